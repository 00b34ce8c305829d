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

mod endpoints;
pub(crate) mod lease;
pub(crate) mod line;
mod owned_key;
pub(crate) mod participant;
pub(crate) mod rpc;
mod runtime;
mod slots;
pub(crate) mod view;
pub(crate) mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::{oneshot, watch as channel};
use tokio_util::sync::CancellationToken;

use self::endpoints::Endpoints;
use self::lease::{Generation, Keeper, Liveness};
use self::line::Line;
use self::rpc::Rpc;
use self::runtime::Runtime;
use self::watch::{Hub, Kind};
use crate::error::{Error, Result};
use crate::name::{self, Prefix};

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
    pub(crate) runtime: Arc<Runtime>,
    pub(crate) namespace: Arc<str>,
    /// Who this process says it is, in the values of lock keys.
    pub(crate) identity: String,
    /// Watches for lines and owned keys.
    pub(crate) deletions: Hub,
    /// Watches for views.
    pub(crate) changes: Hub,
    pub(crate) lines: Mutex<BTreeMap<Prefix, Weak<Line>>>,
    ttl: Duration,
    client: Client,
    current: channel::Receiver<Option<Arc<Generation>>>,
    state: channel::Receiver<SessionState>,
    closing: CancellationToken,
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
    /// An endpoint is `host:port`, or a URL with the scheme `http` or `https`.
    pub fn builder(endpoints: impl IntoIterator<Item = impl Into<String>>) -> SessionBuilder {
        SessionBuilder::new(Transport::Endpoints(endpoints.into_iter().map(Into::into).collect()))
    }

    /// Begins a session on a client that the caller made, with the defaults of [`SessionBuilder`].
    ///
    /// The client's own options apply. Two guards of this crate need connections of its own and are missing then:
    /// keepalives that cannot be delayed by other traffic, and the choice of another member when one does not answer.
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
        SessionBuilder::new(Transport::Client(Box::new(client)))
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
        self.live_generation().is_some()
    }

    /// The id of the lease; `None` while there is none that lives.
    pub fn lease_id(&self) -> Option<i64> {
        self.live_generation().map(|generation| generation.lease.get())
    }

    /// The TTL asked for. etcd raises it when it is below its minimum (1.5 times its election timeout).
    pub fn ttl(&self) -> Duration {
        self.core().ttl
    }

    /// The etcd client of the session, for requests of the caller's own.
    pub fn client(&self) -> Client {
        self.core().client.clone()
    }

    /// Ends the session: revokes the lease, and with it everything acquired through this session, in one request.
    ///
    /// Every guard of the session reports its loss at once, every waiting call fails with [`Error::Closed`]. Returns
    /// when etcd has confirmed, or after the TTL.
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
        Ok(())
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }

    /// The living generation; waits for one.
    pub(crate) async fn generation(&self) -> Result<Arc<Generation>> {
        let core = self.core();
        let mut current = core.current.clone();
        let living =
            current.wait_for(|current| current.as_ref().is_some_and(|generation| generation.is_alive()));
        tokio::select! {
            biased;
            () = core.closing.cancelled() => Err(Error::Closed),
            living = living => living.ok().and_then(|current| current.clone()).ok_or(Error::Closed),
        }
    }

    /// Waits until the session is to be closed.
    pub(crate) async fn closing(&self) {
        self.core().closing.cancelled().await;
    }

    fn live_generation(&self) -> Option<Arc<Generation>> {
        self.core().current.borrow().clone().filter(|generation| generation.is_alive())
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

/// The options of a session.
#[must_use = "a builder does nothing until `connect` is called"]
pub struct SessionBuilder {
    transport: Transport,
    ttl: Duration,
    connect_timeout: Duration,
    namespace: String,
    identity: Option<String>,
    user: Option<(String, String)>,
    #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
    tls: Option<etcd_client::TlsOptions>,
    thread: bool,
    liveness: Option<Liveness>,
}

enum Transport {
    Endpoints(Vec<String>),
    Client(Box<Client>),
}

impl SessionBuilder {
    fn new(transport: Transport) -> Self {
        Self {
            transport,
            ttl: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            namespace: "_etcd-recipes/".into(),
            identity: None,
            user: None,
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            tls: None,
            thread: false,
            liveness: None,
        }
    }

    /// How long the lease outlives its last keepalive: after a crash, others wait this long. Whole seconds.
    ///
    /// Short TTLs fail over faster and are lost sooner when the network or a process stalls. Defaults to 10 seconds.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long [`connect`](SessionBuilder::connect) tries. Defaults to 5 seconds.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Where the crate keeps its bookkeeping keys. A user with restricted permissions needs `readwrite` on it. Defaults
    /// to `_etcd-recipes/`.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// What lock keys say of their owner, for people who look at the line. Anybody who can read the keys can read it.
    /// Defaults to `host:process id`.
    pub fn identity(mut self, identity: impl Into<String>) -> Self {
        self.identity = Some(identity.into());
        self
    }

    /// Logs in. The endpoints must name their scheme then, so that a password is never sent in clear by accident.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some((name.into(), password.into()));
        self
    }

    /// Connects with TLS.
    #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
    #[cfg_attr(docsrs, doc(cfg(feature = "tls")))]
    pub fn tls(mut self, options: etcd_client::TlsOptions) -> Self {
        self.tls = Some(options);
        self
    }

    /// Sends keepalives from a thread of their own, so that blocking code in the application's runtime cannot lose
    /// the lease.
    ///
    /// The other side of it: the lease then also outlives an application that hangs. Give it a
    /// [`liveness`](SessionBuilder::liveness) check.
    pub fn keepalive_thread(mut self) -> Self {
        self.thread = true;
        self
    }

    /// Asks `alive` before each keepalive; while it says no, none is sent, and the lease is lost at its deadline.
    ///
    /// It is called on the task or thread of the keepalives and must not block.
    pub fn liveness(mut self, alive: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.liveness = Some(Arc::new(alive));
        self
    }

    /// Connects and takes the lease.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] for an option out of range; [`Error::Unreachable`] when no endpoint answered within the
    /// connect timeout; [`Error::AuthFailed`] when etcd refuses the user.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the lease is revoked in the background.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<Session> {
        self.check()?;
        let runtime = Arc::new(Runtime::current());
        let options = self.options();
        let timeout = (self.ttl / 5).clamp(Duration::from_millis(500), Duration::from_secs(2));
        let namespace: Arc<str> = self.namespace.into();
        let (has_user, probe) = (self.user.is_some(), name::probe(&namespace));
        let rpc = |endpoints| {
            let (runtime, probe) = (runtime.clone(), probe.clone());
            Rpc { endpoints, runtime, timeout, has_user, probe }
        };
        let (requests, keepalives) = match self.transport {
            Transport::Endpoints(names) => {
                (Endpoints::dial(&names, options.clone()), Endpoints::dial(&names, options))
            }
            Transport::Client(client) => (Endpoints::given((*client).clone()), Endpoints::given(*client)),
        };
        let (state, states) = channel::channel(SessionState::Lost { generation: 0 });
        let (current, generations) = channel::channel(None);
        let closing = CancellationToken::new();
        let keeper = Keeper {
            rpc: rpc(keepalives),
            ttl: self.ttl,
            liveness: self.liveness,
            state,
            current,
            closing: closing.clone(),
        };
        // From here on a dropped call closes what was opened.
        let undo = closing.clone().drop_guard();
        start(keeper, self.connect_timeout, self.thread, &runtime).await?;
        let rpc = Arc::new(rpc(requests));
        let mut last = None;
        let client = rpc.endpoints.for_user(&runtime, &mut last);
        let client = tokio::time::timeout(self.connect_timeout, client).await;
        let client = client.map_err(|_| rpc.unreachable(self.connect_timeout, last))?;
        let core = Core {
            deletions: Hub::new(Kind::Deletions, rpc.clone(), closing.clone()),
            changes: Hub::new(Kind::Everything, rpc.clone(), closing.clone()),
            rpc,
            runtime,
            namespace,
            identity: self.identity.unwrap_or_else(own_identity),
            lines: Mutex::default(),
            ttl: self.ttl,
            client,
            current: generations,
            state: states,
            closing,
        };
        undo.disarm();
        Ok(Session { handle: Arc::new(Handle { core: Arc::new(core) }) })
    }

    fn check(&self) -> Result<()> {
        lease::check_ttl(self.ttl)?;
        let refuse = |option, reason: &str| Err(Error::InvalidOption { option, reason: reason.into() });
        if self.namespace.is_empty() || self.namespace.contains('\0') || !self.namespace.ends_with('/') {
            return refuse("namespace", "it must end with '/' and have no NUL");
        }
        if self.identity.as_ref().is_some_and(|identity| identity.len() > 1024) {
            return refuse("identity", "it is longer than 1,024 bytes");
        }
        match &self.transport {
            Transport::Endpoints(endpoints) if endpoints.is_empty() => refuse("endpoints", "there are none"),
            Transport::Endpoints(endpoints)
                if self.user.is_some() && endpoints.iter().any(|endpoint| !endpoint.contains("://")) =>
            {
                refuse(
                    "user",
                    "an endpoint does not say http:// or https://, and a password must not be sent by chance",
                )
            }
            Transport::Client(_) if self.thread => {
                refuse("keepalive_thread", "it needs connections of its own; use Session::builder")
            }
            _ => Ok(()),
        }
    }

    fn options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.connect_timeout.min(Duration::from_secs(2)))
            // etcd closes connections that ping while idle or more often than every 5 s.
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(3))
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.clone());
        }
        options
    }
}

impl std::fmt::Debug for SessionBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the password.
        f.debug_struct("SessionBuilder")
            .field("ttl", &self.ttl)
            .field("namespace", &self.namespace)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

/// Takes the first lease and leaves the keeper running.
async fn start(keeper: Keeper, limit: Duration, thread: bool, runtime: &Runtime) -> Result<()> {
    let (answer, answered) = oneshot::channel();
    let work = async move {
        match keeper.first(limit).await {
            Ok(first) => {
                keeper.publish(&first);
                // If nobody waits for it any more, the session is closing and so is the keeper, with a revoke.
                let _ = answer.send(Ok(()));
                keeper.run(first).await;
            }
            Err(error) => {
                let _ = answer.send(Err(error));
            }
        }
    };
    if !thread {
        runtime.spawn(work);
        return answered.await.unwrap_or(Err(Error::Closed));
    }
    let refuse = |error| Error::InvalidOption {
        option: "keepalive_thread",
        reason: format!("the thread cannot be started: {error}"),
    };
    // Made in its thread, since a runtime must not be dropped in another.
    let run = move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().map(|own| own.block_on(work))
    };
    let thread = std::thread::Builder::new().name("etcd-keepalive".into()).spawn(run).map_err(refuse)?;
    match answered.await {
        Ok(result) => result,
        // The thread ended before it began to work.
        Err(_) => match thread.join() {
            Ok(Err(error)) => Err(refuse(error)),
            _ => Err(Error::Closed),
        },
    }
}

fn own_identity() -> String {
    let host = std::env::var("HOSTNAME").ok().or_else(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
        Some(name.trim().to_owned())
    });
    format!("{}:{}", host.as_deref().unwrap_or("unknown"), std::process::id())
}
