//! The watch streams of a session: many watches on one gRPC stream, resumed without gaps.
//!
//! A [`Hub`] carries watches on one stream and shares one watch at the server among all who want the same range. The
//! session has two hubs: one for lines and owned keys, which tells deletions only, and one for views; so a busy view
//! cannot slow a hand-off.
//!
//! The stream is always read; subscribers have queues of their own, and one that lets it overflow finds a gap. A broken
//! stream is opened again and every watch goes on after the last revision that was complete. When that is not possible
//! (compacted, or the store is older than before: a restored backup) the watch ends with [`Message::Gap`], and its owner
//! reads again.

mod event;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use etcd_client::proto::PbEvent;
use futures::StreamExt as _;
// Empty ones take a tenth of the space of tokio's, and a session may have thousands.
use futures::channel::mpsc::{Receiver, Sender, channel};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use self::event::{Changed, Entry, Event};
use self::stream::Task;
use super::freshness::Freshness;
use super::rpc::Rpc;
use crate::error::{Error, Result};
use crate::name;

/// How many messages may wait for a subscriber.
const QUEUE: usize = 1024;

/// What a hub's watches tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Deletions, without values.
    Deletions,
    /// Puts and deletions.
    Everything,
}

/// A key, or a range of keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    key: Vec<u8>,
    end: Option<Vec<u8>>,
}

impl Range {
    pub(crate) fn key(key: &[u8]) -> Self {
        Self { key: key.to_vec(), end: None }
    }

    pub(crate) fn prefix(prefix: &name::Prefix) -> Self {
        Self { key: prefix.as_bytes().to_vec(), end: Some(prefix.end()) }
    }

    fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            None => key == self.key,
            Some(end) => key >= self.key.as_slice() && key < end.as_slice(),
        }
    }
}

/// What a subscriber hears.
#[derive(Debug, Clone)]
enum Message {
    /// The watch exists and tells everything above this revision.
    Created(i64),
    /// All changes of one or several whole revisions, in order.
    Events(Arc<[Event]>),
    /// Changes were missed, or may have been; the watch is over.
    Gap,
    /// etcd denies the watch; it is over.
    Denied(Arc<str>),
}

/// What a subscriber makes of it.
#[derive(Debug)]
pub(crate) enum News {
    Events(Arc<[Event]>),
    /// Watch again, then read.
    Gap,
}

/// Many watches on one stream.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    kind: Kind,
    rpc: Arc<Rpc>,
    table: Mutex<Table>,
    /// To the task; it looks into the table for what the id means.
    requests: UnboundedSender<Request>,
    /// What the task needs, until the first watch starts it.
    idle: Mutex<Option<(UnboundedReceiver<Request>, CancellationToken)>>,
    /// When the stream was last heard, by the clock of the runtime.
    heard: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Table {
    last_id: i64,
    last_subscriber: u64,
    watches: BTreeMap<i64, Watch>,
    /// The watches that others may join.
    by_range: HashMap<Arc<Range>, i64>,
    /// The watches without subscribers, which may have been joined again since.
    lingering: Vec<i64>,
}

#[derive(Debug)]
enum Request {
    Create(i64),
    Cancel(i64),
    /// Somebody lingers: look after it.
    Linger,
}

/// One watch at the server.
#[derive(Debug)]
struct Watch {
    range: Arc<Range>,
    /// Everything up to here was told, or lies before the watch; `None` until a watch from "now" was created.
    told: Option<i64>,
    subscribers: Vec<(u64, Sender<Message>)>,
    fragments: Vec<PbEvent>,
    /// It was asked for on an earlier stream, or is on this one.
    asked: bool,
    /// It has told something on this stream, so it does not lag behind.
    in_step: bool,
    lingers: bool,
    alone_since: Option<Instant>,
    /// How many events were told to nobody since.
    unheard: usize,
    /// Of whoever wants to know whether the watch is being told.
    freshness: Option<Freshness>,
}

/// A share of a watch. Dropping it ends the watch, unless others share it or it lingers.
#[derive(Debug)]
pub(crate) struct Subscription {
    shared: Arc<Shared>,
    watch: i64,
    subscriber: u64,
    messages: Receiver<Message>,
    covered: Option<i64>,
}

impl Hub {
    pub(crate) fn new(kind: Kind, rpc: Arc<Rpc>, closing: CancellationToken) -> Self {
        let (requests, inbox) = unbounded_channel();
        let idle = Mutex::new(Some((inbox, closing)));
        let (table, heard) = (Mutex::default(), Arc::default());
        Self { shared: Arc::new(Shared { kind, rpc, table, requests, idle, heard }) }
    }

    /// For a watch of this hub, which keeps it up to date.
    pub(crate) fn freshness(&self) -> Freshness {
        Freshness::new(self.shared.rpc.runtime.clone(), self.shared.heard.clone())
    }

    /// Shares the watch of a range if there is one already.
    pub(crate) fn join(&self, range: &Range) -> Option<Subscription> {
        let mut table = self.shared.table();
        let id = *table.by_range.get(range)?;
        Some(self.shared.subscribe(&mut table, id))
    }

    /// Watches a range from now on; [`Subscription::covered`] tells from which revision that is.
    pub(crate) fn watch(&self, range: &Range) -> Subscription {
        let mut table = self.shared.table();
        let id = match table.by_range.get(range) {
            Some(id) => *id,
            None => {
                let range = Arc::new(range.clone());
                let id = self.shared.add(&mut table, range.clone(), None, None);
                table.by_range.insert(range, id);
                id
            }
        };
        self.shared.subscribe(&mut table, id)
    }

    /// Watches a range from `revision` on. Changes that are past already may come up to 100 ms late.
    pub(crate) fn watch_from(&self, range: &Range, revision: i64) -> Subscription {
        let mut table = self.shared.table();
        let id = self.shared.add(&mut table, Arc::new(range.clone()), Some(revision - 1), None);
        self.shared.subscribe(&mut table, id)
    }

    /// Watches what comes after `revision`, at which the range was read.
    pub(crate) fn follow(&self, range: &Range, revision: i64, freshness: Freshness) -> Subscription {
        let mut table = self.shared.table();
        let id = self.shared.add(&mut table, Arc::new(range.clone()), Some(revision), Some(freshness));
        self.shared.subscribe(&mut table, id)
    }

    /// Lets the watch of a range outlive its last subscriber for a moment and a few events, for the next one to join.
    pub(crate) fn linger(&self, range: &Range) {
        let mut table = self.shared.table();
        if let Some(id) = table.by_range.get(range).copied()
            && let Some(watch) = table.watches.get_mut(&id)
        {
            watch.lingers = true;
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(
        self: &Arc<Self>,
        table: &mut Table,
        range: Arc<Range>,
        told: Option<i64>,
        freshness: Option<Freshness>,
    ) -> i64 {
        if let Some((inbox, closing)) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.rpc.runtime.spawn(Task { shared: self.clone(), inbox, closing }.run());
        }
        table.last_id += 1;
        let id = table.last_id;
        table.watches.insert(id, Watch::new(range, told, freshness));
        let _ = self.requests.send(Request::Create(id));
        id
    }

    fn subscribe(self: &Arc<Self>, table: &mut Table, id: i64) -> Subscription {
        table.last_subscriber += 1;
        let subscriber = table.last_subscriber;
        let (sender, messages) = channel(QUEUE);
        let mut covered = None;
        if let Some(watch) = table.watches.get_mut(&id) {
            watch.subscribers.push((subscriber, sender));
            (watch.lingers, watch.alone_since, watch.unheard) = (false, None, 0);
            covered = watch.told;
        }
        Subscription { shared: self.clone(), watch: id, subscriber, messages, covered }
    }
}

impl Table {
    fn remove(&mut self, id: i64) -> Option<Watch> {
        let watch = self.watches.remove(&id)?;
        if self.by_range.get(&watch.range) == Some(&id) {
            self.by_range.remove(&watch.range);
        }
        Some(watch)
    }

    fn end(&mut self, id: i64, message: &Message) {
        let Some(watch) = self.remove(id) else { return };
        watch.freshness.iter().for_each(Freshness::lost);
        for (_, mut subscriber) in watch.subscribers {
            // A full queue ends with a gap as well.
            let _ = subscriber.try_send(message.clone());
        }
    }

    /// Nothing is told until the watches are taken up again.
    fn lost(&self) {
        self.watches.values().filter_map(|watch| watch.freshness.as_ref()).for_each(Freshness::lost);
    }
}

// === impl Subscription ===

impl Subscription {
    /// The revision above which every change will be told. Waits until the watch exists; `None` for a gap.
    pub(crate) async fn covered(&mut self) -> Result<Option<i64>> {
        loop {
            if let Some(revision) = self.covered {
                return Ok(Some(revision));
            }
            match self.messages.next().await {
                Some(Message::Created(revision)) => self.covered = Some(revision),
                Some(Message::Events(_)) => {}
                Some(Message::Gap) | None => return Ok(None),
                Some(Message::Denied(reason)) => return Err(self.denied(&reason)),
            }
        }
    }

    /// Whether what the watch tells may be up to 100 ms late, as far as can be known at `revision`.
    ///
    /// etcd up to 3.5 begins a watch from "now" after the revision it has just looked up. When a write comes between, that
    /// is one of the past, and such watches are served ten times a second until they have caught up.
    pub(crate) fn may_lag(&self, revision: i64) -> bool {
        let table = self.shared.table();
        let late = |watch: &Watch| !watch.in_step && watch.told.is_some_and(|told| told < revision);
        table.watches.get(&self.watch).is_some_and(late)
    }

    /// Waits for the next changes.
    pub(crate) async fn next(&mut self) -> Result<News> {
        loop {
            match self.messages.next().await {
                Some(Message::Events(events)) => return Ok(News::Events(events)),
                Some(Message::Created(revision)) => self.covered = Some(revision),
                Some(Message::Gap) | None => return Ok(News::Gap),
                Some(Message::Denied(reason)) => return Err(self.denied(&reason)),
            }
        }
    }

    fn denied(&self, reason: &str) -> Error {
        let source = etcd_client::Error::WatchError(reason.to_owned());
        let key = self.shared.table().watches.get(&self.watch).map(|watch| name::display(&watch.range.key));
        Error::PermissionDenied { key: key.unwrap_or_else(|| "a watched range".into()), source }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut table = self.shared.table();
        let Some(watch) = table.watches.get_mut(&self.watch) else { return };
        watch.subscribers.retain(|(subscriber, _)| *subscriber != self.subscriber);
        if !watch.subscribers.is_empty() {
            return;
        }
        let request = if watch.lingers {
            watch.alone_since = Some(Instant::now());
            table.lingering.push(self.watch);
            Request::Linger
        } else {
            table.remove(self.watch);
            Request::Cancel(self.watch)
        };
        let _ = self.shared.requests.send(request);
    }
}

impl Watch {
    fn new(range: Arc<Range>, told: Option<i64>, freshness: Option<Freshness>) -> Self {
        Self {
            range,
            told,
            subscribers: Vec::new(),
            fragments: Vec::new(),
            asked: false,
            in_step: false,
            lingers: false,
            alone_since: None,
            unheard: 0,
            freshness,
        }
    }

    /// Takes in the events of one message.
    fn hear(&mut self, events: Vec<PbEvent>, fragment: bool) {
        self.fragments.extend(events);
        if !fragment && !self.fragments.is_empty() {
            self.dispatch();
        }
    }

    /// A subscriber that is too slow is dropped: it finds a gap at the end of its queue.
    fn tell(&mut self, message: &Message) {
        self.subscribers.retain_mut(|(_, subscriber)| subscriber.try_send(message.clone()).is_ok());
    }

    /// Tells the events collected, which are whole revisions, once each.
    fn dispatch(&mut self) {
        let told = self.told.unwrap_or(0);
        let range = &self.range;
        let events: Arc<[Event]> = std::mem::take(&mut self.fragments)
            .into_iter()
            .filter_map(Event::from_etcd)
            .filter(|event| event.revision > told && range.contains(event.key()))
            .collect();
        if let Some(last) = events.last() {
            (self.told, self.in_step) = (Some(last.revision), true);
            if self.subscribers.is_empty() {
                self.unheard += events.len();
            }
            self.tell(&Message::Events(events));
        }
    }
}

#[cfg(test)]
mod tests;
