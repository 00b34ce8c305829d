//! Leases: what they hold on to and when they end, by tokio's clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::status::Refusal;

/// etcd's maximum, in seconds.
const MAX_TTL: i64 = 9_000_000_000;
/// What etcd gives at least, in seconds, when its members elect a leader quickly.
const MIN_TTL: i64 = 1;

/// The leases of a server.
#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: BTreeMap<i64, Lease>,
    /// Nothing expires meanwhile.
    pub(super) held: bool,
}

#[derive(Debug)]
struct Lease {
    ttl: i64,
    /// The end, unless it is renewed. `None`: too far away to say.
    end: Option<Instant>,
    keys: BTreeSet<Vec<u8>>,
}

impl Lease {
    fn renew(&mut self) {
        let ttl = Duration::from_secs(u64::try_from(self.ttl).unwrap_or(0));
        self.end = Instant::now().checked_add(ttl);
    }
}

impl Leases {
    pub(super) fn has(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// Grants a lease; gives its TTL.
    pub(super) fn grant(&mut self, id: i64, ttl: i64) -> Result<i64, Refusal> {
        if ttl > MAX_TTL {
            return Err(Refusal::TtlTooLarge);
        }
        if self.has(id) {
            return Err(Refusal::LeaseExists);
        }
        let ttl = ttl.max(MIN_TTL);
        let mut lease = Lease { ttl, end: None, keys: BTreeSet::new() };
        lease.renew();
        self.leases.insert(id, lease);
        Ok(ttl)
    }

    /// Starts the TTL anew; gives it, or `None` if there is no such lease.
    pub(super) fn renew(&mut self, id: i64) -> Option<i64> {
        let lease = self.leases.get_mut(&id)?;
        lease.renew();
        Some(lease.ttl)
    }

    pub(super) fn attach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.insert(key.to_vec());
        }
    }

    pub(super) fn detach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.remove(key);
        }
    }

    /// Ends a lease; gives its keys, which are to be deleted.
    pub(super) fn remove(&mut self, id: i64) -> Result<BTreeSet<Vec<u8>>, Refusal> {
        self.leases.remove(&id).map(|lease| lease.keys).ok_or(Refusal::LeaseNotFound)
    }

    /// The TTL left, the TTL granted, both in seconds, and the keys.
    pub(super) fn facts(&self, id: i64) -> Option<(i64, i64, &BTreeSet<Vec<u8>>)> {
        let lease = self.leases.get(&id)?;
        let left = lease.end.map_or(lease.ttl, |end| {
            i64::try_from(end.saturating_duration_since(Instant::now()).as_secs()).unwrap_or(i64::MAX)
        });
        Some((left, lease.ttl, &lease.keys))
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = i64> {
        self.leases.keys().copied()
    }

    /// When the next lease ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        if self.held { None } else { self.leases.values().filter_map(|lease| lease.end).min() }
    }

    /// The leases whose end has come.
    pub(super) fn ended(&self) -> Vec<i64> {
        let now = Instant::now();
        let ended = |lease: &Lease| !self.held && lease.end.is_some_and(|end| end <= now);
        self.leases.iter().filter(|(_, lease)| ended(lease)).map(|(id, _)| *id).collect()
    }
}
