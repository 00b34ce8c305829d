//! Calls that wait for a lock hear of their turn, whatever becomes of the stream that would tell them.

use std::time::{Duration, Instant};

use etcd_client::PutOptions;
use etcd_recipes::{Mutex, MutexGuard, Session};
use tokio::task::JoinHandle;

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::holds::States;
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::rounds;
use crate::support::server::{PATIENCE, Server};

/// A session through proxies, and one that goes straight.
async fn two_sessions(scope: &Scope, proxies: &[Proxy]) -> (Session, Session) {
    let session = Session::connect(proxies.iter().map(Proxy::endpoint)).await.unwrap();
    let other = Session::connect([scope.endpoint()]).await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    scope.owns_lease(other.lease_id().unwrap());
    (session, other)
}

/// A call for a lock, which is in line and watches when this returns.
async fn in_line(server: &Server, scope: &Scope, session: &Session, name: &str) -> JoinHandle<MutexGuard> {
    // None of an earlier session.
    eventually(PATIENCE, "nobody watches", async || watchers(server).await == 0).await;
    let before = scope.keys().await.len();
    let mutex = Mutex::new(session, scope.key(name)).unwrap();
    let call = tokio::spawn(async move { mutex.lock().await.unwrap() });
    eventually(PATIENCE, "in line", async || scope.keys().await.len() > before).await;
    eventually(PATIENCE, "watching", async || watchers(server).await > 0).await;
    call
}

/// How many watches the server has: all are the crate's.
async fn watchers(server: &Server) -> usize {
    let count = server.metrics().await.value("etcd_debugging_mvcc_watcher_total");
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let count = count.expect("the server counts watches") as usize;
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiter_with_a_half_open_connection_gets_its_turn() {
    if lacking(Needs::Metrics) {
        return;
    }
    // A server of its own: it counts watchers.
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        // Two ways to one server stand for two members.
        let proxies = [Proxy::start(scope.endpoint()).await, Proxy::start(scope.endpoint()).await];
        let (session, other) = two_sessions(scope, &proxies).await;
        let states = States::of(&session);
        let holder = Mutex::new(&other, scope.key("lock")).unwrap().lock().await.unwrap();
        let call = in_line(&server, scope, &session, "lock").await;
        proxies[0].set(Mode::HoleBoth).await;
        holder.unlock().await.unwrap();
        let free = Instant::now();
        let guard = tokio::time::timeout(Duration::from_secs(25), call).await.expect("not in 25 s").unwrap();
        println!("half-open: acquired after {:.1?}", free.elapsed());
        states.never_lost();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
        other.close().await.unwrap();
    })
    .await;
}

/// Those ahead of a waiter leave while its watch is away, or is there, and history is gone at once.
async fn compacted_away(server: &Server, scope: &Scope, ahead: usize) {
    let proxy = Proxy::start(scope.endpoint()).await;
    let session = Session::connect([proxy.endpoint()]).await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    let states = States::of(&session);
    let mut client = scope.client();
    let lease = client.lease_grant(600, None).await.unwrap().id();
    scope.owns_lease(lease);
    let line: Vec<String> = (0..ahead).map(|place| scope.key(&format!("lock/{place}"))).collect();
    for key in &line {
        client.put(key.as_str(), "", Some(PutOptions::new().with_lease(lease))).await.unwrap();
    }
    let call = in_line(server, scope, &session, "lock").await;
    // By itself compaction does not touch a watch that is up to date.
    client.put(scope.key("other"), "", None).await.unwrap();
    server.compact().await;
    proxy.set(Mode::Refuse).await;
    // The last of those ahead leave first: whoever is far back watches one of them.
    let leaving = line.len().div_ceil(2);
    for key in line.iter().rev().take(leaving) {
        client.delete(key.as_str(), None).await.unwrap();
    }
    client.delete(scope.key("other"), None).await.unwrap();
    server.compact().await;
    proxy.set(Mode::Pass).await;
    for key in line.iter().rev().skip(leaving) {
        assert!(!call.is_finished(), "got the lock too early");
        client.delete(key.as_str(), None).await.unwrap();
        server.compact().await;
    }
    let guard = tokio::time::timeout(PATIENCE, call).await.expect("never gets its turn").unwrap();
    guard.unlock().await.unwrap();
    client.lease_revoke(lease).await.unwrap();
    states.never_lost();
    session.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_does_not_hurt_a_waiter() {
    if lacking(Needs::Metrics) {
        return;
    }
    let server = Server::fast().await;
    // Near the front the line is watched; further back, one key.
    for ahead in [1, 3, 30] {
        for _ in 0..rounds(5, 50) {
            scoped_on(&server, async |scope| compacted_away(&server, scope, ahead).await).await;
        }
    }
}
