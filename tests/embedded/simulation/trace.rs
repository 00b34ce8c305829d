//! Everything that goes over the links and what the processes are told, and when: two runs of one seed must have the same.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Channel, Client};
use etcd_recipes::embedded::Link;
use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tonic::body::Body;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

/// What happened, in order. With `TRACE` set it is also printed as it happens.
#[derive(Clone)]
pub(super) struct Trace {
    began: Instant,
    lines: Arc<Mutex<Vec<Line>>>,
    print: bool,
}

#[derive(Clone)]
pub(super) struct Line {
    at: Duration,
    what: String,
    /// The part of a message that passed, if one did.
    bytes: Vec<u8>,
}

impl Trace {
    /// Begins now.
    pub(super) fn begin() -> Self {
        let print = std::env::var_os("TRACE").is_some();
        Self { began: Instant::now(), lines: Arc::default(), print }
    }

    pub(super) fn note(&self, what: impl Into<String>) {
        self.add(what.into(), &[]);
    }

    fn add(&self, what: String, bytes: &[u8]) {
        let line = Line { at: self.began.elapsed(), what, bytes: bytes.to_vec() };
        if self.print {
            eprintln!("{line:?}");
        }
        self.lines.lock().unwrap().push(line);
    }

    pub(super) fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap().clone()
    }

    /// An etcd client over a link, everything of which is recorded.
    pub(super) async fn client(&self, link: &Link, name: String) -> Client {
        let recorded = Recorded { link: link.clone(), trace: self.clone(), name: name.into() };
        let channel = Channel::Custom(BoxCloneSyncService::new(recorded));
        Client::from_channel(channel, None).await.unwrap()
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {}", self.at, self.what, self.bytes.escape_ascii())
    }
}

/// A link that is listened in on.
#[derive(Clone)]
struct Recorded {
    link: Link,
    trace: Trace,
    name: Arc<str>,
}

impl Service<http::Request<Body>> for Recorded {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.link.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let call = format!("{} {method}", self.name);
        let (trace, answered) = (self.trace.clone(), format!("{call} <-"));
        let answer = self.link.call(request.map(|body| record(body, trace.clone(), format!("{call} ->"))));
        Box::pin(async move {
            match answer.await {
                Ok(response) => Ok(response.map(|body| record(body, trace, answered))),
                Err(error) => {
                    trace.note(format!("{answered} {error}"));
                    Err(error)
                }
            }
        })
    }
}

/// The same body, with what passes put down.
fn record(body: Body, trace: Trace, what: String) -> Body {
    Body::new(body.map_frame(move |frame| {
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => trace.add(what.clone(), data),
            (_, Some(trailers)) => trace.note(format!("{what} {trailers:?}")),
            _ => {}
        }
        frame
    }))
}
