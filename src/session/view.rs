//! A prefix kept in memory: listed at one revision, then every change in the order of commit, without gaps.
//!
//! When changes were missed (compacted meanwhile, more than a slow reader's queue holds, a restored backup) the prefix is
//! listed again, and the changes are derived by comparing with what is held, deletions included. Until the new list is
//! complete the old state stays: an error never empties a view, it only makes it stale.

mod list;

pub(crate) use self::list::unchanged;
pub(crate) use super::freshness::Freshness;

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::Core;
use super::runtime::Time;
pub(crate) use super::watch::Entry;
use super::watch::{Changed, Event, News, Range, Subscription};
use crate::error::{Error, Result};
use crate::name::Prefix;

/// Whether entries come with their values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Values {
    Keep,
    Drop,
}

/// What became of one key. At least one side is there.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) before: Option<Arc<Entry>>,
    pub(crate) after: Option<Arc<Entry>>,
}

/// What one revision changed, as a whole; or what a new list says has changed since.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) revision: i64,
    pub(crate) changes: Vec<Change>,
    /// Derived from a new list: states in between were missed.
    pub(crate) listed: bool,
}

/// What is under a prefix, revision by revision.
pub(crate) struct View {
    core: Arc<Core>,
    prefix: Prefix,
    values: Values,
    entries: Entries,
    /// The entries are those of this revision.
    revision: i64,
    freshness: Freshness,
    /// `None`: changes were missed.
    watch: Option<Subscription>,
    /// Heard but not applied.
    events: VecDeque<(Arc<[Event]>, usize)>,
    /// The list under way. It is kept: who waits for changes waits for other things as well, and would begin it anew with
    /// each of them, for ever.
    listing: Option<Listing>,
}

struct Listing {
    /// When it began.
    asked: Time,
    listed: BoxFuture<'static, Result<(Entries, i64)>>,
}

/// Entries in the order of their keys.
type Entries = BTreeSet<ByKey>;

/// An entry that stands for its key.
#[derive(Debug, Clone)]
struct ByKey(Arc<Entry>);

impl View {
    /// Lists the prefix; tries until etcd answers.
    ///
    /// # Cancel safety
    ///
    /// Nothing is left behind when dropped.
    pub(crate) async fn open(core: Arc<Core>, prefix: Prefix, values: Values) -> Result<Self> {
        let (freshness, entries) = (core.changes.freshness(), Entries::new());
        let (watch, events, listing) = (None, VecDeque::new(), None);
        let mut view = Self { core, prefix, values, entries, revision: 0, freshness, watch, events, listing };
        view.list().await?;
        Ok(view)
    }

    pub(crate) fn get(&self, key: &[u8]) -> Option<&Arc<Entry>> {
        self.entries.get(key).map(|ByKey(entry)| entry)
    }

    /// All entries, in the order of their keys.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.iter().map(|ByKey(entry)| entry)
    }

    /// The revision of which the entries are. Lower than before after a restored backup.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    pub(crate) fn freshness(&self) -> Freshness {
        self.freshness.clone()
    }

    /// Waits for the next revision that changed something here, and applies it whole.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], and what etcd refuses for good, like a missing permission. The entries stay, stale; a later call
    /// tries again.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when dropped, and what was read so far is kept.
    pub(crate) async fn next(&mut self) -> Result<Batch> {
        loop {
            if let Some(batch) = self.apply_one_revision() {
                return Ok(batch);
            }
            let Some(watch) = &mut self.watch else {
                let changes = self.list().await?;
                return Ok(Batch { revision: self.revision, changes, listed: true });
            };
            let news = tokio::select! {
                biased;
                () = self.core.closing.cancelled() => return Err(Error::Closed),
                news = watch.next() => news,
            };
            match news {
                Ok(News::Events(events)) => self.events.push_back((events, 0)),
                Ok(News::Gap) => self.missed(),
                Err(error) => {
                    self.missed();
                    return Err(error);
                }
            }
        }
    }

    fn missed(&mut self) {
        self.freshness.lost();
        self.watch = None;
    }

    /// Reads everything and goes on from there; tells what is different.
    async fn list(&mut self) -> Result<Vec<Change>> {
        let Listing { asked, listed } = match &mut self.listing {
            Some(listing) => listing,
            None => {
                let (core, prefix, held) = (self.core.clone(), self.prefix.clone(), self.entries.clone());
                let (asked, values) = (core.runtime.now(), self.values);
                let listed = async move { list::list(&core, &prefix, values, &held).await }.boxed();
                self.listing.insert(Listing { asked, listed })
            }
        };
        let (asked, listed) = (*asked, listed.await);
        self.listing = None;
        let (entries, revision) = listed?;
        let changes = differences(&self.entries, &entries);
        (self.entries, self.revision) = (entries, revision);
        self.freshness.proved(asked);
        let range = Range::prefix(&self.prefix);
        self.watch = Some(self.core.changes.follow(&range, revision, self.freshness.clone()));
        Ok(changes)
    }

    fn apply_one_revision(&mut self) -> Option<Batch> {
        let mut applied: Option<Batch> = None;
        while let Some((events, at)) = self.events.front_mut() {
            let Some(event) = events.get(*at) else {
                self.events.pop_front();
                continue;
            };
            let batch = match &mut applied {
                Some(batch) if batch.revision != event.revision => break,
                Some(batch) => batch,
                None => {
                    applied.insert(Batch { revision: event.revision, changes: Vec::new(), listed: false })
                }
            };
            let after = match &event.change {
                Changed::Put(entry) if self.values == Values::Keep => Some(entry.clone()),
                Changed::Put(entry) => Some(Arc::new(entry.without_value())),
                Changed::Deleted(_) => None,
            };
            let before = match &after {
                Some(entry) => self.entries.replace(ByKey(entry.clone())),
                None => self.entries.take(event.key()),
            };
            let before = before.map(|ByKey(entry)| entry);
            if before.is_some() || after.is_some() {
                batch.changes.push(Change { before, after });
            }
            *at += 1;
        }
        if let Some(batch) = &applied {
            self.revision = batch.revision;
        }
        applied
    }
}

/// What was deleted, then what was put, in the order of commit.
fn differences(old: &Entries, new: &Entries) -> Vec<Change> {
    let deleted = old.iter().filter(|entry| !new.contains(entry.key()));
    let mut changes: Vec<Change> =
        deleted.map(|ByKey(entry)| Change { before: Some(entry.clone()), after: None }).collect();
    let deletions = changes.len();
    for entry in new {
        let before = old.get(entry.key()).map(|ByKey(before)| before.clone());
        if before.as_ref() != Some(&entry.0) {
            changes.push(Change { before, after: Some(entry.0.clone()) });
        }
    }
    changes[deletions..].sort_by_key(|change| change.after.as_ref().map(|entry| entry.mod_revision));
    changes
}

// === impl Entry, ByKey ===

impl Entry {
    fn without_value(&self) -> Self {
        let Self { create_revision, mod_revision, lease, .. } = *self;
        Self { key: self.key.clone(), value: Vec::new(), create_revision, mod_revision, lease }
    }
}

impl ByKey {
    fn key(&self) -> &[u8] {
        &self.0.key
    }
}

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for ByKey {}

impl PartialOrd for ByKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(other.key())
    }
}
