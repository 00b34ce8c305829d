//! The leak check finds what is left and accepts what goes away in time.

use std::time::Duration;

use etcd_client::PutOptions;

use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::etcd;
use crate::support::server::Server;

/// Whether closing this scope is refused for as long as it was watched.
async fn refuses(scope: Scope) -> bool {
    let close = tokio::time::timeout(Duration::from_millis(300), scope.close()).await;
    close.is_err()
}

#[tokio::test]
async fn names_are_unique_and_nothing_left_is_fine() {
    let name = scoped(async |scope| scope.name().to_owned()).await;
    scoped(async |scope| {
        assert_ne!(scope.name(), name);
        assert!(scope.key("x").starts_with(scope.name()));
        assert!(scope.keys().await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn waits_for_what_goes_away_by_itself() {
    scoped(async |scope| {
        let lease = scope.client().lease_grant(1, None).await.unwrap().id();
        scope.owns_lease(lease);
        let options = PutOptions::new().with_lease(lease);
        scope.client().put(scope.key("leased"), "", Some(options)).await.unwrap();
        assert_eq!(scope.keys().await, [scope.key("leased")]);
        tokio::spawn(tokio::time::sleep(Duration::from_millis(50)));
    })
    .await;
}

#[tokio::test]
async fn finds_a_key() {
    let scope = Scope::open(etcd()).await;
    let (key, mut client) = (scope.key("left"), scope.client());
    client.put(key.as_str(), "", None).await.unwrap();
    assert!(refuses(scope).await);
    client.delete(key, None).await.unwrap();
}

#[tokio::test]
async fn finds_a_lease() {
    let scope = Scope::open(etcd()).await;
    let mut client = scope.client();
    let lease = client.lease_grant(60, None).await.unwrap().id();
    scope.owns_lease(lease);
    assert!(refuses(scope).await);
    client.lease_revoke(lease).await.unwrap();
}

#[tokio::test]
async fn finds_bookkeeping_of_its_own_lease_only() {
    let server = Server::fast().await;
    let mut client = server.client().await;
    client.put("_etcd-recipes/1b/op", "", None).await.unwrap();
    scoped_on(&server, async |scope| scope.owns_lease(0x1a)).await;
    let scope = Scope::open(&server).await;
    scope.owns_lease(0x1b);
    assert!(refuses(scope).await);
}

#[tokio::test]
async fn finds_a_task() {
    let scope = Scope::open(etcd()).await;
    let task = tokio::spawn(std::future::pending::<()>());
    assert!(refuses(scope).await);
    task.abort();
}

#[tokio::test]
async fn tools_do_not_count_as_tasks_of_the_test() {
    scoped(async |scope| {
        let before = crate::support::check::alive_tasks();
        let proxy = crate::support::proxy::Proxy::start(scope.endpoint()).await;
        let faults = crate::support::faults::Faults::new(proxy.endpoint());
        let mut client = faults.client().await;
        client.get(scope.name(), None).await.unwrap();
        crate::support::client([proxy.endpoint()]).await.get(scope.name(), None).await.unwrap();
        assert_eq!(crate::support::check::alive_tasks(), before);
    })
    .await;
}

#[tokio::test]
#[should_panic(expected = "not within 20ms: pigs fly")]
async fn eventually_gives_up() {
    eventually(Duration::from_millis(20), "pigs fly", async || false).await;
}
