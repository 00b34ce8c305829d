//! The options of a session, and its beginning.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::{oneshot, watch as channel};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::dial::Dial;
use super::endpoints::Endpoints;
use super::generation::Current;
use super::lease::{self, Keeper, Liveness};
use super::queues::Queues;
use super::rpc::Rpc;
#[cfg(feature = "embedded")]
use super::runtime::Began;
use super::runtime::Runtime;
use super::transport::Transport;
use super::{Core, Handle, Session, SessionState};
use crate::error::{Error, Result};
use crate::name;

/// The options of a session.
#[must_use = "a builder does nothing until `connect` is called"]
pub struct SessionBuilder {
    connections: Connections,
    ttl: Duration,
    connect_timeout: Duration,
    namespace: String,
    identity: Option<String>,
    user: Option<(String, String)>,
    #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
    tls: Option<etcd_client::TlsOptions>,
    thread: bool,
    liveness: Option<Liveness>,
    /// Instead of the caller's, with the system's clock.
    runtime: Option<Runtime>,
}

/// What a session also has when it is opened beside another.
pub(crate) struct Options {
    pub(crate) ttl: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) namespace: Arc<str>,
    /// Who this process says it is, in the values of lock keys.
    pub(crate) identity: String,
    pub(crate) liveness: Option<Liveness>,
}

pub(super) enum Connections {
    Endpoints(Vec<String>),
    Client(Box<Client>),
}

impl SessionBuilder {
    pub(super) fn new(connections: Connections) -> Self {
        Self {
            connections,
            ttl: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            namespace: "_etcd-recipes/".into(),
            identity: None,
            user: None,
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            tls: None,
            thread: false,
            liveness: None,
            runtime: None,
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

    /// Connects with TLS: an endpoint that names no scheme is `https` then, and one with `http` is refused.
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

    /// Asks `alive` before each keepalive; while it says no, none is sent, and the lease is lost at its deadline. No new
    /// lease is taken before it says yes.
    ///
    /// It is called on the task or thread of the keepalives and must not block.
    pub fn liveness(mut self, alive: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.liveness = Some(Arc::new(alive));
        self
    }

    /// Lets tokio's clock decide about the lease.
    #[cfg(feature = "embedded")]
    pub(crate) fn on_tokio_time(mut self, began: Began) -> Self {
        self.runtime = Some(Runtime::virtual_time(began));
        self
    }

    /// Takes randomness from a seed, so that a run can be had again: on a runtime of one thread with its clock paused, two
    /// runs of the same code do the same at the same times. Tokio's own `watch` channels, which wake those who wait in an
    /// order drawn by chance, and handlers on threads of their own are beyond it.
    ///
    /// For sessions on an [embedded server](crate::embedded::Server). Their clock on the wall begins on a day in 2020; so
    /// give a seed to all of a server, or to none.
    #[cfg(feature = "embedded")]
    #[cfg_attr(docsrs, doc(cfg(feature = "embedded")))]
    pub fn seed(mut self, seed: u64) -> Self {
        self.runtime = Some(self.runtime.unwrap_or_else(Runtime::current).seeded(seed));
        self
    }

    /// Connects and takes the lease.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] for an option out of range; [`Error::Unreachable`] when no endpoint answered within the
    /// connect timeout; [`Error::AuthFailed`] when etcd refuses the user; [`Error::PermissionDenied`] when the user has no
    /// permission for the namespace.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the lease is revoked in the background. If etcd has not answered for it yet, it is left to expire; it
    /// has no keys.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(mut self) -> Result<Session> {
        self.check()?;
        let began = tokio::time::Instant::now();
        let runtime = Arc::new(self.runtime.take().unwrap_or_else(Runtime::current));
        let closing = CancellationToken::new();
        // What is left when this is dropped before the transport has a session.
        let undo = closing.clone().drop_guard();
        let keeping = if self.thread { keepalive_thread(closing.clone()).await? } else { runtime.clone() };
        let transport = Arc::new(self.transport(runtime, keeping, undo.disarm()));
        let options = Arc::new(Options {
            ttl: self.ttl,
            connect_timeout: self.connect_timeout,
            namespace: self.namespace.into(),
            identity: self.identity.unwrap_or_else(own_identity),
            liveness: self.liveness,
        });
        let begun = begin(&transport, &options).await?;
        let (rpc, mut last) = (&transport.rpc, None);
        let client = rpc.endpoints.for_user(&rpc.runtime, &mut last);
        let client =
            tokio::time::timeout(options.connect_timeout.saturating_sub(began.elapsed()), client).await;
        let client = client.map_err(|_| rpc.unreachable(options.connect_timeout, last))?;
        Ok(begun.session(transport, options, Arc::new(client)))
    }

    fn transport(
        &self,
        runtime: Arc<Runtime>,
        keeping: Arc<Runtime>,
        closing: CancellationToken,
    ) -> Transport {
        let timeout = (self.ttl / 5).clamp(Duration::from_millis(500), Duration::from_secs(2));
        // A client that the caller made may have a user.
        let has_user = self.user.is_some() || matches!(self.connections, Connections::Client(_));
        let rpc = |runtime: Arc<Runtime>| {
            let endpoints = match &self.connections {
                Connections::Endpoints(names) => Endpoints::dial(names, self.dial(), runtime.clone()),
                Connections::Client(client) => Endpoints::given((**client).clone()),
            };
            let probe = name::probe(&self.namespace);
            Arc::new(Rpc { endpoints, runtime, timeout, has_user, probe })
        };
        Transport::new(rpc(runtime), rpc(keeping), closing)
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
        if let Connections::Endpoints(endpoints) = &self.connections {
            let dial = self.dial();
            endpoints.iter().try_for_each(|endpoint| dial.check(endpoint))?;
        }
        match &self.connections {
            Connections::Endpoints(endpoints) if endpoints.is_empty() => {
                refuse("endpoints", "there are none")
            }
            Connections::Endpoints(endpoints)
                if self.user.is_some() && endpoints.iter().any(|endpoint| !endpoint.contains("://")) =>
            {
                refuse(
                    "user",
                    "an endpoint does not say http:// or https://, and a password must not be sent by chance",
                )
            }
            Connections::Client(_) if self.user.is_some() => {
                refuse("user", "the client was made already; give it the user")
            }
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            Connections::Client(_) if self.tls.is_some() => {
                refuse("tls", "the client was made already; give it the TLS options")
            }
            Connections::Client(_) if self.thread => {
                refuse("keepalive_thread", "it needs connections of its own; use Session::builder")
            }
            _ => Ok(()),
        }
    }

    fn dial(&self) -> Dial {
        Dial {
            user: self.user.clone(),
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            tls: self.tls.clone(),
            timeout: self.connect_timeout.min(Duration::from_secs(2)),
        }
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

/// A session whose lease is granted. Closes it when dropped.
struct Begun {
    runtime: Arc<Runtime>,
    current: Arc<Current>,
    state: channel::Receiver<SessionState>,
    undo: DropGuard,
}

/// Takes the first lease and leaves the keeper running. The transport counts the session already.
async fn begin(transport: &Arc<Transport>, options: &Arc<Options>) -> Result<Begun> {
    let (state, states) = channel::channel(SessionState::Lost { generation: 0 });
    let current = Arc::new(Current::default());
    let closing = CancellationToken::new();
    let keeper = Keeper {
        transport: transport.clone(),
        options: options.clone(),
        state,
        current: current.clone(),
        closing: closing.clone(),
    };
    let undo = closing.drop_guard();
    let runtime = Arc::new(transport.rpc.runtime.beside());
    let (answer, answered) = oneshot::channel();
    let keeping = transport.keepalives.rpc.runtime.clone();
    keeping.clone().spawn(async move {
        let first = keeper.first().await.map(|first| {
            keeper.publish(&first);
            // If nobody waits for it any more, the session is closing and so is the keeper, with a revoke.
            keeping.spawn(keeper.run(first));
        });
        let _ = answer.send(first);
    });
    answered.await.unwrap_or(Err(Error::Closed))?;
    Ok(Begun { runtime, current, state: states, undo })
}

/// Begins a session on the transport of another.
pub(super) async fn beside(core: &Core) -> Result<Session> {
    let (transport, options, client) = (core.transport.clone(), core.options.clone(), core.client.clone());
    if core.closing.is_cancelled() || !transport.join() {
        return Err(Error::Closed);
    }
    Ok(begin(&transport, &options).await?.session(transport, options, client))
}

impl Begun {
    fn session(self, transport: Arc<Transport>, options: Arc<Options>, client: Arc<Client>) -> Session {
        let core = Core {
            rpc: transport.rpc.clone(),
            runtime: self.runtime,
            namespace: options.namespace.clone(),
            deletions: transport.deletions.clone(),
            changes: transport.changes.clone(),
            options,
            transport,
            lines: Mutex::default(),
            queues: Queues::default(),
            kept: OnceLock::new(),
            client,
            current: self.current,
            state: self.state,
            closing: self.undo.disarm(),
        };
        Session { handle: Arc::new(Handle { core: Arc::new(core) }) }
    }
}

/// Starts a thread with a runtime of its own, which ends some time after `closing`.
async fn keepalive_thread(closing: CancellationToken) -> Result<Arc<Runtime>> {
    let refuse = |error: std::io::Error| Error::InvalidOption {
        option: "keepalive_thread",
        reason: format!("the thread cannot be started: {error}"),
    };
    let (answer, answered) = oneshot::channel();
    // Made in its thread, since a runtime must not be dropped in another.
    let run = move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(own) => own.block_on(async {
            let runtime = Arc::new(Runtime::current());
            let _ = answer.send(Ok(runtime.clone()));
            closing.cancelled().await;
            runtime.idle().await;
        }),
        Err(error) => drop(answer.send(Err(error))),
    };
    std::thread::Builder::new().name("etcd-keepalive".into()).spawn(run).map_err(refuse)?;
    let ended = |_| Err(std::io::Error::other("it ended at once"));
    answered.await.unwrap_or_else(ended).map_err(refuse)
}

fn own_identity() -> String {
    let host = std::env::var("HOSTNAME").ok().or_else(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
        Some(name.trim().to_owned())
    });
    format!("{}:{}", host.as_deref().unwrap_or("unknown"), std::process::id())
}
