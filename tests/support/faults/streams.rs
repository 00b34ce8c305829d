//! The messages inside streams: counted, and thrown away or held back when a test says so.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt as _};
use http::Response;
use tokio::sync::watch;
use tokio_util::bytes::Bytes;
use tonic::body::Body;
use tonic::{Status, Streaming};

use super::{Shared, wire};

/// The name of a method if its requests are streams, so that their end must not be waited for.
pub(super) fn name(path: &str) -> Option<&'static str> {
    let method = path.rsplit('/').next()?;
    ["Watch", "LeaseKeepAlive"].into_iter().find(|name| *name == method)
}

/// One direction of the streams of one method.
#[derive(Debug, Default, Clone, Copy)]
struct Flow {
    seen: usize,
    swallow: usize,
}

impl Flow {
    /// Counts a message. Whether it goes on.
    fn pass(&mut self) -> bool {
        self.seen += 1;
        let swallowed = self.swallow > 0;
        self.swallow = self.swallow.saturating_sub(1);
        !swallowed
    }
}

type Flows = Mutex<HashMap<String, Flow>>;

/// The state of all streams of one channel.
#[derive(Debug, Default)]
pub(super) struct Streams {
    requests: Flows,
    answers: Flows,
    /// By method: whether answers are held back.
    gates: Mutex<HashMap<String, watch::Sender<bool>>>,
    /// By method: what its streams were ended with last.
    ends: Mutex<HashMap<String, watch::Sender<Option<Status>>>>,
}

impl Streams {
    pub(super) fn swallow_requests(&self, method: &str, count: usize) {
        with(&self.requests, method, |flow| flow.swallow = count);
    }

    pub(super) fn swallow_answers(&self, method: &str, count: usize) {
        with(&self.answers, method, |flow| flow.swallow = count);
    }

    pub(super) fn hold_answers(&self, method: &str, hold: bool) {
        self.gates.lock().unwrap().entry(method.to_owned()).or_default().send_replace(hold);
    }

    /// Tells whether answers are held back.
    fn gate(&self, method: &str) -> watch::Receiver<bool> {
        self.gates.lock().unwrap().entry(method.to_owned()).or_default().subscribe()
    }

    pub(super) fn end(&self, method: &str, status: Status) {
        self.ends.lock().unwrap().entry(method.to_owned()).or_default().send_replace(Some(status));
    }

    /// Tells when streams are ended, and with what.
    fn ended(&self, method: &str) -> watch::Receiver<Option<Status>> {
        self.ends.lock().unwrap().entry(method.to_owned()).or_default().subscribe()
    }

    pub(super) fn sent(&self, method: &str) -> usize {
        with(&self.requests, method, |flow| flow.seen)
    }

    pub(super) fn received(&self, method: &str) -> usize {
        with(&self.answers, method, |flow| flow.seen)
    }

    pub(super) fn clear(&self) {
        for flows in [&self.requests, &self.answers] {
            flows.lock().unwrap().values_mut().for_each(|flow| flow.swallow = 0);
        }
        self.gates.lock().unwrap().values().for_each(|gate| {
            gate.send_replace(false);
        });
    }
}

fn with<T>(flows: &Flows, method: &str, change: impl FnOnce(&mut Flow) -> T) -> T {
    change(flows.lock().unwrap().entry(method.to_owned()).or_default())
}

impl Shared {
    /// The messages of a request stream, the `first` of which was already read.
    pub(super) fn requests(
        self: Arc<Self>,
        method: &'static str,
        first: Option<Bytes>,
        rest: Streaming<Bytes>,
    ) -> impl Stream<Item = Result<Bytes, Status>> + Send + 'static {
        let all = futures::stream::iter(first.map(Ok)).chain(rest);
        all.filter(move |message| {
            let pass = message.is_err() || with(&self.streams.requests, method, Flow::pass);
            std::future::ready(pass)
        })
    }

    /// An answer whose messages are counted and may be swallowed or held back.
    pub(super) fn answers(self: Arc<Self>, method: &'static str, answer: Response<Body>) -> Response<Body> {
        if wire::status_in_head(&answer).is_some() {
            return answer;
        }
        let mut head = Response::new(());
        *head.status_mut() = answer.status();
        *head.version_mut() = answer.version();
        *head.headers_mut() = answer.headers().clone();
        let (gate, ended) = (self.streams.gate(method), self.streams.ended(method));
        let mut told = ended.clone();
        let end = async move {
            // Fails when the channel is gone, and its streams with it.
            let _ = told.changed().await;
        };
        let status =
            async move { ended.has_changed().ok()?.then(|| ended.borrow().clone().map(Err)).flatten() };
        let messages = wire::answer_messages(answer).take_until(end);
        let messages = messages.chain(futures::stream::once(status).filter_map(std::future::ready));
        let messages = messages.filter_map(move |message| {
            let pass = message.is_err() || with(&self.streams.answers, method, Flow::pass);
            let mut gate = gate.clone();
            async move {
                let _ = gate.wait_for(|held| !held).await;
                pass.then_some(message)
            }
        });
        head.map(|()| wire::answer_body(messages))
    }
}
