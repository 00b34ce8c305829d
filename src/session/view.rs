//! A prefix kept in memory: listed at one revision, then every change in the order of commit, without gaps.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use etcd_client::GetOptions;

use super::Core;
use super::rpc::revision;
use super::watch::{Event, News, Put, Range, Subscription};
use crate::error::{Error, Result};
use crate::name::Prefix;

/// Keys asked for at once when listing.
const PAGE: i64 = 1000;

/// What is under a prefix, revision by revision.
pub(crate) struct View {
    core: Arc<Core>,
    prefix: Prefix,
    entries: BTreeMap<Vec<u8>, Put>,
    /// The entries are those of this revision.
    revision: i64,
    watch: Subscription,
    /// Heard but not applied.
    events: VecDeque<(Arc<[Event]>, usize)>,
}

impl View {
    /// Lists the prefix; tries until etcd answers.
    pub(crate) async fn open(core: Arc<Core>, prefix: Prefix) -> Result<Self> {
        let (entries, revision) = list(&core, &prefix).await?;
        let watch = core.changes.watch_from(&Range::prefix(&prefix), revision + 1);
        Ok(Self { core, prefix, entries, revision, watch, events: VecDeque::new() })
    }

    pub(crate) fn entries(&self) -> &BTreeMap<Vec<u8>, Put> {
        &self.entries
    }

    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// Waits for the next revision that changed something here, and applies it whole.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost when dropped.
    pub(crate) async fn next(&mut self) -> Result<()> {
        loop {
            if self.apply_one_revision() {
                return Ok(());
            }
            match self.watch.next().await? {
                News::Events(events) => self.events.push_back((events, 0)),
                News::Gap => {
                    let (entries, revision) = list(&self.core, &self.prefix).await?;
                    self.watch = self.core.changes.watch_from(&Range::prefix(&self.prefix), revision + 1);
                    (self.entries, self.revision) = (entries, revision);
                    self.events.clear();
                    return Ok(());
                }
            }
        }
    }

    fn apply_one_revision(&mut self) -> bool {
        let mut applied = None;
        while let Some((events, at)) = self.events.front_mut() {
            let Some(event) = events.get(*at) else {
                self.events.pop_front();
                continue;
            };
            if applied.is_some_and(|revision| revision != event.revision) {
                break;
            }
            applied = Some(event.revision);
            match &event.put {
                Some(put) => self.entries.insert(event.key.clone(), put.clone()),
                None => self.entries.remove(&event.key),
            };
            *at += 1;
        }
        if let Some(revision) = applied {
            self.revision = revision;
        }
        applied.is_some()
    }
}

/// Reads the prefix in pages, all of one revision.
async fn list(core: &Core, prefix: &Prefix) -> Result<(BTreeMap<Vec<u8>, Put>, i64)> {
    'again: loop {
        let mut entries = BTreeMap::new();
        let mut from = prefix.as_bytes().to_vec();
        let mut at = 0;
        loop {
            let mut options = GetOptions::new().with_range(prefix.end()).with_limit(PAGE);
            if at != 0 {
                options = options.with_revision(at);
            }
            let read = core.rpc.get(&from, options, None);
            let mut page = tokio::select! {
                biased;
                () = core.closing.cancelled() => return Err(Error::Closed),
                page = read => match page {
                    Ok(page) => page,
                    // The revision of the first page was compacted meanwhile.
                    Err(Error::Etcd { .. }) if at != 0 => continue 'again,
                    Err(error) => return Err(error),
                },
            };
            if at == 0 {
                at = revision(page.header());
            }
            let more = page.more();
            for kv in page.take_kvs() {
                let (key, value) = (kv.key().to_vec(), kv.value().to_vec());
                from = [key.as_slice(), b"\0"].concat();
                entries.insert(key, Put { value, create_revision: kv.create_revision(), lease: kv.lease() });
            }
            if !more {
                return Ok((entries, at));
            }
        }
    }
}
