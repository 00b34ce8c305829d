use serde::{Deserialize, Serialize};

use crate::service::format::{address, below, from_json, part, to_json};
use crate::service::{Format, FormatError, Instance};

/// `{service}/{address}`, and `{"Name":"rpc.courseware","Ip":"127.0.0.1:8400"}`.
///
/// Entries whose name is another are left out: programs with this layout read the prefix without the `/`.
#[derive(Debug, Clone, Copy, Default)]
pub struct NameIp;

#[derive(Serialize, Deserialize)]
struct Value {
    #[serde(rename = "Name")]
    name: String,
    #[serde(rename = "Ip")]
    ip: String,
}

impl Format for NameIp {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{}/", part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(part("address", &instance.address)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        to_json(&Value { name: instance.service.clone(), ip: address(&instance.address)?.to_owned() })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if below(&self.prefix(service)?, key)?.is_none() {
            return Ok(None);
        }
        let value: Value = from_json(value)?;
        let instance = Instance::new(service, address(&value.ip)?);
        Ok((value.name == service).then_some(instance))
    }
}
