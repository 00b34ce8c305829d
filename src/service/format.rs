//! How an instance is written to etcd.

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Instance;

/// A layout of keys and values for the instances of services.
///
/// Implement it to stand beside programs that use another layout than those in [`formats`](super::formats). The
/// methods must be pure: they are called often and on tasks of the session, so they must not block.
///
/// # Examples
///
/// ```
/// use etcd_recipes::service::{Format, FormatError, Instance};
///
/// /// `members/{service}/{id}`, and the address as value.
/// struct Members;
///
/// impl Format for Members {
///     fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
///         Ok(format!("members/{service}/").into_bytes())
///     }
///
///     fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
///         Ok(format!("members/{}/{}", instance.service, instance.id).into_bytes())
///     }
///
///     fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
///         Ok(instance.address.clone().into_bytes())
///     }
///
///     fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
///         let text = |bytes| std::str::from_utf8(bytes).map_err(|_| FormatError::new("it is not UTF-8"));
///         let id = text(&key[self.prefix(service)?.len()..])?;
///         Ok(Some(Instance::new(service, text(value)?).id(id)))
///     }
/// }
///
/// let instance = Instance::new("courseware", "10.0.0.7:8400").id("a");
/// let (key, value) = (Members.key(&instance).unwrap(), Members.encode(&instance).unwrap());
/// assert_eq!(Members.decode("courseware", &key, &value).unwrap(), Some(instance));
/// ```
pub trait Format: Send + Sync + 'static {
    /// What the keys of all instances of a service start with; what discovery watches. Not empty.
    ///
    /// # Errors
    ///
    /// When the layout has no place for this name.
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError>;

    /// The key of an instance. It starts with the [`prefix`](Format::prefix) of its service, and does not change when
    /// the weight, the metadata or the tags do.
    ///
    /// # Errors
    ///
    /// When the layout has no place for this instance.
    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError>;

    /// The value of an instance.
    ///
    /// # Errors
    ///
    /// When the layout has no place for this instance.
    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError>;

    /// Reads an entry whose key starts with the prefix of `service`. `None` if it is not about this service.
    ///
    /// # Errors
    ///
    /// When it is malformed. That concerns this entry alone: the instance keeps its last good state, or is left out if
    /// it has none, and the error is reported.
    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError>;
}

/// Why an instance cannot be written, or an entry cannot be read.
///
/// Its text goes to logs: it must not contain parts of the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct FormatError {
    reason: Cow<'static, str>,
}

impl FormatError {
    /// Says what is wrong, as the end of a sentence.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self { reason: reason.into() }
    }
}

/// What follows the prefix of a service in one of its keys. `None` if the key does not start with it.
pub(super) fn below<'a>(prefix: &[u8], key: &'a [u8]) -> Result<Option<&'a str>, FormatError> {
    let Some(rest) = key.strip_prefix(prefix) else { return Ok(None) };
    text(rest, "its key is not UTF-8").map(Some)
}

pub(super) fn text<'a>(bytes: &'a [u8], error: &'static str) -> Result<&'a str, FormatError> {
    std::str::from_utf8(bytes).map_err(|_| FormatError::new(error))
}

/// Refuses what cannot be a part of a key.
pub(super) fn part<'a>(what: &str, text: &'a str) -> Result<&'a str, FormatError> {
    if text.is_empty() {
        return Err(FormatError::new(format!("the {what} is empty")));
    }
    if text.contains('\0') {
        return Err(FormatError::new(format!("the {what} contains a NUL")));
    }
    Ok(text)
}

/// Refuses what cannot be a part of a key between two slashes.
pub(super) fn segment<'a>(what: &str, text: &'a str) -> Result<&'a str, FormatError> {
    if text.contains('/') {
        return Err(FormatError::new(format!("the {what} contains a \"/\"")));
    }
    part(what, text)
}

/// Refuses metadata under a name that the format needs for itself.
pub(super) fn not_taken(instance: &Instance, name: &str) -> Result<(), FormatError> {
    if instance.metadata.contains_key(name) {
        return Err(FormatError::new(format!(
            "the metadata has an entry called \"{name}\", which this format uses"
        )));
    }
    Ok(())
}

pub(super) fn to_json(value: &impl Serialize) -> Result<Vec<u8>, FormatError> {
    serde_json::to_vec(value).map_err(|_| FormatError::new("it cannot be written as JSON"))
}

pub(super) fn from_json<T: DeserializeOwned>(value: &[u8]) -> Result<T, FormatError> {
    // The parser's own message may quote the value.
    serde_json::from_slice(value).map_err(|error| {
        let kind = if error.is_data() { "not the JSON of this format" } else { "not JSON" };
        FormatError::new(format!("its value is {kind} (line {}, column {})", error.line(), error.column()))
    })
}

/// An address out of an entry.
pub(super) fn address(text: &str) -> Result<&str, FormatError> {
    if text.is_empty() { Err(FormatError::new("it has no address")) } else { Ok(text) }
}
