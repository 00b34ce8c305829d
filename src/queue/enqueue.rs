//! Putting items into a queue: alone, many at once, once per id, and no more than a bound.

use std::sync::Arc;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};

use super::keys::Keys;
use crate::error::{Error, Result};
use crate::name;
use crate::session::expiring::Expiring;
use crate::session::once::{Done, Record};
use crate::session::removal::{Removal, Removed};
use crate::session::rpc::{READ_LIMIT, RangeAnswer};
use crate::session::runtime::Backoff;
use crate::session::{Core, Session};

/// The most items of one [`enqueue_all`](super::Queue::enqueue_all): etcd's limit of operations, less our own.
pub(super) const MAX_BATCH: usize = 124;

/// What the transaction puts on record.
const PUT: &str = "put";
const NOT: &str = "not";

/// Items to put in one transaction.
#[derive(Debug, Clone)]
struct Batch {
    /// What all their keys begin with, and no others.
    stem: Vec<u8>,
    items: Vec<(Vec<u8>, Vec<u8>)>,
    /// The record that an id was used, and its lease.
    once: Option<(Vec<u8>, i64)>,
    /// How many items may be in the queue.
    bound: Option<i64>,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// In the queue since this revision.
    Done(i64),
    /// The id was used before.
    Known,
    /// More would be in the queue than may be.
    Full,
}

/// Puts items in one transaction, if the queue has room for all of them.
pub(super) async fn put(
    session: &Session,
    keys: &Arc<Keys>,
    values: Vec<Vec<u8>>,
    once: Option<(&[u8], &Arc<Expiring>)>,
    bound: Option<i64>,
) -> Result<Put> {
    if values.len() > MAX_BATCH {
        return Err(Error::TooLarge { what: "the number of items", size: values.len(), limit: MAX_BATCH });
    }
    values.iter().try_for_each(|value| name::check_item(value))?;
    if let Some((id, _)) = once
        && (id.is_empty() || id.len() > name::MAX_NAME)
    {
        let reason = "an id has from 1 to 1,024 bytes";
        return Err(Error::InvalidName { name: name::display(id), reason });
    }
    loop {
        let lease = match once {
            Some((_, leases)) => Some(leases.lease(session.core()).await?),
            None => None,
        };
        let once_key = once.map(|(id, _)| keys.once(id)).zip(lease);
        let batch = Batch::new(session.core(), keys, values.clone(), once_key, bound);
        match (batch.put(session, keys).await, once.zip(lease)) {
            // Somebody revoked the lease of the record.
            (Err(Error::Etcd { source, .. }), Some(((_, leases), lease))) if is_lease_gone(&source) => {
                leases.forget(lease);
            }
            (Err(error), _) => return Err(error),
            (Ok(None), _) => {}
            (Ok(Some(put)), _) => return Ok(put),
        }
    }
}

/// Waits until there seems to be room for so many items more.
pub(super) async fn wait_for_room(core: &Core, keys: &Keys, items: usize, bound: i64) -> Result<()> {
    let mut backoff = Backoff::of_requests();
    let room = bound.saturating_sub(i64::try_from(items).unwrap_or(i64::MAX));
    while length(core, keys).await? > room {
        tokio::select! {
            biased;
            () = core.closing.cancelled() => return Err(Error::Closed),
            () = backoff.wait(&core.runtime) => {}
        }
    }
    Ok(())
}

/// Counts the items.
pub(super) async fn length(core: &Core, keys: &Keys) -> Result<i64> {
    let options = GetOptions::new().with_range(keys.items.end()).with_count_only();
    Ok(core.rpc.get(keys.items.as_bytes(), options, Some(READ_LIMIT)).await?.count())
}

fn is_lease_gone(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.message().ends_with("requested lease not found"))
}

impl Batch {
    fn new(
        core: &Core,
        keys: &Keys,
        values: Vec<Vec<u8>>,
        once: Option<(Vec<u8>, i64)>,
        bound: Option<i64>,
    ) -> Self {
        // Of one length, so that no stem is the beginning of another.
        let stem = keys.item(format!("{:016x}-", core.runtime.random()).as_bytes());
        let items = values.into_iter().enumerate().map(|(index, value)| {
            let key = [stem.as_slice(), format!("{index:03}").as_bytes()].concat();
            (key, value)
        });
        Self { items: items.collect(), stem, once, bound }
    }

    /// `None` if the keys are taken, by chance.
    async fn put(self, session: &Session, keys: &Arc<Keys>) -> Result<Option<Put>> {
        let Some((key, _)) = self.items.first().cloned() else { return Ok(Some(Put::Done(0))) };
        let (batch, all) = (self.clone(), keys.items.clone());
        let body = move |record: &Record<'_>| batch.txn(&all, record);
        let (batch, core, keys) = (self.clone(), session.core().clone(), keys.clone());
        let settle = move |done| Written { check: Some(Check { batch, core, keys, done }) };
        match session.once(&key, body, settle).await?.check() {
            Some(check) if check.done.record == PUT.as_bytes() => {
                let core = check.core.clone();
                core.to_the_end(check.run()).await.map(Some)
            }
            _ => self.refused(session.core()).await,
        }
    }

    fn txn(&self, all: &name::Prefix, record: &Record<'_>) -> Txn {
        let end = name::end_of(&self.stem);
        let mut when = vec![Compare::create_revision(self.stem.clone(), CompareOp::Equal, 0).with_range(end)];
        let mut then = vec![record.put(PUT)];
        for (key, value) in &self.items {
            then.push(TxnOp::put(key.clone(), value.clone(), None));
        }
        if let Some((key, lease)) = &self.once {
            when.push(Compare::create_revision(key.clone(), CompareOp::Equal, 0));
            then.push(TxnOp::put(key.clone(), "", Some(PutOptions::new().with_lease(*lease))));
        }
        if self.bound.is_some() {
            let options = GetOptions::new().with_range(all.end()).with_count_only();
            then.push(TxnOp::get(all.as_bytes(), Some(options)));
        }
        Txn::new().when(when).and_then(then).or_else([record.put(NOT)])
    }

    /// Why nothing was put.
    async fn refused(&self, core: &Core) -> Result<Option<Put>> {
        let Some((key, _)) = &self.once else { return Ok(None) };
        let options = GetOptions::new().with_count_only();
        let known = core.rpc.get(key, options, Some(READ_LIMIT)).await?.count() > 0;
        Ok(known.then_some(Put::Known))
    }

    /// How many items there were with these.
    async fn count(&self, core: &Core, keys: &Keys, done: &Done) -> Result<i64> {
        let last = |answer: &etcd_client::proto::PbTxnResponse| answer.responses.len().saturating_sub(1);
        let answer = done.answer.as_ref();
        if let Some(count) = answer.and_then(|answer| RangeAnswer::of(&answer.responses, last(answer))) {
            return Ok(count.count());
        }
        let options =
            GetOptions::new().with_range(keys.items.end()).with_count_only().with_revision(done.revision);
        Ok(core.rpc.get(keys.items.as_bytes(), options, Some(READ_LIMIT)).await?.count())
    }

    /// Takes everything back, unless somebody has begun to work on it.
    async fn withdraw(&self, core: &Core, keys: &Keys, revision: i64) -> Result<Put> {
        let Some((first, _)) = self.items.first() else { return Ok(Put::Full) };
        let mut removal = Removal { when: Vec::new(), deletes: Vec::new(), otherwise: Vec::new() };
        for (key, _) in &self.items {
            removal.when.push(Compare::mod_revision(key.clone(), CompareOp::Equal, revision));
            removal.deletes.push(TxnOp::delete(key.clone(), None));
        }
        // Each claim counts itself.
        let attempts = keys.attempts(keys.id(&self.stem));
        let end = name::end_of(&attempts);
        removal.when.push(Compare::create_revision(attempts, CompareOp::Equal, 0).with_range(end));
        let once = self.once.iter().map(|(key, _)| TxnOp::delete(key.clone(), None));
        removal.deletes.extend(once);
        match core.remove(None, first, removal).await? {
            Removed::Now => Ok(Put::Full),
            Removed::Not { unanswered: false, .. } => Ok(Put::Done(revision)),
            Removed::Not { .. } => Err(Error::OutcomeUnknown { key: name::display(first) }),
        }
    }
}

/// What was written for a call. Should the call be gone, the bound is looked after all the same.
struct Written {
    check: Option<Check>,
}

/// A batch that is in the queue, and perhaps over its bound.
struct Check {
    batch: Batch,
    core: Arc<Core>,
    keys: Arc<Keys>,
    done: Done,
}

impl Written {
    fn check(mut self) -> Option<Check> {
        self.check.take()
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if let Some(check) = self.check.take()
            && check.batch.bound.is_some()
            && check.done.record == PUT.as_bytes()
        {
            check.core.clone().runtime.spawn(async move {
                if let Err(error) = check.run().await {
                    tracing::warn!(%error, "a queue may stay over its bound");
                }
            });
        }
    }
}

impl Check {
    async fn run(self) -> Result<Put> {
        let Self { batch, core, keys, done } = self;
        match batch.bound {
            Some(bound) if batch.count(&core, &keys, &done).await? > bound => {
                batch.withdraw(&core, &keys, done.revision).await
            }
            _ => Ok(Put::Done(done.revision)),
        }
    }
}
