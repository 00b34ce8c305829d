use serde::{Deserialize, Serialize};

use crate::service::format::{address, below, from_json, segment, to_json};
use crate::service::{Format, FormatError, Instance};

/// `/{service}/{version}/{address}`, or `/{service}/{address}` without a version, and
/// `{"name":"node","addr":"10.0.0.1:8089","version":"1.0.0","weight":1}`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Versioned;

#[derive(Serialize, Deserialize)]
struct Value {
    name: String,
    addr: String,
    #[serde(default)]
    version: String,
    #[serde(default = "one")]
    weight: u32,
}

fn one() -> u32 {
    1
}

impl Format for Versioned {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("/{}/", segment("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        if !instance.version.is_empty() {
            key.extend_from_slice(segment("version", &instance.version)?.as_bytes());
            key.push(b'/');
        }
        key.extend_from_slice(segment("address", &instance.address)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        to_json(&Value {
            name: instance.service.clone(),
            addr: address(&instance.address)?.to_owned(),
            version: instance.version.clone(),
            weight: instance.weight,
        })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if below(&self.prefix(service)?, key)?.is_none() {
            return Ok(None);
        }
        let value: Value = from_json(value)?;
        let instance = Instance::new(service, address(&value.addr)?).version(value.version);
        Ok((value.name == service).then_some(instance.weight(value.weight)))
    }
}
