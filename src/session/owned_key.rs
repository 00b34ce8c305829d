//! A key on the session's lease, released when its value is dropped.

mod write;

use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnResponse};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::Core;
use super::generation::Generation;
use super::rpc::{Failure, RangeAnswer, revision};
use super::runtime::Backoff;
use super::slots::{Nonce, Slot, Step};
use crate::error::{Error, Result};
use crate::name;

/// A key that this session created and that lives on its lease. Deleted in the background when dropped.
#[derive(Debug)]
pub(crate) struct OwnedKey {
    facts: Arc<Owned>,
    released: bool,
}

/// What is known of an owned key; outlives it in whoever waits for its loss.
pub(crate) struct Owned {
    core: Arc<Core>,
    pub(crate) generation: Arc<Generation>,
    pub(crate) key: Vec<u8>,
    pub(crate) create_revision: i64,
    /// Cancelled when the key is known to be deleted.
    gone: CancellationToken,
    /// Cancelled when the guard of the key was given up but not the key: another guard may write it from then on.
    detached: CancellationToken,
    /// Given back when the key is gone.
    nonce: Mutex<Option<Nonce>>,
}

/// A key just created.
pub(crate) struct Created {
    pub(crate) key: OwnedKey,
    /// The answers to the reads in the creating transaction and its revision; none if that answer was lost and the
    /// key was found by a resend.
    pub(crate) reads: Option<(Vec<PbResponseOp>, i64)>,
}

/// What came of a deletion.
pub(crate) enum Deleted {
    /// By this request: the answers to its reads, and its revision.
    Now(Vec<PbResponseOp>, i64),
    /// By an earlier copy of this request, or with its lease.
    Before,
    /// By somebody else, before it was asked for.
    Lost,
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
        let (answer, answered) = oneshot::channel();
        let Self { key, nonce, value, only_if, reads } = self;
        let (core_of_task, generation) = (core.clone(), generation.clone());
        let task = Task { core: core_of_task, generation, key, nonce: Some(nonce), value, only_if, reads };
        core.runtime.spawn(task.run(answer));
        // The task ends without an answer only when its runtime does.
        answered.await.unwrap_or(Err(Error::Closed))
    }
}

/// A creation under way. It runs in the session, since a request in flight must be followed to its end.
struct Task {
    core: Arc<Core>,
    generation: Arc<Generation>,
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
    /// `only_if` did not hold.
    Not,
    /// The slot had moved, so nothing was done: try again.
    Stale,
}

impl Task {
    async fn run(mut self, mut answer: oneshot::Sender<Result<Option<Created>>>) {
        let generation = self.generation.clone();
        let mut slot = generation.slots.take();
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        let result = loop {
            let attempt = tokio::select! {
                biased;
                () = answer.closed() => return self.give_up(slot).await,
                () = generation.ended() => break Err(self.lost()),
                attempt = self.attempt(&mut slot) => attempt,
            };
            match attempt {
                Ok(Outcome::Created(created)) => break Ok(Some(created)),
                // An attempt may still be under way, and would succeed once nothing speaks against it any more.
                Ok(Outcome::Not) if unanswered => {
                    self.give_up(slot).await;
                    let _ = answer.send(Ok(None));
                    return;
                }
                Ok(Outcome::Not) => {
                    self.nonce.take().into_iter().for_each(Nonce::give_back);
                    break Ok(None);
                }
                Ok(Outcome::Stale) => {}
                Err(Failure::LeaseGone(_)) => {
                    self.generation.end();
                    break Err(self.lost());
                }
                Err(Failure::Refused(error)) if unanswered => {
                    let _ = answer.send(Err(error));
                    return self.give_up(slot).await;
                }
                Err(Failure::Refused(error)) => break Err(error),
                Err(failure) => {
                    unanswered |= !matches!(failure, Failure::Again(_) | Failure::Login(_));
                    tokio::select! {
                        biased;
                        () = answer.closed() => return self.give_up(slot).await,
                        () = backoff.wait(&self.core.runtime) => {}
                    }
                }
            }
        };
        self.generation.slots.give_back(slot);
        // If the caller is gone, the key comes back and is dropped here, and so deleted.
        let _ = answer.send(result);
    }

    /// One attempt. Leaves the slot as etcd has it, when that is known.
    async fn attempt(&mut self, slot: &mut Slot) -> Result<Outcome, Failure> {
        let Self { key, value, only_if, reads, .. } = &*self;
        let step = self.step(slot);
        let options = PutOptions::new().with_lease(self.generation.lease.get());
        let put = TxnOp::put(key.clone(), value.clone(), Some(options));
        let mut compares = vec![step.compare()];
        compares.extend(only_if.clone());
        let mut then = vec![put, step.put("")];
        then.extend(reads.iter().cloned());
        let find = vec![TxnOp::get(key.clone(), Some(GetOptions::new().with_keys_only())), step.get()];
        let response =
            self.core.rpc.txn(key, Txn::new().when(compares).and_then(then).or_else(find)).await?.0;
        let revision = revision(response.header.as_ref().map(Into::into));
        if response.succeeded {
            slot.revision = revision;
            let reads = response.responses.into_iter().skip(2).collect();
            return Ok(Outcome::Created(self.created(revision, Some((reads, revision)))));
        }
        let found = RangeAnswer::of(&response.responses, 0).and_then(|keys| keys.keys().next());
        let moved = RangeAnswer::of(&response.responses, 1).and_then(|keys| keys.keys().next());
        let (seen, now) = (slot.revision, moved.map_or(0, |slot| slot.mod_revision));
        slot.revision = now;
        Ok(match found {
            Some(found) => Outcome::Created(self.created(found.create_revision, None)),
            None if seen == now => Outcome::Not,
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
    async fn give_up(self, mut slot: Slot) {
        let key = &self.key;
        let mut backoff = Backoff::of_requests();
        loop {
            let (step, delete) = (self.step(&slot), TxnOp::delete(key.clone(), None));
            let give_up = Txn::new()
                .when([step.compare()])
                .and_then([step.put(""), delete.clone()])
                .or_else([step.get()]);
            let attempt = tokio::select! {
                biased;
                // The lease goes, and the key and every late copy with it.
                () = self.generation.ended() => return,
                attempt = self.core.rpc.txn(key, give_up) => attempt,
            };
            match attempt {
                Ok(response) if response.succeeded() => {
                    slot.revision = revision(response.header());
                    self.generation.slots.give_back(slot);
                    return self.nonce.into_iter().for_each(Nonce::give_back);
                }
                // Moved by an attempt, or by an earlier copy of this.
                Ok(response) => slot.revision = moved_to(&response),
                Err(Failure::LeaseGone(_)) => return self.generation.end(),
                // Without space the slot cannot move, but the key can go; late copies are refused as long.
                Err(Failure::Refused(_)) => {
                    let made = Compare::create_revision(key.clone(), CompareOp::Equal, slot.revision);
                    let delete = Txn::new().when([made]).and_then([delete]).or_else([step.get()]);
                    match self.core.rpc.txn(key, delete).await {
                        Ok(response) if !response.succeeded() => slot.revision = moved_to(&response),
                        _ => {}
                    }
                    backoff.wait(&self.core.runtime).await;
                }
                Err(_) => backoff.wait(&self.core.runtime).await,
            }
        }
    }

    fn step(&self, slot: &Slot) -> Step {
        slot.step(&self.core.namespace, self.generation.lease.get())
    }

    fn lost(&self) -> Error {
        Error::Lost { key: name::display(&self.key) }
    }
}

/// The slot's revision, when the answer's first operation reads it.
fn moved_to(response: &TxnResponse) -> i64 {
    RangeAnswer::of(&response.0.responses, 0)
        .and_then(|keys| keys.keys().next())
        .map_or(0, |slot| slot.mod_revision)
}

// === impl OwnedKey ===

impl OwnedKey {
    /// A key that an earlier guard kept.
    pub(crate) fn resume(
        core: &Arc<Core>,
        generation: &Arc<Generation>,
        key: Vec<u8>,
        create_revision: i64,
    ) -> Self {
        let (core, generation) = (core.clone(), generation.clone());
        let (gone, detached) = (CancellationToken::new(), CancellationToken::new());
        let nonce = Mutex::new(None);
        let facts = Owned { core, generation, key, create_revision, gone, detached, nonce };
        Self { facts: Arc::new(facts), released: false }
    }

    /// Leaves the key to its lease.
    pub(crate) fn keep(mut self) {
        self.facts.detached.cancel();
        self.released = true;
    }

    pub(crate) fn facts(&self) -> &Arc<Owned> {
        &self.facts
    }

    /// Deletes the key, with `reads` in the same transaction after it. Ends when etcd has deleted it, or the lease is
    /// over.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the deletion goes on in the background.
    pub(crate) async fn delete(self, reads: Vec<TxnOp>) -> Deleted {
        self.delete_or_tell(reads, drop).await
    }

    /// The same; `refused` hears why, whenever etcd will not.
    pub(crate) async fn delete_or_tell(mut self, reads: Vec<TxnOp>, refused: impl FnMut(Error)) -> Deleted {
        let facts = self.facts.clone();
        let deleted = facts.delete(reads, refused).await;
        self.released = true;
        deleted
    }
}

impl Drop for OwnedKey {
    fn drop(&mut self) {
        if !self.released {
            let facts = self.facts.clone();
            self.facts.core.runtime.spawn(async move {
                facts.delete(Vec::new(), drop).await;
            });
        }
    }
}

// === impl Owned ===

impl Owned {
    /// Whether the key is certainly there, as far as this process can know: its lease lives by the local clock and
    /// nobody was seen to delete it.
    pub(crate) fn is_held(&self) -> bool {
        !self.gone.is_cancelled() && self.generation.is_alive()
    }

    /// Waits until the key is lost or given up.
    pub(crate) async fn lost(&self) {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => {}
            () = self.generation.ended() => {}
        }
    }

    /// Notes that the key is gone.
    pub(crate) fn set_gone(&self) {
        self.gone.cancel();
    }

    pub(crate) fn error(&self) -> Error {
        Error::Lost { key: name::display(&self.key) }
    }

    /// True in a transaction only while the key is there.
    pub(crate) fn compare(&self) -> Compare {
        Compare::create_revision(self.key.clone(), CompareOp::Equal, self.create_revision)
    }

    async fn delete(&self, reads: Vec<TxnOp>, refused: impl FnMut(Error)) -> Deleted {
        let deleted = self.delete_for_sure(reads, refused).await;
        let nonce = self.nonce.lock().unwrap_or_else(PoisonError::into_inner).take();
        nonce.into_iter().for_each(Nonce::give_back);
        // Whoever waits for the end of the hold need not wait for that of the lease.
        self.set_gone();
        deleted
    }

    async fn delete_for_sure(&self, reads: Vec<TxnOp>, mut refused: impl FnMut(Error)) -> Deleted {
        if !self.generation.is_alive() {
            return Deleted::Lost;
        }
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        loop {
            let mut then = vec![TxnOp::delete(self.key.clone(), None)];
            then.extend(reads.iter().cloned());
            let txn = Txn::new().when([self.compare()]).and_then(then);
            let attempt = tokio::select! {
                biased;
                attempt = self.core.rpc.txn(&self.key, txn) => attempt,
                () = self.generation.ended() => return Deleted::Before,
            };
            match attempt {
                Ok(response) => {
                    let response = response.0;
                    if response.succeeded {
                        let revision = revision(response.header.as_ref().map(Into::into));
                        return Deleted::Now(response.responses.into_iter().skip(1).collect(), revision);
                    }
                    return if unanswered { Deleted::Before } else { Deleted::Lost };
                }
                Err(Failure::Refused(error)) => {
                    tracing::warn!(key = %name::display(&self.key), %error, "cannot delete; trying again");
                    refused(error);
                    backoff.wait(&self.core.runtime).await;
                }
                Err(failure) => {
                    unanswered |= !matches!(failure, Failure::Again(_) | Failure::Login(_));
                    backoff.wait(&self.core.runtime).await;
                }
            }
        }
    }
}

impl std::fmt::Debug for Owned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owned")
            .field("key", &name::display(&self.key))
            .field("create_revision", &self.create_revision)
            .finish_non_exhaustive()
    }
}
