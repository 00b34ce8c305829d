use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::service::format::{address, below, from_json, part, segment, to_json};
use crate::service::{Format, FormatError, Instance};

/// Kitex' `registry-etcd`: `kitex/registry-etcd/{service}/{address}`, and a JSON object.
///
/// What Kitex calls tags are names with values: the metadata. A service name has no `/`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kitex;

#[derive(Serialize, Deserialize)]
struct Value {
    #[serde(default)]
    network: String,
    address: String,
    /// 0, or none, stands for Kitex' own default.
    #[serde(default)]
    weight: u32,
    #[serde(default)]
    tags: Option<BTreeMap<String, String>>,
}

/// What Kitex gives an instance that does not say.
const DEFAULT_WEIGHT: u32 = 10;

impl Format for Kitex {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("kitex/registry-etcd/{}/", segment("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(part("address", &instance.address)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let tags = (!instance.metadata.is_empty()).then(|| instance.metadata.clone());
        let (network, address) = ("tcp".to_owned(), address(&instance.address)?.to_owned());
        to_json(&Value { network, address, weight: instance.weight, tags })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if below(&self.prefix(service)?, key)?.is_none() {
            return Ok(None);
        }
        let value: Value = from_json(value)?;
        let weight = if value.weight == 0 { DEFAULT_WEIGHT } else { value.weight };
        let mut instance = Instance::new(service, address(&value.address)?).weight(weight);
        instance.metadata = value.tags.unwrap_or_default();
        Ok(Some(instance))
    }
}
