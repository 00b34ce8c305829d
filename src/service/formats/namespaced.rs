use crate::service::format::{address, below, part, text};
use crate::service::{Format, FormatError, Instance};

/// `/ns/{service}/{address}`, and the address as value.
#[derive(Debug, Clone, Copy, Default)]
pub struct Namespaced;

impl Format for Namespaced {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("/ns/{}/", part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(part("address", &instance.address)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(address(&instance.address)?.into())
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        match below(&self.prefix(service)?, key)? {
            // Of a service with a longer name.
            Some(rest) if rest.contains('/') => Ok(None),
            Some(_) => Ok(Some(Instance::new(service, address(text(value, "its value is not UTF-8")?)?))),
            None => Ok(None),
        }
    }
}
