//! A fair mutual exclusion across processes.
//!
//! Contenders are served in the order of their arrival at etcd, whatever program they run: `etcdctl lock`, etcd's Go
//! package and this one stand in the same line.
//!
//! # What a lock can promise, and how to fence
//!
//! At most one contender holds the lock *at etcd*. No lock can stop a process from acting on a belief that was true a
//! moment ago: it may be suspended between the check and the write, and its write may take its time on the network.
//! So what must not happen twice has to be checked where it happens:
//!
//! - **Data in etcd**: write through [`MutexGuard::txn`], or put [`MutexGuard::compare`] into a transaction of your
//!   own. etcd commits it only while the lock is held.
//! - **Any other store**: send [`MutexGuard::token`] along; the store keeps the highest token it has seen and refuses
//!   lower ones. Tokens grow strictly from holder to holder.
//! - **Neither possible**: ask [`MutexGuard::is_held`] right before, or run the work in [`MutexGuard::run`], which
//!   stops it when the lock is lost. This narrows the window to the length of one action; it does not close it.

use std::future::Future;
use std::sync::Arc;

use etcd_client::{Compare, Txn, TxnResponse};

use crate::error::Result;
use crate::session::Session;
use crate::session::line::{Line, Place};
use crate::session::participant::{self, Participant};

/// A lock shared by everybody who uses its name on one etcd cluster.
///
/// Cheap to clone. Not reentrant: two calls of [`lock`](Mutex::lock) exclude each other, also on one session.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{Mutex, Session};
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let guard = Mutex::new(&session, "reports")?.lock().await?;
/// assert!(guard.token() > 0);
/// guard.unlock().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Mutex {
    session: Session,
    line: Arc<Line>,
}

impl Mutex {
    /// Names a lock. Nothing is sent.
    ///
    /// The name is used byte for byte. Keys of the lock start with `{name}/`, so a name and another below it, like `a`
    /// and `a/b`, would stand in one line: do not use both.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`](crate::Error::InvalidName) if the name is empty, longer than 1,024 bytes, contains a NUL,
    /// or if this session uses one above or below it.
    pub fn new(session: &Session, name: impl AsRef<[u8]>) -> Result<Self> {
        Ok(Self { session: session.clone(), line: Line::open(session.core(), name.as_ref())? })
    }

    /// Waits for the lock, in order of arrival.
    ///
    /// Uncontended this is one request. There is no limit of time: wrap it in `tokio::time::timeout`. Faults of the
    /// network and of etcd are waited out. When the session's lease is lost meanwhile, the call takes a new place at
    /// the end of the line.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`](crate::Error::Closed) when the session is closed;
    /// [`Error::PermissionDenied`](crate::Error::PermissionDenied), [`Error::NoSpace`](crate::Error::NoSpace) and
    /// [`Error::Etcd`](crate::Error::Etcd) as etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the place in line is given up and no key is left, also if the request was on its way. A call that
    /// is neither polled nor dropped, such as one that a `select!` has left for later, keeps its place: once its turn has
    /// come, all behind it wait.
    pub async fn lock(&self) -> Result<MutexGuard> {
        let describe = || participant::describe(self.session.core());
        Ok(MutexGuard { place: self.line.enter(&self.session, describe).await? })
    }

    /// Takes the lock if nobody holds it or waits for it; `None` otherwise. One request either way.
    ///
    /// # Errors
    ///
    /// As [`lock`](Mutex::lock); and [`Error::Lost`](crate::Error::Lost) when the session's lease was lost meanwhile.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the lock is not taken, or given back.
    pub async fn try_lock(&self) -> Result<Option<MutexGuard>> {
        let value = participant::describe(self.session.core());
        let place = self.line.try_enter(&self.session, value).await?;
        Ok(place.map(|place| MutexGuard { place }))
    }

    /// Reads who holds the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`](crate::Error::Unreachable) after 10 s without an answer, or as etcd says.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn holder(&self) -> Result<Option<Participant>> {
        Ok(self.line.first(self.session.core()).await?.0.map(Participant::from))
    }

    /// Reads who waits for the lock, in order.
    ///
    /// # Errors
    ///
    /// As [`holder`](Mutex::holder).
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn waiters(&self) -> Result<Vec<Participant>> {
        let members = self.line.members(self.session.core()).await?;
        Ok(members.into_iter().skip(1).map(Participant::from).collect())
    }
}

impl std::fmt::Debug for Mutex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mutex").field("name", &self.line.prefix()).finish_non_exhaustive()
    }
}

/// A lock that is held; see the [module](crate::mutex) for what that means.
///
/// # Drop behaviour
///
/// Dropping the guard releases the lock in the background: it sends the release to the session and neither waits nor
/// fails. Call [`unlock`](MutexGuard::unlock) to know that it is released, and whether it was held until then. A guard
/// that is leaked keeps the lock as long as its session lives.
#[must_use = "a guard that is not kept releases the lock at once"]
pub struct MutexGuard {
    place: Place,
}

impl MutexGuard {
    /// The fencing token: a revision of etcd, larger than that of every earlier holder of this lock.
    pub fn token(&self) -> i64 {
        self.place.token()
    }

    /// The revision at which the key was created: the place in line.
    pub fn create_revision(&self) -> i64 {
        self.place.facts().create_revision
    }

    /// The key that stands for this hold.
    pub fn key(&self) -> &[u8] {
        &self.place.facts().key
    }

    /// A condition for etcd transactions that is true only while this hold lasts.
    pub fn compare(&self) -> Compare {
        self.place.compare()
    }

    /// Whether the lock is certainly still held, as far as this process can know.
    ///
    /// Compares clocks in the caller's thread, in well under a microsecond: the answer is right also in the first
    /// instruction after the process was stopped. When the lease runs out, it is false before etcd gives the lock to
    /// anybody else. When somebody deletes the key or revokes the lease, it is false as soon as this process hears of
    /// it. Once false, false for ever.
    pub fn is_held(&self) -> bool {
        self.place.is_held()
    }

    /// Waits until the lock is lost: the lease is over, or somebody deleted the key. Also ends when the lock was
    /// released. The future does not borrow the guard.
    ///
    /// Timers stand still while the machine sleeps: after that it may end up to a third of the TTL late, and
    /// [`is_held`](MutexGuard::is_held) knows at once.
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.place.lost()
    }

    /// Commits a transaction only while the lock is held, at most once, whatever happens to its answer.
    ///
    /// If the answer of a transaction without conditions of its own is lost after the commit, the response says that
    /// it succeeded and carries no results of its operations.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`](crate::Error::Lost) when the lock was not held, so nothing was written;
    /// [`Error::TooLarge`](crate::Error::TooLarge) for more than 124 operations or 1.5 MiB;
    /// [`Error::OutcomeUnknown`](crate::Error::OutcomeUnknown) when an answer was lost and cannot be told any more;
    /// otherwise as etcd says, and nothing was written.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the transaction is settled in the background: committed already, or never to be.
    pub async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        self.place.txn(txn).await
    }

    /// Runs `work` while the lock is held: when the lock is lost first, `work` is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`](crate::Error::Lost) when the lock was lost before `work` was done.
    ///
    /// # Cancel safety
    ///
    /// When dropped, `work` is dropped; the lock stays held.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        self.place.run(work).await
    }

    /// Releases the lock. One request. Returns when etcd has confirmed, or when the lease is over, which releases it
    /// as well.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`](crate::Error::Lost) when the lock was lost before this call. When etcd refuses the release, most
    /// likely with [`Error::PermissionDenied`](crate::Error::PermissionDenied), the lock is still taken: the session
    /// goes on trying in the background until the lease is over. [`Error::Closed`](crate::Error::Closed) when the runtime
    /// of the session has ended.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the release goes on in the background.
    pub async fn unlock(self) -> Result<()> {
        self.place.leave().await
    }
}

impl std::fmt::Debug for MutexGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MutexGuard")
            .field("key", &crate::name::display(self.key()))
            .field("token", &self.token())
            .finish_non_exhaustive()
    }
}
