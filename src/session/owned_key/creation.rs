//! The creation of an owned key: once, or never.

use std::sync::{Arc, Mutex};

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnResponse};
use tokio_util::sync::CancellationToken;

use super::{Owned, OwnedKey};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Core;
use crate::session::generation::Generation;
use crate::session::rpc::{Failure, RangeAnswer, revision};
use crate::session::runtime::Backoff;
use crate::session::slots::{Nonce, Slot, Step};

/// A key just created.
pub(crate) struct Created {
    pub(crate) key: OwnedKey,
    /// The answers to the reads in the creating transaction and its revision; none if that answer was lost and the
    /// key was found by a resend.
    pub(crate) reads: Option<(Vec<PbResponseOp>, i64)>,
}

/// A key to create.
pub(crate) struct Creation {
    pub(crate) key: Vec<u8>,
    /// What makes the key's name unlike all others that exist.
    pub(crate) nonce: Nonce,
    pub(crate) value: Vec<u8>,
    /// Create only if this holds as well.
    pub(crate) only_if: Option<Compare>,
    /// Read in the same transaction, after the creation.
    pub(crate) reads: Vec<TxnOp>,
}

impl Creation {
    /// Creates the key in the given generation. `None` if `only_if` did not hold.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the key will not exist: it is not created, or deleted again, by the session.
    pub(crate) async fn run(self, core: &Arc<Core>, generation: &Arc<Generation>) -> Result<Option<Created>> {
        let Self { key, nonce, value, only_if, reads } = self;
        let (core, generation) = (core.clone(), generation.clone());
        let (slot, nonce) = (generation.slots.take(), Some(nonce));
        Pending(Some(Task { core, generation, slot, key, nonce, value, only_if, reads })).run().await
    }
}

/// A creation of which it is open whether some attempt leaves a key. Given up in the background when dropped.
struct Pending(Option<Task>);

/// A creation under way.
struct Task {
    core: Arc<Core>,
    generation: Arc<Generation>,
    slot: Slot,
    key: Vec<u8>,
    /// Goes to the created key.
    nonce: Option<Nonce>,
    value: Vec<u8>,
    only_if: Option<Compare>,
    reads: Vec<TxnOp>,
}

/// What one answered attempt says.
enum Outcome {
    Created(Created),
    /// `only_if` did not hold, and no copy of any attempt will be applied when it does.
    Not,
    /// The slot had moved, so nothing was done: try again.
    Stale,
    /// The lease has ended, whether or not it came back.
    Ended,
}

impl Pending {
    async fn run(mut self) -> Result<Option<Created>> {
        let mut unanswered = false;
        let mut again = false;
        let mut backoff = Backoff::of_requests();
        while let Some(task) = &mut self.0 {
            let generation = task.generation.clone();
            let attempt = tokio::select! {
                biased;
                () = generation.ended() => return Err(self.end()),
                attempt = task.attempt(again) => attempt,
            };
            again = true;
            match attempt {
                Ok(Outcome::Created(created)) => {
                    self.settle();
                    return Ok(Some(created));
                }
                Ok(Outcome::Not) => {
                    task.nonce.take().into_iter().for_each(Nonce::give_back);
                    self.settle();
                    return Ok(None);
                }
                Ok(Outcome::Stale) => {}
                Ok(Outcome::Ended) | Err(Failure::LeaseGone(_)) => {
                    generation.end();
                    return Err(self.end());
                }
                Err(Failure::Refused(error)) => {
                    if !unanswered {
                        self.settle();
                    }
                    return Err(error);
                }
                Err(failure) => {
                    unanswered |= failure.is_unanswered();
                    backoff.wait(&task.core.runtime).await;
                }
            }
        }
        Err(Error::Closed)
    }

    /// No attempt will leave a key, or the one there is has its owner.
    fn settle(&mut self) {
        if let Some(task) = self.0.take() {
            task.generation.slots.give_back(task.slot);
        }
    }

    /// The lease has ended, and takes along whatever an attempt leaves.
    fn end(&mut self) -> Error {
        self.0.take().map_or(Error::Closed, |task| Error::Lost { key: name::display(&task.key) })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.core.runtime.clone().spawn(task.give_up());
        }
    }
}

impl Task {
    /// One attempt.
    async fn attempt(&mut self, again: bool) -> Result<Outcome, Failure> {
        let Self { key, value, only_if, reads, .. } = &*self;
        let step = self.step();
        let options = PutOptions::new().with_lease(self.generation.lease.get());
        let put = TxnOp::put(key.clone(), value.clone(), Some(options));
        let mut compares = step.compares();
        compares.extend(only_if.clone());
        let then = [put, step.put("")].into_iter().chain(reads.iter().cloned()).collect::<Vec<_>>();
        // A first attempt that nothing else speaks against fails only when the lease has ended, or when something on the
        // way sent it twice: not worth a question with each, the next attempt asks.
        let asks = again || only_if.is_some();
        let find = || [TxnOp::get(key.clone(), Some(GetOptions::new().with_keys_only())), step.get()];
        let mut find = if asks { find().into_iter().chain(step.get_first()).collect() } else { Vec::new() };
        if only_if.is_some() {
            // Or a copy that comes late would be applied when nothing speaks against it any more.
            find.push(TxnOp::txn(Txn::new().when(step.compares()).and_then([step.put("")])));
        }
        let response =
            self.core.rpc.txn(key, Txn::new().when(compares).and_then(then).or_else(find)).await?.0;
        let revision = revision(response.header.as_ref().map(Into::into));
        if response.succeeded {
            self.slot.revision = revision;
            let reads = response.responses.into_iter().skip(2).collect();
            return Ok(Outcome::Created(self.created(revision, Some((reads, revision)))));
        }
        if !asks {
            return Ok(Outcome::Stale);
        }
        let answer = |op| RangeAnswer::of(&response.responses, op).and_then(|keys| keys.keys().next());
        let (found, moved, first) = (answer(0), answer(1), answer(2));
        let now = step.moved_to(moved.as_ref());
        let seen = std::mem::replace(&mut self.slot.revision, now);
        Ok(match found {
            _ if step.shows_end(now, first.as_ref()) => Outcome::Ended,
            Some(found) => Outcome::Created(self.created(found.create_revision, None)),
            // Then the slot was moved after it was read.
            None if seen == now => {
                self.slot.revision = revision;
                Outcome::Not
            }
            None => Outcome::Stale,
        })
    }

    fn created(&mut self, create_revision: i64, reads: Option<(Vec<PbResponseOp>, i64)>) -> Created {
        let facts = Owned {
            core: self.core.clone(),
            generation: self.generation.clone(),
            key: self.key.clone(),
            create_revision,
            gone: CancellationToken::new(),
            detached: CancellationToken::new(),
            nonce: Mutex::new(self.nonce.take()),
        };
        Created { key: OwnedKey { facts: Arc::new(facts), released: false }, reads }
    }

    /// Sees to it that no attempt made so far leaves a key.
    ///
    /// Copies of these transactions may be late too, when slot and key name serve another operation. So they compare
    /// what they change.
    async fn give_up(mut self) {
        let mut backoff = Backoff::of_requests();
        loop {
            let (step, key) = (self.step(), self.key.clone());
            let delete = TxnOp::delete(key.clone(), None);
            let give_up = Txn::new()
                .when(step.compares())
                .and_then([step.put(""), delete.clone()])
                .or_else([step.get()]);
            let attempt = tokio::select! {
                biased;
                // The lease goes, and the key and every late copy with it.
                () = self.generation.ended() => return,
                attempt = self.core.rpc.txn(&key, give_up) => attempt,
            };
            match attempt {
                Ok(response) if response.succeeded() => {
                    self.slot.revision = revision(response.header());
                    self.generation.slots.give_back(self.slot);
                    return self.nonce.into_iter().for_each(Nonce::give_back);
                }
                // Moved by an attempt, or by an earlier copy of this.
                Ok(response) => match moved_to(&step, &response) {
                    // Only its lease takes a slot away.
                    0 => return self.generation.end(),
                    now => self.slot.revision = now,
                },
                Err(Failure::LeaseGone(_)) => return self.generation.end(),
                // Without space the slot cannot move, but the key can go; late copies are refused as long.
                Err(Failure::Refused(_)) => {
                    let made = Compare::create_revision(key.clone(), CompareOp::Equal, self.slot.revision);
                    let delete = Txn::new().when([made]).and_then([delete]).or_else([step.get()]);
                    match self.core.rpc.txn(&key, delete).await {
                        Ok(response) if !response.succeeded() => {
                            self.slot.revision = moved_to(&step, &response)
                        }
                        _ => {}
                    }
                    backoff.wait(&self.core.runtime).await;
                }
                Err(_) => backoff.wait(&self.core.runtime).await,
            }
        }
    }

    fn step(&self) -> Step {
        self.slot.step(&self.core.namespace, self.generation.lease.get())
    }
}

/// The slot's revision, when the answer's first operation reads it.
fn moved_to(step: &Step, response: &TxnResponse) -> i64 {
    let slot = RangeAnswer::of(&response.0.responses, 0).and_then(|keys| keys.keys().next());
    step.moved_to(slot.as_ref())
}
