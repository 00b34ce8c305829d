//! The watch streams of a session: many watches on one gRPC stream, resumed without gaps.
//!
//! A [`Hub`] carries watches on one stream and shares one watch at the server among all who want the same range. The
//! session has two hubs: one for lines and owned keys, which tells deletions only, and one for views; so a busy view
//! cannot slow a hand-off.
//!
//! The stream is always read; subscribers have queues of their own. A broken stream is opened again and every watch
//! goes on after the last revision that was complete. When that is not possible (compacted, or the store is older than
//! before: a restored backup) the watch ends with [`Message::Gap`], and its owner reads again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::proto::{PbEvent, PbWatchResponse};
use etcd_client::{GetOptions, WatchFilterType, WatchOptions, WatchRequestSender, WatchResponseStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rpc::{self, Failure, Rpc, revision};
use super::runtime::Backoff;
use crate::error::{Error, Result};

/// How long a watch that lingers stays without subscribers.
const LINGER: Duration = Duration::from_secs(1);
/// How long an empty stream stays open.
const IDLE: Duration = Duration::from_secs(10);
/// Silence after which the stream is suspected.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a suspected stream has to answer.
const GRACE: Duration = Duration::from_secs(5);
/// The largest message: one event may carry a value at etcd's limit twice.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;

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

    pub(crate) fn prefix(prefix: &crate::name::Prefix) -> Self {
        Self { key: prefix.as_bytes().to_vec(), end: Some(prefix.end()) }
    }

    fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            None => key == self.key,
            Some(end) => key >= self.key.as_slice() && key < end.as_slice(),
        }
    }
}

/// A change of one key.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) key: Vec<u8>,
    pub(crate) revision: i64,
    /// `None`: deleted.
    pub(crate) put: Option<Put>,
}

/// The new state of a key that was put.
#[derive(Debug, Clone)]
pub(crate) struct Put {
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: i64,
    pub(crate) lease: i64,
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
#[derive(Debug)]
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
}

#[derive(Debug, Default)]
struct Table {
    last_id: i64,
    last_subscriber: u64,
    watches: BTreeMap<i64, Watch>,
    /// The watches that others may join.
    by_range: HashMap<Range, i64>,
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
    range: Range,
    /// Everything up to here was told, or lies before the watch; `None` until a watch from "now" was created.
    told: Option<i64>,
    subscribers: Vec<(u64, UnboundedSender<Message>)>,
    fragments: Vec<PbEvent>,
    lingers: bool,
    alone_since: Option<Instant>,
}

/// A share of a watch. Dropping it ends the watch, unless others share it or it lingers.
#[derive(Debug)]
pub(crate) struct Subscription {
    shared: Arc<Shared>,
    watch: i64,
    subscriber: u64,
    messages: UnboundedReceiver<Message>,
    covered: Option<i64>,
}

impl Hub {
    pub(crate) fn new(kind: Kind, rpc: Arc<Rpc>, closing: CancellationToken) -> Self {
        let (requests, inbox) = unbounded_channel();
        let shared = Arc::new(Shared { kind, rpc, table: Mutex::default(), requests });
        let task = Task { shared: shared.clone(), inbox, closing };
        shared.rpc.runtime.spawn(task.run());
        Self { shared }
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
                let id = self.shared.add(&mut table, range, None);
                table.by_range.insert(range.clone(), id);
                id
            }
        };
        self.shared.subscribe(&mut table, id)
    }

    /// Watches a range from `revision` on. Changes that are past already may come up to 100 ms late.
    pub(crate) fn watch_from(&self, range: &Range, revision: i64) -> Subscription {
        let mut table = self.shared.table();
        let id = self.shared.add(&mut table, range, Some(revision - 1));
        self.shared.subscribe(&mut table, id)
    }

    /// Lets the watch of a range outlive its last subscriber for a moment, for the next one to join.
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

    fn add(&self, table: &mut Table, range: &Range, told: Option<i64>) -> i64 {
        table.last_id += 1;
        let id = table.last_id;
        let (subscribers, fragments) = (Vec::new(), Vec::new());
        let range = range.clone();
        table
            .watches
            .insert(id, Watch { range, told, subscribers, fragments, lingers: false, alone_since: None });
        let _ = self.requests.send(Request::Create(id));
        id
    }

    fn subscribe(self: &Arc<Self>, table: &mut Table, id: i64) -> Subscription {
        table.last_subscriber += 1;
        let subscriber = table.last_subscriber;
        let (sender, messages) = unbounded_channel();
        let mut covered = None;
        if let Some(watch) = table.watches.get_mut(&id) {
            watch.subscribers.push((subscriber, sender));
            (watch.lingers, watch.alone_since) = (false, None);
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
        for (_, subscriber) in self.remove(id).into_iter().flat_map(|watch| watch.subscribers) {
            let _ = subscriber.send(message.clone());
        }
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
            match self.messages.recv().await {
                Some(Message::Created(revision)) => self.covered = Some(revision),
                Some(Message::Events(_)) => {}
                Some(Message::Gap) | None => return Ok(None),
                Some(Message::Denied(reason)) => return Err(self.denied(&reason)),
            }
        }
    }

    /// Waits for the next changes.
    pub(crate) async fn next(&mut self) -> Result<News> {
        loop {
            match self.messages.recv().await {
                Some(Message::Events(events)) => return Ok(News::Events(events)),
                Some(Message::Created(revision)) => self.covered = Some(revision),
                Some(Message::Gap) | None => return Ok(News::Gap),
                Some(Message::Denied(reason)) => return Err(self.denied(&reason)),
            }
        }
    }

    fn denied(&self, reason: &str) -> Error {
        let source = etcd_client::Error::WatchError(reason.to_owned());
        let key =
            self.shared.table().watches.get(&self.watch).map(|watch| crate::name::display(&watch.range.key));
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

/// The task of a hub.
struct Task {
    shared: Arc<Shared>,
    inbox: UnboundedReceiver<Request>,
    closing: CancellationToken,
}

/// One open stream.
struct Stream {
    responses: WatchResponseStream,
    writer: UnboundedSender<Write>,
    /// Creations without an answer, in the order they were sent: refusals carry no id.
    pending: VecDeque<i64>,
    /// The newest watch asked for on this stream; ids only grow.
    newest: i64,
    heard: Instant,
    /// Set when the stream was asked for a sign of life.
    asked: Option<Instant>,
}

enum Write {
    Create(Vec<u8>, Box<WatchOptions>),
    Cancel(i64),
    Progress,
}

/// What a message means for the stream.
enum Heard {
    Fine,
    /// A watch was cancelled for a reason that passes: open another stream.
    Refused,
    /// The same, and the token is no longer accepted.
    Unauthenticated,
}

/// Why a stream is not used any more.
enum End {
    Closing,
    Idle,
    Broken,
}

impl Task {
    async fn run(mut self) {
        let closing = self.closing.clone();
        loop {
            // Without watches there is no stream.
            tokio::select! {
                () = closing.cancelled() => return,
                request = self.inbox.recv() => if request.is_none() { return },
            }
            let mut backoff = Backoff::of_requests();
            while !self.shared.table().watches.is_empty() {
                let opened = Instant::now();
                let member = self.shared.rpc.endpoints.current();
                let end = tokio::select! {
                    () = closing.cancelled() => return,
                    end = self.serve(member) => end,
                };
                match end {
                    End::Closing => return,
                    End::Idle => break,
                    End::Broken => self.shared.rpc.endpoints.avoid(member),
                }
                if opened.elapsed() > GRACE {
                    backoff = Backoff::of_requests();
                }
                backoff.wait(&self.shared.rpc.runtime).await;
            }
        }
    }

    /// Opens a stream with all watches on it and reads it as long as it works.
    async fn serve(&mut self, member: usize) -> End {
        while self.inbox.try_recv().is_ok() {
            // Whatever it asks for, the table says it too.
        }
        let Some(mut stream) = self.open(member).await else { return End::Broken };
        let mut empty_since = None;
        loop {
            let restless = !stream.pending.is_empty() || !self.shared.table().lingering.is_empty();
            let tick = tokio::time::sleep(if restless { LINGER / 4 } else { GRACE / 2 });
            tokio::select! {
                biased;
                message = stream.responses.message() => match message {
                    Ok(Some(message)) => {
                        (stream.heard, stream.asked) = (Instant::now(), None);
                        match self.hear(&mut stream, message.0) {
                            Heard::Fine => {}
                            Heard::Refused => return End::Broken,
                            Heard::Unauthenticated => {
                                self.shared.rpc.log_in_again(member).await;
                                return End::Broken;
                            }
                        }
                    }
                    Ok(None) => return End::Broken,
                    Err(error) => {
                        tracing::debug!(%error, "watch stream lost");
                        if let Failure::Again(_) = rpc::classify(b"", error, self.shared.rpc.has_user) {
                            self.shared.rpc.log_in_again(member).await;
                        }
                        return End::Broken;
                    }
                },
                request = self.inbox.recv() => match request {
                    Some(Request::Create(id)) => self.create(&mut stream, id),
                    Some(Request::Cancel(id)) => { let _ = stream.writer.send(Write::Cancel(id)); }
                    Some(Request::Linger) => {}
                    None => return End::Closing,
                },
                () = tick => {}
            }
            self.sweep(&stream);
            if self.shared.table().watches.is_empty() {
                let since = *empty_since.get_or_insert_with(Instant::now);
                if since.elapsed() > IDLE {
                    return End::Idle;
                }
            } else {
                empty_since = None;
                if !self.lives(&mut stream).await {
                    return End::Broken;
                }
            }
        }
    }

    async fn open(&self, member: usize) -> Option<Stream> {
        let rpc = &self.shared.rpc;
        let ids: Vec<i64> = self.shared.table().watches.keys().copied().collect();
        let mut creations =
            ids.iter().filter_map(|id| self.creation(*id).map(|(key, options)| (*id, key, options)));
        let (first, key, options) = creations.next()?;
        let open = async {
            let client = rpc.endpoints.client(member).await?;
            client.watch_client().max_decoding_message_size(MAX_MESSAGE).watch(key, Some(options)).await
        };
        let (requests, responses) = match tokio::time::timeout(rpc.timeout, open).await {
            Ok(Ok(stream)) => stream.split(),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no watch stream");
                if let Failure::Again(_) = rpc::classify(b"", error, rpc.has_user) {
                    rpc.log_in_again(member).await;
                }
                return None;
            }
            Err(_) => return None,
        };
        let (writer, inbox) = unbounded_channel();
        // The client's own queue is bounded, and waiting for it here would keep the stream from being read.
        rpc.runtime.spawn(write(requests, inbox));
        let pending = VecDeque::from([first]);
        let newest = ids.last().copied().unwrap_or(first);
        let mut stream = Stream { responses, writer, pending, newest, heard: Instant::now(), asked: None };
        for (id, key, options) in creations {
            stream.pending.push_back(id);
            let _ = stream.writer.send(Write::Create(key, Box::new(options)));
        }
        Some(stream)
    }

    fn create(&self, stream: &mut Stream, id: i64) {
        if id <= stream.newest {
            return;
        }
        stream.newest = id;
        if let Some((key, options)) = self.creation(id) {
            stream.pending.push_back(id);
            let _ = stream.writer.send(Write::Create(key, Box::new(options)));
        }
    }

    fn creation(&self, id: i64) -> Option<(Vec<u8>, WatchOptions)> {
        let mut table = self.shared.table();
        let watch = table.watches.get_mut(&id)?;
        watch.fragments.clear();
        let mut options = WatchOptions::new().with_watch_id(id).with_fragment();
        if let Some(end) = &watch.range.end {
            options = options.with_range(end.clone());
        }
        if let Some(told) = watch.told {
            options = options.with_start_revision(told + 1);
        }
        if self.shared.kind == Kind::Deletions {
            options = options.with_filters([WatchFilterType::NoPut]);
        }
        Some((watch.range.key.clone(), options))
    }

    /// Takes in one message.
    fn hear(&self, stream: &mut Stream, message: PbWatchResponse) -> Heard {
        let mut table = self.shared.table();
        let mut id = message.watch_id;
        if message.created {
            let oldest = stream.pending.pop_front();
            if message.canceled {
                id = oldest.unwrap_or(id);
            }
        }
        if message.canceled {
            if message.compact_revision != 0 {
                table.end(id, &Message::Gap);
                return Heard::Fine;
            }
            if !table.watches.contains_key(&id) {
                return Heard::Fine;
            }
            tracing::debug!(reason = message.cancel_reason, "watch cancelled");
            if message.cancel_reason.contains("permission denied") {
                table.end(id, &Message::Denied(message.cancel_reason.into()));
                return Heard::Fine;
            }
            let stale = ["auth", "user name"].iter().any(|word| message.cancel_reason.contains(word));
            return if stale { Heard::Unauthenticated } else { Heard::Refused };
        }
        let header = message.header.as_ref().map_or(0, |header| header.revision);
        let Some(watch) = table.watches.get_mut(&id) else { return Heard::Fine };
        if message.created {
            match watch.told {
                None => {
                    watch.told = Some(header);
                    watch.tell(&Message::Created(header));
                }
                // The store is older than what it told before: a restored backup.
                Some(told) if header < told => table.end(id, &Message::Gap),
                Some(_) => {}
            }
            return Heard::Fine;
        }
        watch.fragments.extend(message.events);
        if !message.fragment && !watch.fragments.is_empty() {
            watch.dispatch();
        }
        Heard::Fine
    }

    /// Ends the watches that have lingered long enough.
    fn sweep(&self, stream: &Stream) {
        let mut table = self.shared.table();
        for id in std::mem::take(&mut table.lingering) {
            match table.watches.get(&id).and_then(|watch| watch.alone_since) {
                Some(since) if since.elapsed() > LINGER => {
                    table.remove(id);
                    let _ = stream.writer.send(Write::Cancel(id));
                }
                Some(_) => table.lingering.push(id),
                None => {}
            }
        }
    }

    /// Whether the stream may still be trusted.
    async fn lives(&self, stream: &mut Stream) -> bool {
        let silence = stream.heard.elapsed();
        if !stream.pending.is_empty() && silence > self.shared.rpc.timeout * 2 {
            return false;
        }
        if let Some(asked) = stream.asked {
            return asked.elapsed() < GRACE;
        }
        if silence > SILENCE {
            let highest =
                self.shared.table().watches.values().filter_map(|watch| watch.told).max().unwrap_or(0);
            let options = GetOptions::new().with_count_only();
            // A watch that starts in the future does not answer a progress request, so only ask once it cannot.
            if let Ok(read) = self.shared.rpc.get(b"\0", options, Some(GRACE)).await
                && revision(read.header()) >= highest
            {
                stream.asked = Some(Instant::now());
                let _ = stream.writer.send(Write::Progress);
            }
        }
        true
    }
}

impl Watch {
    fn tell(&self, message: &Message) {
        for (_, subscriber) in &self.subscribers {
            let _ = subscriber.send(message.clone());
        }
    }

    /// Tells the events collected, which are whole revisions, once each.
    fn dispatch(&mut self) {
        let told = self.told.unwrap_or(0);
        let range = &self.range;
        let events: Arc<[Event]> = std::mem::take(&mut self.fragments)
            .into_iter()
            .filter_map(Event::from_etcd)
            .filter(|event| event.revision > told && range.contains(&event.key))
            .collect();
        if let Some(last) = events.last() {
            self.told = Some(last.revision);
            self.tell(&Message::Events(events));
        }
    }
}

impl Event {
    fn from_etcd(event: PbEvent) -> Option<Self> {
        let kv = event.kv?;
        let put = match event.r#type {
            0 => Some(Put { value: kv.value, create_revision: kv.create_revision, lease: kv.lease }),
            1 => None,
            _ => return None,
        };
        Some(Self { key: kv.key, revision: kv.mod_revision, put })
    }
}

/// Passes requests on to the client's bounded queue.
async fn write(mut requests: WatchRequestSender, mut inbox: UnboundedReceiver<Write>) {
    while let Some(request) = inbox.recv().await {
        let sent = match request {
            Write::Create(key, options) => requests.watch(key, Some(*options)).await,
            Write::Cancel(id) => requests.cancel(id).await,
            Write::Progress => requests.request_progress().await,
        };
        if sent.is_err() {
            return;
        }
    }
}
