//! The session: one lease on etcd, kept alive, that everything else lives on.
//!
//! A [`Session`] is a cheap handle; clone it freely. It owns one lease at a time, and everything that was acquired
//! through it, locks and leaderships, lives on that lease. When the lease is lost the session takes a new one as soon
//! as etcd answers: a new *generation*. What is exclusive ends with its generation, for ever; what can be made again
//! heals: a call still waiting for a lock takes a new place in line, an observer goes on observing.
//!
//! # The local deadline
//!
//! A process must know that its lease is over *before* etcd gives its locks to somebody else, also when it cannot
//! reach etcd, and also when it was stopped meanwhile. So the session computes a deadline of its own: the time the last
//! confirmed keepalive was sent, plus the TTL in its answer, less a margin of 5 % and at least 100 ms. Questions like
//! [`MutexGuard::is_held`](crate::MutexGuard::is_held) compare that deadline with the clock in the caller's thread.
//! Deadlines bound what this process believes; they do not stop a write that is already on its way. For that, fence.

mod batch;
mod builder;
mod dial;
mod endpoints;
pub(crate) mod expiring;
mod flag;
mod freshness;
pub(crate) mod generation;
mod keepalive;
pub(crate) mod kept;
mod lease;
pub(crate) mod line;
mod login;
pub(crate) mod once;
pub(crate) mod owned_key;
pub(crate) mod participant;
pub(crate) mod queues;
mod refused;
pub(crate) mod removal;
pub(crate) mod rpc;
pub(crate) mod runtime;
mod slots;
mod transport;
pub(crate) mod view;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

pub use self::builder::SessionBuilder;
use self::builder::{Connections, Options};
use self::generation::{Current, Generation};
use self::kept::Kept;
use self::line::Line;
use self::queues::Queues;
use self::rpc::Rpc;
use self::runtime::Runtime;
use self::transport::Transport;
use self::watch::Hub;
use crate::error::{Error, Result};
use crate::name::Prefix;

/// A handle on one lease at etcd and all that lives on it.
///
/// Dropping the last handle (guards hold one too) revokes the lease in the background, best effort: if the runtime is
/// shutting down, the lease expires after its TTL instead. Call [`close`](Session::close) to know that it is gone.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{Mutex, Session};
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let mutex = Mutex::new(&session, "reports")?;
/// let guard = mutex.lock().await?;
/// assert!(guard.is_held());
/// guard.unlock().await?;
/// session.close().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Session {
    handle: Arc<Handle>,
}

/// Closes the session when the last one is dropped.
struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.closing.cancel();
    }
}

/// What the parts of a session share. Tasks hold this; only users hold the handle.
pub(crate) struct Core {
    pub(crate) rpc: Arc<Rpc>,
    /// Runs the tasks of this session alone.
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) namespace: Arc<str>,
    /// Watches for lines and owned keys.
    pub(crate) deletions: Hub,
    /// Watches for views.
    pub(crate) changes: Hub,
    pub(crate) options: Arc<Options>,
    transport: Arc<Transport>,
    /// Their names are shared, because a tree keeps room for several.
    pub(crate) lines: Mutex<BTreeMap<Arc<Prefix>, Weak<Line>>>,
    pub(crate) queues: Queues,
    /// Made with the first key, since most sessions keep none.
    pub(crate) kept: OnceLock<Kept>,
    client: Arc<Client>,
    current: Arc<Current>,
    state: channel::Receiver<SessionState>,
    /// Cancelled when the session is to be closed.
    pub(crate) closing: CancellationToken,
}

/// What a session is doing, as far as it knows; see [`Session::watch_state`].
///
/// The state informs; whether a lock is held is for its guard to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionState {
    /// The lease lives.
    Connected {
        /// Counts the leases of this session, from 1.
        generation: u64,
    },
    /// A keepalive is overdue. The lease still lives; it is lost if none succeeds before the deadline.
    Suspended {
        /// Counts the leases of this session, from 1.
        generation: u64,
    },
    /// The lease is lost, and everything exclusive with it. A new one is granted as soon as etcd answers.
    Lost {
        /// The generation that was lost.
        generation: u64,
    },
    /// The session was closed. Final.
    Closed,
}

impl Session {
    /// Connects with the defaults of [`SessionBuilder`].
    ///
    /// # Errors
    ///
    /// As [`SessionBuilder::connect`].
    ///
    /// # Cancel safety
    ///
    /// As [`SessionBuilder::connect`].
    pub async fn connect(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        Self::builder(endpoints).connect().await
    }

    /// Begins a session on connections of its own, to any of the given members of one cluster.
    ///
    /// An endpoint is `host:port`, or a URL with the scheme `http` or `https`; `https` needs one of the features `tls` and
    /// `tls-aws-lc`.
    pub fn builder(endpoints: impl IntoIterator<Item = impl Into<String>>) -> SessionBuilder {
        SessionBuilder::new(Connections::Endpoints(endpoints.into_iter().map(Into::into).collect()))
    }

    /// Begins a session on a client that the caller made, with the defaults of [`SessionBuilder`].
    ///
    /// The client's own options apply. Three guards of this crate need connections of its own and are missing then:
    /// keepalives that cannot be delayed by other traffic, the choice of another member when one does not answer, and
    /// room for more while large answers wait for callers that do not take them.
    ///
    /// # Errors
    ///
    /// As [`SessionBuilder::connect`].
    ///
    /// # Cancel safety
    ///
    /// As [`SessionBuilder::connect`].
    pub async fn with_client(client: Client) -> Result<Self> {
        Self::builder_with_client(client).connect().await
    }

    /// Begins a session on a client that the caller made; see [`with_client`](Session::with_client).
    pub fn builder_with_client(client: Client) -> SessionBuilder {
        SessionBuilder::new(Connections::Client(Box::new(client)))
    }

    /// Opens a further session beside this one: a lease of its own, with the same options, over the same connections
    /// and streams.
    ///
    /// Takes some 7 to 8 KB while it waits for a lock, where one with connections of its own takes many times that. Each
    /// of them is lost, renewed and closed by itself; the connections end with the last. Contenders of one session take
    /// turns more cheaply than those of several, so open another only for what is to be lost or closed on its own.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when this session is closed; otherwise as [`SessionBuilder::connect`].
    ///
    /// # Cancel safety
    ///
    /// As [`SessionBuilder::connect`].
    pub async fn beside(&self) -> Result<Self> {
        builder::beside(self.core()).await
    }

    /// The state now.
    pub fn state(&self) -> SessionState {
        *self.core().state.borrow()
    }

    /// A channel that always holds the newest state; states in between may be missed.
    pub fn watch_state(&self) -> channel::Receiver<SessionState> {
        self.core().state.clone()
    }

    /// Whether the session has a lease that certainly lives, by the local deadline. Compares clocks in the caller's
    /// thread.
    pub fn is_alive(&self) -> bool {
        self.core().current.living().is_some()
    }

    /// The id of the lease; `None` while there is none that lives.
    pub fn lease_id(&self) -> Option<i64> {
        self.core().current.living().map(|generation| generation.lease.get())
    }

    /// The TTL asked for. etcd raises it when it is below its minimum (1.5 times its election timeout).
    pub fn ttl(&self) -> Duration {
        self.core().options.ttl
    }

    /// The etcd client of the session, for requests of the caller's own.
    pub fn client(&self) -> Client {
        Client::clone(&self.core().client)
    }

    /// Ends the session: revokes the lease, and with it everything acquired through this session, in one request.
    ///
    /// Every guard of the session reports its loss at once, every waiting call fails with [`Error::Closed`]. Returns
    /// when etcd has confirmed; when it refuses, or does not answer for the TTL, the lease is left to expire.
    ///
    /// # Errors
    ///
    /// None at present; closing a closed session is fine.
    ///
    /// # Cancel safety
    ///
    /// When dropped, closing goes on in the background.
    pub async fn close(&self) -> Result<()> {
        let core = self.core();
        core.closing.cancel();
        let mut state = core.state.clone();
        // An error means that the keeper is gone, and the session with it.
        let _ = state.wait_for(|state| *state == SessionState::Closed).await;
        core.runtime.idle().await;
        core.transport.ended().await;
        Ok(())
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }

    /// The living generation; waits for one.
    pub(crate) async fn generation(&self) -> Result<Arc<Generation>> {
        self.core().generation().await
    }

    /// Waits until the session is to be closed.
    pub(crate) async fn closing(&self) {
        self.core().closing.cancelled().await;
    }
}

impl Core {
    /// The living generation; waits for one.
    pub(crate) async fn generation(&self) -> Result<Arc<Generation>> {
        tokio::select! {
            biased;
            () = self.closing.cancelled() => Err(Error::Closed),
            generation = self.current.next() => generation.ok_or(Error::Closed),
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("state", &self.state())
            .field("lease", &self.lease_id().map(|lease| format!("{lease:x}")))
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("rpc", &self.rpc).finish_non_exhaustive()
    }
}
