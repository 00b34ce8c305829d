//! Faults inside the client's channel, per gRPC method: "commit, then lose the answer" without a race.

mod rules;
mod streams;
mod wire;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use http::{Request, Response};
use tokio::sync::oneshot;
use tokio_util::bytes::Bytes;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, ServiceExt as _};

pub(crate) use rules::{Arm, Fault, Injection, Until};
use rules::{Record, Rule};
use streams::Streams;

/// Clients whose requests meet the faults a test arms. All clients of one `Faults` share its connection and
/// its faults. A method is named by its last part (`Txn`, `Range`, `LeaseGrant`, `LeaseRevoke`,
/// `LeaseKeepAlive`, `Watch`, …), by its full path, or by `*`.
#[derive(Debug, Clone)]
pub(crate) struct Faults {
    channel: Channel,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    rules: Mutex<Vec<Rule>>,
    calls: Mutex<HashMap<String, usize>>,
    streams: Streams,
}

impl Faults {
    /// In front of one endpoint.
    pub(crate) fn new(endpoint: impl Into<String>) -> Self {
        // The connection's tasks belong to the tools' runtime, not to the test's.
        let _enter = super::background().enter();
        Self { channel: to(endpoint.into()).connect_lazy(), shared: Arc::default() }
    }

    /// In front of several endpoints, chosen at random per request.
    pub(crate) fn over<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        let _enter = super::background().enter();
        let endpoints: Vec<Endpoint> = endpoints.into_iter().map(|endpoint| to(endpoint.into())).collect();
        Self { channel: Channel::balance_list(endpoints.into_iter()), shared: Arc::default() }
    }

    /// A client that meets the faults.
    pub(crate) async fn client(&self) -> Client {
        self.client_with(ConnectOptions::new()).await
    }

    /// A client that meets the faults, with options (those about the connection itself have no effect).
    pub(crate) async fn client_with(&self, options: ConnectOptions) -> Client {
        let channel = etcd_client::Channel::Custom(BoxCloneSyncService::new(self.clone()));
        Client::from_channel(channel, Some(options)).await.expect("cannot log in to etcd")
    }

    /// Arms a fault for the next request of a method.
    pub(crate) fn next(&self, method: &str, fault: Fault) -> Injection {
        self.on(method).inject(fault)
    }

    /// Describes requests to arm a fault for: the next one of `method`, unless told otherwise.
    pub(crate) fn on(&self, method: &str) -> Arm<'_> {
        Arm { faults: self, method: method.to_owned(), predicate: None, skip: 0, times: 1 }
    }

    /// Disarms every fault and lets swallowed and held streams flow again. Requests already held stay held.
    pub(crate) fn clear(&self) {
        self.rules().clear();
        self.shared.streams.clear();
    }

    /// How many requests of a method callers made so far, sent or not (a stream is one).
    pub(crate) fn calls(&self, method: &str) -> usize {
        self.shared.calls.lock().unwrap().get(method).copied().unwrap_or_default()
    }

    /// Throws away the next `count` messages that arrive in streams of a method (`Watch`, `LeaseKeepAlive`),
    /// those already open included. Zero ends it.
    pub(crate) fn swallow_answers(&self, method: &str, count: usize) {
        self.shared.streams.swallow_answers(method, count);
    }

    /// Throws away the next `count` messages that callers send in streams of a method. Zero ends it.
    pub(crate) fn swallow_requests(&self, method: &str, count: usize) {
        self.shared.streams.swallow_requests(method, count);
    }

    /// Holds back the messages that arrive in streams of a method from now on, in their order, until they are
    /// held no longer (`false`). They are counted when they arrive; of those held, only the first is.
    pub(crate) fn hold_answers(&self, method: &str, hold: bool) {
        self.shared.streams.hold_answers(method, hold);
    }

    /// Ends the open streams of a method with this status.
    pub(crate) fn end_streams(&self, method: &str, status: Status) {
        self.shared.streams.end(method, status);
    }

    /// How many messages callers sent in streams of a method so far, for example renewals.
    pub(crate) fn messages_sent(&self, method: &str) -> usize {
        self.shared.streams.sent(method)
    }

    /// How many messages arrived in streams of a method so far, swallowed ones included.
    pub(crate) fn messages_received(&self, method: &str) -> usize {
        self.shared.streams.received(method)
    }

    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.shared.rules.lock().unwrap()
    }

    /// The fault this request meets, if any; the first rule armed wins.
    fn take(&self, path: &str, message: &[u8]) -> Option<(Fault, Arc<Record>)> {
        let mut rules = self.rules();
        let rule = rules.iter_mut().find_map(|rule| rule.takes(path, message).then_some(&*rule))?;
        let taken = (rule.fault.clone(), rule.record.clone());
        rules.retain(|rule| rule.times > 0);
        Some(taken)
    }

    /// One request, from the caller's side.
    async fn handle(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let path = request.uri().path().to_owned();
        let armed = self.rules().iter().any(|rule| rule.is_about(&path));
        let stream = streams::name(&path);
        if stream.is_none() && !armed {
            return Ok(self.channel.oneshot(request).await?);
        }
        let (head, body) = request.into_parts();
        let mut messages = wire::request_messages(body);
        let first = if armed { messages.message().await? } else { None };
        let met = armed.then(|| self.take(&path, first.as_deref().unwrap_or_default())).flatten();
        let delivery = match stream {
            Some(method) => {
                let body = wire::request_body(self.shared.clone().requests(method, first, messages));
                Delivery::Stream(self.clone(), method, Request::from_parts(head, body))
            }
            None => Delivery::Unary(self.channel.clone(), head, first.unwrap_or_default()),
        };
        match met {
            None => delivery.send().await,
            Some((fault, record)) => meet(fault, record, delivery).await,
        }
    }
}

/// A request ready to be sent.
enum Delivery {
    Unary(Channel, http::request::Parts, Bytes),
    Stream(Faults, &'static str, Request<Body>),
}

impl Delivery {
    async fn send(self) -> Result<Response<Body>, BoxError> {
        match self {
            Self::Unary(channel, head, message) => {
                Ok(channel.oneshot(wire::unary_request(head, message)).await?)
            }
            Self::Stream(faults, method, request) => {
                let answer = faults.channel.oneshot(request).await?;
                Ok(faults.shared.answers(method, answer))
            }
        }
    }

    /// Sends it and reads the answer to its end (of a stream only the head).
    async fn send_and_read(self) -> Result<Bytes, Status> {
        let unary = matches!(self, Self::Unary(..));
        let answer = self.send().await;
        read(answer, unary).await
    }

    fn copy(&self) -> Self {
        match self {
            Self::Unary(channel, head, message) => {
                Self::Unary(channel.clone(), head.clone(), message.clone())
            }
            Self::Stream(_, method, _) => panic!("a {method} stream cannot be sent twice"),
        }
    }
}

async fn read(answer: Result<Response<Body>, BoxError>, unary: bool) -> Result<Bytes, Status> {
    match answer {
        Ok(answer) if unary => wire::unary_answer(answer).await,
        Ok(answer) => wire::status_in_head(&answer).map_or(Ok(Bytes::new()), Err),
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

/// Does to a request what its fault says. What must happen without the caller runs on the tools' runtime.
async fn meet(fault: Fault, record: Arc<Record>, delivery: Delivery) -> Result<Response<Body>, BoxError> {
    let (mut respond, response) = oneshot::channel();
    let run = super::background();
    match fault {
        Fault::FailBefore => return Ok(Status::unavailable("injected: not sent").into_http()),
        Fault::FailWith(status) => return Ok(status.into_http()),
        Fault::NeverSend => return std::future::pending().await,
        Fault::LoseAnswer | Fault::LoseAnswerWith(_) | Fault::NeverAnswer => {
            let answers = !matches!(fault, Fault::NeverAnswer);
            let status = match fault {
                Fault::LoseAnswerWith(status) => status,
                _ => Status::unavailable("injected: answer lost"),
            };
            run.spawn(async move {
                record.keep(delivery.send_and_read().await);
                if answers {
                    let _ = respond.send(Ok(status.into_http()));
                } else {
                    respond.closed().await;
                }
            });
        }
        Fault::Hold(until) => {
            run.spawn(async move {
                record.wait(until).await;
                let unary = matches!(delivery, Delivery::Unary(..));
                let answer = delivery.send().await;
                if let Err(answer) = respond.send(answer) {
                    record.keep(read(answer, unary).await);
                }
            });
        }
        Fault::Twice(until) => {
            let copy = delivery.copy();
            run.spawn(async move {
                let answer = delivery.send().await;
                let _ = respond.send(answer);
                record.wait(until).await;
                record.keep(copy.send_and_read().await);
            });
        }
    }
    response.await.expect("the fault's task ended without an answer")
}

impl Service<Request<Body>> for Faults {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        *self.shared.calls.lock().unwrap().entry(method).or_default() += 1;
        Box::pin(self.clone().handle(request))
    }
}

fn to(endpoint: String) -> Endpoint {
    let endpoint = if endpoint.contains("://") { endpoint } else { format!("http://{endpoint}") };
    let endpoint = Endpoint::from_shared(endpoint).expect("not an endpoint");
    endpoint.connect_timeout(Duration::from_secs(5))
}
