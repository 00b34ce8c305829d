//! A claim on an item: a delivery that is acked, given back, or lost with its lease.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{PbResponseHeader, PbTxnOpResponse, PbTxnRequest, PbTxnResponse};
use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp, TxnResponse};
use tokio::task::AbortHandle;

use super::Queue;
use super::attempt::Means;
use super::chain::Candidate;
use super::dead;
use super::item::Item;
use super::keys::{self, Delay, Keys};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Core;
use crate::session::generation::Generation;
use crate::session::once::{Done, Record};
use crate::session::owned_key::{Owned, OwnedKey};
use crate::session::removal::{Removal, Removed};
use crate::session::rpc::RangeAnswer;

/// What the transactions that end a claim put on record.
const ENDED: &str = "ended";
const LOST: &str = "lost";

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
        let why = dead::why(reason, self.attempt, hold.core.runtime.wall_seconds());
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

/// A claim as etcd has it. Dropping it gives the item back in the background.
#[derive(Debug)]
pub(crate) struct Hold {
    core: Arc<Core>,
    keys: Arc<Keys>,
    candidate: Candidate,
    pub(super) value: Vec<u8>,
    facts: Arc<Owned>,
    /// `None` once it is ended.
    key: Option<OwnedKey>,
    limit: Option<AbortHandle>,
}

impl Hold {
    pub(crate) fn new(
        means: &Means,
        generation: &Arc<Generation>,
        candidate: Candidate,
        value: Vec<u8>,
        revision: i64,
    ) -> Self {
        let (core, keys) = (means.core.clone(), means.keys.clone());
        let key = keys.claim(keys.id(&candidate.entry.key));
        let key = OwnedKey::resume(&core, generation, key, revision);
        let facts = key.facts().clone();
        let mut hold = Self { core, keys, candidate, value, facts, key: Some(key), limit: None };
        hold.limit = means.time_limit.map(|limit| {
            let (facts, tidy) = (hold.facts.clone(), hold.tidy());
            let core = hold.core.clone();
            hold.core.runtime.spawn_abortable(end_after(limit, core, facts, tidy))
        });
        hold
    }

    pub(crate) fn facts(&self) -> &Arc<Owned> {
        &self.facts
    }

    /// The item and all that is noted of it, the claim included.
    fn deletes(&self) -> Vec<TxnOp> {
        let (item, id) = (&self.candidate.entry.key, self.id());
        [item.clone(), self.facts.key.clone(), self.keys.attempts(id)]
            .map(|key| TxnOp::delete(key, None))
            .to_vec()
    }

    /// True while the claim is held and the item is the one that was claimed.
    fn compares(&self) -> [Compare; 2] {
        let entry = &self.candidate.entry;
        [self.facts.compare(), Compare::mod_revision(entry.key.clone(), CompareOp::Equal, entry.mod_revision)]
    }

    fn id(&self) -> &[u8] {
        self.keys.id(&self.candidate.entry.key)
    }

    /// Removes what is noted of an item that somebody took in spite of the claim.
    fn tidy(&self) -> TxnOp {
        let gone = Compare::mod_revision(self.candidate.entry.key.clone(), CompareOp::Equal, 0);
        let attempts = TxnOp::delete(self.keys.attempts(self.id()), None);
        TxnOp::txn(Txn::new().when([gone]).and_then([attempts]))
    }

    /// The claim is over at etcd.
    fn keep(mut self) {
        self.facts.set_gone();
        self.key.take().into_iter().for_each(OwnedKey::keep);
    }

    async fn ack(self) -> Result<()> {
        let entry = &self.candidate.entry;
        let keys_only = |key: &[u8]| TxnOp::get(key, Some(GetOptions::new().with_keys_only()));
        let removal = Removal {
            when: self.compares().to_vec(),
            deletes: self.deletes(),
            otherwise: vec![keys_only(&self.facts.key), keys_only(&entry.key)],
        };
        let generation = &self.facts.generation;
        if let Removed::Not { reads, unanswered } =
            self.core.remove(Some(generation), &self.facts.key, removal).await?
        {
            let there =
                |index| RangeAnswer::of(&reads, index).is_some_and(|found| found.keys().next().is_some());
            // Without claim and item an earlier attempt may have done it.
            if !unanswered || there(0) || there(1) {
                return Err(self.facts.error());
            }
            // It did, unless the claim went with its lease, which somebody may have revoked, and another consumer took
            // the item. A lease that can still be written on did not take the claim away.
            let lives = |record: &Record<'_>| Txn::new().and_then([record.put(ENDED)]);
            if self.core.once(generation, &self.facts.key, lives, |_| ()).await.is_err() {
                return Err(Error::OutcomeUnknown { key: name::display(&self.facts.key) });
            }
        }
        self.keep();
        Ok(())
    }

    /// Ends the claim with a record of it: `and` is done in the same transaction, and `then` last.
    async fn end(&self, and: Vec<TxnOp>, then: Vec<TxnOp>) -> Result<Done> {
        let compares = self.compares();
        let body = move |record: &Record<'_>| {
            let ops = [record.put(ENDED)].into_iter().chain(and.clone()).chain(then.clone());
            Txn::new().when(compares.clone()).and_then(ops.collect::<Vec<_>>()).or_else([record.put(LOST)])
        };
        let done = self.core.once(&self.facts.generation, &self.facts.key, body, |done| done).await?;
        if done.record == ENDED.as_bytes() { Ok(done) } else { Err(self.facts.error()) }
    }

    async fn release(mut self) -> Result<()> {
        use crate::session::owned_key::Deleted;
        let tidy = self.tidy();
        let Some(key) = self.key.take() else { return Err(self.facts.error()) };
        self.facts.set_gone();
        match key.delete(vec![tidy]).await {
            Deleted::Lost => Err(self.facts.error()),
            Deleted::Now(..) | Deleted::Before => Ok(()),
        }
    }

    async fn release_after(self, delay: Duration) -> Result<()> {
        let delay = keys::write(&Delay::new(delay, self.core.runtime.wall()));
        let then = vec![
            TxnOp::put(self.keys.delay(self.id()), delay, None),
            TxnOp::delete(self.facts.key.clone(), None),
        ];
        self.end(Vec::new(), then).await?;
        self.keep();
        Ok(())
    }

    async fn reject(self, value: Vec<u8>, why: keys::Why) -> Result<()> {
        let letter = dead::letter(&self.keys, self.id(), &value, &why);
        self.end(letter.to_vec(), self.deletes()).await?;
        self.keep();
        Ok(())
    }

    /// Gives the item back as if it had never been claimed.
    fn unclaim(mut self) {
        let attempts = self.keys.attempts(self.id());
        let before = match self.candidate.attempts {
            None => TxnOp::delete(attempts.clone(), None),
            Some((before, _)) => TxnOp::put(attempts.clone(), keys::write(&before), None),
        };
        let ours = Compare::mod_revision(attempts, CompareOp::Equal, self.facts.create_revision);
        let restore = TxnOp::txn(Txn::new().when([ours]).and_then([before]));
        self.give_back(restore);
    }

    fn give_back(&mut self, and: TxnOp) {
        if let Some(key) = self.key.take() {
            self.facts.set_gone();
            self.core.runtime.spawn(async move {
                key.delete(vec![and]).await;
            });
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.limit.take().into_iter().for_each(|limit| limit.abort());
        let tidy = self.tidy();
        self.give_back(tidy);
    }
}

/// Ends a claim that lasts too long.
async fn end_after(limit: Duration, core: Arc<Core>, facts: Arc<Owned>, tidy: TxnOp) {
    tokio::select! {
        biased;
        () = facts.lost() => return,
        () = tokio::time::sleep(limit) => {}
    }
    tracing::warn!(key = %name::display(&facts.key), ?limit, "a claim has reached its time limit");
    facts.set_gone();
    let key = OwnedKey::resume(&core, &facts.generation, facts.key.clone(), facts.create_revision);
    key.delete(vec![tidy]).await;
}

/// A claim on its way to who asked for it. If that one is gone, the claim is undone and does not count.
#[derive(Debug)]
pub(crate) struct Claimed(Option<Hold>);

impl Claimed {
    pub(crate) fn new(hold: Hold) -> Self {
        Self(Some(hold))
    }

    pub(crate) fn open(mut self) -> Option<Hold> {
        self.0.take()
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(Hold::unclaim);
    }
}
