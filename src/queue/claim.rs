//! A claim on an item: a delivery that is acked, given back, or lost with its lease.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{PbResponseHeader, PbTxnOpResponse, PbTxnRequest, PbTxnResponse};
use etcd_client::{Compare, Txn, TxnOp, TxnResponse};

use super::Queue;
use super::dead;
use super::hold::Hold;
use super::item::Item;
use crate::error::{Error, Result};
use crate::name;
use crate::session::once::Done;
use crate::session::owned_key::Owned;

/// An item that was delivered to this process and to nobody else, as long as the claim is held.
///
/// The claim lives on the session's lease. When the process dies, or loses its lease, the item is delivered again, in
/// its old place in the queue and with the next number of [`attempt`](Claim::attempt). So an item may be worked on
/// twice; but it is acked once: whoever lost the claim cannot [`ack`](Claim::ack) it any more.
///
/// # Drop behaviour
///
/// Dropping the claim gives the item back in the background, at once; so does the end of a function by an error. A
/// claim that is leaked keeps the item as long as its session lives.
#[must_use = "a claim that is not kept gives the item back at once"]
pub struct Claim {
    // Its session lives as long, and its consumer, which hears of the loss.
    queue: Queue,
    item: Item,
    attempt: u32,
    facts: Arc<Owned>,
    /// `None` once it is acked or given back.
    hold: Option<Hold>,
}

impl Claim {
    pub(super) fn new(queue: Queue, hold: Hold) -> Self {
        let Hold { candidate, .. } = &hold;
        let (key, create_revision) = (candidate.entry.key.clone(), candidate.entry.create_revision);
        let attempt = candidate.attempts().saturating_add(1);
        let (facts, mut hold) = (hold.facts().clone(), hold);
        let value = std::mem::take(&mut hold.value);
        Self { queue, item: Item { key, value, create_revision }, attempt, facts, hold: Some(hold) }
    }

    /// The item.
    pub fn item(&self) -> &Item {
        &self.item
    }

    /// What was enqueued.
    pub fn value(&self) -> &[u8] {
        &self.item.value
    }

    /// How often the item was claimed, this claim included. More than 1: somebody gave it back, or died over it.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The fencing token: a revision of etcd, larger than that of every earlier claim of this item.
    pub fn token(&self) -> i64 {
        self.facts.create_revision
    }

    /// The key that stands for this claim.
    pub fn key(&self) -> &[u8] {
        &self.facts.key
    }

    /// A condition for etcd transactions that is true only while this claim lasts.
    pub fn compare(&self) -> Compare {
        self.facts.compare()
    }

    /// Whether the item is certainly still ours, as far as this process can know.
    ///
    /// Compares clocks in the caller's thread: the answer is right also in the first instruction after the process was
    /// stopped. Once false, false for ever.
    pub fn is_held(&self) -> bool {
        self.hold.is_some() && self.facts.is_held()
    }

    /// Waits until the claim is lost: the lease is over, somebody deleted the key, or the time limit of the queue has
    /// passed. Also ends when the claim was acked or given back. The future does not borrow the claim.
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let facts = self.facts.clone();
        async move { facts.lost().await }
    }

    /// Takes the item out of the queue for good: it was worked on. One request, which works also when etcd is out of
    /// space.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the claim was lost before, so the item is not acked: somebody else has it, or will;
    /// [`Error::OutcomeUnknown`] when the lease ended while an answer was missing; otherwise as etcd says, and the item
    /// is given back.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the ack goes on in the background.
    pub async fn ack(mut self) -> Result<()> {
        let hold = self.take()?;
        self.queue.session.core().to_the_end(hold.ack()).await
    }

    /// Acks together with the caller's own writes: all of it is committed in one transaction while the claim is held, or
    /// none, and at most once. So the effect of an item that is written to this etcd happens exactly once.
    ///
    /// The item is acked whichever branch of `txn` etcd takes. If the answer is lost after the commit, the response of a
    /// transaction without conditions of its own says that it succeeded and carries no results of its operations.
    /// Afterwards the claim is over. After an error other than the first two below it is still held.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the claim was lost before, so nothing was written;
    /// [`Error::OutcomeUnknown`] when an answer was lost and cannot be told any more;
    /// [`Error::TooLarge`] for more than 122 operations or 1.5 MiB; [`Error::NoSpace`]; otherwise as etcd says, and
    /// nothing was written.
    ///
    /// # Cancel safety
    ///
    /// When dropped, all of it may be committed or nothing.
    pub async fn ack_with(&mut self, txn: Txn) -> Result<TxnResponse> {
        let hold = self.hold.as_ref().filter(|_| self.facts.is_held()).ok_or_else(|| self.facts.error())?;
        let plain = PbTxnRequest::from(txn.clone()).compare.is_empty();
        let then = hold.deletes();
        let acked = hold.end(vec![TxnOp::txn(txn)], then).await;
        match acked {
            Ok(done) => {
                self.hold.take().into_iter().for_each(Hold::keep);
                answer_of_user(done, plain).ok_or_else(|| self.unknown())
            }
            Err(error) => {
                if matches!(error, Error::Lost { .. } | Error::OutcomeUnknown { .. }) {
                    self.hold = None;
                }
                Err(error)
            }
        }
    }

    /// Commits a transaction only while the claim is held, at most once; the item is not acked.
    ///
    /// # Errors
    ///
    /// As [`MutexGuard::txn`](crate::MutexGuard::txn).
    ///
    /// # Cancel safety
    ///
    /// When dropped, the transaction may be committed or not.
    pub async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        if self.hold.is_none() {
            return Err(self.facts.error());
        }
        self.facts.txn(txn).await
    }

    /// Gives the item back, to be delivered again after `delay`; zero: at once, in its old place.
    ///
    /// No consumer waits longer than `delay` from when it hears of it; how much shorter a consumer waits that starts
    /// later depends on the clocks of the machines.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the claim was lost before; otherwise as etcd says, and the item is given back without delay.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the item is given back in the background, perhaps without delay.
    pub async fn release(mut self, delay: Duration) -> Result<()> {
        let hold = self.take()?;
        if delay.is_zero() {
            return self.queue.session.core().to_the_end(hold.release()).await;
        }
        self.queue.session.core().to_the_end(hold.release_after(delay)).await
    }

    /// Gives the item up: it goes to the dead letters, with the reason, and is not delivered again. Of the reason at
    /// most 1,024 bytes are kept.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the claim was lost before; otherwise as etcd says, and the item is given back.
    ///
    /// # Cancel safety
    ///
    /// When dropped, it goes on in the background.
    pub async fn reject(mut self, reason: &str) -> Result<()> {
        let hold = self.take()?;
        let why = dead::why(reason, self.attempt, self.queue.session.core().runtime.wall_seconds());
        let value = std::mem::take(&mut self.item.value);
        self.queue.session.core().to_the_end(hold.reject(value, why)).await
    }

    /// What is to be ended, unless it is over.
    fn take(&mut self) -> Result<Hold> {
        let hold = self.hold.take();
        // A hold that is lost is dropped here.
        hold.filter(|_| self.facts.is_held()).ok_or_else(|| self.facts.error())
    }

    fn unknown(&self) -> Error {
        Error::OutcomeUnknown { key: name::display(&self.facts.key) }
    }
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Claim")
            .field("item", &self.item)
            .field("attempt", &self.attempt)
            .field("token", &self.token())
            .finish_non_exhaustive()
    }
}

/// The answer to the user's transaction, out of that to ours.
fn answer_of_user(done: Done, plain: bool) -> Option<TxnResponse> {
    let header = Some(PbResponseHeader { revision: done.revision, ..Default::default() });
    let Some(answer) = done.answer else {
        let applied = PbTxnResponse { header, succeeded: true, responses: Vec::new() };
        return plain.then_some(TxnResponse(applied));
    };
    match answer.responses.into_iter().nth(1)?.response? {
        PbTxnOpResponse::ResponseTxn(mut inner) => {
            inner.header = header;
            Some(TxnResponse(inner))
        }
        _ => None,
    }
}
