use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Any};

use crate::service::format::{address, below, from_json, not_taken, part, to_json};
use crate::service::{Format, FormatError, Instance};

/// Go's `client/v3/naming/endpoints`, which gRPC programs in Go resolve as `etcd:///{service}`.
///
/// The key is `{service}/{id}`, where the id is the address as a rule, and the value
/// `{"Op":0,"Addr":"10.0.0.7:8400","Metadata":null}`. In `Metadata` there may be anything. This crate writes an object
/// of strings into it, with `weight`, `version` and `tags` for those fields, or `null` if there is nothing to say; it
/// reads the same, and keeps whatever else is there as JSON text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Endpoints;

#[derive(Serialize, Deserialize)]
struct Value {
    #[serde(rename = "Op", default)]
    op: i64,
    #[serde(rename = "Addr")]
    addr: String,
    #[serde(rename = "Metadata", default)]
    metadata: Any,
}

const WEIGHT: &str = "weight";
const VERSION: &str = "version";
const TAGS: &str = "tags";

impl Format for Endpoints {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{}/", part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(part("id", &instance.id)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        for name in [WEIGHT, VERSION, TAGS] {
            not_taken(instance, name)?;
        }
        let text = |(name, value): (&String, &String)| (name.clone(), Any::String(value.clone()));
        let mut metadata: Map<String, Any> = instance.metadata.iter().map(text).collect();
        if instance.weight != 1 {
            metadata.insert(WEIGHT.into(), instance.weight.to_string().into());
        }
        if !instance.version.is_empty() {
            metadata.insert(VERSION.into(), instance.version.clone().into());
        }
        if !instance.tags.is_empty() {
            metadata.insert(TAGS.into(), instance.tags.clone().into());
        }
        let metadata = if metadata.is_empty() { Any::Null } else { Any::Object(metadata) };
        to_json(&Value { op: 0, addr: address(&instance.address)?.to_owned(), metadata })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let Some(id) = below(&self.prefix(service)?, key)? else { return Ok(None) };
        let value: Value = from_json(value)?;
        let mut instance = Instance::new(service, address(&value.addr)?).id(id);
        match value.metadata {
            Any::Null => {}
            Any::Object(entries) => {
                for (name, value) in entries {
                    take(&mut instance, name, value)?;
                }
            }
            other => instance = instance.metadata("Metadata", plain(other)),
        }
        Ok(Some(instance))
    }
}

fn take(instance: &mut Instance, name: String, value: Any) -> Result<(), FormatError> {
    match (name.as_str(), value) {
        (WEIGHT, value) => {
            let weight = plain(value).parse();
            instance.weight = weight.map_err(|_| FormatError::new("its weight is not a number"))?;
        }
        (VERSION, Any::String(version)) => instance.version = version,
        (TAGS, Any::Array(tags)) => instance.tags = tags.into_iter().map(plain).collect(),
        (_, value) => {
            instance.metadata.insert(name, plain(value));
        }
    }
    Ok(())
}

fn plain(value: Any) -> String {
    match value {
        Any::String(text) => text,
        other => other.to_string(),
    }
}
