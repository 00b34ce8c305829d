//! One request that takes, or claims, the first of several items that is still to be had.
//!
//! Many consumers see the same first item, and what a consumer sees is always a little old. So a request names several
//! candidates, in order: a transaction for the first, whose other branch is a transaction for the second, and so on.

use std::sync::Arc;

use etcd_client::proto::{PbResponseOp, PbTxnOpResponse, PbTxnResponse};
use etcd_client::{Compare, CompareOp, Txn, TxnOp};

use super::keys::{self, Attempts, Keys};
use crate::session::once::Record;
use crate::session::view::Entry;

/// The most candidates of one request: of deeper transactions clients cannot decode the answer, which they find out
/// after the commit.
pub(crate) const MOST: usize = 24;

/// What the request puts on record; which item it took is seen at etcd.
const TRIED: &[u8] = b"tried";

/// An item that seems to be there and free.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) entry: Arc<Entry>,
    /// How often it was claimed, and the `mod_revision` of the key that says so.
    pub(crate) attempts: Option<(Attempts, i64)>,
    pub(crate) delayed: bool,
}

impl Candidate {
    /// How often it was claimed.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts.map_or(0, |(attempts, _)| attempts.attempts)
    }

    /// The `mod_revision` of the count of attempts, 0 if there is none.
    pub(crate) fn attempts_revision(&self) -> i64 {
        self.attempts.map_or(0, |(_, revision)| revision)
    }

    /// True only as long as nobody changed, took or claimed the item: each claim counts itself.
    pub(crate) fn untouched(&self, keys: &Keys) -> [Compare; 2] {
        let id = keys.id(&self.entry.key);
        [
            Compare::mod_revision(self.entry.key.clone(), CompareOp::Equal, self.entry.mod_revision),
            Compare::mod_revision(keys.attempts(id), CompareOp::Equal, self.attempts_revision()),
        ]
    }

    /// Deletes the item, and what is known of it.
    pub(crate) fn delete(&self, keys: &Keys) -> Vec<TxnOp> {
        let id = keys.id(&self.entry.key);
        let mut deletes = vec![TxnOp::delete(self.entry.key.clone(), None)];
        if self.attempts.is_some() {
            deletes.push(TxnOp::delete(keys.attempts(id), None));
        }
        if self.delayed {
            deletes.push(TxnOp::delete(keys.delay(id), None));
        }
        deletes
    }

    fn take(&self, keys: &Keys) -> Txn {
        let mut then = vec![TxnOp::get(self.entry.key.clone(), None)];
        then.extend(self.delete(keys));
        Txn::new().when(self.untouched(keys)).and_then(then)
    }

    fn claim(&self, keys: &Keys, who: &[u8], record: &Record<'_>) -> Txn {
        let id = keys.id(&self.entry.key);
        let attempts =
            Attempts { attempts: self.attempts().saturating_add(1), item: self.entry.create_revision };
        let mut then = vec![
            TxnOp::get(self.entry.key.clone(), None),
            TxnOp::put(keys.claim(id), who, Some(record.on_lease())),
            TxnOp::put(keys.attempts(id), keys::write(&attempts), None),
        ];
        if self.delayed {
            then.push(TxnOp::delete(keys.delay(id), None));
        }
        let mut when = self.untouched(keys).to_vec();
        when.push(Compare::create_revision(keys.claim(id), CompareOp::Equal, 0));
        Txn::new().when(when).and_then(then)
    }
}

/// Takes the first of the candidates that is still there.
pub(crate) fn take(keys: &Keys, candidates: &[Candidate], record: &Record<'_>) -> Txn {
    first_of(candidates.iter().map(|candidate| candidate.take(keys)), record)
}

/// Takes the first without a record: works when etcd is out of space, but is not to be sent twice.
pub(crate) fn take_unrecorded(keys: &Keys, candidates: &[Candidate]) -> Option<Txn> {
    nested(candidates.iter().map(|candidate| candidate.take(keys)))
}

/// Claims the first of the candidates that is still there and free. `who` is for people to look at.
pub(crate) fn claim(keys: &Keys, candidates: &[Candidate], who: &[u8], record: &Record<'_>) -> Txn {
    first_of(candidates.iter().map(|candidate| candidate.claim(keys, who, record)), record)
}

fn first_of(txns: impl DoubleEndedIterator<Item = Txn>, record: &Record<'_>) -> Txn {
    let mut then = vec![record.put(TRIED)];
    then.extend(nested(txns).map(TxnOp::txn));
    Txn::new().and_then(then)
}

fn nested(txns: impl DoubleEndedIterator<Item = Txn>) -> Option<Txn> {
    txns.rev().reduce(|rest, txn| txn.or_else([TxnOp::txn(rest)]))
}

/// Which of the candidates it was, with its value; `None` if none of them was to be had.
pub(crate) fn taken(answer: PbTxnResponse) -> Option<(usize, Vec<u8>)> {
    let Some(PbTxnOpResponse::ResponseTxn(chain)) = answer.responses.into_iter().nth(1)?.response else {
        return None;
    };
    taken_unrecorded(chain)
}

/// The same for [`take_unrecorded`].
pub(crate) fn taken_unrecorded(mut link: PbTxnResponse) -> Option<(usize, Vec<u8>)> {
    for index in 0.. {
        let first = link.responses.into_iter().next();
        if link.succeeded {
            return Some((index, value(first?)?));
        }
        let Some(PbTxnOpResponse::ResponseTxn(next)) = first?.response else { return None };
        link = next;
    }
    None
}

fn value(op: PbResponseOp) -> Option<Vec<u8>> {
    match op.response? {
        PbTxnOpResponse::ResponseRange(range) => Some(range.kvs.into_iter().next()?.value),
        _ => None,
    }
}
