//! One lease of a session, and the local knowledge of its end.

use std::num::NonZeroI64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::flag::Flag;
use super::runtime::{Runtime, Time};
use super::slots::{Nonces, Slots};

/// How long the answers to requests under way are waited for when a generation ends. They tell what became of a write, which
/// otherwise nobody knows.
const LAST_ANSWERS: Duration = Duration::from_millis(250);

/// One lease of a session, from its grant to its loss.
#[derive(Debug)]
pub(crate) struct Generation {
    pub(crate) number: u64,
    /// Never 0: a key with lease 0 would stay for ever.
    pub(crate) lease: NonZeroI64,
    pub(crate) slots: Slots,
    pub(crate) nonces: Arc<Nonces>,
    deadline: AtomicU64,
    ended: Flag,
    runtime: Arc<Runtime>,
}

/// The generation that a session has now, if any.
#[derive(Debug, Default)]
pub(crate) struct Current {
    generation: Mutex<Option<Arc<Generation>>>,
    /// Nothing follows any more.
    over: AtomicBool,
    // Not a `watch`, which wakes those who wait in an order drawn by chance: a run from a seed could not be had again.
    changed: Notify,
}

impl Current {
    pub(crate) fn living(&self) -> Option<Arc<Generation>> {
        let generation = self.generation().clone();
        generation.filter(|generation| generation.is_alive())
    }

    /// Waits for a generation that lives; `None` if there will be none.
    pub(crate) async fn next(&self) -> Option<Arc<Generation>> {
        loop {
            // Hears of everything from here on.
            let changed = self.changed.notified();
            if let Some(generation) = self.living() {
                return Some(generation);
            }
            if self.over.load(Ordering::Acquire) {
                return None;
            }
            changed.await;
        }
    }

    pub(crate) fn replace(&self, next: Option<Arc<Generation>>) {
        *self.generation() = next;
        self.changed.notify_waiters();
    }

    /// Ends the generation there is, and all that could follow.
    pub(crate) fn end(&self) {
        let last = self.generation().take();
        last.iter().for_each(|generation| generation.end());
        self.over.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    fn generation(&self) -> MutexGuard<'_, Option<Arc<Generation>>> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The deadline of a generation that is over.
const OVER: u64 = 0;

impl Generation {
    pub(crate) fn new(
        number: u64,
        lease: NonZeroI64,
        deadline: Time,
        slots: Slots,
        runtime: Arc<Runtime>,
    ) -> Self {
        let deadline = AtomicU64::new(deadline.0);
        Self { number, lease, slots, nonces: Arc::default(), deadline, ended: Flag::default(), runtime }
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
        self.ended.wait().await;
    }

    /// Waits for the end, and a moment longer: what was under way has been answered then, or its answer is late.
    pub(crate) async fn over(&self) {
        self.ended().await;
        tokio::time::sleep(LAST_ANSWERS).await;
    }

    /// Ends the generation now: the lease is known to be gone, or is about to be revoked.
    pub(crate) fn end(&self) {
        self.deadline.store(OVER, Ordering::Release);
        self.ended.set();
    }

    fn close_at(&self, deadline: u64) -> bool {
        let closed =
            self.deadline.compare_exchange(deadline, OVER, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if closed {
            self.ended.set();
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt as _;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn generation(deadline: impl Fn(Time) -> Time) -> (Generation, Time) {
        let runtime = Arc::new(Runtime::current());
        let now = runtime.now();
        (Generation::new(1, NonZeroI64::MAX, deadline(now), Slots::new(0), runtime), now)
    }

    #[tokio::test]
    async fn who_sees_the_deadline_passed_says_so_for_all() {
        let (generation, now) = generation(|now| now);
        assert!(generation.ended().now_or_never().is_none());
        assert!(!generation.is_alive());
        assert!(generation.ended().now_or_never().is_some(), "nobody else hears of it");
        assert!(!generation.extend(now.after(SECOND)) && !generation.is_alive());
    }

    #[tokio::test]
    async fn a_renewal_that_was_sent_earlier_takes_nothing_away() {
        let (generation, now) = generation(|now| now.after(SECOND));
        assert!(generation.extend(now.after(SECOND * 20)) && generation.extend(now.after(SECOND * 10)));
        assert_eq!(generation.deadline(), now.after(SECOND * 20));
    }
}
