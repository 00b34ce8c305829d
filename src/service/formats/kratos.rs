use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::service::format::{address, below, from_json, not_taken, part, segment, to_json};
use crate::service::{Format, FormatError, Instance};

/// go-kratos': `/microservices/{service}/{id}`, and a JSON object with endpoints as URLs.
///
/// The weight is an entry of the metadata. Of several endpoints the one with this format's scheme is taken, else the
/// first.
#[derive(Debug, Clone)]
pub struct Kratos {
    namespace: String,
    scheme: String,
}

#[derive(Serialize, Deserialize)]
struct Value {
    id: String,
    name: String,
    #[serde(default)]
    version: String,
    #[serde(default, deserialize_with = "or_default")]
    metadata: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    endpoints: Vec<String>,
}

/// Go writes `null` for what is empty.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

const WEIGHT: &str = "weight";

impl Kratos {
    /// In another namespace than `/microservices`.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// With endpoints of another scheme than `grpc`.
    #[must_use]
    pub fn scheme(mut self, scheme: impl Into<String>) -> Self {
        self.scheme = scheme.into();
        self
    }
}

impl Default for Kratos {
    fn default() -> Self {
        Self { namespace: "/microservices".into(), scheme: "grpc".into() }
    }
}

impl Format for Kratos {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{}/{}/", self.namespace, part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(segment("id", &instance.id)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        not_taken(instance, WEIGHT)?;
        let mut metadata = instance.metadata.clone();
        if instance.weight != 1 {
            metadata.insert(WEIGHT.into(), instance.weight.to_string());
        }
        to_json(&Value {
            id: instance.id.clone(),
            name: instance.service.clone(),
            version: instance.version.clone(),
            metadata,
            endpoints: vec![format!("{}://{}?isSecure=false", self.scheme, address(&instance.address)?)],
        })
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if below(&self.prefix(service)?, key)?.is_none() {
            return Ok(None);
        }
        let mut value: Value = from_json(value)?;
        if value.name != service {
            return Ok(None);
        }
        let scheme = format!("{}://", self.scheme);
        let endpoint = value.endpoints.iter().find(|url| url.starts_with(&scheme));
        let endpoint = endpoint.or(value.endpoints.first()).map_or("", String::as_str);
        let place = endpoint.split_once("://").map_or("", |(_, rest)| rest);
        let place = place.split(['?', '/']).next().unwrap_or_default();
        let mut instance = Instance::new(service, address(place)?).id(value.id).version(value.version);
        if let Some(weight) = value.metadata.remove(WEIGHT) {
            instance.weight = weight.parse().map_err(|_| FormatError::new("its weight is not a number"))?;
        }
        instance.metadata = value.metadata;
        Ok(Some(instance))
    }
}
