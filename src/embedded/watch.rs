//! Watches: each change is told, in the order of commit, to the streams that asked for it.

use std::collections::BTreeMap;

use etcd_client::proto::{PbEvent, PbResponseHeader, PbWatchRequestUnion, PbWatchResponse};
use tokio::sync::mpsc::UnboundedSender;

use super::store::{Change, DELETE, PUT, Range, Store};

/// What etcd says instead of an id when there is none.
const NO_ID: i64 = -1;
/// A message larger than this is split, for those who want that.
const FRAGMENT: usize = 1536 * 1024;

/// All watch streams of a server.
#[derive(Debug, Default)]
pub(super) struct Watches {
    last_stream: u64,
    streams: BTreeMap<u64, Stream>,
}

#[derive(Debug)]
struct Stream {
    out: UnboundedSender<PbWatchResponse>,
    next_id: i64,
    watches: BTreeMap<i64, Watch>,
}

#[derive(Debug)]
struct Watch {
    range: Range,
    /// The first revision it wants.
    from: i64,
    /// The numbers of the event types it does not want.
    without: Vec<i32>,
    with_before: bool,
    fragment: bool,
    progress: bool,
}

impl Watches {
    pub(super) fn open(&mut self, out: UnboundedSender<PbWatchResponse>) -> u64 {
        self.last_stream += 1;
        self.streams.insert(self.last_stream, Stream { out, next_id: 0, watches: BTreeMap::new() });
        self.last_stream
    }

    pub(super) fn close(&mut self, stream: u64) {
        self.streams.remove(&stream);
    }

    /// How many watches there are, and on how many streams.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.streams.values().map(|stream| stream.watches.len()).sum(), self.streams.len())
    }

    /// Takes a request of a stream.
    pub(super) fn ask(
        &mut self,
        stream: u64,
        request: PbWatchRequestUnion,
        store: &Store,
        header: &PbResponseHeader,
    ) {
        let Some(stream) = self.streams.get_mut(&stream) else { return };
        match request {
            PbWatchRequestUnion::CreateRequest(create) => {
                let (key, end) = match create.key.as_slice() {
                    [] => (&[0][..], create.range_end.as_slice()),
                    key => (key, create.range_end.as_slice()),
                };
                let watch = Watch {
                    range: Range::new(key, end),
                    from: match create.start_revision {
                        0 => store.revision() + 1,
                        revision => revision,
                    },
                    without: create.filters.iter().filter_map(|filter| unwanted(*filter)).collect(),
                    with_before: create.prev_kv,
                    fragment: create.fragment,
                    progress: create.progress_notify,
                };
                stream.create(create.watch_id, watch, store, header);
            }
            PbWatchRequestUnion::CancelRequest(cancel) => {
                if stream.watches.remove(&cancel.watch_id).is_some() {
                    let told = PbWatchResponse { watch_id: cancel.watch_id, canceled: true, ..blank(header) };
                    let _ = stream.out.send(told);
                }
            }
            PbWatchRequestUnion::ProgressRequest(_) => {
                // As etcd: a watch that waits for the future has no progress to speak of.
                if stream
                    .watches
                    .values()
                    .all(|watch| watch.from <= store.revision() + 1 || watch.from == i64::MAX)
                {
                    let _ = stream.out.send(PbWatchResponse { watch_id: NO_ID, ..blank(header) });
                }
            }
        }
    }

    /// Tells the watches of a stream that want to know how far they are.
    pub(super) fn progress(&self, stream: u64, header: &PbResponseHeader) {
        let Some(stream) = self.streams.get(&stream) else { return };
        for (id, _) in stream.watches.iter().filter(|(_, watch)| watch.progress) {
            let _ = stream.out.send(PbWatchResponse { watch_id: *id, ..blank(header) });
        }
    }

    /// Tells everybody what one revision changed.
    pub(super) fn tell(&self, changes: &[Change], header: &PbResponseHeader) {
        for stream in self.streams.values() {
            for (id, watch) in &stream.watches {
                stream.send(*id, watch, watch.events(changes.iter(), 0), header);
            }
        }
    }
}

impl Stream {
    fn create(&mut self, asked: i64, watch: Watch, store: &Store, header: &PbResponseHeader) {
        let refuse = |reason: &str| PbWatchResponse {
            watch_id: NO_ID,
            created: true,
            canceled: true,
            cancel_reason: reason.into(),
            ..blank(header)
        };
        let backwards = !matches!(watch.range.end.as_slice(), [] | [0]) && watch.range.key >= watch.range.end;
        if backwards {
            let _ = self.out.send(refuse("mvcc: watcher range is empty"));
            return;
        }
        if asked != 0 && self.watches.contains_key(&asked) {
            let _ = self.out.send(refuse("mvcc: duplicate watch ID provided on the WatchStream"));
            return;
        }
        let id = if asked == 0 { self.free_id() } else { asked };
        let _ = self.out.send(PbWatchResponse { watch_id: id, created: true, ..blank(header) });
        if watch.from < store.compacted() {
            let _ = self.out.send(PbWatchResponse {
                watch_id: id,
                // As etcd, to which a compaction at 0 is none to speak of.
                canceled: store.compacted() != 0,
                compact_revision: store.compacted(),
                ..blank(header)
            });
            // As etcd: the id stays taken, and nothing is told any more.
            self.watches.insert(id, Watch { from: i64::MAX, ..watch });
            return;
        }
        // As etcd: who asks for what was before all revisions is told nothing of the past.
        let past = if watch.from < 0 { i64::MAX } else { watch.from };
        self.send(id, &watch, watch.events(store.since(past), store.compacted()), header);
        self.watches.insert(id, watch);
    }

    fn free_id(&mut self) -> i64 {
        while self.watches.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    fn send(&self, id: i64, watch: &Watch, mut events: Vec<PbEvent>, header: &PbResponseHeader) {
        while !events.is_empty() {
            let rest = if watch.fragment { events.split_off(fitting(&events)) } else { Vec::new() };
            let fragment = !rest.is_empty();
            let _ = self.out.send(PbWatchResponse { watch_id: id, events, fragment, ..blank(header) });
            events = rest;
        }
    }
}

impl Watch {
    fn events<'a>(&self, changes: impl Iterator<Item = &'a Change>, compacted: i64) -> Vec<PbEvent> {
        changes
            .filter(|change| change.revision >= self.from && self.range.contains(&change.key))
            .filter(|change| {
                let kind = if change.after.is_some() { PUT } else { DELETE };
                !self.without.contains(&kind)
            })
            .map(|change| change.event(self.with_before, compacted))
            .collect()
    }
}

/// The event type that a filter takes out; the numbers are etcd's.
fn unwanted(filter: i32) -> Option<i32> {
    [PUT, DELETE].get(usize::try_from(filter).ok()?).copied()
}

/// How many events go into one message: at least one.
fn fitting(events: &[PbEvent]) -> usize {
    let mut left = FRAGMENT;
    let fits = events.iter().take_while(|event| {
        let bytes = [&event.kv, &event.prev_kv].into_iter().flatten().map(|kv| kv.key.len() + kv.value.len());
        left.checked_sub(bytes.sum()).map(|rest| left = rest).is_some()
    });
    fits.count().max(1)
}

fn blank(header: &PbResponseHeader) -> PbWatchResponse {
    PbWatchResponse { header: Some(*header), ..PbWatchResponse::default() }
}
