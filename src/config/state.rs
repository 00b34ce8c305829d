//! What the cache holds at one revision, and its public faces: entry, snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};

use super::changes::ConfigChange;
use super::map::{Keyed, Map};
use super::typed::{self, Typed};
use crate::error::Result;
use crate::name::{self, Hidden};
use crate::session::view::Entry;

/// A key of the cache with its value, as of one revision. Cheap to clone.
#[derive(Clone)]
pub struct ConfigEntry {
    entry: Arc<Entry>,
    /// The length of the cache's prefix.
    skip: usize,
}

impl ConfigEntry {
    pub(super) fn new(entry: Arc<Entry>, skip: usize) -> Self {
        Self { entry, skip }
    }

    /// The key, without the prefix of the cache.
    pub fn key(&self) -> &[u8] {
        &self.entry.key[self.skip..]
    }

    /// The key as etcd has it.
    pub fn full_key(&self) -> &[u8] {
        &self.entry.key
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        &self.entry.value
    }

    /// The revision that wrote this value.
    pub fn revision(&self) -> i64 {
        self.entry.mod_revision
    }

    /// The revision that created the key.
    pub fn create_revision(&self) -> i64 {
        self.entry.create_revision
    }

    /// The value as JSON of a type. Decodes at each call; see [`ConfigCache::get_as`](super::ConfigCache::get_as).
    ///
    /// # Errors
    ///
    /// [`Error::Undecodable`](crate::Error::Undecodable).
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        typed::decode(self)
    }

    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.entry, &other.entry)
    }
}

impl Keyed for ConfigEntry {
    fn key(&self) -> &[u8] {
        self.key()
    }
}

impl PartialEq for ConfigEntry {
    fn eq(&self, other: &Self) -> bool {
        self.entry == other.entry
    }
}

impl Eq for ConfigEntry {}

impl std::fmt::Debug for ConfigEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigEntry")
            .field("key", &name::display(self.key()))
            .field("value", &Hidden(self.value()))
            .field("revision", &self.revision())
            .finish_non_exhaustive()
    }
}

/// Everything the cache holds, as of one revision.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    /// 0 until the first list is complete.
    pub(super) revision: i64,
    pub(super) entries: Map<ConfigEntry>,
    /// What of it was read with a type.
    pub(super) typed: Map<Arc<Typed>>,
}

impl State {
    pub(super) fn apply(&mut self, change: &ConfigChange) {
        let Some(entry) = &change.after else {
            self.entries.remove(change.key());
            return self.typed.remove(change.key());
        };
        self.entries.insert(entry.clone());
        if let Some(typed) = self.typed.get(entry.key()) {
            let typed = Arc::new(typed.renewed(entry));
            self.typed.insert(typed);
        }
    }
}

/// The whole cache as of one revision: several reads of one snapshot fit together. Cheap to take and to clone; it stays
/// as it is.
///
/// Serializes (with serde) for people and programs to look at: an object with `prefix`, `revision` and `entries`, which
/// maps each key to its `value` and `revision`. A value that is not UTF-8 has `value_base64` instead of `value`; keys
/// that are not UTF-8 are in `entries_base64` instead, under their bytes in base64.
#[derive(Clone)]
pub struct ConfigSnapshot {
    pub(super) state: Arc<State>,
    pub(super) prefix: Arc<[u8]>,
}

impl ConfigSnapshot {
    /// The revision it shows. Lower than that of an earlier one only after etcd was restored from a backup.
    pub fn revision(&self) -> i64 {
        self.state.revision
    }

    /// The value of a key, which is given without the prefix.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<&ConfigEntry> {
        self.state.entries.get(key.as_ref())
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.state.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All entries, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigEntry> {
        self.state.entries.iter()
    }
}

impl std::fmt::Debug for ConfigSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigSnapshot")
            .field("revision", &self.revision())
            .field("keys", &self.len())
            .finish_non_exhaustive()
    }
}

#[derive(Serialize)]
struct ShownSnapshot<'a> {
    prefix: std::borrow::Cow<'a, str>,
    revision: i64,
    entries: BTreeMap<&'a str, &'a ConfigEntry>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    entries_base64: BTreeMap<String, &'a ConfigEntry>,
}

impl Serialize for ConfigSnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (mut entries, mut entries_base64) = (BTreeMap::new(), BTreeMap::new());
        for entry in self.iter() {
            match std::str::from_utf8(entry.key()) {
                Ok(key) => entries.insert(key, entry),
                Err(_) => entries_base64.insert(BASE64.encode(entry.key()), entry),
            };
        }
        let prefix = String::from_utf8_lossy(&self.prefix);
        let shown = ShownSnapshot { prefix, revision: self.revision(), entries, entries_base64 };
        shown.serialize(serializer)
    }
}

#[derive(Serialize)]
struct ShownEntry<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    revision: i64,
}

/// `value` (or `value_base64` if it is not UTF-8) and `revision`.
impl Serialize for ConfigEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = std::str::from_utf8(self.value()).ok();
        let value_base64 = value.is_none().then(|| BASE64.encode(self.value()));
        ShownEntry { value, value_base64, revision: self.revision() }.serialize(serializer)
    }
}
