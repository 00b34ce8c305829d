//! One watch stream, and what it was told.

use std::collections::BTreeMap;
use std::time::Duration;

use etcd_client::{
    Client, WatchFilterType, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream,
};
use fastrand::Rng;

use super::operation::Keys;

/// How long etcd may take to tell something.
const PATIENCE: Duration = Duration::from_secs(20);
/// The id of a watch that only asks for an answer.
const BARRIER: i64 = 1 << 40;

/// What each watch was told, in order.
pub(super) type Told = BTreeMap<i64, Vec<String>>;

/// A watch to ask for.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    keys: Keys,
    start: i64,
    id: i64,
    without: Option<bool>,
    prev: bool,
    fragment: bool,
}

/// A watch stream.
pub(super) struct Observer {
    requests: WatchRequestSender,
    responses: WatchResponseStream,
    told: Told,
    /// Answers to requests, in order.
    answers: Vec<String>,
    ids: Vec<i64>,
}

impl Wish {
    pub(super) fn random(random: &mut Rng, revision: i64) -> Self {
        Self {
            keys: Keys::random(random),
            start: match random.u8(..4) {
                0 => 0,
                1 => random.i64(1..=revision + 5),
                _ => random.i64((revision - 30).max(1)..=revision + 1),
            },
            id: if random.u8(..4) == 0 { random.i64(1..8) } else { 0 },
            without: (random.u8(..4) == 0).then(|| random.bool()),
            prev: random.bool(),
            fragment: random.bool(),
        }
    }

    fn options(&self) -> WatchOptions {
        let mut options = WatchOptions::new().with_start_revision(self.start).with_watch_id(self.id);
        if !self.keys.end.is_empty() {
            options = options.with_range(self.keys.end.clone());
        }
        if let Some(puts) = self.without {
            let filter = if puts { WatchFilterType::NoPut } else { WatchFilterType::NoDelete };
            options = options.with_filters([filter]);
        }
        if self.prev {
            options = options.with_prev_key();
        }
        if self.fragment { options.with_fragment() } else { options }
    }
}

impl Observer {
    pub(super) async fn open(client: &Client) -> Self {
        // The first watch of a stream is asked for by the client; nothing ever happens to its key.
        let stream = client.clone().watch("nobody", None).await.unwrap();
        let (requests, responses) = stream.split();
        let mut observer =
            Self { requests, responses, told: Told::new(), answers: Vec::new(), ids: Vec::new() };
        observer.answer().await;
        observer.ids.clear();
        observer
    }

    /// Asks for a watch; gives the answer.
    pub(super) async fn watch(&mut self, wish: &Wish) -> String {
        self.requests.watch(wish.keys.key.clone(), Some(wish.options())).await.unwrap();
        self.answer().await
    }

    pub(super) async fn cancel(&mut self, which: usize) -> String {
        if self.ids.is_empty() {
            return "none".into();
        }
        let id = self.ids.remove(which % self.ids.len());
        self.requests.cancel(id).await.unwrap();
        self.answer().await
    }

    /// Asks how far the stream is, if no watch waits for the future.
    pub(super) async fn progress(&mut self) -> String {
        String::new()
    }

    /// The answer to a request; what is told meanwhile is kept.
    async fn answer(&mut self) -> String {
        while self.answers.is_empty() {
            let message = tokio::time::timeout(PATIENCE, self.responses.message()).await;
            self.hear(message.expect("no answer").unwrap().unwrap());
        }
        self.answers.remove(0)
    }

    /// What was told by a server that tells at once: all of it, when it answers the next request of the stream.
    pub(super) async fn told(&mut self) -> Told {
        self.barrier().await;
        std::mem::take(&mut self.told)
    }

    /// Ends all watches. One that starts in the past may not have looked there yet when etcd compacts, and then it finds
    /// nothing, though nothing was kept from it.
    pub(super) async fn cancel_all(&mut self) {
        for id in std::mem::take(&mut self.ids) {
            self.requests.cancel(id).await.unwrap();
            self.answer().await;
        }
    }

    async fn barrier(&mut self) {
        self.requests.watch("nobody", Some(WatchOptions::new().with_watch_id(BARRIER))).await.unwrap();
        self.answer().await;
        self.ids.retain(|id| *id != BARRIER);
        self.requests.cancel(BARRIER).await.unwrap();
        self.answer().await;
    }

    /// What was told, once it is as much as is expected, or time is up.
    pub(super) async fn told_at_least(&mut self, expected: &Told) -> Told {
        let count = |told: &Told| told.values().map(Vec::len).sum::<usize>();
        while count(&self.told) < count(expected) {
            let Ok(message) = tokio::time::timeout(PATIENCE, self.responses.message()).await else { break };
            self.hear(message.unwrap().unwrap());
        }
        std::mem::take(&mut self.told)
    }

    fn hear(&mut self, message: WatchResponse) {
        let id = message.watch_id();
        let header = message.header().map_or(0, etcd_client::ResponseHeader::revision);
        if message.created() {
            if !message.canceled() {
                self.ids.push(id);
            }
            self.answers.push(format!(
                "created {id} {header} {} {}",
                message.canceled(),
                message.cancel_reason()
            ));
            return;
        }
        if message.canceled() {
            let (compacted, reason) = (message.compact_revision(), message.cancel_reason());
            if compacted == 0 {
                self.answers.push(format!("cancelled {id} {header} {reason}"));
            } else {
                self.ids.retain(|other| *other != id);
                self.told.entry(id).or_default().push(format!("compacted {compacted} {reason}"));
            }
            return;
        }
        let told = self.told.entry(id).or_default();
        told.extend(
            message
                .events()
                .iter()
                .map(|event| format!("{:?} {:?} {:?}", event.0.r#type, event.0.kv, event.0.prev_kv)),
        );
    }
}
