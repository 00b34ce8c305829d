use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::service::format::{address, below, from_json, part, segment, to_json};
use crate::service::{Format, FormatError, Instance};

/// The format of this crate: `services/{service}/{id}`, and a JSON object with all the rest.
///
/// `{"address":"10.0.0.7:8400","version":"1.2.0","weight":3,"metadata":{"zone":"a"},"tags":["blue"]}`; only the address
/// is required, fields that are not known are ignored. An id has no `/`.
#[derive(Debug, Clone)]
pub struct Json {
    root: String,
}

#[derive(Serialize, Deserialize)]
struct Value<'a> {
    address: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    version: String,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: std::borrow::Cow<'a, BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tags: Vec<String>,
}

fn one() -> u32 {
    1
}

impl Json {
    /// Under another root than `services/`. It is used as it is: end it with `/`.
    pub fn under(root: impl Into<String>) -> Self {
        Self { root: root.into() }
    }
}

impl Default for Json {
    fn default() -> Self {
        Self::under("services/")
    }
}

impl Format for Json {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{}{}/", self.root, part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(segment("id", &instance.id)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        to_json(&Value {
            address: address(&instance.address)?.to_owned(),
            version: instance.version.clone(),
            weight: instance.weight,
            metadata: std::borrow::Cow::Borrowed(&instance.metadata),
            tags: instance.tags.clone(),
        })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let Some(id) = below(&self.prefix(service)?, key)? else { return Ok(None) };
        if id.contains('/') {
            // Of a service with a longer name.
            return Ok(None);
        }
        let value: Value<'_> = from_json(value)?;
        address(&value.address)?;
        Ok(Some(Instance {
            service: service.to_owned(),
            id: id.to_owned(),
            address: value.address,
            version: value.version,
            weight: value.weight,
            metadata: value.metadata.into_owned(),
            tags: value.tags,
        }))
    }
}
