//! Something that happens once, and those who wait for it.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Once set, set for ever. Lies in its owner, where a `CancellationToken` is an allocation of its own: every lock and
/// every waiter has several.
#[derive(Debug, Default)]
pub(super) struct Flag {
    set: AtomicBool,
    changed: Notify,
}

impl Flag {
    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Sets it, and tells those who wait in the order in which they began to.
    pub(super) fn set(&self) {
        self.set.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Waits until it is set.
    pub(super) async fn wait(&self) {
        // Hears of everything from here on. After the look at the flag it would miss what is set in between.
        let changed = self.changed.notified();
        if !self.is_set() {
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn all_who_wait_are_told_and_who_comes_later_need_not_wait() {
        let flag = Flag::default();
        let (mut polled, unpolled) = (Box::pin(flag.wait()), flag.wait());
        assert!(!flag.is_set() && polled.as_mut().now_or_never().is_none());
        flag.set();
        assert!(flag.is_set() && polled.now_or_never().is_some());
        assert!(unpolled.now_or_never().is_some() && flag.wait().now_or_never().is_some());
    }
}
