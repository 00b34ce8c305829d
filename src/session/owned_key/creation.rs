//! The creation of an owned key: once, or never.

use std::sync::Arc;

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};

use super::{Owned, OwnedKey};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Core;
use crate::session::generation::Generation;
use crate::session::once::{Done, Fenced, fence};
use crate::session::refused::Refused;
use crate::session::rpc::{Failure, KeyFacts, RangeAnswer, revision};
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
    /// There is a key of this name that none of the attempts created.
    Taken,
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
                Ok(Outcome::Taken) => {
                    // Nobody knows when the name will be free again.
                    task.nonce = None;
                    return Err(task.lost());
                }
                Ok(Outcome::Ended) | Err(Failure::LeaseGone(_)) => {
                    generation.end();
                    return Err(self.end());
                }
                Err(Failure::Refused(error)) => {
                    if !unanswered {
                        self.refused(&error);
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

    /// No attempt was applied. A copy might be, when the reason is gone.
    fn refused(&mut self, error: &Error) {
        match self.0.take() {
            Some(task) if error.may_pass() => task.core.clone().refused(&task.generation.clone(), task),
            Some(task) => task.give_back(),
            None => {}
        }
    }

    /// The lease has ended, and takes along whatever an attempt leaves.
    fn end(&mut self) -> Error {
        self.0.take().map_or(Error::Closed, |task| task.lost())
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
        let absent = Compare::create_revision(key.clone(), CompareOp::Equal, 0);
        let compares: Vec<_> = step.compares().into_iter().chain([absent]).chain(only_if.clone()).collect();
        let then = [put, step.put("")].into_iter().chain(reads.iter().cloned()).collect::<Vec<_>>();
        // A first attempt that nothing else speaks against fails only when the lease has ended, when something on the way
        // sent it twice, or when somebody else put the key: not worth a question with each, the next attempt asks.
        let conditional = only_if.is_some();
        let asks = again || conditional;
        let find = || [TxnOp::get(key.clone(), Some(GetOptions::new().with_keys_only())), step.get()];
        let mut find = if asks { find().into_iter().chain(step.get_first()).collect() } else { Vec::new() };
        if conditional {
            // Or a copy that comes late would be applied when nothing speaks against it any more.
            find.push(TxnOp::txn(Txn::new().when(step.compares()).and_then([step.put("")])));
        }
        let txn = Txn::new().when(compares).and_then(then).or_else(find);
        let response = self.core.rpc.txn_of(value.len(), key, txn).await?.0;
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
        // Slot and key were written at one revision.
        let ours = |found: &KeyFacts| found.create_revision == now;
        Ok(match found {
            _ if step.shows_end(now, first.as_ref()) => Outcome::Ended,
            Some(found) if ours(&found) => Outcome::Created(self.created(found.create_revision, None)),
            Some(_) if !conditional => Outcome::Taken,
            // Then the slot was moved after it was read.
            _ if seen == now => {
                self.slot.revision = revision;
                Outcome::Not
            }
            _ => Outcome::Stale,
        })
    }

    fn created(&mut self, create_revision: i64, reads: Option<(Vec<PbResponseOp>, i64)>) -> Created {
        let (core, generation, nonce) = (self.core.clone(), self.generation.clone(), self.nonce.take());
        let facts = Owned::new(core, generation, self.key.clone(), create_revision, nonce);
        Created { key: OwnedKey { facts: Arc::new(facts), released: false }, reads }
    }

    /// Sees to it that no attempt made so far leaves a key.
    async fn give_up(mut self) {
        let (mut backoff, mut refusals) = (Backoff::of_requests(), Backoff::of_refusals());
        let made = loop {
            let pause = match fence(&self.core, &self.generation, &self.key, &mut self.slot).await {
                Ok(Fenced::Never) => break None,
                Ok(Fenced::Applied(done)) => break Some(done),
                // The lease goes, and the key and every late copy with it.
                Ok(Fenced::Ended) => return,
                // Without space the slot cannot move, but a key can go; late copies are refused as long.
                Err(Failure::Refused(_)) => match self.look().await {
                    Some(done) => break Some(done),
                    None => &mut refusals,
                },
                Err(_) => &mut backoff,
            };
            tokio::select! {
                biased;
                () = self.generation.ended() => return,
                () = pause.wait(&self.core.runtime) => {}
            }
        };
        self.given_up(made);
    }

    /// Finds out whether the slot was moved by an attempt.
    async fn look(&self) -> Option<Done> {
        let step = self.step();
        let read =
            self.core.rpc.get(step.key(), GetOptions::new(), Some(self.core.rpc.timeout)).await.ok()?;
        let slot = read.kvs().first().map(KeyFacts::from);
        let revision = step.moved_to(slot.as_ref());
        let record = Vec::new();
        (revision != 0 && revision != self.slot.revision).then_some(Done { revision, record, answer: None })
    }

    /// No attempt will be applied. One was, perhaps, and moved the slot with the key: then that is deleted.
    fn given_up(mut self, made: Option<Done>) {
        match made {
            None => self.give_back(),
            Some(Done { revision, .. }) => {
                self.slot.revision = revision;
                drop(self.created(revision, None));
                self.generation.slots.give_back(self.slot);
            }
        }
    }

    /// No attempt made so far leaves a key.
    fn give_back(self) {
        self.generation.slots.give_back(self.slot);
        self.nonce.into_iter().for_each(Nonce::give_back);
    }

    fn lost(&self) -> Error {
        Error::Lost { key: name::display(&self.key) }
    }

    fn step(&self) -> Step {
        self.slot.step(&self.core.namespace, self.generation.lease.get())
    }
}

impl Refused for Task {
    fn slot(&mut self) -> &mut Slot {
        &mut self.slot
    }

    fn fenced(self: Box<Self>, done: Option<Done>) {
        self.given_up(done);
    }
}
