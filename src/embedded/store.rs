//! Keys, their history, and what reads of them give: etcd's storage, in memory.
//!
//! Each write gets the next revision; what was before stays readable until it is compacted. A transaction's writes all
//! have one revision, and an order within it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use etcd_client::proto::{PbEvent, PbKeyValue, PbRangeRequest, PbRangeResponse};

use super::status::Refusal;

/// What etcd calls a put and a delete in an event.
pub(super) const PUT: i32 = 0;
pub(super) const DELETE: i32 = 1;

/// All keys of a server.
#[derive(Debug)]
pub(super) struct Store {
    /// The revision of the last write.
    revision: i64,
    /// Revisions below this are gone.
    compacted: i64,
    keys: BTreeMap<Vec<u8>, Vec<Version>>,
    /// What happened at each revision that is not compacted, in order.
    log: BTreeMap<i64, Vec<Change>>,
    /// The revision of the transaction under way, once it has written.
    writing: Option<i64>,
}

/// One state of a key.
#[derive(Debug, Clone)]
struct Version {
    revision: i64,
    /// `None`: deleted.
    state: Option<Arc<PbKeyValue>>,
}

/// A write, as watchers are told.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub(super) key: Vec<u8>,
    pub(super) revision: i64,
    /// `None`: deleted.
    pub(super) after: Option<Arc<PbKeyValue>>,
    /// As of the revision before.
    before: Option<Arc<PbKeyValue>>,
}

/// A set of keys as requests name it: one key, a range, or everything from a key on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Range {
    pub(super) key: Vec<u8>,
    pub(super) end: Vec<u8>,
}

impl Range {
    pub(super) fn new(key: &[u8], end: &[u8]) -> Self {
        Self { key: key.to_vec(), end: end.to_vec() }
    }

    pub(super) fn contains(&self, key: &[u8]) -> bool {
        match self.end.as_slice() {
            [] => key == self.key,
            [0] => key >= self.key.as_slice(),
            end => key >= self.key.as_slice() && key < end,
        }
    }

    /// Where it ends; `None` if before it begins.
    fn upper(&self) -> Option<Bound<&[u8]>> {
        match self.end.as_slice() {
            [] => Some(Bound::Included(self.key.as_slice())),
            [0] => Some(Bound::Unbounded),
            // The range of a map must not be backwards.
            end if end <= self.key.as_slice() => None,
            end => Some(Bound::Excluded(end)),
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        let (keys, log) = (BTreeMap::new(), BTreeMap::new());
        Self { revision: 1, compacted: -1, keys, log, writing: None }
    }
}

impl Store {
    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn compacted(&self) -> i64 {
        self.compacted
    }

    /// Ends the transaction under way; gives what it wrote.
    pub(super) fn commit(&mut self) -> &[Change] {
        let written = self.writing.take();
        written.and_then(|revision| self.log.get(&revision)).map_or(&[], Vec::as_slice)
    }

    /// The key now; the transaction under way included.
    pub(super) fn get(&self, key: &[u8]) -> Option<&Arc<PbKeyValue>> {
        self.keys.get(key)?.last()?.state.as_ref()
    }

    /// The keys of a range now.
    pub(super) fn now<'a>(&'a self, range: &'a Range) -> impl Iterator<Item = &'a Arc<PbKeyValue>> {
        self.versions(range).filter_map(|versions| versions.last()?.state.as_ref())
    }

    fn versions<'a>(&'a self, range: &'a Range) -> impl Iterator<Item = &'a Vec<Version>> {
        let from = Bound::Included(range.key.as_slice());
        let found = range.upper().map(|upper| self.keys.range::<[u8], _>((from, upper)));
        found.into_iter().flatten().map(|(_, versions)| versions)
    }

    /// Refuses revisions that cannot be read.
    pub(super) fn check_revision(&self, revision: i64) -> Result<(), Refusal> {
        if revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        if revision > 0 && revision < self.compacted {
            return Err(Refusal::Compacted);
        }
        Ok(())
    }

    /// Answers a range; without its header.
    pub(super) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        self.check_revision(request.revision)?;
        let range = Range::new(&request.key, &request.range_end);
        let at = if request.revision > 0 { request.revision } else { i64::MAX };
        let state = |versions: &'_ Vec<Version>| {
            versions.iter().rev().find(|version| version.revision <= at)?.state.clone()
        };
        let mut found: Vec<Arc<PbKeyValue>> = self.versions(&range).filter_map(state).collect();
        let count = i64::try_from(found.len()).unwrap_or(i64::MAX);
        if request.count_only {
            return Ok(PbRangeResponse { count, ..PbRangeResponse::default() });
        }
        let below = |most: i64, revision: i64| most == 0 || revision <= most;
        found.retain(|kv| {
            below(request.max_mod_revision, kv.mod_revision)
                && kv.mod_revision >= request.min_mod_revision
                && below(request.max_create_revision, kv.create_revision)
                && kv.create_revision >= request.min_create_revision
        });
        sort(&mut found, request.sort_target, request.sort_order);
        let limit = usize::try_from(request.limit).unwrap_or(0);
        let more = limit > 0 && found.len() > limit;
        if more {
            found.truncate(limit);
        }
        let kvs = found.into_iter().map(|kv| {
            let value = if request.keys_only { Vec::new() } else { kv.value.clone() };
            PbKeyValue { value, key: kv.key.clone(), ..shallow(&kv) }
        });
        Ok(PbRangeResponse { header: None, kvs: kvs.collect(), more, count })
    }

    /// Writes a key; gives what it was before.
    pub(super) fn put(&mut self, key: &[u8], value: Vec<u8>, lease: i64) -> Option<Arc<PbKeyValue>> {
        let before = self.get(key).cloned();
        let revision = self.write();
        let (create_revision, version) =
            before.as_ref().map_or((revision, 1), |kv| (kv.create_revision, kv.version + 1));
        let key = key.to_vec();
        let kv = PbKeyValue { key, value, create_revision, mod_revision: revision, version, lease };
        self.record(revision, Some(Arc::new(kv)), before.clone());
        before
    }

    /// Deletes the keys of a range; gives what they were.
    pub(super) fn delete(&mut self, range: &Range) -> Vec<Arc<PbKeyValue>> {
        let deleted: Vec<_> = self.now(range).cloned().collect();
        for before in &deleted {
            let revision = self.write();
            self.record(revision, None, Some(before.clone()));
        }
        deleted
    }

    fn write(&mut self) -> i64 {
        *self.writing.get_or_insert_with(|| {
            self.revision += 1;
            self.revision
        })
    }

    fn record(&mut self, revision: i64, after: Option<Arc<PbKeyValue>>, before: Option<Arc<PbKeyValue>>) {
        let Some(key) = after.as_ref().or(before.as_ref()).map(|kv| kv.key.clone()) else { return };
        let versions = self.keys.entry(key.clone()).or_default();
        // Watchers are told what was before the transaction, whatever happened within it.
        let earlier = versions.iter().rev().find(|version| version.revision < revision);
        let before = earlier.and_then(|version| version.state.clone());
        versions.push(Version { revision, state: after.clone() });
        self.log.entry(revision).or_default().push(Change { key, revision, after, before });
    }

    /// Forgets what was before a revision.
    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision <= self.compacted {
            return Err(Refusal::Compacted);
        }
        if revision > self.revision {
            return Err(Refusal::FutureRevision);
        }
        self.compacted = revision;
        self.log = self.log.split_off(&revision);
        self.keys.retain(|_, versions| {
            let readable = versions.iter().rposition(|version| version.revision <= revision).unwrap_or(0);
            versions.drain(..readable);
            versions.iter().any(|version| version.state.is_some())
        });
        Ok(())
    }

    /// What happened from a revision on, in order.
    pub(super) fn since(&self, revision: i64) -> impl Iterator<Item = &Change> {
        self.log.range(revision..).flat_map(|(_, changes)| changes)
    }
}

impl Change {
    /// The event that tells of it, and of what was before if that is not compacted.
    pub(super) fn event(&self, with_before: bool, compacted: i64) -> PbEvent {
        let created = self.after.as_ref().is_some_and(|kv| kv.create_revision == self.revision);
        let told = with_before && !created && self.revision > compacted;
        let before = self.before.as_ref().filter(|_| told).map(|kv| PbKeyValue::clone(kv));
        let (r#type, kv) = match &self.after {
            Some(kv) => (PUT, PbKeyValue::clone(kv)),
            None => {
                let (key, mod_revision) = (self.key.clone(), self.revision);
                (DELETE, PbKeyValue { key, mod_revision, ..PbKeyValue::default() })
            }
        };
        PbEvent { r#type, kv: Some(kv), prev_kv: before }
    }
}

/// Everything of a key but the key and its value.
fn shallow(kv: &PbKeyValue) -> PbKeyValue {
    let PbKeyValue { create_revision, mod_revision, version, lease, .. } = *kv;
    PbKeyValue { key: Vec::new(), value: Vec::new(), create_revision, mod_revision, version, lease }
}

/// Sorts as a request asks: the target's numbers are etcd's.
fn sort(found: &mut [Arc<PbKeyValue>], target: i32, order: i32) {
    const DESCENDING: i32 = 2;
    if !(0..=DESCENDING).contains(&order) {
        return;
    }
    match target {
        1 => found.sort_by_key(|kv| kv.version),
        2 => found.sort_by_key(|kv| kv.create_revision),
        3 => found.sort_by_key(|kv| kv.mod_revision),
        4 => found.sort_by(|a, b| a.value.cmp(&b.value)),
        // They come in the order of their keys.
        _ => {}
    }
    if order == DESCENDING {
        found.reverse();
    }
}
