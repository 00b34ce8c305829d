//! What the handles of one cache share, and the task that follows the prefix.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use serde::de::DeserializeOwned;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

use super::changes::{ConfigChange, Found, Queue};
use super::followers::{ConfigProblem, Followers};
use super::state::{ConfigEntry, State};
use super::typed::{BadValue, Typed};
use crate::error::{Error, Result};
use crate::name::Prefix;
use crate::session::Core;
use crate::session::runtime::Runtime;
use crate::session::view::{Batch, Change, Entry, Freshness, Values, View, unchanged};

/// The pause before a refused list or watch is tried again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// How long [`Cache::wait_for`] waits for an event before it asks etcd whether there is anything to wait for.
const ASK_AFTER: Duration = Duration::from_millis(10);
const ASK_SELDOM: Duration = Duration::from_secs(1);

/// How many changes are handed over to the thread of the handlers together.
const AT_ONCE: usize = 256;

/// One cache.
pub(super) struct Cache {
    pub(super) prefix: Prefix,
    state: ArcSwap<State>,
    pub(super) followers: Followers,
    pub(super) progress: channel::Sender<Progress>,
    opened: Instant,
    /// Set when the first list is complete.
    freshness: OnceLock<Freshness>,
}

/// How far it has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Every change up to here is applied; 0 until the first list is complete.
    pub(super) revision: i64,
    /// The last refusal by etcd that nobody has taken.
    pub(super) refused: Option<Error>,
    pub(super) ended: bool,
}

impl Cache {
    pub(super) fn new(prefix: Prefix) -> Self {
        Self {
            prefix,
            state: ArcSwap::default(),
            followers: Followers::default(),
            progress: channel::Sender::default(),
            opened: Instant::now(),
            freshness: OnceLock::new(),
        }
    }

    pub(super) fn state(&self) -> Arc<State> {
        self.state.load_full()
    }

    pub(super) fn revision(&self) -> i64 {
        self.state.load().revision
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<ConfigEntry> {
        self.state.load().entries.get(key).cloned()
    }

    pub(super) fn get_as<T: DeserializeOwned + Send + Sync + 'static>(
        &self,
        key: &[u8],
    ) -> Result<Option<Arc<T>>> {
        let state = self.state.load();
        if let Some(typed) = state.typed.get(key) {
            return typed.value().map_or_else(
                || state.entries.get(key).map(|e| e.decode().map(Arc::new)).transpose(),
                |value| value.map(Some),
            );
        }
        let Some(entry) = state.entries.get(key) else { return Ok(None) };
        let typed = Arc::new(Typed::new::<T>(entry));
        self.state.rcu(|now| match now.entries.get(key) {
            Some(held) if held.same(entry) && now.typed.get(key).is_none() => {
                let mut next = State::clone(now);
                next.typed.insert(typed.clone());
                Arc::new(next)
            }
            _ => now.clone(),
        });
        if let Some(bad) = typed.bad() {
            self.followers.report(ConfigProblem::BadValue(bad));
        }
        typed.value().transpose()
    }

    pub(super) fn bad_values(&self) -> Vec<BadValue> {
        let mut bad: Vec<_> = self.state.load().typed.iter().filter_map(|typed| typed.bad()).collect();
        bad.sort_by(|a, b| a.key.cmp(&b.key));
        bad
    }

    /// For how long it has been stale.
    pub(super) fn stale_for(&self) -> Option<Duration> {
        self.freshness.get().map_or_else(|| Some(self.opened.elapsed()), Freshness::stale_for)
    }

    pub(super) fn age(&self) -> Option<Duration> {
        self.freshness.get().and_then(Freshness::age)
    }

    /// Waits until every change up to `revision` is applied.
    pub(super) async fn wait_for(&self, core: &Core, revision: i64) -> Result<()> {
        let mut progress = self.progress.subscribe();
        let mut pause = ASK_AFTER;
        loop {
            let applied = progress.wait_for(|now| now.revision >= revision || now.ended);
            match tokio::time::timeout(pause, applied).await {
                Ok(Ok(now)) if now.revision >= revision => return Ok(()),
                Ok(_) => return Err(Error::Closed),
                Err(_) => {}
            }
            pause = (pause * 2).min(ASK_SELDOM);
            let state = self.state();
            if state.revision == 0 || self.stale_for().is_some() {
                continue;
            }
            match unchanged(core, &self.prefix, state.revision, state.entries.len()).await {
                Ok(Some(now)) if now >= revision && self.stale_for().is_none() => return Ok(()),
                // Something is on its way, or the revision is not there yet.
                Ok(_) | Err(Error::Unreachable { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Follows the prefix until the session or the cache ends.
    pub(super) async fn run(self: Arc<Self>, core: Arc<Core>, dropped: CancellationToken) {
        tokio::select! {
            biased;
            () = dropped.cancelled() => {}
            () = self.follow(&core) => {}
        }
        if let Some(freshness) = self.freshness.get() {
            freshness.lost();
        }
        self.followers.end();
        self.progress.send_modify(|progress| progress.ended = true);
    }

    /// Calls the handlers until the end; on a thread where they may block.
    pub(super) async fn call_handlers(self: Arc<Self>, runtime: &Runtime, queue: Arc<Queue>) {
        let mut handlers = Vec::new();
        loop {
            let mut changes = Vec::new();
            match std::future::poll_fn(|cx| queue.poll(cx)).await {
                Found::End => return,
                Found::Nudge => {}
                Found::Change(change) => changes.push(change),
            }
            queue.take(&mut changes, AT_ONCE);
            handlers.extend(self.followers.take_new());
            let cache = self.clone();
            let called = runtime.blocking(move || {
                cache.followers.call_all(&mut handlers, &changes);
                handlers
            });
            // The runtime may end.
            let Some(back) = called.await else { return };
            handlers = back;
        }
    }

    async fn follow(&self, core: &Arc<Core>) {
        let mut view = loop {
            match View::open(core.clone(), self.prefix.clone(), Values::Keep).await {
                Ok(view) => break view,
                Err(error) => {
                    if self.refused(core, error).await {
                        return;
                    }
                }
            }
        };
        let _ = self.freshness.set(view.freshness());
        let all = view.entries().map(|entry| self.change(view.revision(), None, Some(entry.clone())));
        self.publish(view.revision(), all.collect());
        loop {
            match view.next().await {
                Ok(Batch { revision, changes, .. }) => {
                    let change = |Change { before, after }| self.change(revision, before, after);
                    self.publish(revision, changes.into_iter().map(change).collect());
                }
                Err(error) => {
                    if self.refused(core, error).await {
                        return;
                    }
                }
            }
        }
    }

    /// Tells of an error, and waits a little. Whether it is final.
    async fn refused(&self, core: &Core, error: Error) -> bool {
        if matches!(error, Error::Closed) {
            return true;
        }
        self.followers.report(ConfigProblem::Refused { reason: error.to_string() });
        self.progress.send_modify(|progress| progress.refused = Some(error));
        tokio::time::sleep(REFUSED_PAUSE + core.runtime.jitter(REFUSED_PAUSE)).await;
        false
    }

    fn change(&self, revision: i64, before: Option<Arc<Entry>>, after: Option<Arc<Entry>>) -> ConfigChange {
        let skip = self.prefix.as_bytes().len();
        let entry = |entry| ConfigEntry::new(entry, skip);
        ConfigChange { revision, before: before.map(entry), after: after.map(entry), number: 0 }
    }

    /// Applies the changes that lead to `revision`, all at once, and tells everybody.
    fn publish(&self, revision: i64, changes: Vec<ConfigChange>) {
        let mut bad = Vec::new();
        self.followers.tell(changes, |changes| {
            self.state.rcu(|now| {
                let mut next = State::clone(now);
                next.revision = revision;
                changes.iter().for_each(|change| next.apply(change));
                next
            });
            let state = self.state();
            let typed = changes
                .iter()
                .filter(|change| change.after.is_some())
                .map(|change| state.typed.get(change.key()));
            bad.extend(typed.flatten().filter_map(|typed| typed.bad()));
        });
        self.progress.send_modify(|progress| {
            progress.revision = revision;
            progress.refused = None;
        });
        for bad in bad {
            self.followers.report(ConfigProblem::BadValue(bad));
        }
    }
}
