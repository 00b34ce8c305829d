//! Whether a stream that says nothing may still be trusted.

use std::time::Duration;

use etcd_client::{GetOptions, GetResponse};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::{Stream, Task, Write};
use crate::error::Result;
use crate::session::watch::{Message, Shared, Watch};

/// Silence after which the stream is suspected.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a suspected stream has to answer.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// What is done about a silence.
pub(super) enum Doubt {
    None,
    /// A read tells how far the store is, which had this revision already. Other messages may come meanwhile.
    Reading(i64, BoxFuture<'static, Result<GetResponse>>),
    /// The stream was asked for a sign of life.
    Asked(Instant),
}

impl Doubt {
    /// Waits for the read, if there is one. Gives what the store had before, and what it has.
    pub(super) async fn read(&mut self) -> (i64, Result<GetResponse>) {
        match self {
            Self::Reading(before, read) => (*before, read.await),
            Self::None | Self::Asked(_) => std::future::pending().await,
        }
    }
}

impl Task {
    /// Whether the stream may still be trusted. A silence is looked into.
    pub(super) fn lives(&self, stream: &mut Stream) -> bool {
        let silence = stream.heard.elapsed();
        if !stream.pending.is_empty() && silence > self.shared.rpc.timeout * 2 {
            return false;
        }
        match &stream.doubt {
            Doubt::Asked(asked) => asked.elapsed() < GRACE,
            Doubt::None if silence > SILENCE => {
                let told = self.shared.table().watches.values().filter_map(|watch| watch.told).max();
                let shared = self.shared.clone();
                let read = async move {
                    let read = shared.read().await;
                    if read.is_err() {
                        // The next read is not to follow at once.
                        tokio::time::sleep(GRACE).await;
                    }
                    read
                };
                stream.doubt = Doubt::Reading(told.unwrap_or(0), read.boxed());
                true
            }
            Doubt::None | Doubt::Reading(..) => true,
        }
    }

    /// Goes on when it is known how far the store is, which had the revision `before` already.
    pub(super) fn judge(&self, stream: &mut Stream, before: i64, revision: i64) {
        if before > revision {
            self.end_newer_than(stream, revision);
        } else {
            // A watch that starts in the future does not answer a progress request. Now none does.
            stream.doubt = Doubt::Asked(Instant::now());
            let _ = stream.writer.send(Write::Progress);
        }
    }

    /// Ends the watches that have told more than there is now: the store was restored from a backup.
    pub(super) fn end_newer_than(&self, stream: &Stream, revision: i64) {
        let mut table = self.shared.table();
        let newer = |watch: &Watch| watch.told.is_some_and(|told| told > revision);
        let ids: Vec<i64> =
            table.watches.iter().filter(|(_, watch)| newer(watch)).map(|(id, _)| *id).collect();
        for id in ids {
            table.end(id, &Message::Gap);
            let _ = stream.writer.send(Write::Cancel(id));
        }
    }
}

impl Shared {
    /// Reads for the answer's header.
    pub(super) async fn read(&self) -> Result<GetResponse> {
        self.rpc.get(&self.rpc.probe, GetOptions::new().with_count_only(), Some(GRACE)).await
    }
}
