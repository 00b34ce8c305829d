//! The options of a session, and its beginning.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch as channel};
use tokio_util::sync::CancellationToken;

use super::endpoints::{self, Endpoints};
use super::kept::Kept;
use super::lease::{self, Keeper, Liveness};
use super::rpc::Rpc;
use super::runtime::Runtime;
use super::watch::{Hub, Kind};
use super::{Core, Handle, Session, SessionState};
use crate::error::{Error, Result};
use crate::name;

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
    /// Instead of the caller's, with the system's clock.
    runtime: Option<Runtime>,
}

pub(super) enum Transport {
    Endpoints(Vec<String>),
    Client(Box<Client>),
}

impl SessionBuilder {
    pub(super) fn new(transport: Transport) -> Self {
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
    pub(crate) fn on_tokio_time(mut self) -> Self {
        self.runtime = Some(Runtime::virtual_time(None));
        self
    }

    /// Takes randomness from a seed, so that a run can be had again. After
    /// [`Server::session`](crate::embedded::Server::session).
    #[cfg(feature = "embedded")]
    #[cfg_attr(docsrs, doc(cfg(feature = "embedded")))]
    pub fn seed(mut self, seed: u64) -> Self {
        self.runtime = Some(Runtime::virtual_time(Some(seed)));
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
    /// When dropped, the lease is revoked in the background.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(mut self) -> Result<Session> {
        self.check()?;
        let began = tokio::time::Instant::now();
        let runtime = Arc::new(self.runtime.take().unwrap_or_else(Runtime::current));
        let options = self.options();
        let timeout = (self.ttl / 5).clamp(Duration::from_millis(500), Duration::from_secs(2));
        let namespace: Arc<str> = self.namespace.into();
        // A client that the caller made may have a user.
        let given = matches!(self.transport, Transport::Client(_));
        let (has_user, probe) = (given || self.user.is_some(), name::probe(&namespace));
        let rpc = |endpoints| {
            let (runtime, probe) = (runtime.clone(), probe.clone());
            Rpc { endpoints, runtime, timeout, has_user, login: AsyncMutex::default(), probe }
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
        let remaining = self.connect_timeout.saturating_sub(began.elapsed());
        let client = tokio::time::timeout(remaining, client).await;
        let client = client.map_err(|_| rpc.unreachable(self.connect_timeout, last))?;
        let core = Core {
            deletions: Hub::new(Kind::Deletions, rpc.clone(), closing.clone()),
            changes: Hub::new(Kind::Everything, rpc.clone(), closing.clone()),
            rpc,
            runtime,
            namespace,
            identity: self.identity.unwrap_or_else(own_identity),
            lines: Mutex::default(),
            kept: Kept::new(),
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
        if let Transport::Endpoints(endpoints) = &self.transport {
            endpoints.iter().try_for_each(|endpoint| endpoints::check(endpoint))?;
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
            Transport::Client(_) if self.user.is_some() => {
                refuse("user", "the client was made already; give it the user")
            }
            #[cfg(any(feature = "tls", feature = "tls-aws-lc"))]
            Transport::Client(_) if self.tls.is_some() => {
                refuse("tls", "the client was made already; give it the TLS options")
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
