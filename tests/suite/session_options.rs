//! The options of a session, each by what it changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_recipes::etcd_client::{Client, GetOptions};
use etcd_recipes::{Error, Mutex, Session, SessionState};

use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, generation, reaches, session, waits};

const TTL: Duration = Duration::from_secs(2);

fn builder(scope: &Scope) -> etcd_recipes::SessionBuilder {
    Session::builder([scope.endpoint()]).ttl(TTL)
}

/// Blocks the thread of the test's runtime, so that nothing runs on it.
#[allow(clippy::disallowed_methods)]
fn block_the_runtime(time: Duration) {
    std::thread::sleep(time);
}

#[tokio::test]
async fn a_keepalive_thread_keeps_the_lease_while_the_runtime_is_blocked() {
    scoped(async |scope| {
        let session = connect(scope, builder(scope).keepalive_thread()).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        block_the_runtime(TTL * 3);
        assert!(guard.is_held() && session.is_alive());
        assert_eq!(scope.keys().await.len(), 1);
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
        assert_eq!(session.state(), SessionState::Closed);
    })
    .await;
}

#[tokio::test]
async fn without_a_keepalive_thread_a_blocked_runtime_loses_the_lease_and_knows_it_at_once() {
    scoped(async |scope| {
        let session = connect(scope, builder(scope)).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        block_the_runtime(TTL * 2);
        assert!(!guard.is_held() && !session.is_alive());
        assert!(guard.unlock().await.unwrap_err().is_lost());
        generation(scope, &session, 2).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_keepalive_thread_ends_with_its_session() {
    scoped(async |scope| {
        for dropped in [false, true] {
            let session = connect(scope, builder(scope).keepalive_thread()).await;
            let states = session.watch_state();
            if dropped {
                drop(session);
            } else {
                session.close().await.unwrap();
            }
            eventually(PATIENCE, "it is closed", async || *states.borrow() == SessionState::Closed).await;
            // The thread held the sender.
            eventually(PATIENCE, "the thread has ended", async || states.has_changed().is_err()).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_session_with_a_keepalive_thread_has_generations_too() {
    scoped(async |scope| {
        let session = connect(scope, builder(scope).keepalive_thread()).await;
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        generation(scope, &session, 2).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_liveness_check_that_says_no_loses_the_lease_until_it_says_yes() {
    scoped(async |scope| {
        for thread in [false, true] {
            let (alive, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
            let check = {
                let (alive, asked) = (alive.clone(), asked.clone());
                move || {
                    asked.fetch_add(1, Ordering::SeqCst);
                    alive.load(Ordering::SeqCst)
                }
            };
            let builder = builder(scope).liveness(check);
            let session = connect(scope, if thread { builder.keepalive_thread() } else { builder }).await;
            let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
            eventually(PATIENCE, "it is asked", async || asked.load(Ordering::SeqCst) >= 2).await;
            assert!(guard.is_held());

            alive.store(false, Ordering::SeqCst);
            reaches(&session, SessionState::Lost { generation: 1 }).await;
            assert!(!guard.is_held());
            // Whoever is not alive gets no new lease either: it would hold things up again.
            let count = asked.load(Ordering::SeqCst);
            eventually(PATIENCE, "it is asked on", async || asked.load(Ordering::SeqCst) > count + 5).await;
            assert_eq!((session.state(), session.lease_id()), (SessionState::Lost { generation: 1 }, None));
            let mutex = Mutex::new(&session, scope.name()).unwrap();
            let mut waiting = Box::pin(mutex.lock());
            assert!(waits(Duration::from_millis(100), &mut waiting).await);

            alive.store(true, Ordering::SeqCst);
            let next = tokio::time::timeout(PATIENCE, waiting).await.expect("it lives again").unwrap();
            generation(scope, &session, 2).await;
            next.unlock().await.unwrap();
            drop(guard);
            session.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_session_closes_while_its_liveness_check_says_no() {
    scoped(async |scope| {
        let session = connect(scope, builder(scope).liveness(|| false)).await;
        reaches(&session, SessionState::Suspended { generation: 1 }).await;
        session.close().await.unwrap();
        let session = connect(scope, builder(scope).liveness(|| false)).await;
        reaches(&session, SessionState::Lost { generation: 1 }).await;
        tokio::time::timeout(PATIENCE, session.close()).await.expect("close hangs").unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_session_works_on_a_client_of_the_user() {
    scoped(async |scope| {
        let mut client = Client::connect([scope.endpoint()], None).await.unwrap();
        let session = Session::with_client(client.clone()).await.unwrap();
        crate::support::sessions::owns(scope, &session);
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        let waiting = tokio::spawn(async move { mutex.lock().await });
        eventually(PATIENCE, "it waits", async || scope.keys().await.len() == 2).await;
        guard.unlock().await.unwrap();
        waiting.await.unwrap().unwrap().unlock().await.unwrap();
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        generation(scope, &session, 2).await;
        session.close().await.unwrap();
        // It is the user's: closing the session does not close it.
        client.get("x", None).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_thread_for_keepalives_needs_connections_of_its_own() {
    scoped(async |scope| {
        let client = scope.client();
        let error = Session::builder_with_client(client).keepalive_thread().connect().await.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "keepalive_thread", .. }), "{error}");
        assert!(error.to_string().contains("Session::builder"), "what to do: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_ttl_below_the_minimum_of_the_server_is_raised_and_the_raised_one_counts() {
    if lacking(Needs::Settings) {
        return;
    }
    // With etcd's own settings it is two seconds.
    let server = Server::start().await;
    scoped_on(&server, async |scope| {
        let asked = Duration::from_secs(1);
        let session = connect(scope, Session::builder([scope.endpoint()]).ttl(asked)).await;
        let granted = scope.client().lease_time_to_live(session.lease_id().unwrap(), None).await.unwrap();
        assert_eq!((session.ttl(), granted.granted_ttl()), (asked, 2));
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        // Longer than what was asked for, less than what was granted.
        block_the_runtime(Duration::from_millis(1400));
        assert!(guard.is_held());
        let mut lost = Box::pin(guard.lost());
        assert!(waits(Duration::from_secs(4), &mut lost).await, "and it is kept alive");
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn bookkeeping_stays_in_the_namespace() {
    scoped(async |scope| {
        let namespace = format!("{}-own/", scope.name());
        let session = connect(scope, builder(scope).namespace(namespace.clone())).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        let lease = session.lease_id().unwrap();
        let all = scope.client().get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
        for kv in all.kvs().iter().filter(|kv| kv.lease() == lease) {
            assert!(kv.key() == guard.key() || kv.key().starts_with(namespace.as_bytes()), "{kv:?}");
        }
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
        let left = scope.client().get(namespace, Some(GetOptions::new().with_prefix())).await.unwrap();
        assert!(left.kvs().is_empty());
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_is_dead_is_no_obstacle_when_another_lives() {
    scoped(async |scope| {
        let (dead, silent) = (Proxy::start(scope.endpoint()).await, Proxy::start(scope.endpoint()).await);
        dead.set(Mode::Refuse).await;
        silent.set(Mode::HoleBoth).await;
        let endpoints = [dead.endpoint(), silent.endpoint(), scope.endpoint().to_owned()];
        let session = connect(scope, Session::builder(endpoints)).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn endpoints_may_have_a_scheme_or_not() {
    scoped(async |scope| {
        let bare = scope.endpoint().trim_start_matches("http://").to_owned();
        for endpoint in [bare, scope.endpoint().to_owned()] {
            let session = connect(scope, Session::builder([endpoint])).await;
            session.close().await.unwrap();
        }
        let session = session(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
