//! The runtime is blocked past the TTL: whoever asks learns that the hold is over, in time. With keepalives on a thread
//! of their own it is not over.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use etcd_recipes::{Mutex, MutexGuard, Session, SessionBuilder, SessionState};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use crate::support::check::{Scope, scoped};
use crate::support::clock::boottime;
use crate::support::holds::{Belief, Deletions, States, returns};

const TTL: Duration = Duration::from_secs(2);
const WORKERS: usize = 2;

#[derive(Debug, Clone, Copy)]
enum Flavour {
    Current,
    Multi,
}

fn runtime(flavour: Flavour) -> Runtime {
    let mut builder = match flavour {
        Flavour::Current => Builder::new_current_thread(),
        Flavour::Multi => Builder::new_multi_thread(),
    };
    builder.worker_threads(WORKERS).enable_all().build().unwrap()
}

/// Blocks every thread of the current runtime until `go_on`. What each of them is answered right after.
async fn block(flavour: Flavour, guard: &Arc<MutexGuard>, go_on: &Arc<AtomicBool>) -> Vec<bool> {
    let sleep = move |guard: Arc<MutexGuard>, go_on: Arc<AtomicBool>| {
        while !go_on.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        guard.is_held()
    };
    match flavour {
        Flavour::Current => vec![sleep(guard.clone(), go_on.clone())],
        Flavour::Multi => {
            let all = Arc::new(Barrier::new(WORKERS));
            let workers: Vec<_> = (0..WORKERS)
                .map(|_| {
                    let (guard, go_on, all) = (guard.clone(), go_on.clone(), all.clone());
                    tokio::spawn(async move {
                        all.wait(); // Each on a worker of its own.
                        sleep(guard, go_on)
                    })
                })
                .collect();
            futures::future::join_all(workers).await.into_iter().map(Result::unwrap).collect()
        }
    }
}

/// A hold in a runtime of its own, which is blocked once it is held.
struct Blocked {
    session: Session,
    guard: Arc<MutexGuard>,
    states: States,
    belief: Belief,
    /// Lets the runtime go on.
    go_on: Arc<AtomicBool>,
    /// What its threads were answered then.
    answers: oneshot::Receiver<Vec<bool>>,
    thread: std::thread::JoinHandle<()>,
}

impl Blocked {
    async fn start(scope: &Scope, flavour: Flavour, builder: SessionBuilder) -> Self {
        let (ready, hold) = oneshot::channel();
        let (answer, answers) = oneshot::channel();
        let name = scope.key(&format!("{flavour:?}"));
        let go_on = Arc::new(AtomicBool::new(false));
        let blocked_until = go_on.clone();
        let thread = std::thread::spawn(move || {
            runtime(flavour).block_on(async {
                let session = builder.ttl(TTL).connect().await.unwrap();
                let guard = Arc::new(Mutex::new(&session, name).unwrap().lock().await.unwrap());
                let _ = ready.send((session.clone(), guard.clone()));
                let answers = block(flavour, &guard, &blocked_until).await;
                drop(guard);
                answer.send(answers).unwrap();
                // The test closes the session; only then may the runtime end.
                let closed = |state: &SessionState| *state == SessionState::Closed;
                session.watch_state().wait_for(closed).await.unwrap();
            });
        });
        let (session, guard): (Session, Arc<MutexGuard>) = hold.await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let (states, asked) = (States::of(&session), guard.clone());
        let belief = Belief::of(move || asked.is_held());
        Self { session, guard, states, belief, go_on, answers, thread }
    }

    async fn end(self) {
        drop(self.belief);
        let guard = Arc::into_inner(self.guard).expect("the guard is shared");
        let held = guard.is_held();
        assert_eq!(guard.unlock().await.is_ok(), held);
        self.session.close().await.unwrap();
        self.thread.join().unwrap();
    }
}

async fn lost_in_time(scope: &Scope, deletions: &Deletions, flavour: Flavour) {
    let hold = Blocked::start(scope, flavour, Session::builder([scope.endpoint()])).await;
    let deletion = deletions.of(hold.guard.key()).await;
    let ahead = hold.belief.ended_before(deletion);
    println!("{flavour:?}: known before the deletion by {ahead:.1?}");
    hold.go_on.store(true, Ordering::Relaxed);
    let lost = hold.guard.lost();
    let mut hold = hold;
    let answers = (&mut hold.answers).await.unwrap();
    assert!(answers.iter().all(|held| !held), "believed when the runtime went on: {answers:?}");
    lost.await;
    returns(&hold.session).await;
    scope.owns_lease(hold.session.lease_id().unwrap());
    hold.end().await;
}

#[tokio::test]
async fn a_blocked_runtime_does_not_keep_anybody_believing() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        futures::join!(
            lost_in_time(scope, &deletions, Flavour::Current),
            lost_in_time(scope, &deletions, Flavour::Multi)
        );
    })
    .await;
}

#[tokio::test]
async fn a_keepalive_thread_keeps_the_session_of_a_blocked_runtime() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let kept = async |flavour| {
            let builder = Session::builder([scope.endpoint()]).keepalive_thread();
            let mut hold = Blocked::start(scope, flavour, builder).await;
            tokio::time::sleep(TTL * 3).await;
            assert!(!deletions.has(hold.guard.key()));
            hold.go_on.store(true, Ordering::Relaxed);
            assert!((&mut hold.answers).await.unwrap().into_iter().all(|held| held));
            assert_eq!(hold.belief.answers().first_no, None);
            hold.states.never_lost();
            hold.end().await;
        };
        futures::join!(kept(Flavour::Current), kept(Flavour::Multi));
    })
    .await;
}

#[tokio::test]
async fn an_application_that_is_not_alive_loses_its_session_in_time() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let alive = Arc::new(AtomicBool::new(true));
        let says = alive.clone();
        let builder = Session::builder([scope.endpoint()]);
        let builder = builder.keepalive_thread().liveness(move || says.load(Ordering::Relaxed));
        let hold = Blocked::start(scope, Flavour::Current, builder).await;
        tokio::time::sleep(TTL * 2).await;
        assert!(hold.guard.is_held());
        alive.store(false, Ordering::Relaxed);
        let from = boottime();
        let lost = hold.belief.end().await;
        assert!(lost - from < TTL);
        hold.belief.ended_before(deletions.of(hold.guard.key()).await);
        hold.states.suspended_before_lost().await;
        alive.store(true, Ordering::Relaxed);
        hold.go_on.store(true, Ordering::Relaxed);
        returns(&hold.session).await;
        scope.owns_lease(hold.session.lease_id().unwrap());
        let mut hold = hold;
        (&mut hold.answers).await.unwrap();
        hold.end().await;
    })
    .await;
}
