//! Values as types: decoded once for each version, and the last good one kept when a new one does not decode.

use std::any::{Any, TypeId};
use std::panic::catch_unwind;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::map::Keyed;
use super::state::ConfigEntry;
use crate::error::{Error, Result};
use crate::name;

type Decoded = Arc<dyn Any + Send + Sync>;

/// A key that was read as a type.
#[derive(Clone)]
pub(super) struct Typed {
    kind: TypeId,
    decode: fn(&[u8]) -> Result<Decoded, String>,
    /// Of the last version that decoded.
    good: Option<Decoded>,
    /// The newest version.
    entry: ConfigEntry,
    /// Why that does not decode.
    bad: Option<String>,
}

impl Typed {
    pub(super) fn new<T: DeserializeOwned + Send + Sync + 'static>(entry: &ConfigEntry) -> Self {
        let decode = |value: &[u8]| match serde_json::from_slice::<T>(value) {
            Ok(value) => Ok(Arc::new(value) as Decoded),
            Err(error) => Err(reason(&error)),
        };
        let empty = Self { kind: TypeId::of::<T>(), decode, good: None, entry: entry.clone(), bad: None };
        empty.renewed(entry)
    }

    /// The same key with a new version of its value.
    pub(super) fn renewed(&self, entry: &ConfigEntry) -> Self {
        // The user's own code may take part in it.
        let (decode, value) = (self.decode, entry.value());
        let (good, bad) = match catch_unwind(|| decode(value)) {
            Ok(Ok(value)) => (Some(value), None),
            Ok(Err(reason)) => (self.good.clone(), Some(reason)),
            Err(_) => (self.good.clone(), Some("its decoder panicked".into())),
        };
        Self { good, bad, entry: entry.clone(), ..*self }
    }

    /// The last good value; `None` if it was read as another type.
    pub(super) fn value<T: Send + Sync + 'static>(&self) -> Option<Result<Arc<T>>> {
        if self.kind != TypeId::of::<T>() {
            return None;
        }
        match &self.good {
            Some(value) => value.clone().downcast().ok().map(Ok),
            None => Some(Err(undecodable(self.entry.full_key(), self.bad.clone().unwrap_or_default()))),
        }
    }

    /// What is wrong with the newest version.
    pub(super) fn bad(&self) -> Option<BadValue> {
        let reason = self.bad.clone()?;
        let (key, revision) = (self.entry.key().to_vec(), self.entry.revision());
        Some(BadValue { key, revision, reason, replaced: self.good.is_some() })
    }
}

impl Keyed for Arc<Typed> {
    fn key(&self) -> &[u8] {
        self.entry.key()
    }
}

impl std::fmt::Debug for Typed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Typed").field("entry", &self.entry).field("bad", &self.bad).finish_non_exhaustive()
    }
}

/// A value that does not decode as the type its key is read as.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadValue {
    /// The key, without the prefix of the cache.
    pub key: Vec<u8>,
    /// The revision that wrote the value.
    pub revision: i64,
    /// What is wrong, without anything of the value.
    pub reason: String,
    /// Whether reads get the last good value instead; otherwise they fail.
    pub replaced: bool,
}

pub(super) fn decode<T: DeserializeOwned>(entry: &ConfigEntry) -> Result<T> {
    serde_json::from_slice(entry.value()).map_err(|error| undecodable(entry.full_key(), reason(&error)))
}

fn undecodable(key: &[u8], reason: String) -> Error {
    Error::Undecodable { key: name::display(key), reason }
}

/// What is wrong with a value, without what it says: messages of the decoder quote values, which may be secrets.
fn reason(error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let place = if line == 0 { String::new() } else { format!(" at line {line}, column {column}") };
    if !error.is_data() {
        return format!("it is not JSON{place}");
    }
    let message = error.to_string();
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    match message.rsplit_once(", expected ") {
        Some((_, expected)) => format!("it is not {expected}{place}"),
        None if message.starts_with("missing field ") => format!("it has a {message}"),
        None => format!("it does not fit the type{place}"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reasons_do_not_quote_the_value() {
        #[derive(Debug, serde::Deserialize)]
        #[allow(dead_code)]
        struct Limits {
            most: u32,
        }
        let of = |text: &str| reason(&serde_json::from_str::<Limits>(text).unwrap_err());
        assert_eq!(of(r#"{"most": "hunter2"}"#), "it is not u32 at line 1, column 18");
        assert_eq!(of(r#"{"least": "hunter2"}"#), "it has a missing field `most`");
        assert_eq!(of("hunter2"), "it is not JSON at line 1, column 1");
        assert!(!of("\"hunter2, expected\"").contains("hunter2"));
    }
}
