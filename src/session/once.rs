//! A write that takes effect once at most, however often it is sent, and that can tell what it did when its answer is
//! lost.
//!
//! The transaction takes a step of an op slot (see [`slots`](super::slots)), and each path through it writes into the
//! slot which path that was. Whoever sends it again finds the slot moved, and the record there.

use std::sync::Arc;

use etcd_client::proto::{PbTxnOpResponse, PbTxnRequest, PbTxnResponse};
use etcd_client::{PutOptions, Txn, TxnOp};
use tokio::sync::oneshot;

use super::generation::Generation;
use super::refused::Refused;
use super::rpc::{Failure, RangeAnswer, revision};
use super::runtime::Backoff;
use super::slots::{Slot, Step};
use super::{Core, Session};
use crate::error::{Error, Result};
use crate::name;

/// What etcd counts of the transaction around the body.
const OUTER_OPS: usize = 2;

/// Where the body of a write says what it did.
pub(crate) struct Record<'a>(&'a Step);

impl Record<'_> {
    /// Says that this path was taken. Each path through the body has exactly one.
    pub(crate) fn put(&self, what: impl Into<Vec<u8>>) -> TxnOp {
        self.0.put(what)
    }

    /// Options of a put whose key is to live on the session's lease.
    pub(crate) fn on_lease(&self) -> PutOptions {
        PutOptions::new().with_lease(self.0.lease())
    }
}

/// A write that took effect.
#[derive(Debug)]
pub(crate) struct Done {
    /// The revision at which it did.
    pub(crate) revision: i64,
    /// What its path put on record.
    pub(crate) record: Vec<u8>,
    /// The answer to the body; `None` if it was lost, and a resend found the record.
    pub(crate) answer: Option<PbTxnResponse>,
}

impl Session {
    /// Writes as [`Core::once`], in this generation or the next. Waits for a generation if there is none.
    pub(crate) async fn once<T, B, S>(&self, key: &[u8], body: B, settle: S) -> Result<T>
    where
        T: Send + 'static,
        B: Fn(&Record<'_>) -> Txn + Clone + Send + Sync + 'static,
        S: FnOnce(Done) -> T + Clone + Send + 'static,
    {
        loop {
            let generation = self.generation().await?;
            match self.core().once(&generation, key, body.clone(), settle.clone()).await {
                // With its generation ended an attempt that was not applied never will be.
                Err(Error::Lost { .. }) => {}
                result => return result,
            }
        }
    }
}

impl Core {
    /// Writes what `body` says, once at most; `key` is what an error speaks of.
    ///
    /// `settle` makes the result of what was done. It runs in the session: if the caller is gone, the result is dropped
    /// there, and cleans up after itself if it must.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] if the generation ended before the write was applied, [`Error::OutcomeUnknown`] if it ended while
    /// an attempt was without an answer, and what etcd refuses.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the write is not sent again, and settled in the background: done, or never to be done.
    pub(crate) async fn once<T, B, S>(
        self: &Arc<Self>,
        generation: &Arc<Generation>,
        key: &[u8],
        body: B,
        settle: S,
    ) -> Result<T>
    where
        T: Send + 'static,
        B: Fn(&Record<'_>) -> Txn + Send + Sync + 'static,
        S: FnOnce(Done) -> T + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let slot = generation.slots.take();
        let mut write =
            Write { core: self.clone(), generation: generation.clone(), key: key.to_vec(), body, bytes: 0 };
        match write.check(&slot) {
            Ok(bytes) => write.bytes = bytes,
            Err(error) => {
                generation.slots.give_back(slot);
                return Err(error);
            }
        }
        self.runtime.spawn(write.run(slot, settle, answer));
        // The task ends without an answer only when its runtime does.
        answered.await.unwrap_or(Err(Error::Closed))
    }
}

/// A write under way.
pub(super) struct Write<B> {
    pub(super) core: Arc<Core>,
    pub(super) generation: Arc<Generation>,
    pub(super) key: Vec<u8>,
    pub(super) body: B,
    /// Of the body.
    pub(super) bytes: usize,
}

/// What is known of a write that no attempt can apply any more.
pub(super) enum Fenced {
    /// An earlier attempt was applied.
    Applied(Done),
    /// None was.
    Never,
    /// The generation has ended, and it is not known.
    Ended,
}

impl<B> Write<B>
where
    B: Fn(&Record<'_>) -> Txn + Send + Sync + 'static,
{
    fn check(&self, slot: &Slot) -> Result<usize> {
        name::check_txn(&PbTxnRequest::from((self.body)(&Record(&self.step(slot)))), OUTER_OPS)
    }

    async fn run<T, S>(self, mut slot: Slot, settle: S, mut answer: oneshot::Sender<Result<T>>)
    where
        S: FnOnce(Done) -> T + Send + 'static,
    {
        if answer.is_closed() {
            return self.generation.slots.give_back(slot);
        }
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        let result = loop {
            if !self.generation.is_alive() {
                break Err(self.ended(unanswered));
            }
            let attempt = tokio::select! {
                biased;
                () = answer.closed() => return self.give_up(slot, settle).await,
                attempt = self.attempt(&mut slot, unanswered) => attempt,
                // The slot is on the lease, so no attempt can be applied any more; but the one under way may have been.
                () = self.generation.over() => break Err(self.ended(true)),
            };
            match attempt {
                Ok(Some(done)) => break Ok(done),
                Ok(None) => {}
                // Some lease in the transaction does not exist. It is ours if the slot cannot be moved either.
                Err(Failure::LeaseGone(source)) => match self.fence(&mut slot).await {
                    Some(Fenced::Applied(done)) => break Ok(done),
                    Some(Fenced::Never) => break Err(Error::Etcd { key: name::display(&self.key), source }),
                    Some(Fenced::Ended) => break Err(self.ended(unanswered)),
                    None => {
                        let _ = answer.send(Err(self.ended(true)));
                        return self.keep_in_mind(slot, settle);
                    }
                },
                Err(Failure::Refused(error)) if !unanswered && error.may_pass() => {
                    let _ = answer.send(Err(error));
                    return self.keep_in_mind(slot, settle);
                }
                Err(Failure::Refused(error)) if !unanswered => break Err(error),
                // An earlier attempt may have been applied, or may be yet.
                Err(Failure::Refused(error)) => match self.fence(&mut slot).await {
                    Some(Fenced::Applied(done)) => break Ok(done),
                    Some(Fenced::Never) => break Err(error),
                    Some(Fenced::Ended) => break Err(self.ended(true)),
                    // Nobody knows as long as the slot cannot be moved either.
                    None => {
                        let _ = answer.send(Err(self.ended(true)));
                        return self.keep_in_mind(slot, settle);
                    }
                },
                Err(failure) => {
                    unanswered |= failure.is_unanswered();
                    tokio::select! {
                        biased;
                        () = answer.closed() => {}
                        () = backoff.wait(&self.core.runtime) => {}
                    }
                }
            }
        };
        self.generation.slots.give_back(slot);
        // If the caller is gone, the result comes back and is dropped here.
        let _ = answer.send(result.map(settle));
    }

    /// One attempt. `None` if the slot had moved without it, and nothing was done.
    pub(super) async fn attempt(&self, slot: &mut Slot, unanswered: bool) -> Result<Option<Done>, Failure> {
        let step = self.step(slot);
        let txn = Txn::new()
            .when(step.compares())
            .and_then([TxnOp::txn((self.body)(&Record(&step))), step.get()])
            .or_else([step.get(), step.put_aside()]);
        let response = self.core.rpc.txn_of(self.bytes, &self.key, txn).await?.0;
        let (now, record) = moved_to(&step, &response, usize::from(response.succeeded));
        let moved = std::mem::replace(&mut slot.revision, now) != now;
        if response.succeeded {
            let revision = revision(response.header.as_ref().map(Into::into));
            let header = response.header;
            let answer = response.responses.into_iter().next().and_then(|op| match op.response {
                Some(PbTxnOpResponse::ResponseTxn(answer)) => Some(PbTxnResponse { header, ..answer }),
                _ => None,
            });
            return Ok(Some(Done { revision, record, answer }));
        }
        // Only its lease takes a slot away.
        if now == 0 {
            self.generation.end();
        }
        Ok((moved && unanswered && now != 0).then_some(Done { revision: now, record, answer: None }))
    }

    /// Sees to it that no attempt made so far is applied from now on; what was applied before is settled and dropped.
    async fn give_up<T>(self, mut slot: Slot, settle: impl FnOnce(Done) -> T + Send + 'static) {
        match self.fence(&mut slot).await {
            Some(Fenced::Ended) => return,
            Some(Fenced::Applied(done)) => drop(settle(done)),
            Some(Fenced::Never) => {}
            None => return self.keep_in_mind(slot, settle),
        }
        self.generation.slots.give_back(slot);
    }

    /// The same as soon as etcd accepts it.
    pub(super) fn keep_in_mind<T>(&self, slot: Slot, settle: impl FnOnce(Done) -> T + Send + 'static) {
        let generation = self.generation.clone();
        self.core.refused(&self.generation, GivenUp { slot, settle, generation });
    }

    /// Moves the slot, so that no attempt made so far is applied from now on. Tells whether one was; `None` if etcd refuses.
    pub(super) async fn fence(&self, slot: &mut Slot) -> Option<Fenced> {
        let mut backoff = Backoff::of_requests();
        loop {
            match fence(&self.core, &self.generation, &self.key, slot).await {
                Ok(fenced) => return Some(fenced),
                Err(Failure::Refused(_)) => return None,
                Err(_) => backoff.wait(&self.core.runtime).await,
            }
        }
    }

    fn step(&self, slot: &Slot) -> Step {
        slot.step(&self.core.namespace, self.generation.lease.get())
    }

    /// The error of a write that ended with its generation: it may have been applied if some attempt had no answer.
    fn ended(&self, unanswered: bool) -> Error {
        let key = name::display(&self.key);
        if unanswered { Error::OutcomeUnknown { key } } else { Error::Lost { key } }
    }
}

/// A write that was given up, and its slot cannot be moved yet.
struct GivenUp<S> {
    slot: Slot,
    settle: S,
    generation: Arc<Generation>,
}

impl<T, S: FnOnce(Done) -> T + Send> Refused for GivenUp<S> {
    fn slot(&mut self) -> &mut Slot {
        &mut self.slot
    }

    fn fenced(self: Box<Self>, done: Option<Done>) {
        drop(done.map(self.settle));
        self.generation.slots.give_back(self.slot);
    }
}

/// Moves a slot, so that no attempt made so far is applied from now on. Tells whether one was. `key` is what an error speaks
/// of.
pub(super) async fn fence(
    core: &Core,
    generation: &Generation,
    key: &[u8],
    slot: &mut Slot,
) -> Result<Fenced, Failure> {
    let step = slot.step(&core.namespace, generation.lease.get());
    let txn = Txn::new().when(step.compares()).and_then([step.put(GIVEN_UP)]).or_else([step.get()]);
    let attempt = tokio::select! {
        biased;
        // The lease goes, and with it every late copy.
        () = generation.ended() => return Ok(Fenced::Ended),
        attempt = core.rpc.txn(key, txn) => attempt,
    };
    let response = match attempt {
        Ok(response) => response,
        Err(Failure::LeaseGone(_)) => {
            generation.end();
            return Ok(Fenced::Ended);
        }
        Err(failure) => return Err(failure),
    };
    if response.succeeded() {
        slot.revision = revision(response.header());
        return Ok(Fenced::Never);
    }
    let (revision, record) = moved_to(&step, &response.0, 0);
    // Only its lease takes a slot away.
    if revision == 0 {
        generation.end();
        return Ok(Fenced::Ended);
    }
    slot.revision = revision;
    // Moved by an attempt, or by an earlier copy of this.
    let never = record == GIVEN_UP;
    Ok(if never { Fenced::Never } else { Fenced::Applied(Done { revision, record, answer: None }) })
}

/// The revision and the record of the slot, as operation `index` of an answer reads them.
fn moved_to(step: &Step, response: &PbTxnResponse, index: usize) -> (i64, Vec<u8>) {
    let slot = RangeAnswer::of(&response.responses, index).and_then(|slot| slot.first_value());
    slot.map_or((0, Vec::new()), |(slot, record)| (step.moved_to(Some(&slot)), record))
}

/// The record of a write that was given up. No path of a body writes this.
const GIVEN_UP: &[u8] = b"given up";
