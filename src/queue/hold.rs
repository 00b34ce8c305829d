//! A claim as etcd has it, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use tokio::task::AbortHandle;

use super::attempt::Means;
use super::chain::Candidate;
use super::dead;
use super::keys::{self, Delay, Keys};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Core;
use crate::session::generation::Generation;
use crate::session::once::{Done, Record};
use crate::session::owned_key::{Deleted, Owned, OwnedKey};
use crate::session::removal::{Removal, Removed};
use crate::session::rpc::RangeAnswer;

/// What the transactions that end a claim put on record.
const ENDED: &str = "ended";
const LOST: &str = "lost";

/// A claim as etcd has it. Dropping it gives the item back in the background.
#[derive(Debug)]
pub(crate) struct Hold {
    core: Arc<Core>,
    keys: Arc<Keys>,
    pub(super) candidate: Candidate,
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
    pub(super) fn deletes(&self) -> Vec<TxnOp> {
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
        let attempts = TxnOp::delete(self.keys.attempts(self.id()), None);
        TxnOp::txn(Txn::new().when([self.gone()]).and_then([attempts]))
    }

    /// True when there is no such item.
    fn gone(&self) -> Compare {
        Compare::mod_revision(self.candidate.entry.key.clone(), CompareOp::Equal, 0)
    }

    /// The claim is over at etcd.
    pub(super) fn keep(mut self) {
        self.facts.set_gone();
        self.key.take().into_iter().for_each(OwnedKey::keep);
    }

    pub(super) async fn ack(self) -> Result<()> {
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
    pub(super) async fn end(&self, and: Vec<TxnOp>, then: Vec<TxnOp>) -> Result<Done> {
        let compares = self.compares();
        let body = move |record: &Record<'_>| {
            let ops = [record.put(ENDED)].into_iter().chain(and.clone()).chain(then.clone());
            Txn::new().when(compares.clone()).and_then(ops.collect::<Vec<_>>()).or_else([record.put(LOST)])
        };
        let done = self.core.once(&self.facts.generation, &self.facts.key, body, |done| done).await?;
        if done.record == ENDED.as_bytes() { Ok(done) } else { Err(self.facts.error()) }
    }

    pub(super) async fn release(mut self) -> Result<()> {
        let tidy = self.tidy();
        let Some(key) = self.key.take() else { return Err(self.facts.error()) };
        self.facts.set_gone();
        match key.delete(vec![tidy]).await {
            Deleted::Lost => Err(self.facts.error()),
            Deleted::Now(..) | Deleted::Before => Ok(()),
        }
    }

    pub(super) async fn release_after(self, delay: Duration) -> Result<()> {
        let delay = keys::write(&Delay::new(delay, self.core.runtime.wall()));
        let then = vec![
            TxnOp::put(self.keys.delay(self.id()), delay, None),
            TxnOp::delete(self.facts.key.clone(), None),
        ];
        self.end(Vec::new(), then).await?;
        self.keep();
        Ok(())
    }

    pub(super) async fn reject(self, value: Vec<u8>, why: keys::Why) -> Result<()> {
        let letter = dead::letter(&self.keys, self.id(), &value, &why);
        self.end(letter.to_vec(), self.deletes()).await?;
        self.keep();
        Ok(())
    }

    /// Gives the item back as if it had never been claimed.
    fn unclaim(mut self) {
        let attempts = self.keys.attempts(self.id());
        let nothing = TxnOp::delete(attempts.clone(), None);
        let restore = match self.candidate.attempts {
            None => nothing,
            Some((before, _)) => {
                let before = TxnOp::put(attempts, keys::write(&before), None);
                TxnOp::txn(Txn::new().when([self.gone()]).and_then([nothing]).or_else([before]))
            }
        };
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
