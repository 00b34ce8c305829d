//! Leases that nobody renews: for records that go by themselves.
//!
//! Records of one period share a lease, and the next period has another, so each lives for at least the time asked for
//! and at most half as long again.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{Client, LeaseGrantOptions};
use tokio::sync::Mutex;

use super::Core;
use super::rpc::Failure;
use super::runtime::{Backoff, Time};
use crate::error::{Error, Result};

/// The lease for records of now.
#[derive(Debug)]
pub(crate) struct Expiring {
    least: Duration,
    /// With the end of its period.
    current: Mutex<Option<(i64, Time)>>,
    /// The last one that was gone before its time.
    gone: AtomicI64,
}

impl Expiring {
    /// For records that live for at least this long.
    pub(crate) fn new(least: Duration) -> Self {
        Self { least, current: Mutex::default(), gone: AtomicI64::new(0) }
    }

    /// The lease for a record that is put now. Grants one if the period is over.
    ///
    /// # Cancel safety
    ///
    /// When dropped, a lease without keys may be left, which expires.
    pub(crate) async fn lease(self: &Arc<Self>, core: &Arc<Core>) -> Result<i64> {
        // In a task: a caller that is not polled any more is not to keep the others waiting.
        let (leases, core) = (self.clone(), core.clone());
        core.clone().to_the_end(async move { leases.lease_now(&core).await }).await
    }

    async fn lease_now(&self, core: &Core) -> Result<i64> {
        let mut current = self.current.lock().await;
        let mut backoff = Backoff::of_requests();
        loop {
            let sent = core.runtime.now();
            if let Some((lease, until)) = *current
                && sent < until
                && lease != self.gone.load(Ordering::Relaxed)
            {
                return Ok(lease);
            }
            let lease = i64::try_from(core.runtime.random() >> 1).unwrap_or(1).max(1);
            let period = (self.least / 2).max(Duration::from_secs(1));
            // Rounded up: etcd counts in whole seconds.
            let ttl = i64::try_from((self.least + period).as_secs() + 1).unwrap_or(i64::MAX);
            let grant = |client: &Client| {
                let (mut client, options) = (client.lease_client(), LeaseGrantOptions::new().with_id(lease));
                async move { client.grant(ttl, Some(options)).await }
            };
            let attempt = tokio::select! {
                biased;
                () = core.closing.cancelled() => return Err(Error::Closed),
                attempt = core.rpc.attempt(b"a lease for records", grant) => attempt,
            };
            match attempt {
                Ok(_) => *current = Some((lease, sent.after(period))),
                Err(Failure::Refused(error)) => return Err(error),
                // Another id: one that was granted without an answer has no keys, and expires.
                Err(_) => backoff.wait(&core.runtime).await,
            }
        }
    }

    /// The lease is gone before its time.
    pub(crate) fn forget(&self, lease: i64) {
        self.gone.store(lease, Ordering::Relaxed);
    }
}
