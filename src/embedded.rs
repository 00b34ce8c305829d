//! An etcd in this process, for development and tests. **Production is an etcd cluster**: this one is a single member, in
//! memory, and gone when it is dropped.
//!
//! [`Server`] speaks etcd's gRPC API well enough that etcd-client, `etcdctl` and this crate cannot tell the difference in
//! what they use: KV with nested transactions and history, watches, leases, and what clients ask of maintenance and
//! membership. There is no authentication and no cluster; what is not served says so.
//!
//! # Testing your code with it
//!
//! The tests alone need it, and `test-util` of tokio for its paused clock:
//!
//! ```toml
//! [dev-dependencies]
//! etcd-recipes = { version = "0.1", features = ["embedded"] }
//! tokio = { version = "1", features = ["full", "test-util"] }
//! ```
//!
//! A test holds the server in its hands: it ends leases, cuts and stalls links, loses answers, and lets time pass. Give the
//! code under test a [`Session`]; the rest of it is as in production. In this test a holder loses its lock in the middle of
//! its work, for want of a network, which takes seconds of the paused clock and a few milliseconds of yours:
//!
//! ```
//! # // In a test: #[tokio::test(start_paused = true)]
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! use etcd_recipes::embedded::Server;
//! use etcd_recipes::{Mutex, Session};
//!
//! // The code under test: it must not write a report without the lock.
//! async fn report(session: &Session) -> etcd_recipes::Result<()> {
//!     let guard = Mutex::new(session, "reports")?.lock().await?;
//!     guard.run(tokio::time::sleep(Duration::from_secs(60))).await?; // long work
//!     guard.unlock().await
//! }
//!
//! // The test: #[tokio::test(start_paused = true)]
//! let server = Server::start();
//! let link = server.link();
//! let session = server.session(&link).await?.ttl(Duration::from_secs(10)).connect().await?;
//! let work = tokio::spawn({
//!     let session = session.clone();
//!     async move { report(&session).await }
//! });
//! tokio::time::sleep(Duration::from_secs(1)).await;
//! assert_eq!(server.keys("reports/").len(), 1, "at work");
//!
//! link.stall();
//! assert!(work.await?.unwrap_err().is_lost());
//! assert_eq!(server.keys("reports/").len(), 1, "the holder knows before etcd gives the lock away");
//!
//! tokio::time::sleep(Duration::from_secs(10)).await;
//! assert!(server.keys("reports/").is_empty());
//! # Ok(()) }
//! ```
//!
//! ## What can be done to it
//!
//! Each client has a [`Link`] of its own, so that one process of several can be cut off. Faults meet its requests by the
//! name of their method in etcd's API; a lock is one `Txn`.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use std::time::Duration;
//! # use etcd_recipes::Mutex;
//! # use etcd_recipes::embedded::{Fault, Server};
//! # let server = Server::start();
//! # let link = server.link();
//! # let session = server.session(&link).await?.ttl(Duration::from_secs(10)).connect().await?;
//! let mutex = Mutex::new(&session, "reports")?;
//!
//! // Cut: what is under way fails, and so does what comes. Short ones hurt nobody.
//! let guard = mutex.lock().await?;
//! link.cut();
//! tokio::time::sleep(Duration::from_secs(3)).await;
//! link.restore();
//! assert!(guard.is_held());
//!
//! // Stall: nothing gets through, and nothing fails, as with a network that swallows packets.
//! link.stall();
//! assert!(tokio::time::timeout(Duration::from_secs(2), guard.unlock()).await.is_err());
//! link.restore();
//!
//! // Refuse: as an etcd that is not available. It is tried again, so the lock is had all the same.
//! let refused = link.inject("Txn", Fault::Refuse, 2);
//! let guard = mutex.lock().await?;
//! assert_eq!(refused.hits(), 2);
//!
//! // Lose the answer: it is done, and nobody is told.
//! link.inject("Txn", Fault::LoseAnswer, 1);
//! guard.unlock().await?;
//!
//! // Hold: the request arrives later, also when its sender has given up.
//! let held = link.inject("Txn", Fault::Hold, 1);
//! let lock = tokio::spawn({
//!     let mutex = mutex.clone();
//!     async move { mutex.lock().await }
//! });
//! held.hit(1).await;
//! lock.abort();
//! held.release();
//! tokio::time::sleep(Duration::from_secs(5)).await;
//! assert!(server.keys("reports/").is_empty(), "whoever gave up keeps no lock");
//!
//! // End a lease now: by its TTL, by an operator, it is the same.
//! let guard = mutex.lock().await?;
//! assert!(server.expire(session.lease_id().expect("it is alive")));
//! guard.lost().await;
//!
//! // Let time pass. Nobody waits for it: the clock of the test is paused, and jumps.
//! tokio::time::sleep(Duration::from_secs(3600)).await;
//! assert!(session.is_alive(), "with a new lease");
//! assert!(server.keys("reports/").is_empty());
//!
//! // Forget the history, under the eyes of those who watch it.
//! server.compact(server.revision())?;
//! # Ok(()) }
//! ```
//!
//! A paused clock jumps as soon as all tasks wait, so let tasks wait, and not threads: no blocking calls, no keepalive
//! thread, and no TCP, whose answers take real time. A program that is given endpoints is served with
//! [`Server::listen`], on the real clock; so are several processes, by the example `dev_server`.
//!
//! ## What is not as in etcd
//!
//! There is one member and one term, nothing is on disk, and `/metrics`, users, alarms, quotas, snapshots, hashes and the
//! services for locks and elections in the server are not there: their methods answer `Unimplemented`, by name. A lease ends
//! on time, not up to half a second late, and is granted for one second at least. A watch is told of the past at once, not a tenth
//! of a second later. A watch that starts at the very revision of a compaction is told of a deletion there, as by etcd from
//! 3.4.34 and 3.5.16 on, and a sort by a target that is none is refused, over which older ones end themselves. The test suite
//! of this crate runs on this server as well as on etcd, and 100,000 random requests are compared with those to an etcd.

mod engine;
mod lease;
mod link;
mod named;
mod service;
mod status;
mod store;
mod txn;
mod watch;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use etcd_client::Client;
use etcd_client::proto::{PbCompactionRequest, PbLeaseLeasesResponse};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::time::Instant;
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
    /// When it began, by tokio's clock and by that on the wall.
    began: (Instant, SystemTime),
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
        let began = (Instant::now(), SystemTime::now());
        Self { services, address, began, _closing: closing.drop_guard() }
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
        Ok(Session::builder_with_client(link.client().await?).on_tokio_time(self.began))
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
