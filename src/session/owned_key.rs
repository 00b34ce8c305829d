//! A key on the session's lease, released when its value is dropped.

mod creation;
mod write;

use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, CompareOp, Txn, TxnOp};

pub(crate) use self::creation::{Created, Creation};
use super::Core;
use super::flag::Flag;
use super::generation::Generation;
use super::rpc::{Failure, revision};
use super::runtime::Backoff;
use super::slots::Nonce;
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
    /// Set when the key is known to be deleted.
    gone: Flag,
    /// Set when the guard of the key was given up but not the key: another guard may write it from then on.
    detached: Flag,
    /// Given back when the key is gone.
    nonce: Mutex<Option<Nonce>>,
}

/// What came of a deletion.
pub(crate) enum Deleted {
    /// By this request: the answers to what came after it, and its revision.
    Now(Vec<PbResponseOp>, i64),
    /// By an earlier copy of this request, or with its lease.
    Before,
    /// By somebody else, before it was asked for.
    Lost,
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
        let facts = Owned::new(core.clone(), generation.clone(), key, create_revision, None);
        Self { facts: Arc::new(facts), released: false }
    }

    /// Leaves the key to its lease.
    pub(crate) fn keep(mut self) {
        self.facts.detached.set();
        self.released = true;
    }

    pub(crate) fn facts(&self) -> &Arc<Owned> {
        &self.facts
    }

    /// Deletes the key, with `then` in the same transaction after it. Ends when etcd has deleted it, or the lease is
    /// over.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the deletion goes on in the background, without `then`.
    pub(crate) async fn delete(mut self, then: Vec<TxnOp>) -> Deleted {
        let deleted = self.facts.delete_for_sure(&then).await;
        self.released = true;
        deleted
    }

    /// The same once, or tells at once what etcd refuses. Then the key is still there.
    pub(crate) async fn delete_or_tell(&mut self, then: Vec<TxnOp>) -> Result<Deleted> {
        let deleted = self.facts.delete(&then, &mut false).await?;
        self.released = true;
        Ok(deleted)
    }
}

impl Drop for OwnedKey {
    fn drop(&mut self) {
        if !self.released {
            let facts = self.facts.clone();
            self.facts.core.runtime.spawn(async move {
                facts.delete_for_sure(&[]).await;
            });
        }
    }
}

// === impl Owned ===

impl Owned {
    fn new(
        core: Arc<Core>,
        generation: Arc<Generation>,
        key: Vec<u8>,
        create_revision: i64,
        nonce: Option<Nonce>,
    ) -> Self {
        let (gone, detached) = (Flag::default(), Flag::default());
        Self { core, generation, key, create_revision, gone, detached, nonce: Mutex::new(nonce) }
    }

    /// Whether the key is certainly there, as far as this process can know: its lease lives by the local clock and
    /// nobody was seen to delete it.
    pub(crate) fn is_held(&self) -> bool {
        !self.gone.is_set() && self.generation.is_alive()
    }

    /// Waits until the key is lost or given up.
    pub(crate) async fn lost(&self) {
        tokio::select! {
            biased;
            () = self.gone.wait() => {}
            () = self.generation.ended() => {}
        }
    }

    /// Notes that the key is gone.
    pub(crate) fn set_gone(&self) {
        self.gone.set();
    }

    pub(crate) fn error(&self) -> Error {
        Error::Lost { key: name::display(&self.key) }
    }

    /// True in a transaction only while the key is there.
    pub(crate) fn compare(&self) -> Compare {
        Compare::create_revision(self.key.clone(), CompareOp::Equal, self.create_revision)
    }

    /// Deletes the key, however often etcd refuses.
    async fn delete_for_sure(&self, then: &[TxnOp]) -> Deleted {
        let mut unanswered = false;
        let mut backoff = Backoff::of_refusals();
        loop {
            match self.delete(then, &mut unanswered).await {
                Ok(deleted) => return deleted,
                Err(error) => {
                    tracing::warn!(key = %name::display(&self.key), %error, "cannot delete; trying again");
                    tokio::select! {
                        biased;
                        () = self.generation.ended() => {}
                        () = backoff.wait(&self.core.runtime) => {}
                    }
                }
            }
        }
    }

    /// `unanswered`: whether an attempt had no answer.
    async fn delete(&self, then: &[TxnOp], unanswered: &mut bool) -> Result<Deleted> {
        let deleted = self.request_deletion(then, unanswered).await?;
        let nonce = self.nonce.lock().unwrap_or_else(PoisonError::into_inner).take();
        nonce.into_iter().for_each(Nonce::give_back);
        // Whoever waits for the end of the hold need not wait for that of the lease.
        self.set_gone();
        Ok(deleted)
    }

    async fn request_deletion(&self, then: &[TxnOp], unanswered: &mut bool) -> Result<Deleted> {
        if !self.generation.is_alive() {
            return Ok(Deleted::Lost);
        }
        let mut backoff = Backoff::of_requests();
        loop {
            let delete = TxnOp::delete(self.key.clone(), None);
            let ops: Vec<_> = std::iter::once(delete).chain(then.iter().cloned()).collect();
            let txn = Txn::new().when([self.compare()]).and_then(ops);
            let attempt = tokio::select! {
                biased;
                attempt = self.core.rpc.txn(&self.key, txn) => attempt,
                () = self.generation.ended() => return Ok(Deleted::Before),
            };
            match attempt {
                Ok(response) => {
                    let response = response.0;
                    if response.succeeded {
                        let revision = revision(response.header.as_ref().map(Into::into));
                        return Ok(Deleted::Now(response.responses.into_iter().skip(1).collect(), revision));
                    }
                    return Ok(if *unanswered { Deleted::Before } else { Deleted::Lost });
                }
                Err(Failure::Refused(error)) => return Err(error),
                Err(failure) => {
                    *unanswered |= failure.is_unanswered();
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
