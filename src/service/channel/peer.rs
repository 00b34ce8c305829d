//! The connection to one instance.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Service, StdError};
use tonic::transport::{Channel, Endpoint};

/// The longest a connection may take, whatever the endpoint says.
const PATIENCE: Duration = Duration::from_secs(5);

/// An instance and the connection to it.
#[derive(Debug)]
pub(super) struct Peer {
    address: String,
    connection: AsyncMutex<Option<Connection>>,
    /// Counts the attempts to connect.
    attempts: AtomicU64,
    /// The last connection that is known to be broken.
    broken: AtomicU64,
}

/// An open connection.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    channel: Channel,
    number: u64,
}

impl Peer {
    pub(super) fn new(address: &str) -> Self {
        let (attempts, broken) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { address: address.to_owned(), connection: AsyncMutex::default(), attempts, broken }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The open connection, or a new one. Calls that wait for the same attempt share its failure.
    pub(super) async fn connect(
        &self,
        endpoint: impl FnOnce() -> Result<Endpoint, tonic::transport::Error>,
    ) -> Result<Connection, StdError> {
        let before = self.attempts.load(Ordering::Acquire);
        let mut connection = self.connection.lock().await;
        if let Some(open) =
            connection.as_ref().filter(|open| open.number > self.broken.load(Ordering::Acquire))
        {
            return Ok(open.clone());
        }
        *connection = None;
        if self.attempts.load(Ordering::Acquire) != before {
            return Err("another call has just tried".into());
        }
        let opened = tokio::time::timeout(PATIENCE, endpoint()?.connect()).await;
        let number = self.attempts.fetch_add(1, Ordering::AcqRel) + 1;
        let open = Connection { channel: opened.map_err(|_| "it does not answer")??, number };
        *connection = Some(open.clone());
        Ok(open)
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
