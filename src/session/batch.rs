//! Many small writes in one transaction: etcd commits a hundred puts at once many times faster than one by one.
//!
//! Only writes of different keys share a batch: the conditions within a transaction all see the state before it, and all
//! of it gets one revision. A batch with puts takes a step of one op slot, so no copy of it that arrives late is
//! applied; a batch of deletions has conditions only and no put, so that it also works when etcd is out of space.

use std::sync::Arc;

use etcd_client::proto::{PbResponseOp, PbTxnOpResponse};
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};

use super::Core;
use super::generation::Generation;
use super::once::{Done, Fenced, Record, Write};
use super::rpc::{Failure, KeyFacts, RangeAnswer, revision};
use super::runtime::Backoff;
use crate::error::{Error, Result};
use crate::name;

/// The most writes in a batch. etcd's limit is 128 operations, some of which go around them.
pub(crate) const MOST: usize = 120;
/// Bytes of keys and values from which on a batch is full.
pub(crate) const FULL: usize = 1024 * 1024;

/// One write of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Op {
    pub(crate) key: Arc<[u8]>,
    pub(crate) what: What,
}

#[derive(Debug, Clone)]
pub(crate) enum What {
    /// Puts, whatever is there.
    Take(Arc<[u8]>),
    /// Puts if our own put of this revision is still the last, or if there is nothing and `absent` allows it.
    Put { value: Arc<[u8]>, last: i64, absent: bool },
    /// Deletes if our own put of this revision is still the last.
    Delete { last: i64 },
}

/// What came of one write.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Done, at this revision.
    Done(i64),
    /// Its condition did not hold: this is there, or nothing. `maybe`: an earlier attempt of it may have been applied.
    Not { found: Option<KeyFacts>, maybe: bool },
    /// etcd refused it; it is not applied.
    Refused(Error),
    /// The generation has ended, and with it the lease: if it was applied, its key is gone or goes.
    Ended,
}

impl Op {
    pub(crate) fn size(&self) -> usize {
        let value = match &self.what {
            What::Take(value) | What::Put { value, .. } => value.len(),
            What::Delete { .. } => 0,
        };
        self.key.len() + value
    }

    fn facts(&self) -> TxnOp {
        TxnOp::get(self.key.to_vec(), Some(GetOptions::new().with_keys_only()))
    }

    fn is_last(&self, last: i64) -> Compare {
        Compare::mod_revision(self.key.to_vec(), CompareOp::Equal, last)
    }

    fn to_txn_op(&self, options: &PutOptions) -> TxnOp {
        let put = |value: &Arc<[u8]>| TxnOp::put(self.key.to_vec(), value.to_vec(), Some(options.clone()));
        match &self.what {
            What::Take(value) => put(value),
            What::Put { value, last, absent } => {
                let over =
                    Txn::new().when([self.is_last(*last)]).and_then([put(value)]).or_else([self.facts()]);
                if !absent {
                    return TxnOp::txn(over);
                }
                let free = Compare::create_revision(self.key.to_vec(), CompareOp::Equal, 0);
                TxnOp::txn(Txn::new().when([free]).and_then([put(value)]).or_else([TxnOp::txn(over)]))
            }
            What::Delete { last } => {
                let delete = TxnOp::delete(self.key.to_vec(), None);
                TxnOp::txn(Txn::new().when([self.is_last(*last)]).and_then([delete]).or_else([self.facts()]))
            }
        }
    }
}

/// Writes a batch: either deletions only, or none. Follows it to its end, and tells what came of each.
pub(crate) async fn write(core: &Arc<Core>, generation: &Arc<Generation>, ops: Arc<[Op]>) -> Vec<Outcome> {
    let deletes = matches!(ops.first(), Some(Op { what: What::Delete { .. }, .. }));
    let refused = match send(core, generation, &ops, deletes).await {
        Ok(outcomes) => return outcomes,
        Err(error) => error,
    };
    if ops.len() == 1 {
        return vec![Outcome::Refused(refused)];
    }
    // Out of space is out of space for all of them.
    if matches!(refused, Error::NoSpace { .. }) {
        let no_space = |op: &Op| Outcome::Refused(Error::NoSpace { key: name::display(&op.key) });
        return ops.iter().map(no_space).collect();
    }
    // Which of them it was is found out one by one.
    let mut outcomes = Vec::with_capacity(ops.len());
    for op in ops.iter() {
        let one = Arc::from([op.clone()]);
        outcomes.extend(match send(core, generation, &one, deletes).await {
            Ok(outcomes) => outcomes,
            Err(error) => vec![Outcome::Refused(error)],
        });
    }
    outcomes
}

fn all(ops: &[Op], outcome: impl Fn() -> Outcome) -> Vec<Outcome> {
    ops.iter().map(|_| outcome()).collect()
}

async fn send(
    core: &Arc<Core>,
    generation: &Arc<Generation>,
    ops: &Arc<[Op]>,
    deletes: bool,
) -> Result<Vec<Outcome>> {
    if deletes { delete(core, generation, ops).await } else { put(core, generation, ops).await }
}

/// One batch with puts.
async fn put(core: &Arc<Core>, generation: &Arc<Generation>, ops: &Arc<[Op]>) -> Result<Vec<Outcome>> {
    let body = {
        let ops = ops.clone();
        move |record: &Record<'_>| {
            let options = record.on_lease();
            let writes = ops.iter().map(|op| op.to_txn_op(&options));
            Txn::new().and_then(std::iter::once(record.put("")).chain(writes).collect::<Vec<_>>())
        }
    };
    let key = ops.first().map_or(Vec::new(), |op| op.key.to_vec());
    let bytes = ops.iter().map(Op::size).sum();
    let write = Write { core: core.clone(), generation: generation.clone(), key, body, bytes };
    let mut slot = generation.slots.take();
    let mut unanswered = false;
    let (mut backoff, mut refusals) = (Backoff::of_requests(), Backoff::of_refusals());
    let done = loop {
        if !generation.is_alive() {
            return Ok(all(ops, || Outcome::Ended));
        }
        let attempt = tokio::select! {
            biased;
            attempt = write.attempt(&mut slot, unanswered) => attempt,
            () = generation.ended() => return Ok(all(ops, || Outcome::Ended)),
        };
        match attempt {
            Ok(Some(done)) => break done,
            Ok(None) => {}
            Err(Failure::LeaseGone(_)) => {
                generation.end();
                return Ok(all(ops, || Outcome::Ended));
            }
            Err(Failure::Refused(error)) if !unanswered => {
                if error.may_pass() {
                    write.keep_in_mind(slot, drop);
                } else {
                    generation.slots.give_back(slot);
                }
                return Err(error);
            }
            // An earlier attempt may have been applied, or may be yet.
            Err(Failure::Refused(error)) => match write.fence(&mut slot).await {
                Some(Fenced::Applied(done)) => break done,
                Some(Fenced::Never) => {
                    generation.slots.give_back(slot);
                    return Err(error);
                }
                Some(Fenced::Ended) => return Ok(all(ops, || Outcome::Ended)),
                None => refusals.wait(&core.runtime).await,
            },
            Err(failure) => {
                unanswered |= failure.is_unanswered();
                backoff.wait(&core.runtime).await;
            }
        }
    };
    generation.slots.give_back(slot);
    match &done.answer {
        Some(answer) => {
            let answers = answer.responses.iter().skip(1);
            Ok(ops.iter().zip(answers).map(|(_, answer)| outcome(answer, done.revision)).collect())
        }
        None => Ok(look(core, generation, ops, &done).await),
    }
}

/// What an answered write says.
fn outcome(answer: &PbResponseOp, revision: i64) -> Outcome {
    match &answer.response {
        Some(PbTxnOpResponse::ResponseTxn(txn)) => match txn.responses.first() {
            Some(inner) => outcome(inner, revision),
            None => Outcome::Not { found: None, maybe: true },
        },
        Some(PbTxnOpResponse::ResponseRange(_)) => {
            let found =
                RangeAnswer::of(std::slice::from_ref(answer), 0).and_then(|found| found.keys().next());
            Outcome::Not { found, maybe: false }
        }
        _ => Outcome::Done(revision),
    }
}

/// The batch was applied and its answer lost. No other write has its revision, so the keys tell which parts took effect.
async fn look(core: &Core, generation: &Generation, ops: &[Op], done: &Done) -> Vec<Outcome> {
    let certain = |op: &Op| matches!(op.what, What::Take(_));
    let mut backoff = Backoff::of_requests();
    while !ops.iter().all(certain) {
        let key = ops.first().map_or(&[][..], |op| &op.key);
        let reads = Txn::new().and_then(ops.iter().map(Op::facts).collect::<Vec<_>>());
        let read = tokio::select! {
            biased;
            () = generation.ended() => return all(ops, || Outcome::Ended),
            read = core.rpc.txn(key, reads) => read,
        };
        if let Ok(read) = read {
            let outcome = |(op, answer): (&Op, &PbResponseOp)| {
                let found =
                    RangeAnswer::of(std::slice::from_ref(answer), 0).and_then(|found| found.keys().next());
                let ours = found.as_ref().is_some_and(|found| found.mod_revision == done.revision);
                if ours || certain(op) {
                    Outcome::Done(done.revision)
                } else {
                    Outcome::Not { found, maybe: true }
                }
            };
            return ops.iter().zip(&read.0.responses).map(outcome).collect();
        }
        backoff.wait(&core.runtime).await;
    }
    all(ops, || Outcome::Done(done.revision))
}

/// One batch of deletions.
async fn delete(core: &Arc<Core>, generation: &Arc<Generation>, ops: &Arc<[Op]>) -> Result<Vec<Outcome>> {
    let key = ops.first().map_or(&[][..], |op| &op.key);
    let mut unanswered = false;
    let mut backoff = Backoff::of_requests();
    loop {
        let options = PutOptions::new();
        let txn = Txn::new().and_then(ops.iter().map(|op| op.to_txn_op(&options)).collect::<Vec<_>>());
        let attempt = tokio::select! {
            biased;
            attempt = core.rpc.txn(key, txn) => attempt,
            () = generation.ended() => return Ok(all(ops, || Outcome::Ended)),
        };
        match attempt {
            Ok(response) => {
                let at = revision(response.header());
                let outcomes = response.0.responses.iter().map(|answer| match outcome(answer, at) {
                    Outcome::Not { found, .. } => Outcome::Not { found, maybe: unanswered },
                    other => other,
                });
                return Ok(outcomes.collect());
            }
            Err(Failure::Refused(error)) => return Err(error),
            Err(failure) => {
                unanswered |= failure.is_unanswered();
                backoff.wait(&core.runtime).await;
            }
        }
    }
}
