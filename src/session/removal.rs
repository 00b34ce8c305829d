//! Transactions that only delete, on a condition that their own effect ends: they work when etcd is out of space, and a
//! late copy of one finds nothing to do.

use std::sync::Arc;
use std::task::Poll;

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, Txn, TxnOp};
use tokio::sync::oneshot;

use super::Core;
use super::generation::Generation;
use super::rpc::Failure;
use super::runtime::Backoff;
use crate::error::{Error, Result};
use crate::name;

/// What to delete, and when.
pub(crate) struct Removal {
    pub(crate) when: Vec<Compare>,
    pub(crate) deletes: Vec<TxnOp>,
    /// Read when the conditions do not hold.
    pub(crate) otherwise: Vec<TxnOp>,
}

/// What came of it.
pub(crate) enum Removed {
    Now,
    /// The conditions do not hold: what was read instead, and whether an attempt without an answer may have been applied
    /// before.
    Not {
        reads: Vec<PbResponseOp>,
        unanswered: bool,
    },
}

impl Core {
    /// Deletes, sending again until etcd answers. `key` is what an error speaks of. With a generation, only as long as
    /// that lives.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`], or [`Error::OutcomeUnknown`] if an attempt had no answer, when the generation ended;
    /// [`Error::Closed`]; and what etcd refuses.
    pub(crate) async fn remove(
        &self,
        generation: Option<&Arc<Generation>>,
        key: &[u8],
        removal: Removal,
    ) -> Result<Removed> {
        let Removal { when, deletes, otherwise } = removal;
        let txn = Txn::new().when(when).and_then(deletes).or_else(otherwise);
        let ended = |unanswered| {
            let key = name::display(key);
            if unanswered { Error::OutcomeUnknown { key } } else { Error::Lost { key } }
        };
        let over = async {
            match generation {
                Some(generation) => generation.over().await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(over);
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        loop {
            if generation.is_some_and(|generation| !generation.is_alive()) {
                return Err(ended(unanswered));
            }
            let attempt = tokio::select! {
                biased;
                attempt = self.rpc.txn(key, txn.clone()) => attempt,
                // The attempt under way may have been applied.
                () = &mut over => return Err(ended(true)),
                () = self.closing.cancelled(), if generation.is_none() => return Err(Error::Closed),
            };
            match attempt {
                Ok(response) if response.succeeded() => return Ok(Removed::Now),
                Ok(response) => return Ok(Removed::Not { reads: response.0.responses, unanswered }),
                Err(Failure::Refused(error)) => return Err(if unanswered { ended(true) } else { error }),
                Err(failure) => {
                    unanswered |= failure.is_unanswered();
                    backoff.wait(&self.runtime).await;
                }
            }
        }
    }

    /// Runs `work` in the session, to its end whatever becomes of the caller. It begins at once: what it sends first goes
    /// before what tasks send that are ready already.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let mut work = Box::pin(work);
        if let Poll::Ready(result) = self.runtime.begin(work.as_mut()) {
            return result;
        }
        let (answer, answered) = oneshot::channel();
        self.runtime.spawn(async move {
            // Nobody may wait for it any more.
            let _ = answer.send(work.await);
        });
        // The task ends without an answer only when its runtime does.
        answered.await.unwrap_or(Err(Error::Closed))
    }
}
