//! The task that makes snapshots of what the view shows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Filter, Malformed, Snapshot};
use crate::name;
use crate::service::{Format, FormatError, Instance};
use crate::session::runtime::{Backoff, Runtime};
use crate::session::view::{Batch, Entry, View};

/// How many revisions may go into one snapshot.
const AT_ONCE: usize = 1000;

/// What the instances are protected from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Protection {
    /// More than this share of them must not vanish...
    pub(super) share: f64,
    /// ... within this time; it is also how long they are kept.
    pub(super) keep: Duration,
}

/// Follows the entries of a service.
pub(super) struct Follower {
    view: View,
    known: Known,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

/// What is known of the entries.
struct Known {
    format: Arc<dyn Format>,
    service: String,
    filter: Filter,
    protection: Option<Protection>,
    entries: BTreeMap<Vec<u8>, State>,
    vanished: BTreeMap<Vec<u8>, (Arc<Instance>, Instant)>,
}

/// What is known of one entry. At least one of both is there.
struct State {
    /// Its last good state, if that is wanted.
    instance: Option<Arc<Instance>>,
    error: Option<FormatError>,
    mod_revision: i64,
}

impl Follower {
    pub(super) fn new(
        view: View,
        format: Arc<dyn Format>,
        service: String,
        filter: Filter,
        protection: Option<Protection>,
    ) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let (entries, vanished) = (BTreeMap::new(), BTreeMap::new());
        let mut known = Known { format, service, filter, protection, entries, vanished };
        view.entries().for_each(|entry| known.put(entry));
        let (snapshots, receiver) = watch::channel(Arc::new(known.snapshot(view.revision())));
        (Self { view, known, snapshots }, receiver)
    }

    pub(super) async fn run(mut self, runtime: Arc<Runtime>, closing: CancellationToken) {
        let mut backoff = Backoff::of_refusals();
        loop {
            tokio::select! {
                biased;
                () = closing.cancelled() => return,
                batch = self.view.next() => match batch {
                    Ok(batch) => {
                        backoff = Backoff::of_refusals();
                        self.known.apply(&batch);
                        // What has come by now goes into the same snapshot.
                        for _ in 0..AT_ONCE {
                            let Some(Ok(batch)) = self.view.next().now_or_never() else { break };
                            self.known.apply(&batch);
                        }
                    }
                    Err(error) => {
                        tracing::warn!(service = %self.known.service, %error, "cannot follow the service");
                        backoff.wait(&runtime).await;
                    }
                },
                () = wait(self.known.next_to_go()) => {}
            }
            self.snapshots.send_replace(Arc::new(self.known.snapshot(self.view.revision())));
        }
    }
}

async fn wait(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

impl Known {
    fn apply(&mut self, batch: &Batch) {
        for change in &batch.changes {
            match (&change.after, &change.before) {
                (Some(entry), _) => self.put(entry),
                (None, Some(entry)) => self.delete(&entry.key),
                (None, None) => {}
            }
        }
    }

    fn put(&mut self, entry: &Entry) {
        let decoded = self.format.decode(&self.service, &entry.key, &entry.value);
        let before = self.entries.get_mut(&entry.key);
        match decoded {
            Ok(Some(instance)) if self.filter.wants(&instance) => {
                self.vanished.remove(&entry.key);
                // Who is as before stays the same, so that nobody has to look.
                let before = before.and_then(|state| state.instance.take());
                let instance = before.filter(|before| **before == instance).unwrap_or(Arc::new(instance));
                let state = State { instance: Some(instance), error: None, mod_revision: entry.mod_revision };
                self.entries.insert(entry.key.clone(), state);
            }
            Ok(_) => {
                self.vanished.remove(&entry.key);
                self.entries.remove(&entry.key);
            }
            Err(error) => {
                let key = name::display(&entry.key);
                tracing::warn!(service = %self.service, %key, %error, "malformed entry");
                match before {
                    Some(state) => state.error = Some(error),
                    None => {
                        let state = State { instance: None, error: Some(error), mod_revision: 0 };
                        self.entries.insert(entry.key.clone(), state);
                    }
                }
            }
        }
    }

    fn delete(&mut self, key: &[u8]) {
        let Some((key, state)) = self.entries.remove_entry(key) else { return };
        if let Some(instance) = state.instance
            && self.protection.is_some()
        {
            self.vanished.insert(key, (instance, Instant::now()));
        }
    }

    /// When the first of those who have vanished is to be given up.
    fn next_to_go(&self) -> Option<Instant> {
        let keep = self.protection?.keep;
        self.vanished.values().map(|(_, since)| *since + keep).min()
    }

    fn snapshot(&mut self, revision: i64) -> Snapshot {
        let mut by_id: BTreeMap<&str, (i64, &Arc<Instance>)> = BTreeMap::new();
        for State { instance, mod_revision, .. } in self.entries.values() {
            let Some(instance) = instance else { continue };
            let newest = by_id.entry(&instance.id).or_insert((*mod_revision, instance));
            if newest.0 < *mod_revision {
                *newest = (*mod_revision, instance);
            }
        }
        let mut kept = 0;
        if let Some(Protection { share, keep }) = self.protection {
            let now = Instant::now();
            self.vanished.retain(|_, (instance, since)| {
                *since + keep > now && !by_id.contains_key(instance.id.as_str())
            });
            let (gone, all) = (self.vanished.len(), self.vanished.len() + by_id.len());
            #[allow(clippy::cast_precision_loss, reason = "nobody has so many instances")]
            if gone > 0 && (gone == all || gone as f64 > share * all as f64) {
                kept = gone;
                by_id.extend(
                    self.vanished.values().map(|(instance, _)| (instance.id.as_str(), (0, instance))),
                );
            }
        }
        let instances = by_id.into_values().map(|(_, instance)| instance.clone()).collect();
        let malformed = self.entries.iter().filter_map(|(key, state)| {
            state.error.clone().map(|error| Malformed { key: key.clone(), error })
        });
        Snapshot { revision, instances, malformed: malformed.collect(), kept }
    }
}

#[cfg(test)]
mod tests;
