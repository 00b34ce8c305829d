//! How far what is known of a range can be trusted to be what etcd has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::runtime::{Runtime, Time};

/// Tells how fresh a view is; a cheap handle, to be read from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Freshness {
    runtime: Arc<Runtime>,
    facts: Arc<Facts>,
    /// When the stream that carries the watch was last heard, on any of its watches. 0: never.
    stream: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Facts {
    /// The last proof of its own, in nanoseconds; 0: none yet.
    proved: AtomicU64,
    /// Since when it is stale; 0: it is not.
    stale: AtomicU64,
}

impl Freshness {
    /// Of something that is not known yet.
    pub(super) fn new(runtime: Arc<Runtime>, stream: Arc<AtomicU64>) -> Self {
        let facts = Facts { proved: AtomicU64::new(0), stale: AtomicU64::new(runtime.now().0) };
        Self { runtime, facts: Arc::new(facts), stream }
    }

    /// A list was read that was asked for at this time.
    pub(super) fn proved(&self, asked: Time) {
        self.facts.proved.fetch_max(asked.0, Ordering::Relaxed);
        self.facts.stale.store(0, Ordering::Release);
    }

    /// Changes may be missed from now on.
    pub(crate) fn lost(&self) {
        let heard = self.stream.load(Ordering::Relaxed);
        let now = self.runtime.now().0;
        if self.facts.stale.compare_exchange(0, now, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.facts.proved.fetch_max(heard, Ordering::Relaxed);
        }
    }

    /// For how long it has been known to be stale; `None` while every change is being told.
    pub(crate) fn stale_for(&self) -> Option<Duration> {
        let since = self.facts.stale.load(Ordering::Acquire);
        (since != 0).then(|| Time(since).until(self.runtime.now()))
    }

    /// How long ago the last proof was given: a list, a change, or any sign of life of the stream that would tell one.
    /// `None` before the first.
    pub(crate) fn age(&self) -> Option<Duration> {
        let own = self.facts.proved.load(Ordering::Relaxed);
        let fresh = self.facts.stale.load(Ordering::Acquire) == 0;
        let proof = if fresh { own.max(self.stream.load(Ordering::Relaxed)) } else { own };
        (proof != 0).then(|| Time(proof).until(self.runtime.now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_stale_grows_old_whatever_its_stream_tells() {
        let (runtime, stream) = (Arc::new(Runtime::current()), Arc::new(AtomicU64::new(0)));
        let freshness = Freshness::new(runtime.clone(), stream.clone());
        let (listed, heard) = (Time(1), runtime.now());
        freshness.proved(listed);
        freshness.lost();
        stream.store(heard.0, Ordering::Relaxed);
        assert!(
            freshness.age() >= Some(listed.until(heard)),
            "another watch of the stream was told something"
        );
        // Again in order, and until it is lost: that was a proof.
        freshness.proved(listed);
        assert!(freshness.age() <= Some(heard.until(runtime.now())));
        freshness.lost();
        stream.store(0, Ordering::Relaxed);
        assert!(freshness.age() <= Some(heard.until(runtime.now())));
    }
}
