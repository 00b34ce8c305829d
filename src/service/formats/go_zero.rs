use crate::service::format::{address, below, part, text};
use crate::service::{Format, FormatError, Instance};

/// go-zero's: `{service}/{id}`, and the address as value.
///
/// go-zero itself takes the lease id, in decimal, as id, or a number from its configuration; readers do not look at it.
/// For them the address is what tells instances apart, so it is the id of what is discovered.
#[derive(Debug, Clone, Copy, Default)]
pub struct GoZero;

impl Format for GoZero {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{}/", part("service name", service)?).into_bytes())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(part("id", &instance.id)?.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(address(&instance.address)?.into())
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        if below(&self.prefix(service)?, key)?.is_none() {
            return Ok(None);
        }
        Ok(Some(Instance::new(service, address(text(value, "its value is not UTF-8")?)?)))
    }
}
