//! Coordination for services on an [etcd](https://etcd.io) v3 cluster: one shared [`Session`], and on it a fair
//! [`Mutex`] with fencing, leader [`Election`], a work [`Queue`], a [`ConfigCache`], and registration and discovery of
//! [services](service). For development and tests, the feature `embedded` brings an etcd that runs in the process.
//!
//! # Which one to take
//!
//! | You want | Take | You get |
//! |---|---|---|
//! | one process at a time in a critical section | [`Mutex`] | [`MutexGuard`] |
//! | one process that leads until it stops or dies, and everybody to know who it is | [`Election`] | [`Leadership`] |
//! | to know who leads, without running | [`Election::observe`] | a stream of [`Observation`]s |
//! | work that is done once by one of many processes, in order | [`Queue`] | [`Claim`], or [`Item`] |
//! | clients to find your server, as long as it runs | [`Services::register`](service::Services::register) | a [`Registration`](service::Registration) |
//! | to call whoever serves, and not whoever has died | [`Services::discover`](service::Services::discover) | a [`Discovery`](service::Discovery), and for gRPC a channel |
//! | configuration that is read all the time, and to hear of its changes | [`ConfigCache`] | [`ConfigEntry`], handlers, streams |
//!
//! All stand on a [`Session`]: one lease at etcd, kept alive in the background. One session per process is right for
//! most; everything made from it is cheap.
//!
//! # A short tour
//!
//! ```no_run
//! use etcd_recipes::etcd_client::{Txn, TxnOp};
//! use etcd_recipes::{Mutex, Queue, Session};
//!
//! # async fn example() -> etcd_recipes::Result<()> {
//! let session = Session::connect(["127.0.0.1:2379"]).await?;
//! let mutex = Mutex::new(&session, "reports")?;
//!
//! let guard = mutex.lock().await?;
//! // Committed by etcd only while the lock is held, whatever became of this process meanwhile.
//! guard.txn(Txn::new().and_then([TxnOp::put("report", "done", None)])).await?;
//! // Any other store can refuse tokens that are lower than one it has seen.
//! let token: i64 = guard.token();
//! // Stop when the lock is lost.
//! guard.run(async { /* … */ }).await?;
//! guard.unlock().await?;
//!
//! let queue = Queue::new(&session, "mails")?;
//! queue.enqueue("to anna").await?;
//! // Delivered again, to somebody else, if this process dies before the ack.
//! let claim = queue.claim().await?;
//! claim.ack().await?;
//!
//! session.close().await?;
//! # Ok(()) }
//! ```
//!
//! # What holds
//!
//! - **Exclusion at etcd.** At most one contender of a name holds it, over all programs that use the layout of etcd's
//!   Go package: this crate, Go, Java, `etcdctl lock`.
//! - **Order.** Contenders are served in the order etcd received them.
//! - **Fencing.** Each hold has a token larger than all before it, and transactions can be tied to it.
//! - **Loss is known first here.** [`MutexGuard::is_held`] turns false before a lease that runs out gives the lock to
//!   somebody else, also after the process was stopped, the runtime was blocked or the network went silent. What a lock
//!   can *not* promise is told in [`mutex`].
//! - **Nothing is done twice, nothing reappears.** A request whose answer was lost is sent again so that only one copy
//!   can take effect, and a copy that arrives late takes none.
//! - **Registrations heal, and give way.** One comes back by itself when its lease or key is lost, and never takes the
//!   place of a newer one of the same id.
//! - **An item is acked once.** Whoever dies over a claimed item loses it to the next, and whoever lost it is refused;
//!   [`Claim::ack_with`] makes its effect and the ack one transaction.
//! - **What is known stays.** While etcd is away, configuration and instances are served as they were last known, and say
//!   since when they may be old.
//! - **Every future may be dropped.** No key, no task and no place in line is left behind; each method says so under
//!   "Cancel safety".
//!
//! # Conventions
//!
//! Times are [`Duration`](std::time::Duration)s, lease times whole seconds; revisions and tokens are etcd revisions.
//! Everything runs on [tokio](https://tokio.rs); a session belongs to the runtime it was connected in. Progress is
//! reported with [`tracing`](https://docs.rs/tracing): `warn` when something is lost, `info` when the session changes
//! its state, `debug` for retries. Values never appear in logs, nor do passwords; note that the `trace` level of HTTP
//! libraries prints headers, in which etcd's auth token travels.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "embedded")]
#[cfg_attr(docsrs, doc(cfg(feature = "embedded")))]
pub mod embedded;
mod error;
mod name;

pub mod config;
pub mod election;
pub mod mutex;
pub mod queue;
pub mod service;
pub mod session;

pub use etcd_client;

pub use crate::config::{
    BadValue, ConfigCache, ConfigChange, ConfigChanges, ConfigEntry, ConfigHandler, ConfigProblem,
    ConfigSnapshot,
};
pub use crate::election::{DetachedLeadership, Election, Leader, Leadership, Observation, Observe};
pub use crate::error::{Error, Result};
pub use crate::mutex::{Mutex, MutexGuard};
pub use crate::name::MAX_NAME;
pub use crate::queue::{Claim, DeadLetter, Item, Queue, QueueBuilder, TypedClaim, TypedQueue};
pub use crate::session::participant::Participant;
pub use crate::session::{Session, SessionBuilder, SessionState};

// The examples of the README are compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
