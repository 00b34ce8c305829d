//! Requests whose answers are lost, that arrive late, or twice: nothing is done twice, nothing is lost, nothing
//! reappears.

mod ambiguous;
mod committed;
mod copies;
mod fenced;
mod grant;
mod large;
mod no_space;
mod proclaim;
mod queues;
mod refused;

use std::time::Duration;

use etcd_recipes::{Election, Mutex, MutexGuard, Session};

use crate::support::check::{Scope, alive_tasks, eventually, scoped};
use crate::support::faults::{Arm, Fault, Faults, Injection, Until};
use crate::support::line::{Entry, line, text};

/// Attempts of sessions with this TTL are given up after two seconds.
const TTL: Duration = Duration::from_secs(60);
/// What is to happen at once has happened by then, also on a machine under load; what is stuck waits for a lease, or
/// for ever.
const PATIENCE: Duration = Duration::from_secs(15);

/// No case of a test takes that long.
const LONG: Duration = Duration::from_secs(60);

/// One contender with faults of its own, and a name of its own.
struct Rig<'a> {
    scope: &'a Scope,
    faults: Faults,
    session: Session,
    name: String,
    /// How many tasks run while this session, the youngest, is idle.
    tasks: usize,
}

impl<'a> Rig<'a> {
    /// A session on a channel with faults.
    async fn new(scope: &'a Scope, name: &str) -> Self {
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await);
        let session = session.ttl(TTL).connect_timeout(TTL).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        Self { scope, faults, session, name: scope.key(name), tasks: alive_tasks() }
    }

    fn mutex(&self) -> Mutex {
        Mutex::new(&self.session, &self.name).unwrap()
    }

    fn election(&self) -> Election {
        Election::new(&self.session, &self.name).unwrap()
    }

    /// The transactions of this rig's line.
    fn txns(&self) -> Arm<'_> {
        self.faults.on("Txn").containing(&self.name)
    }

    /// The key of the session's first hold.
    fn first_key(&self) -> String {
        format!("{}/{:x}-0", self.name, self.session.lease_id().unwrap())
    }

    /// Waits until nothing is under way in the session; only then are names and slots used again.
    async fn idle(&self) {
        eventually(PATIENCE, "the session is idle", async || alive_tasks() <= self.tasks).await;
    }

    /// The line as etcd has it.
    async fn line(&self) -> Vec<Entry> {
        line(&mut self.scope.client(), &self.name).await
    }

    /// Locks, unlocks, and returns the token.
    async fn pass(&self) -> i64 {
        let mutex = self.mutex();
        let guard = tokio::time::timeout(PATIENCE, mutex.lock()).await.expect("stuck").unwrap();
        let token = guard.token();
        guard.unlock().await.unwrap();
        token
    }

    async fn close(self) {
        self.faults.clear();
        self.session.close().await.unwrap();
    }
}

/// How the second copy of a request comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    /// The network delivers it twice.
    Twice,
    /// It is held back, so that the session sends it again.
    Resent,
}

const COPIES: [Copy; 2] = [Copy::Twice, Copy::Resent];

impl Copy {
    fn fault(self) -> Fault {
        match self {
            Self::Twice => Fault::Twice(Until::Released),
            Self::Resent => Fault::Hold(Until::Released),
        }
    }
}

/// Every pair.
fn each<A: Clone, B>(
    a: impl IntoIterator<Item = A>,
    b: impl IntoIterator<Item = B> + Clone,
) -> impl Iterator<Item = (A, B)> {
    a.into_iter().flat_map(move |a| b.clone().into_iter().map(move |b| (a.clone(), b)))
}

/// Runs a test with each of the cases side by side, since they wait long; each in a runtime and a scope of its own.
fn side_by_side<C: Send>(
    cases: impl IntoIterator<Item = C>,
    body: impl AsyncFn(&Scope, C) + std::marker::Copy + Send,
) {
    std::thread::scope(|threads| {
        for case in cases {
            threads.spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let test = scoped(async |scope| body(scope, case).await);
                runtime.block_on(async { tokio::time::timeout(LONG, test).await }).expect("stuck");
            });
        }
    });
}

/// Lets the late copies go and waits until etcd has answered all of them.
async fn arrive(copies: &Injection) {
    copies.release();
    copies.answered(copies.hits()).await;
}

/// The hold is the only one, and whole.
async fn assert_holds(rig: &Rig<'_>, guard: &MutexGuard) {
    let line = rig.line().await;
    assert_eq!(line.len(), 1, "{line:?}");
    assert_eq!((line[0].key.clone(), line[0].lease), (text(guard.key()), rig.session.lease_id().unwrap()));
    assert!(guard.is_held());
    guard.txn(etcd_client::Txn::new()).await.expect("the hold is gone at etcd");
}
