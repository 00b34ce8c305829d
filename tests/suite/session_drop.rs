//! The end of a session that nobody closes.

use std::time::Duration;

use etcd_recipes::{Election, Error, Mutex, Session, SessionState};
use tokio::runtime::{Builder, Runtime};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, session};
use crate::support::{background, etcd};

async fn is_gone(scope: &Scope, lease: i64) {
    let gone = async || scope.client().lease_time_to_live(lease, None).await.unwrap().ttl() <= 0;
    eventually(PATIENCE, "the lease is gone", gone).await;
}

#[tokio::test]
async fn dropping_the_last_handle_revokes_the_lease_in_the_background() {
    scoped(async |scope| {
        let session = session(scope).await;
        let lease = session.lease_id().unwrap();
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        let (clone, states) = (session.clone(), session.watch_state());
        drop(session);
        drop(clone);
        // The guard is a handle too: what is held stays held.
        assert!(guard.is_held());
        assert_eq!(scope.keys().await.len(), 1);
        assert_eq!(*states.borrow(), SessionState::Connected { generation: 1 });
        drop(guard);
        is_gone(scope, lease).await;
        assert!(scope.keys().await.is_empty());
        eventually(PATIENCE, "it says so", async || *states.borrow() == SessionState::Closed).await;
    })
    .await;
}

#[tokio::test]
async fn a_forgotten_observer_and_a_mutex_are_handles_as_well() {
    scoped(async |scope| {
        let session = session(scope).await;
        let lease = session.lease_id().unwrap();
        let election = Election::new(&session, scope.name()).unwrap();
        let observe = election.observe();
        drop((session, election));
        assert!(scope.client().lease_time_to_live(lease, None).await.unwrap().ttl() > 0);
        drop(observe);
        is_gone(scope, lease).await;
    })
    .await;
}

/// Runs `work` where no runtime is, and fails if it panics.
fn outside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(work).join().expect("it panicked outside a runtime")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_outside_a_runtime_does_not_panic_and_releases() {
    scoped(async |scope| {
        let session = session(scope).await;
        let lease = session.lease_id().unwrap();
        let guard = Mutex::new(&session, scope.key("m")).unwrap().lock().await.unwrap();
        let leadership = Election::new(&session, scope.key("e")).unwrap().campaign("x").await.unwrap();
        let mutex = Mutex::new(&session, scope.key("m")).unwrap();
        outside(move || drop(guard));
        mutex.lock().await.unwrap().unlock().await.unwrap();
        outside(move || drop(leadership));
        outside(move || drop((session, mutex)));
        is_gone(scope, lease).await;
    })
    .await;
}

/// A runtime that is not the test's.
fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Runs `work` on `runtime` from a thread of its own.
fn on<T: Send + 'static>(runtime: Runtime, work: impl Future<Output = T> + Send + 'static) -> (Runtime, T) {
    outside(move || {
        let result = runtime.block_on(work);
        (runtime, result)
    })
}

/// What is left of a session whose runtime is gone.
struct Left {
    session: Session,
    mutex: Mutex,
    guard: etcd_recipes::MutexGuard,
    leadership: etcd_recipes::Leadership,
}

/// Takes a session with all sorts of things on it in a runtime of its own, and shuts that down.
fn left_behind(scope: &Scope, thread: bool) -> Left {
    let (endpoint, name) = (scope.endpoint().to_owned(), scope.name().to_owned());
    let (runtime, left) = on(runtime(), async move {
        let builder = Session::builder([endpoint]).ttl(Duration::from_secs(2));
        let builder = if thread { builder.keepalive_thread() } else { builder };
        let session = builder.connect().await.unwrap();
        let mutex = Mutex::new(&session, format!("{name}/m")).unwrap();
        let guard = mutex.lock().await.unwrap();
        let election = Election::new(&session, format!("{name}/e")).unwrap();
        let leadership = election.campaign("x").await.unwrap();
        // Somebody waits when the end comes.
        tokio::spawn({
            let mutex = mutex.clone();
            async move { mutex.lock().await }
        });
        Left { session, mutex, guard, leadership }
    });
    scope.owns_lease(left.session.lease_id().unwrap());
    outside(move || runtime.shutdown_timeout(PATIENCE));
    left
}

#[tokio::test]
async fn dropping_after_the_end_of_the_runtime_does_not_panic() {
    scoped(async |scope| {
        for thread in [false, true] {
            let Left { session, mutex, guard, leadership } = left_behind(scope, thread);
            outside(move || {
                drop(guard);
                drop(leadership);
                drop(mutex);
                drop(session);
            });
        }
        // The leases expire, which the scope waits for.
    })
    .await;
}

#[tokio::test]
async fn calls_after_the_end_of_the_runtime_fail_and_do_not_hang() {
    scoped(async |scope| {
        let Left { session, mutex, guard, leadership } = left_behind(scope, false);
        let calls = async move {
            assert!(!mutex.lock().await.is_ok_and(|guard| guard.is_held()));
            assert!(guard.unlock().await.is_err());
            assert!(leadership.proclaim("y").await.is_err());
            assert!(leadership.resign().await.is_err());
            assert!(matches!(mutex.try_lock().await, Err(Error::Closed | Error::Lost { .. })));
            session.close().await.unwrap();
        };
        tokio::time::timeout(PATIENCE, calls).await.expect("a call hangs");
    })
    .await;
}

#[tokio::test]
async fn a_hold_whose_runtime_is_gone_ends_at_its_deadline() {
    scoped(async |scope| {
        let Left { guard, .. } = left_behind(scope, false);
        // No task is left to say so; the clock is enough, and it is ahead of etcd's.
        let over = async || {
            let there = !scope.client().get(guard.key(), None).await.unwrap().kvs().is_empty();
            let held = guard.is_held();
            assert!(there || !held, "etcd was first");
            !held
        };
        eventually(PATIENCE, "the deadline passes", over).await;
        outside(move || drop(guard));
    })
    .await;
}

#[tokio::test]
async fn a_guard_dropped_by_a_panic_releases_the_lock() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        let task = tokio::spawn(async move {
            let _held = guard;
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(task.await.unwrap_err().is_panic());
        mutex.lock().await.unwrap().unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_session_used_from_another_runtime_works_as_long_as_its_own_runs() {
    scoped(async |scope| {
        let session = connect(scope, Session::builder([etcd().endpoint()])).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let other = background().spawn(async move {
            let guard = mutex.lock().await.unwrap();
            let held = guard.is_held();
            guard.unlock().await.unwrap();
            held
        });
        assert!(other.await.unwrap());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_session_first_used_from_a_runtime_that_ends_goes_on() {
    scoped(async |scope| {
        let session = connect(scope, Session::builder([etcd().endpoint()])).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let first = mutex.clone();
        let other = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { first.lock().await.unwrap().unlock().await.unwrap() });
        });
        tokio::task::spawn_blocking(move || other.join().unwrap()).await.unwrap();
        let again = tokio::time::timeout(PATIENCE, mutex.lock()).await.expect("its connection is gone");
        again.unwrap().unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
