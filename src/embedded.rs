//! An etcd in this process, for development and tests. **Production is an etcd cluster**: this one is a single member, in
//! memory, and gone when it is dropped.
//!
//! [`Server`] speaks etcd's gRPC API well enough that etcd-client, `etcdctl` and this crate cannot tell the difference in
//! what they use: KV with nested transactions and history, watches, leases, and what clients ask of maintenance and
//! membership. There is no authentication and no cluster; what is not served says so.
//!
//! # Testing your code with it
//!
//! A test holds the server in its hands: it ends leases, cuts and stalls links, loses answers, and lets time pass on
//! tokio's paused clock, so that the loss of a lease takes microseconds.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! use etcd_recipes::embedded::Server;
//! use etcd_recipes::Mutex;
//!
//! let server = Server::start();
//! let link = server.link();
//! let session = server.session(&link).await?.ttl(Duration::from_secs(10)).connect().await?;
//! let guard = Mutex::new(&session, "reports")?.lock().await?;
//!
//! // In the middle of the work the network swallows everything. The holder knows before etcd acts on it.
//! link.stall();
//! guard.lost().await;
//! assert!(!guard.is_held());
//! assert_eq!(server.keys("reports/").len(), 1, "etcd still waits for the lease to end");
//!
//! tokio::time::sleep(Duration::from_secs(10)).await;
//! assert!(server.keys("reports/").is_empty());
//! # Ok(()) }
//! ```

mod engine;
mod lease;
mod link;
mod service;
mod status;
mod store;
mod txn;
mod watch;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use etcd_client::Client;
use etcd_client::proto::{PbCompactionRequest, PbLeaseLeasesResponse};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::server::TcpIncoming;

use self::engine::Engine;
pub use self::link::{Fault, Injection, Link};
use self::service::{Services, routes};
use self::store::Range;
use crate::session::{Session, SessionBuilder};

/// An etcd in this process; see the [module](self). Ends when it is dropped.
pub struct Server {
    services: Services,
    address: Option<SocketAddr>,
    /// Ends the tasks of the server.
    _closing: DropGuard,
}

/// A key as a server has it.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Key {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// The revision at which it was created.
    pub create_revision: i64,
    /// The revision at which it was last put.
    pub mod_revision: i64,
    /// The lease it lives on; 0 for none.
    pub lease: i64,
}

impl Server {
    /// Starts a server that is reached over [links](Server::link), without a port.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start() -> Self {
        Self::serve("http://embedded", None)
    }

    /// Starts a server that is reached over TCP as well, by any etcd client.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on, for one because another server does.
    ///
    /// # Cancel safety
    ///
    /// Nothing remains when dropped.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn listen(address: impl ToSocketAddrs) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let server = Self::serve(&format!("http://{address}"), Some(address));
        let closing = server.services.closing.clone();
        // HTTP/1 is for `/health`.
        let serve = tonic::transport::Server::builder()
            .accept_http1(true)
            .add_routes(routes(&server.services))
            .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
                closing.cancelled().await;
            });
        tokio::spawn(async move {
            if let Err(error) = serve.await {
                tracing::warn!(%error, "the embedded server ended");
            }
        });
        Ok(server)
    }

    fn serve(url: &str, address: Option<SocketAddr>) -> Self {
        let (engine, closing) = (Arc::new(Engine::default()), CancellationToken::new());
        let (expiry, ended) = (engine.clone().expire(), closing.clone());
        tokio::spawn(async move { ended.run_until_cancelled(expiry).await });
        let services = Services { engine, url: url.into(), closing: closing.clone() };
        Self { services, address, _closing: closing.drop_guard() }
    }

    /// Where it listens, if it does.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// A new way to this server, in memory. Each client that is to be cut off by itself needs its own.
    pub fn link(&self) -> Link {
        Link::new(routes(&self.services), self.services.closing.clone())
    }

    /// An etcd client over a link of its own.
    ///
    /// # Errors
    ///
    /// As [`Link::client`].
    ///
    /// # Cancel safety
    ///
    /// As [`Link::client`].
    pub async fn client(&self) -> Result<Client, etcd_client::Error> {
        self.link().client().await
    }

    /// Begins a session over a link, on tokio's clock: when that is paused, so are its deadlines.
    ///
    /// # Errors
    ///
    /// As [`Link::client`].
    ///
    /// # Cancel safety
    ///
    /// As [`Link::client`].
    pub async fn session(&self, link: &Link) -> Result<SessionBuilder, etcd_client::Error> {
        Ok(Session::builder_with_client(link.client().await?).on_tokio_time())
    }

    /// Ends a lease now, as if its time were over: its keys are deleted. `false` if there is none of this id.
    pub fn expire(&self, lease: i64) -> bool {
        self.services.engine.revoke(lease).is_ok()
    }

    /// Lets no lease end by itself, until [`resume_expiry`](Server::resume_expiry).
    pub fn hold_expiry(&self) {
        self.services.engine.hold_expiry(true);
    }

    /// Lets leases end again; those whose time is over do at once.
    pub fn resume_expiry(&self) {
        self.services.engine.hold_expiry(false);
    }

    /// Forgets what was before a revision.
    ///
    /// # Errors
    ///
    /// As etcd: when the revision is compacted already, or in the future.
    pub fn compact(&self, revision: i64) -> Result<(), etcd_client::Error> {
        let request = PbCompactionRequest { revision, physical: false };
        let refused = |refusal| etcd_client::Error::GRpcStatus(tonic::Status::from(refusal));
        self.services.engine.compact(request).map(drop).map_err(refused)
    }

    /// The revision of the last write.
    pub fn revision(&self) -> i64 {
        self.services.engine.header().revision
    }

    /// The keys that start with a prefix, in their order.
    pub fn keys(&self, prefix: impl AsRef<[u8]>) -> Vec<Key> {
        let prefix = prefix.as_ref();
        let all = self.services.engine.keys(&Range::new(prefix, b"\0"));
        all.into_iter()
            .take_while(|kv| kv.key.starts_with(prefix))
            .map(|kv| Key {
                key: kv.key,
                value: kv.value,
                create_revision: kv.create_revision,
                mod_revision: kv.mod_revision,
                lease: kv.lease,
            })
            .collect()
    }

    /// The ids of the leases that live.
    pub fn leases(&self) -> Vec<i64> {
        let PbLeaseLeasesResponse { leases, .. } = self.services.engine.leases();
        leases.into_iter().map(|lease| lease.id).collect()
    }

    /// How many watches there are.
    pub fn watches(&self) -> usize {
        self.services.engine.watch_count().0
    }

    /// On how many streams they are.
    pub fn watch_streams(&self) -> usize {
        self.services.engine.watch_count().1
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("key", &crate::name::display(&self.key))
            .field("value", &crate::name::Hidden(&self.value))
            .field("create_revision", &self.create_revision)
            .field("mod_revision", &self.mod_revision)
            .field("lease", &format_args!("{:x}", self.lease))
            .finish()
    }
}
