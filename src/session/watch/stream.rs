//! The task that keeps one watch stream open and reads it.

mod silence;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::proto::PbWatchResponse;
use etcd_client::{WatchFilterType, WatchOptions, WatchRequestSender, WatchResponseStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::silence::{Doubt, GRACE};
use super::{Kind, Message, Request, Shared, Watch};
use crate::session::rpc::{is_token_refused, revision};
use crate::session::runtime::Backoff;

/// How long a watch that lingers stays without subscribers.
const LINGER: Duration = Duration::from_secs(1);
/// How many events it is told at most: each goes to all who linger, and many may come and go.
const UNHEARD: usize = 7;
/// How long an empty stream stays open.
const IDLE: Duration = Duration::from_secs(10);
/// The largest message: one event may carry a value at etcd's limit twice.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// The task of a hub.
pub(super) struct Task {
    pub(super) shared: Arc<Shared>,
    pub(super) inbox: UnboundedReceiver<Request>,
    pub(super) closing: CancellationToken,
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
    doubt: Doubt,
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
    /// The member's store is older than what was told already.
    Older,
}

/// Why a stream is not used any more.
enum End {
    Closing,
    Idle,
    Broken,
    TokenRefused,
    /// There is another token.
    Again,
}

impl End {
    fn of(error: &etcd_client::Error) -> Self {
        if is_token_refused(error) { Self::TokenRefused } else { Self::Broken }
    }
}

impl Task {
    pub(super) async fn run(mut self) {
        let closing = self.closing.clone();
        loop {
            // Without watches there is no stream.
            tokio::select! {
                biased;
                () = closing.cancelled() => return,
                request = self.inbox.recv() => if request.is_none() { return },
            }
            let mut backoff = Backoff::of_requests();
            while !self.shared.table().watches.is_empty() {
                let opened = Instant::now();
                let member = self.shared.rpc.endpoints.current();
                let serve = async {
                    match self.serve(member).await {
                        End::TokenRefused if self.shared.rpc.renews_token(member, opened).await => End::Again,
                        end => end,
                    }
                };
                let end = tokio::select! {
                    biased;
                    () = closing.cancelled() => return,
                    end = serve => end,
                };
                self.shared.table().lost();
                if opened.elapsed() > GRACE {
                    backoff = Backoff::of_requests();
                }
                match end {
                    End::Closing => return,
                    End::Idle => break,
                    End::Again => continue,
                    End::Broken | End::TokenRefused => self.shared.rpc.endpoints.avoid(member),
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
        let mut stream = match self.open(member).await {
            Ok(stream) => stream,
            Err(end) => return end,
        };
        let mut empty_since = None;
        loop {
            let restless = !stream.pending.is_empty() || !self.shared.table().lingering.is_empty();
            let tick = tokio::time::sleep(if restless { LINGER / 4 } else { GRACE / 2 });
            tokio::select! {
                biased;
                message = stream.responses.message() => match message {
                    Ok(Some(message)) => {
                        (stream.heard, stream.doubt) = (Instant::now(), Doubt::None);
                        self.shared.heard.store(self.shared.rpc.runtime.now().0, Ordering::Relaxed);
                        match self.hear(&mut stream, message.0) {
                            Heard::Fine => {}
                            Heard::Refused => return End::Broken,
                            Heard::Older => {
                                if let Ok(read) = self.shared.read().await {
                                    self.end_newer_than(&stream, revision(read.header()));
                                }
                                return End::Broken;
                            }
                            Heard::Unauthenticated => return End::TokenRefused,
                        }
                    }
                    Ok(None) => return End::Broken,
                    Err(error) => {
                        tracing::debug!(%error, "watch stream lost");
                        return End::of(&error);
                    }
                },
                request = self.inbox.recv() => match request {
                    Some(Request::Create(id)) => self.create(&mut stream, id),
                    Some(Request::Cancel(id)) => { let _ = stream.writer.send(Write::Cancel(id)); }
                    Some(Request::Linger) => {}
                    None => return End::Closing,
                },
                (before, read) = stream.doubt.read() => {
                    stream.doubt = Doubt::None;
                    if let Ok(read) = read {
                        self.judge(&mut stream, before, revision(read.header()));
                    }
                }
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
                if !self.lives(&mut stream) {
                    return End::Broken;
                }
            }
        }
    }

    async fn open(&self, member: usize) -> Result<Stream, End> {
        let rpc = &self.shared.rpc;
        let ids: Vec<i64> = self.shared.table().watches.keys().copied().collect();
        let mut creations =
            ids.iter().filter_map(|id| self.creation(*id).map(|(key, options)| (*id, key, options)));
        let (first, key, options) = creations.next().ok_or(End::Broken)?;
        let open = async {
            let client = rpc.endpoints.client(member).await?;
            client.watch_client().max_decoding_message_size(MAX_MESSAGE).watch(key, Some(options)).await
        };
        let (requests, responses) = match tokio::time::timeout(rpc.timeout, open).await {
            Ok(Ok(stream)) => stream.split(),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no watch stream");
                return Err(End::of(&error));
            }
            Err(_) => return Err(End::Broken),
        };
        let (writer, inbox) = unbounded_channel();
        // The client's own queue is bounded, and waiting for it here would keep the stream from being read.
        rpc.runtime.spawn(write(requests, inbox));
        let pending = VecDeque::from([first]);
        let newest = ids.last().copied().unwrap_or(first);
        let mut stream =
            Stream { responses, writer, pending, newest, heard: Instant::now(), doubt: Doubt::None };
        for (id, key, options) in creations {
            stream.pending.push_back(id);
            let _ = stream.writer.send(Write::Create(key, Box::new(options)));
        }
        Ok(stream)
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
        Some((watch.range.key.clone(), watch.creation(id, self.shared.kind)))
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
                // The member is behind, or the store is a restored backup.
                Some(told) if header < told => return Heard::Older,
                Some(_) => {
                    let now = self.shared.rpc.runtime.now();
                    watch.freshness.iter().for_each(|freshness| freshness.proved(now));
                }
            }
            return Heard::Fine;
        }
        watch.hear(message.events, message.fragment);
        Heard::Fine
    }

    /// Ends the watches that have lingered long enough.
    fn sweep(&self, stream: &Stream) {
        let mut table = self.shared.table();
        for id in std::mem::take(&mut table.lingering) {
            let Some(watch) = table.watches.get(&id) else { continue };
            match watch.alone_since {
                Some(since) if since.elapsed() > LINGER || watch.unheard >= UNHEARD => {
                    table.remove(id);
                    let _ = stream.writer.send(Write::Cancel(id));
                }
                Some(_) => table.lingering.push(id),
                None => {}
            }
        }
    }
}

impl Watch {
    /// What it is asked for with, at first or on another stream.
    pub(super) fn creation(&mut self, id: i64, kind: Kind) -> WatchOptions {
        // All of it is told again.
        self.fragments.clear();
        self.in_step = false;
        // What was read at a revision is followed from there: a watch that starts in the future gives no sign of life.
        let resumed = std::mem::replace(&mut self.asked, true) || self.freshness.is_some();
        let mut options = WatchOptions::new().with_watch_id(id).with_fragment();
        if let Some(end) = &self.range.end {
            options = options.with_range(end.clone());
        }
        if let Some(told) = self.told {
            // A deletion at the very revision of a compaction is lost to a watch that starts there, until etcd 3.4.34
            // and 3.5.16 (etcd issue 18089). From one revision before, etcd says that it cannot tell.
            options = options.with_start_revision(if resumed { told.max(1) } else { told + 1 });
        }
        match kind {
            Kind::Deletions => options.with_filters([WatchFilterType::NoPut]),
            Kind::Everything => options,
        }
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
