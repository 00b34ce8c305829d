//! Who acts in the tests of cancellation, and what must hold after each cut.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, Instant};

use etcd_recipes::{Election, Mutex, Session};
use futures::StreamExt as _;

use crate::support::check::{Scope, alive_tasks, eventually, scoped};
use crate::support::faults::Faults;
use crate::support::line::{Entry, line};
use crate::support::poll::{drop_after_polls, drop_when_woken};

/// The next one has its turn within this time. A machine under load may stand still, but not at the same cut each time.
const AT_ONCE: Duration = Duration::from_secs(2);
const TRIES: usize = 3;
/// Within this time everything is as if the dropped call had never been, also on a machine under load; what is stuck
/// waits for a lease, or for ever.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// No call takes that long.
const LONG: Duration = Duration::from_secs(60);

/// Where a future is dropped.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    /// Right after this many polls.
    After(usize),
    /// After this many polls, when a request that followed from the last one is on its way.
    Sent(usize),
    /// After this many polls, when what it waited for has come and it does not get to look.
    Woken(usize),
}

/// A cut, and what it takes to make it.
#[derive(Clone, Copy)]
pub(super) struct Knife<'a> {
    pub(super) cut: Cut,
    faults: &'a Faults,
}

impl Knife<'_> {
    /// The output if it is complete before the cut.
    pub(super) async fn of<F: Future>(self, future: F) -> Option<F::Output> {
        match self.cut {
            Cut::After(polls) => drop_after_polls(polls, future).await,
            Cut::Sent(polls) => self.drop_when_sent(polls, future).await,
            Cut::Woken(polls) => drop_when_woken(polls, future).await,
        }
    }

    /// The same, while something else happens.
    pub(super) async fn during<F: Future>(self, future: F, meanwhile: impl Future) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = self.of(future) => output,
            () = async { meanwhile.await; std::future::pending().await } => None,
        }
    }

    async fn drop_when_sent<F: Future>(self, polls: usize, future: F) -> Option<F::Output> {
        let (polled, before) = (Cell::new(0), Cell::new(None));
        let mut future = pin!(future);
        let counted = poll_fn(|context| {
            polled.set(polled.get() + 1);
            before.set((polled.get() == polls).then(|| self.requests()));
            future.as_mut().poll(context)
        });
        let sent = async {
            while before.get().is_none_or(|before| self.requests() == before) {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            output = drop_when_woken(polls, counted) => output,
            () = sent => None,
        }
    }

    /// How many requests were sent so far.
    fn requests(self) -> usize {
        ["Txn", "Range", "LeaseGrant", "LeaseRevoke"].iter().map(|method| self.faults.calls(method)).sum()
    }
}

/// One line, the session whose calls are cut, and another that wants its turn.
pub(super) struct Stage<'a> {
    pub(super) scope: &'a Scope,
    /// The channel of our session.
    faults: Faults,
    pub(super) ours: Session,
    pub(super) other: Session,
    pub(super) name: String,
    /// How many tasks run when nothing is under way.
    tasks: usize,
}

/// Tries a call with every cut until it is complete, and looks around after each. `call` returns `None` when the call
/// was cut; it has taken away then what it brought itself.
pub(super) async fn every_cut(call: impl AsyncFn(&Stage<'_>, Knife<'_>) -> Option<()>) {
    scoped(async |scope| {
        let stage = Stage::open(scope).await;
        let try_cut = async |cut| {
            let mut slowest = Duration::ZERO;
            for _ in 0..TRIES {
                // Boxed: in debug builds a large future is copied to the stack more often than it has room for.
                let knife = Knife { cut, faults: &stage.faults };
                let call = tokio::time::timeout(LONG, Box::pin(call(&stage, knife))).await;
                let complete = call.unwrap_or_else(|_| panic!("{cut:?}: stuck")).is_some();
                let waited = stage.look_around(cut).await;
                if waited < AT_ONCE {
                    return complete;
                }
                slowest = slowest.max(waited);
            }
            panic!("{cut:?}: the next one waits {slowest:?} for its turn");
        };
        let mut polls = 0;
        while !try_cut(Cut::After(polls)).await {
            polls += 1;
            assert!(polls < 200, "the call does not come to its end");
            try_cut(Cut::Sent(polls)).await;
            try_cut(Cut::Woken(polls)).await;
        }
        assert!(polls > 0, "it was never cut");
        // It may be another than at the start.
        scope.owns_lease(stage.ours.lease_id().expect("the session has no lease"));
        stage.ours.close().await.unwrap();
        stage.other.close().await.unwrap();
    })
    .await;
}

impl<'a> Stage<'a> {
    async fn open(scope: &'a Scope) -> Self {
        let ((faults, ours), (_, other)) = (settled(scope).await, settled(scope).await);
        Self { scope, faults, ours, other, name: scope.key("name"), tasks: fewest_tasks().await }
    }

    pub(super) fn mutex(&self) -> Mutex {
        Mutex::new(&self.ours, &self.name).unwrap()
    }

    pub(super) fn election(&self) -> Election {
        Election::new(&self.ours, &self.name).unwrap()
    }

    /// The line as etcd has it.
    pub(super) async fn line(&self) -> Vec<Entry> {
        line(&mut self.scope.client(), &self.name).await
    }

    /// Waits until so many are in the line.
    pub(super) async fn line_of(&self, count: usize) -> Vec<Entry> {
        let mut found = Vec::new();
        let what = format!("{count} keys in the line");
        eventually(PATIENCE, &what, async || {
            found = self.line().await;
            found.len() == count
        })
        .await;
        found
    }

    /// Waits until nothing is under way.
    pub(super) async fn idle(&self) {
        self.idle_with(0).await;
    }

    /// Waits until only so many tasks of the test's own run.
    pub(super) async fn idle_with(&self, own: usize) {
        eventually(PATIENCE, "no task is left", async || alive_tasks() <= self.tasks + own).await;
    }

    /// Nothing is left, and the next has its turn. Returns how long it waited.
    async fn look_around(&self, cut: Cut) -> Duration {
        let start = Instant::now();
        let mutex = Mutex::new(&self.other, &self.name).unwrap();
        let guard = tokio::time::timeout(PATIENCE, mutex.lock()).await;
        guard.unwrap_or_else(|_| panic!("{cut:?}: stuck")).unwrap().unlock().await.unwrap();
        let election = Election::new(&self.other, &self.name).unwrap();
        let leadership = tokio::time::timeout(PATIENCE, election.campaign("other")).await;
        leadership.unwrap_or_else(|_| panic!("{cut:?}: stuck")).unwrap().resign().await.unwrap();
        let waited = start.elapsed();
        self.idle().await;
        assert!(self.line().await.is_empty(), "{cut:?}: {:?}", self.line().await);
        let what = format!("{cut:?}: the session lives");
        eventually(PATIENCE, &what, async || self.ours.is_alive()).await;
        waited
    }
}

/// How many tasks run once those that only begin or end something are over.
async fn fewest_tasks() -> usize {
    /// For so long there were never fewer.
    const STEADY: Duration = Duration::from_millis(200);
    let (mut fewest, mut since) = (usize::MAX, Instant::now());
    while since.elapsed() < STEADY {
        let tasks = alive_tasks();
        if tasks < fewest {
            (fewest, since) = (tasks, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    fewest
}

/// A session that watches already, both for itself and for its user, so that it starts no more tasks of its own.
async fn settled(scope: &Scope) -> (Faults, Session) {
    let faults = Faults::new(scope.endpoint());
    let session = Session::builder_with_client(faults.client().await);
    let session = session.ttl(Duration::from_secs(60)).connect().await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    let election = Election::new(&session, scope.key("settling")).unwrap();
    let leadership = election.campaign("").await.unwrap();
    let mut observe = election.observe();
    observe.next().await.unwrap().unwrap();
    eventually(PATIENCE, "two streams are watched", async || faults.messages_received("Watch") > 1).await;
    leadership.resign().await.unwrap();
    (faults, session)
}
