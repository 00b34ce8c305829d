//! Writing to the prefix of a config cache.

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use serde::Serialize;

use super::ConfigCache;
use crate::error::{Error, Result};
use crate::name;
use crate::session::once::Record;

/// The record of a write whose condition held.
const WRITTEN: &str = "written";

impl ConfigCache {
    /// Writes a key, and tells the revision at which it did. Takes effect once, whatever becomes of its answer.
    ///
    /// The cache shows the value when etcd has told it: [`wait_for`](ConfigCache::wait_for) the revision.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`] for an empty key; [`Error::TooLarge`]; [`Error::OutcomeUnknown`] when the session's lease
    /// ended before etcd answered; [`Error::NoSpace`], [`Error::PermissionDenied`] and [`Error::Etcd`] as etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the value may be written or not, but not later than the session ends.
    pub async fn publish(&self, key: impl AsRef<[u8]>, value: impl Into<Vec<u8>>) -> Result<i64> {
        let written = self.write(key.as_ref(), None, Some(value.into())).await?;
        // Without a condition it is always written.
        written.ok_or(Error::Closed)
    }

    /// Writes a key as JSON; see [`publish`](ConfigCache::publish).
    ///
    /// # Errors
    ///
    /// As [`publish`](ConfigCache::publish), and [`Error::Malformed`] for a value that cannot be JSON.
    ///
    /// # Cancel safety
    ///
    /// As [`publish`](ConfigCache::publish).
    pub async fn publish_as(&self, key: impl AsRef<[u8]>, value: &(impl Serialize + ?Sized)) -> Result<i64> {
        let key = key.as_ref();
        let value = serde_json::to_vec(value)
            .map_err(|source| Error::Malformed { key: name::display(&self.full_key(key)), source })?;
        self.publish(key, value).await
    }

    /// Writes a key only if its [`revision`](super::ConfigEntry::revision) is still `expected` (0: if it does not exist).
    /// `None` if it is not.
    ///
    /// # Errors
    ///
    /// As [`publish`](ConfigCache::publish).
    ///
    /// # Cancel safety
    ///
    /// As [`publish`](ConfigCache::publish).
    pub async fn publish_if(
        &self,
        key: impl AsRef<[u8]>,
        expected: i64,
        value: impl Into<Vec<u8>>,
    ) -> Result<Option<i64>> {
        self.write(key.as_ref(), Some((CompareOp::Equal, expected)), Some(value.into())).await
    }

    /// Deletes a key, and tells the revision at which it did; `None` if there was no such key.
    ///
    /// # Errors
    ///
    /// As [`publish`](ConfigCache::publish).
    ///
    /// # Cancel safety
    ///
    /// As [`publish`](ConfigCache::publish).
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<Option<i64>> {
        self.write(key.as_ref(), Some((CompareOp::NotEqual, 0)), None).await
    }

    /// Deletes a key only if its [`revision`](super::ConfigEntry::revision) is still `expected`. `None` if it is not, and
    /// always for 0: what does not exist is not deleted.
    ///
    /// # Errors
    ///
    /// As [`publish`](ConfigCache::publish).
    ///
    /// # Cancel safety
    ///
    /// As [`publish`](ConfigCache::publish).
    pub async fn delete_if(&self, key: impl AsRef<[u8]>, expected: i64) -> Result<Option<i64>> {
        if expected == 0 {
            return Ok(None);
        }
        self.write(key.as_ref(), Some((CompareOp::Equal, expected)), None).await
    }

    async fn write(
        &self,
        key: &[u8],
        condition: Option<(CompareOp, i64)>,
        value: Option<Vec<u8>>,
    ) -> Result<Option<i64>> {
        if key.is_empty() {
            return Err(Error::InvalidName { name: String::new(), reason: "the key is empty" });
        }
        name::check_value(value.as_deref().unwrap_or_default())?;
        let key = self.full_key(key);
        let body = {
            let key = key.clone();
            move |record: &Record<'_>| {
                let write = match &value {
                    Some(value) => TxnOp::put(key.clone(), value.clone(), None),
                    None => TxnOp::delete(key.clone(), None),
                };
                let txn = match condition {
                    None => Txn::new(),
                    Some((how, revision)) => {
                        Txn::new().when([Compare::mod_revision(key.clone(), how, revision)])
                    }
                };
                // Without a condition this is always what happens.
                txn.and_then([write, record.put(WRITTEN)]).or_else([record.put("")])
            }
        };
        self.session
            .once(&key, body, |done| (done.record == WRITTEN.as_bytes()).then_some(done.revision))
            .await
    }

    fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [self.cache.prefix.as_bytes(), key].concat()
    }
}
