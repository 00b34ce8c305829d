//! The connections to etcd and what goes over them, shared by a session and all that were opened beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;

use super::keepalive::Keepalives;
use super::rpc::Rpc;
use super::watch::{Hub, Kind};

/// What sessions beside each other share. Ends with the last of them.
#[derive(Debug)]
pub(crate) struct Transport {
    pub(crate) rpc: Arc<Rpc>,
    pub(crate) keepalives: Keepalives,
    /// Watches for lines and owned keys.
    pub(crate) deletions: Hub,
    /// Watches for views.
    pub(crate) changes: Hub,
    sessions: AtomicUsize,
    closing: CancellationToken,
}

impl Transport {
    /// For one session; `closing` is cancelled when the last has left.
    pub(crate) fn new(rpc: Arc<Rpc>, keepalives: Arc<Rpc>, closing: CancellationToken) -> Self {
        Self {
            keepalives: Keepalives::new(keepalives, closing.clone()),
            deletions: Hub::new(Kind::Deletions, rpc.clone(), closing.clone()),
            changes: Hub::new(Kind::Everything, rpc.clone(), closing.clone()),
            rpc,
            sessions: AtomicUsize::new(1),
            closing,
        }
    }

    /// Counts a further session; false if the last has left already.
    pub(crate) fn join(&self) -> bool {
        let one_more = |sessions: usize| (sessions > 0).then_some(sessions + 1);
        self.sessions.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Ends everything with the last session.
    pub(crate) fn leave(&self) {
        if self.sessions.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.closing.cancel();
        }
    }

    /// Waits until everything has ended, if the last session has left.
    pub(crate) async fn ended(&self) {
        if self.closing.is_cancelled() {
            self.rpc.runtime.idle().await;
        }
    }
}
