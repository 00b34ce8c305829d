//! Op slots and key names: what makes a request take effect once at most.
//!
//! # Why no copy of a request can do harm
//!
//! A request without an answer may still be applied, later, even after its key was created, used and deleted by
//! another copy of it. So the transaction that creates a key also takes a step of an *op slot*: it compares the slot's
//! last `mod_revision` and writes the slot. The first copy to be applied moves the slot; every other finds it moved
//! and does nothing, for ever, since revisions never come back. A copy that finds a condition of the operation broken
//! moves the slot as well, or another would be applied when the condition holds. An operation that is given up moves the
//! slot itself, and then deletes the key if an attempt had moved it before. One that etcd refuses does so as soon as etcd
//! accepts that (see [`refused`](super::refused)). Slots are bookkeeping keys on the lease, used again and again; their cost
//! is one more put in a transaction that is sent anyway.
//!
//! A deletion compares the key's create revision, so copies of it are harmless by themselves.
//!
//! # A lease that comes back
//!
//! The request that granted the lease may have late copies, too. One that arrives after the lease was revoked brings its
//! id back, with none of its keys. A step that compares with the revision of a key is refused from then on, but the first
//! step of a slot compares with a key that was never there. So slot 0 is put right after the grant, and the first step of
//! every other slot compares its create revision as well.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};

use super::refused::Refusals;
use super::rpc::KeyFacts;
use crate::name;

/// The op slots of one generation: as many as operations were ever under way at once.
#[derive(Debug)]
pub(crate) struct Slots {
    free: Mutex<Vec<Slot>>,
    made: AtomicU32,
    /// The create revision of slot 0.
    first: i64,
    /// Those of operations that were refused.
    pub(super) refused: Refusals,
}

/// One op slot: the right to do one operation that must not be done twice.
#[derive(Debug)]
pub(crate) struct Slot {
    index: u32,
    /// The slot's `mod_revision`, 0 while its key does not exist.
    pub(crate) revision: i64,
    first: i64,
}

impl Slots {
    /// Slot 0 was put at the revision `first`; 0 if it was not, because the session may not write.
    pub(crate) fn new(first: i64) -> Self {
        let free = if first == 0 { Vec::new() } else { vec![Slot { index: 0, revision: first, first }] };
        Self { free: Mutex::new(free), made: AtomicU32::new(1), first, refused: Refusals::default() }
    }

    /// A transaction that puts slot 0, or tells its create revision.
    pub(crate) fn begin(namespace: &str, lease: i64) -> Txn {
        let step = Slot { index: 0, revision: 0, first: 0 }.step(namespace, lease);
        Txn::new().when(step.compares()).and_then([step.put("")]).or_else([step.get()])
    }

    pub(crate) fn take(&self) -> Slot {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let made = || self.made.fetch_add(1, Ordering::Relaxed);
        free.unwrap_or_else(|| Slot { index: made(), revision: 0, first: self.first })
    }

    pub(crate) fn give_back(&self, slot: Slot) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
    }
}

impl Slot {
    /// The parts of a transaction that takes the next step of this slot.
    pub(crate) fn step(&self, namespace: &str, lease: i64) -> Step {
        let first = (self.revision == 0).then(|| (name::slot(namespace, lease, 0), self.first));
        let first = first.filter(|(_, created)| *created != 0);
        let created = (self.index == 0 && self.first != 0).then_some(self.first);
        Step { key: name::slot(namespace, lease, self.index), lease, seen: self.revision, first, created }
    }
}

/// Numbers for key names, each used by one key at a time.
///
/// Names are used again, because etcd keeps an index entry of every name it ever saw until it is compacted, and a range
/// walks over all of them: a lock with a new name for each hold would become slower with each. One pool serves all
/// names of a generation, so a number whose key may still exist is out of use everywhere.
#[derive(Debug, Default)]
pub(crate) struct Nonces {
    free: Mutex<BTreeSet<u32>>,
    made: AtomicU32,
}

/// A number on loan. If it is not given back it is never used again, which is right when it is unknown whether its key
/// is gone.
#[derive(Debug)]
pub(crate) struct Nonce {
    pool: Arc<Nonces>,
    pub(crate) number: u32,
}

impl Nonces {
    /// Lends `wanted` if it is free, so that who asks for the number it had last has one name all the time; otherwise
    /// the lowest.
    pub(crate) fn take(self: &Arc<Self>, wanted: u32) -> Nonce {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let number = if free.remove(&wanted) { Some(wanted) } else { free.pop_first() };
        drop(free);
        let number = number.unwrap_or_else(|| self.made.fetch_add(1, Ordering::Relaxed));
        Nonce { pool: self.clone(), number }
    }
}

impl Nonce {
    /// The key is gone.
    pub(crate) fn give_back(self) {
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).insert(self.number);
    }
}

/// A step of a slot, as parts of a transaction.
pub(crate) struct Step {
    key: Vec<u8>,
    lease: i64,
    seen: i64,
    /// Of a slot's first step: slot 0 and its create revision.
    first: Option<(Vec<u8>, i64)>,
    /// Of slot 0: its create revision.
    created: Option<i64>,
}

impl Step {
    /// If they do not hold and the slot does not exist, the lease has ended, whether or not it came back.
    pub(crate) fn compares(&self) -> Vec<Compare> {
        let slot = Compare::mod_revision(self.key.clone(), CompareOp::Equal, self.seen);
        let first = self.first.iter();
        let first =
            first.map(|(key, created)| Compare::create_revision(key.clone(), CompareOp::Equal, *created));
        std::iter::once(slot).chain(first).collect()
    }

    /// Moves the slot; `record` is for whoever finds it moved.
    pub(crate) fn put(&self, record: impl Into<Vec<u8>>) -> TxnOp {
        TxnOp::put(self.key.clone(), record, Some(PutOptions::new().with_lease(self.lease)))
    }

    /// A put beside the slot, for the branch of a transaction that is hardly ever taken. By the puts it sees, etcd decides
    /// whether a transaction needs space, and it does not look into nested ones.
    pub(crate) fn put_aside(&self) -> TxnOp {
        let key = [self.key.as_slice(), b"/late"].concat();
        TxnOp::put(key, "", Some(PutOptions::new().with_lease(self.lease)))
    }

    pub(crate) fn get(&self) -> TxnOp {
        TxnOp::get(self.key.clone(), None)
    }

    /// That of the slot.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// The revision of the slot that an answer shows; 0 if it is gone. A slot 0 of another create revision was put by a
    /// late copy of the lease's first write, and is none of ours.
    pub(crate) fn moved_to(&self, slot: Option<&KeyFacts>) -> i64 {
        let ours = |slot: &&KeyFacts| self.created.is_none_or(|created| slot.create_revision == created);
        slot.filter(ours).map_or(0, |slot| slot.mod_revision)
    }

    /// Reads slot 0, where [`compares`](Self::compares) looks at it.
    pub(crate) fn get_first(&self) -> Option<TxnOp> {
        self.first.as_ref().map(|(key, _)| TxnOp::get(key.clone(), None))
    }

    /// Whether the lease has ended, by the slot's revision now and the answer to [`get_first`](Self::get_first).
    pub(crate) fn shows_end(&self, now: i64, first: Option<&KeyFacts>) -> bool {
        let created = first.map_or(0, |first| first.create_revision);
        match &self.first {
            Some((_, known)) => created != *known,
            None => now == 0 && self.seen != 0,
        }
    }

    pub(crate) fn lease(&self) -> i64 {
        self.lease
    }
}
