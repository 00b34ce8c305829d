//! The connection to one instance.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::Shared;
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Service, StdError};
use tonic::transport::{Channel, Endpoint};

use crate::session::runtime::Runtime;

/// The longest a connection may take, whatever the endpoint says.
const PATIENCE: Duration = Duration::from_secs(5);

/// An instance and the connection to it.
#[derive(Debug)]
pub(super) struct Peer {
    address: String,
    latest: Mutex<Option<Attempt>>,
    /// The last attempt that failed, or whose connection is known to be broken.
    broken: AtomicU64,
}

/// An attempt to connect; the first is number 1.
#[derive(Debug, Clone)]
struct Attempt {
    number: u64,
    opened: Shared<oneshot::Receiver<Result<Channel, String>>>,
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    channel: Channel,
    number: u64,
}

impl Peer {
    pub(super) fn new(address: &str) -> Arc<Self> {
        let (latest, broken) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { address: address.to_owned(), latest, broken })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The open connection, or a new one. Calls that wait for the same attempt share its failure.
    pub(super) async fn connect(
        self: &Arc<Self>,
        runtime: &Runtime,
        endpoint: impl FnOnce() -> Result<Endpoint, tonic::transport::Error>,
    ) -> Result<Connection, StdError> {
        let Attempt { number, opened } = match self.latest() {
            Some(attempt) => attempt,
            None => self.attempt(runtime, endpoint().map_err(|error| causes(&error))?),
        };
        let opened = opened.await.inspect_err(|_| self.disconnect(number));
        let channel = opened.map_err(|_| "the runtime of the session has ended")??;
        Ok(Connection { channel, number })
    }

    /// The last attempt, if it is under way or has succeeded.
    fn latest(&self) -> Option<Attempt> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = self.broken.load(Ordering::Acquire);
        latest.clone().filter(|attempt| attempt.number > broken)
    }

    /// A new attempt, unless another call has begun one meanwhile. It is made in the session: a call that is not polled
    /// keeps nobody waiting.
    fn attempt(self: &Arc<Self>, runtime: &Runtime, endpoint: Endpoint) -> Attempt {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = self.broken.load(Ordering::Acquire);
        if let Some(attempt) = latest.as_ref().filter(|attempt| attempt.number > broken) {
            return attempt.clone();
        }
        let (answer, opened) = oneshot::channel();
        let (peer, number) = (self.clone(), broken + 1);
        runtime.spawn_connection(async move {
            let opened = match tokio::time::timeout(PATIENCE, endpoint.connect()).await {
                Ok(opened) => opened.map_err(|error| causes(&error)),
                Err(_) => Err("it does not answer".into()),
            };
            if opened.is_err() {
                peer.disconnect(number);
            }
            let _ = answer.send(opened);
        });
        latest.insert(Attempt { number, opened: opened.shared() }).clone()
    }

    /// Gives a connection up. Calls that are under way on it go on as far as they can.
    pub(super) fn disconnect(&self, number: u64) {
        self.broken.fetch_max(number, Ordering::AcqRel);
    }
}

impl Connection {
    /// Tells the connections of a peer apart.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) async fn call(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Body>, tonic::transport::Error> {
        let mut channel = self.channel.clone();
        poll_fn(|context| channel.poll_ready(context)).await?;
        channel.call(request).await
    }
}

/// An error, and those that caused it.
pub(super) fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// What they say.
pub(super) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
