//! Leader election: one leader among many candidates, and everybody can see who it is.
//!
//! Candidates lead in the order of their arrival at etcd, whatever program they run: `etcdctl elect`, etcd's Go package
//! and this one stand in the same line. Each brings a value, which observers see while it leads.
//!
//! A leadership is a guard like that of the [mutex](crate::mutex), with the same limits and the same means of fencing.

mod observe;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::{Compare, Txn, TxnResponse};
use tokio::sync::oneshot;

pub use self::observe::{Observation, Observe};
use crate::error::{Error, Result};
use crate::name::{self, Hidden};
use crate::session::Session;
use crate::session::line::{Line, Member, Place};
use crate::session::participant::Participant;

/// An election among everybody who uses its name on one etcd cluster.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{Election, Session};
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let election = Election::new(&session, "indexer")?;
/// let leadership = election.campaign("10.0.0.7:8080").await?;
/// assert_eq!(election.leader().await?.map(|leader| leader.value), Some(b"10.0.0.7:8080".to_vec()));
/// leadership.resign().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Election {
    session: Session,
    line: Arc<Line>,
}

/// The leader of an election.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leader {
    /// Its key.
    pub key: Vec<u8>,
    /// What it proclaimed last.
    pub value: Vec<u8>,
    /// The revision at which it became a candidate; identifies the leadership.
    pub create_revision: i64,
    /// The lease it lives on; 0 if none.
    pub lease: i64,
}

impl Election {
    /// Names an election. Nothing is sent.
    ///
    /// # Errors
    ///
    /// As [`Mutex::new`](crate::Mutex::new); a lock and an election of one name would stand in one line.
    pub fn new(session: &Session, name: impl AsRef<[u8]>) -> Result<Self> {
        Ok(Self { session: session.clone(), line: Line::open(session.core(), name.as_ref())? })
    }

    /// Waits to become the leader, in order of arrival. Observers see `value` while this candidate leads.
    ///
    /// There is no limit of time: wrap it in `tokio::time::timeout`. When the session's lease is lost meanwhile, the
    /// call takes a new place at the end of the line; a candidate never leads with a lease that is lost.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] for a value over etcd's request limit; otherwise as [`Mutex::lock`](crate::Mutex::lock).
    ///
    /// # Cancel safety
    ///
    /// When dropped, the candidacy is withdrawn and no key is left. A call that is neither polled nor dropped keeps its
    /// place, as with [`Mutex::lock`](crate::Mutex::lock).
    pub async fn campaign(&self, value: impl Into<Vec<u8>>) -> Result<Leadership> {
        let value = value.into();
        name::check_value(&value)?;
        Ok(Leadership::new(self.line.enter(&self.session, || value.clone()).await?))
    }

    /// Reads who leads.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] after 10 s without an answer, or as etcd says.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn leader(&self) -> Result<Option<Leader>> {
        Ok(self.line.first(self.session.core()).await?.0.map(Leader::from))
    }

    /// Reads all candidates in order; the first leads.
    ///
    /// # Errors
    ///
    /// As [`leader`](Election::leader).
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn candidates(&self) -> Result<Vec<Participant>> {
        let members = self.line.members(self.session.core()).await?;
        Ok(members.into_iter().map(Participant::from).collect())
    }

    /// Follows who leads: the leader now, and then each change of the leader or of its value, and each time there is
    /// none.
    ///
    /// The stream survives restarts of etcd, compaction and lost connections, by itself; while etcd cannot be reached
    /// it says nothing. Revisions never go back, unless etcd was restored from an older backup. It ends when the
    /// session is closed, with [`Error::Closed`], or when etcd denies permission. It keeps the session open like any
    /// other handle.
    pub fn observe(&self) -> Observe {
        Observe::new(self.session.clone(), self.line.prefix().clone())
    }

    /// Takes up a leadership that an earlier guard of this session gave up with [`Leadership::detach`].
    ///
    /// `None` if it is over, because the key is gone or the lease that it lived on, or if it has been taken up already.
    ///
    /// # Errors
    ///
    /// As [`leader`](Election::leader).
    ///
    /// # Cancel safety
    ///
    /// When dropped, the leadership stays detached.
    pub async fn resume(&self, detached: &DetachedLeadership) -> Result<Option<Leadership>> {
        let place = self.line.resume(&self.session, &detached.key, detached.create_revision).await?;
        Ok(place.map(Leadership::new))
    }
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election").field("name", &self.line.prefix()).finish_non_exhaustive()
    }
}

impl From<Member> for Leader {
    fn from(member: Member) -> Self {
        let facts = member.facts;
        Self {
            key: facts.key,
            value: member.value,
            create_revision: facts.create_revision,
            lease: facts.lease,
        }
    }
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leader")
            .field("key", &name::display(&self.key))
            .field("value", &Hidden(&self.value))
            .field("create_revision", &self.create_revision)
            .field("lease", &format_args!("{:x}", self.lease))
            .finish()
    }
}

/// A leadership that is held; a guard like [`MutexGuard`](crate::MutexGuard).
///
/// # Drop behaviour
///
/// Dropping it resigns in the background; see [`MutexGuard`](crate::MutexGuard).
#[must_use = "a leadership that is not kept resigns at once"]
pub struct Leadership {
    place: Place,
    /// The `mod_revision` of our last put, once the proclamation that put it is through. Each passes it on to the next.
    last: Mutex<oneshot::Receiver<i64>>,
}

/// Names a leadership that is still held at etcd but has no guard; see [`Leadership::detach`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DetachedLeadership {
    /// The key of the leadership.
    pub key: Vec<u8>,
    /// The create revision of the key.
    pub create_revision: i64,
}

impl Leadership {
    fn new(place: Place) -> Self {
        let (created, last) = oneshot::channel();
        let _ = created.send(place.facts().create_revision);
        Self { place, last: Mutex::new(last) }
    }

    /// The fencing token: a revision of etcd, larger than that of every earlier leader.
    pub fn token(&self) -> i64 {
        self.place.token()
    }

    /// The revision at which this process became a candidate.
    pub fn create_revision(&self) -> i64 {
        self.place.facts().create_revision
    }

    /// The key that stands for this leadership.
    pub fn key(&self) -> &[u8] {
        &self.place.facts().key
    }

    /// A condition for etcd transactions that is true only while this leadership lasts.
    pub fn compare(&self) -> Compare {
        self.place.compare()
    }

    /// Whether this process certainly still leads; see [`MutexGuard::is_held`](crate::MutexGuard::is_held).
    pub fn is_held(&self) -> bool {
        self.place.is_held()
    }

    /// Waits until the leadership is lost; see [`MutexGuard::lost`](crate::MutexGuard::lost).
    ///
    /// # Cancel safety
    ///
    /// Only waits.
    pub fn lost(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.place.lost()
    }

    /// Commits a transaction only while leading; see [`MutexGuard::txn`](crate::MutexGuard::txn).
    ///
    /// # Errors
    ///
    /// As [`MutexGuard::txn`](crate::MutexGuard::txn).
    ///
    /// # Cancel safety
    ///
    /// When dropped, the transaction is settled in the background: committed already, or never to be.
    pub async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        self.place.txn(txn).await
    }

    /// Runs `work` while leading; see [`MutexGuard::run`](crate::MutexGuard::run).
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the leadership was lost before `work` was done.
    ///
    /// # Cancel safety
    ///
    /// When dropped, `work` is dropped; the leadership stays.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        self.place.run(work).await
    }

    /// Shows observers a new value. Takes effect once, and never after a later proclamation or the resignation.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when this process does not lead any more; [`Error::TooLarge`]; [`Error::OutcomeUnknown`] when the
    /// leadership ended before etcd answered; [`Error::Closed`] when the runtime of the session has ended; otherwise as
    /// etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the proclamation goes on in the background, until the leadership is detached; a later one waits for
    /// it.
    pub async fn proclaim(&self, value: impl Into<Vec<u8>>) -> Result<()> {
        let value = value.into();
        name::check_value(&value)?;
        if !self.is_held() {
            return Err(self.place.facts().error());
        }
        let (through, next) = oneshot::channel();
        let before = std::mem::replace(&mut *self.last.lock().unwrap_or_else(PoisonError::into_inner), next);
        let facts = self.place.facts().clone();
        // Its turn comes in the session: a caller that is not polled keeps nobody waiting.
        let proclaim = async move {
            let mut last = before.await.map_err(|_| Error::Closed)?;
            let result = facts.update(value, &mut last).await;
            let _ = through.send(last);
            result
        };
        self.place.session().core().to_the_end(proclaim).await
    }

    /// Ends the leadership. One request.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when it was lost before this call. When etcd refuses, most likely with
    /// [`Error::PermissionDenied`], the leadership is still there: the session goes on trying in the background until the
    /// lease is over. [`Error::Closed`] when the runtime of the session has ended.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the resignation goes on in the background.
    pub async fn resign(self) -> Result<()> {
        self.place.leave().await
    }

    /// Gives up the guard but not the leadership: it lasts as long as the session's lease, and can be taken up again with
    /// [`Election::resume`].
    pub fn detach(self) -> DetachedLeadership {
        let facts = self.place.detach();
        DetachedLeadership { key: facts.key.clone(), create_revision: facts.create_revision }
    }
}

impl std::fmt::Debug for Leadership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leadership")
            .field("key", &name::display(self.key()))
            .field("token", &self.token())
            .finish_non_exhaustive()
    }
}
