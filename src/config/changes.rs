//! Changes, and the queues through which they reach those who follow them.
//!
//! A queue belongs to its reader: however slow one is, nobody else waits for it. It holds every change in order as long as
//! it is short; when it grows, changes of one key are joined into one, so that it never holds more than twice as many
//! as there are keys.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::Stream;

use super::state::ConfigEntry;

/// How many changes may wait before those of one key are joined.
const JOINED_ABOVE: usize = 1024;

/// What became of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigChange {
    /// The state of the cache to which this belongs; all changes of one revision have the same.
    pub revision: i64,
    /// The key as it was; `None` if it was not there.
    pub before: Option<ConfigEntry>,
    /// The key as it is; `None` if it was deleted.
    pub after: Option<ConfigEntry>,
    /// Whom it concerns: those who came before it.
    pub(super) number: u64,
}

impl ConfigChange {
    /// The key, without the prefix of the cache.
    pub fn key(&self) -> &[u8] {
        self.after.as_ref().or(self.before.as_ref()).map_or(&[], ConfigEntry::key)
    }

    /// The new value; `None` if the key was deleted.
    pub fn value(&self) -> Option<&[u8]> {
        self.after.as_ref().map(ConfigEntry::value)
    }
}

/// Which keys somebody follows.
#[derive(Debug, Clone)]
pub(super) enum Pattern {
    Key(Box<[u8]>),
    Prefix(Box<[u8]>),
}

impl Pattern {
    pub(super) fn matches(&self, key: &[u8]) -> bool {
        match self {
            Self::Key(own) => key == &**own,
            Self::Prefix(prefix) => key.starts_with(prefix),
        }
    }
}

/// The queue of one reader.
#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    changes: VecDeque<ConfigChange>,
    /// Above this length changes are joined.
    most: usize,
    ended: bool,
    /// There is something to look after beside changes.
    nudged: bool,
    reader: Option<Waker>,
}

/// What a reader finds.
pub(super) enum Found {
    Change(ConfigChange),
    Nudge,
    End,
}

impl Queue {
    pub(super) fn new() -> Self {
        let (changes, most) = (VecDeque::new(), JOINED_ABOVE);
        Self { state: Mutex::new(Waiting { changes, most, ended: false, nudged: false, reader: None }) }
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, changes: impl IntoIterator<Item = ConfigChange>) {
        self.update(|waiting| {
            waiting.changes.extend(changes);
            if waiting.changes.len() > waiting.most {
                waiting.changes = joined(std::mem::take(&mut waiting.changes));
                waiting.most = JOINED_ABOVE.max(waiting.changes.len() * 2);
            }
        });
    }

    pub(super) fn nudge(&self) {
        self.update(|waiting| waiting.nudged = true);
    }

    /// No more will come.
    pub(super) fn end(&self) {
        self.update(|waiting| waiting.ended = true);
    }

    fn update(&self, update: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.state();
        update(&mut waiting);
        let some = !waiting.changes.is_empty() || waiting.nudged || waiting.ended;
        let reader = if some { waiting.reader.take() } else { None };
        drop(waiting);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Takes more changes, up to `most` in all, without waiting.
    pub(super) fn take(&self, changes: &mut Vec<ConfigChange>, most: usize) {
        let mut waiting = self.state();
        let more = waiting.changes.len().min(most.saturating_sub(changes.len()));
        changes.extend(waiting.changes.drain(..more));
    }

    /// What comes next.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Found> {
        let mut waiting = self.state();
        if std::mem::take(&mut waiting.nudged) {
            return Poll::Ready(Found::Nudge);
        }
        if let Some(change) = waiting.changes.pop_front() {
            if waiting.changes.is_empty() {
                (waiting.changes, waiting.most) = (VecDeque::new(), JOINED_ABOVE);
            }
            return Poll::Ready(Found::Change(change));
        }
        if waiting.ended {
            return Poll::Ready(Found::End);
        }
        waiting.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// One change per key, in the order of the last ones: from the oldest state to the newest.
fn joined(changes: VecDeque<ConfigChange>) -> VecDeque<ConfigChange> {
    let mut kept: Vec<ConfigChange> = Vec::new();
    let mut places: HashMap<Vec<u8>, usize> = HashMap::new();
    for change in changes.into_iter().rev() {
        match places.get(change.key()) {
            // A key that came and went keeps its last state, to say which it was.
            Some(place) if change.before.is_some() || kept[*place].after.is_some() => {
                kept[*place].before = change.before;
            }
            Some(_) => {}
            None => {
                places.insert(change.key().to_vec(), kept.len());
                kept.push(change);
            }
        }
    }
    kept.into_iter().rev().collect()
}

/// The stream of [`ConfigCache::changes`](super::ConfigCache::changes).
#[must_use = "a stream does nothing unless polled"]
#[derive(Debug)]
pub struct ConfigChanges {
    pub(super) queue: Arc<Queue>,
}

impl Stream for ConfigChanges {
    type Item = ConfigChange;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<ConfigChange>> {
        loop {
            match std::task::ready!(self.queue.poll(cx)) {
                Found::Change(change) => return Poll::Ready(Some(change)),
                Found::Nudge => {}
                Found::End => return Poll::Ready(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::view::Entry;

    fn entry(key: &str, revision: i64) -> ConfigEntry {
        let (key, value) = (key.into(), revision.to_string().into());
        let (create_revision, mod_revision, lease) = (1, revision, 0);
        ConfigEntry::new(Arc::new(Entry { key, value, create_revision, mod_revision, lease }), 0)
    }

    fn change(key: &str, before: Option<i64>, after: Option<i64>) -> ConfigChange {
        let of = |revision: Option<i64>| revision.map(|revision| entry(key, revision));
        ConfigChange { revision: 0, before: of(before), after: of(after), number: 0 }
    }

    #[test]
    fn joined_changes_lead_from_the_oldest_state_to_the_newest() {
        let changes = [
            change("a", Some(1), Some(2)),
            change("b", None, Some(3)),
            change("c", Some(1), Some(4)),
            change("a", Some(2), Some(5)),
            change("b", Some(3), None),
        ];
        let kept: Vec<_> = joined(changes.into()).into();
        let expected =
            [change("c", Some(1), Some(4)), change("a", Some(1), Some(5)), change("b", Some(3), None)];
        assert_eq!(kept, expected);
    }

    #[test]
    fn a_queue_that_nobody_reads_stays_small() {
        let queue = Queue::new();
        for revision in 0..100_000 {
            queue.push([change(&(revision % 10).to_string(), None, Some(revision))]);
        }
        assert!(queue.state().changes.len() <= JOINED_ABOVE);
    }
}
