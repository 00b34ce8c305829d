use crate::service::format::{address, below, part, text};
use crate::service::{Format, FormatError, Instance};

/// `{service}{id}`, where the id is a number, and the address as value.
///
/// Programs with this layout take the lease id, in decimal, as id. Nothing stands between name and number, so names
/// must not end in a digit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gateway;

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

impl Format for Gateway {
    fn prefix(&self, service: &str) -> Result<Vec<u8>, FormatError> {
        if service.ends_with(|last: char| last.is_ascii_digit()) {
            return Err(FormatError::new("the service name ends in a digit"));
        }
        Ok(part("service name", service)?.into())
    }

    fn key(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        if !is_number(&instance.id) {
            return Err(FormatError::new("the id is not a number"));
        }
        let mut key = self.prefix(&instance.service)?;
        key.extend_from_slice(instance.id.as_bytes());
        Ok(key)
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(address(&instance.address)?.into())
    }

    fn decode(&self, service: &str, key: &[u8], value: &[u8]) -> Result<Option<Instance>, FormatError> {
        match below(&self.prefix(service)?, key)? {
            Some(id) if is_number(id) => {
                let place = address(text(value, "its value is not UTF-8")?)?;
                Ok(Some(Instance::new(service, place).id(id)))
            }
            // Of a service with a longer name.
            _ => Ok(None),
        }
    }
}
