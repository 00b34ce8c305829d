//! One lease of a session, and the local knowledge of its end.

use std::num::NonZeroI64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use super::runtime::{Runtime, Time};
use super::slots::{Nonces, Slots};

/// One lease of a session, from its grant to its loss.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) number: u64,
    /// Never 0: a key with lease 0 would stay for ever.
    pub(crate) lease: NonZeroI64,
    pub(crate) slots: Slots,
    pub(crate) nonces: Arc<Nonces>,
    deadline: AtomicU64,
    ended: CancellationToken,
    runtime: Arc<Runtime>,
}

/// The generation that a session has now, if any.
#[derive(Debug, Default)]
pub(crate) struct Current(Mutex<Option<Arc<Generation>>>);

impl Current {
    pub(crate) fn living(&self) -> Option<Arc<Generation>> {
        self.generation().clone().filter(|generation| generation.is_alive())
    }

    /// Gives what was there before.
    pub(crate) fn replace(&self, next: Option<Arc<Generation>>) -> Option<Arc<Generation>> {
        std::mem::replace(&mut *self.generation(), next)
    }

    fn generation(&self) -> MutexGuard<'_, Option<Arc<Generation>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The deadline of a generation that is over.
const OVER: u64 = 0;

impl Generation {
    pub(crate) fn new(number: u64, lease: NonZeroI64, deadline: Time, runtime: Arc<Runtime>) -> Self {
        let deadline = AtomicU64::new(deadline.0);
        Self {
            number,
            lease,
            slots: Slots::default(),
            nonces: Arc::default(),
            deadline,
            ended: CancellationToken::new(),
            runtime,
        }
    }

    /// Whether the lease certainly lives. Compares clocks in the caller's thread; once false, false for ever.
    pub(crate) fn is_alive(&self) -> bool {
        loop {
            let deadline = self.deadline.load(Ordering::Acquire);
            if deadline == OVER {
                return false;
            }
            if self.runtime.now().0 < deadline {
                return true;
            }
            // Passed. Whoever sees it says so for all, unless a renewal was faster.
            if self.close_at(deadline) {
                return false;
            }
        }
    }

    /// Waits for the end.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends the generation now: the lease is known to be gone, or is about to be revoked.
    pub(crate) fn end(&self) {
        self.deadline.store(OVER, Ordering::Release);
        self.ended.cancel();
    }

    fn close_at(&self, deadline: u64) -> bool {
        let closed =
            self.deadline.compare_exchange(deadline, OVER, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if closed {
            self.ended.cancel();
        }
        closed
    }

    /// Moves the deadline. False, and the end, if it has passed meanwhile.
    pub(crate) fn extend(&self, deadline: Time) -> bool {
        loop {
            if !self.is_alive() {
                return false;
            }
            let old = self.deadline.load(Ordering::Acquire);
            if old == OVER {
                return false;
            }
            // A renewal that was sent earlier may be confirmed later.
            let new = old.max(deadline.0);
            if self.deadline.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return true;
            }
        }
    }

    pub(crate) fn deadline(&self) -> Time {
        Time(self.deadline.load(Ordering::Acquire))
    }
}
