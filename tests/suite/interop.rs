//! `etcdctl lock`, `etcdctl elect` and the lock and election services of etcd stand in one line with this crate.

use std::time::Duration;

use etcd_client::{LockOptions, ResignOptions};
use etcd_recipes::{Election, Mutex};
use futures::StreamExt as _;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::foreign::Foreign;
use crate::support::needs::{Needs, lacking};
use crate::support::server::PATIENCE;
use crate::support::sessions::{session, waits};
use crate::support::{background, etcd};

const SHORT: Duration = Duration::from_millis(200);

async fn in_line(scope: &Scope, count: usize) {
    eventually(PATIENCE, &format!("{count} in line"), async || scope.keys().await.len() == count).await;
}

/// Polls what should wait until so many are in line.
async fn enters<T>(scope: &Scope, count: usize, waiter: &mut (impl Future<Output = T> + Unpin)) {
    tokio::select! {
        _ = waiter => panic!("it did not wait"),
        () = in_line(scope, count) => {}
    }
}

#[tokio::test]
async fn etcdctl_lock_waits_for_us_and_we_wait_for_it() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let ours = mutex.lock().await.unwrap();
        let mut foreign = Foreign::lock(etcd(), scope.name());
        in_line(scope, 2).await;
        let waiters = mutex.waiters().await.unwrap();
        assert_eq!((waiters.len(), waiters[0].identity.as_deref()), (1, None));
        assert!(waiters[0].lease != 0);
        assert!(foreign.said().is_empty());
        let token = ours.token();
        ours.unlock().await.unwrap();
        let foreign_token = foreign.token().await;
        assert!(foreign_token > token);

        assert!(mutex.try_lock().await.unwrap().is_none());
        let holder = mutex.holder().await.unwrap().expect("it holds the lock");
        assert_eq!(holder.key, waiters[0].key);
        let mut ours = Box::pin(mutex.lock());
        assert!(waits(SHORT, &mut ours).await);
        foreign.leave().await;
        let ours = tokio::time::timeout(PATIENCE, ours).await.expect("our turn").unwrap();
        assert!(ours.token() > foreign_token);
        ours.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_mixed_line_of_locks_keeps_its_order() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [first, second] = [&a, &b].map(|session| Mutex::new(session, scope.name()).unwrap());
        let ours = first.lock().await.unwrap();
        let mut tokens = vec![ours.token()];
        let mut foreign_1 = Foreign::lock(etcd(), scope.name());
        in_line(scope, 2).await;
        let mut waiter_1 = Box::pin(second.lock());
        enters(scope, 3, &mut waiter_1).await;
        let mut foreign_2 = Foreign::lock(etcd(), scope.name());
        in_line(scope, 4).await;
        // On the session that holds the lock: it must not be handed over past the others.
        let mut waiter_2 = Box::pin(first.lock());
        enters(scope, 5, &mut waiter_2).await;
        let mut foreign_3 = Foreign::lock(etcd(), scope.name());
        in_line(scope, 6).await;

        ours.unlock().await.unwrap();
        tokens.push(foreign_1.token().await);
        assert!(waits(SHORT, &mut waiter_1).await && waits(SHORT, &mut waiter_2).await);
        foreign_1.leave().await;
        let ours = tokio::time::timeout(PATIENCE, waiter_1).await.expect("our turn").unwrap();
        tokens.push(ours.token());
        assert!(waits(SHORT, &mut waiter_2).await && foreign_2.said().is_empty());
        ours.unlock().await.unwrap();
        tokens.push(foreign_2.token().await);
        assert!(waits(SHORT, &mut waiter_2).await && foreign_3.said().is_empty());
        foreign_2.leave().await;
        let ours = tokio::time::timeout(PATIENCE, waiter_2).await.expect("our turn").unwrap();
        tokens.push(ours.token());
        assert!(foreign_3.said().is_empty());
        ours.unlock().await.unwrap();
        tokens.push(foreign_3.token().await);
        foreign_3.leave().await;
        assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_foreign_holder_that_dies_is_followed_when_its_lease_ends() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let mut foreign = Foreign::lock(etcd(), scope.name());
        foreign.token().await;
        let lease = mutex.holder().await.unwrap().unwrap().lease;
        let mut ours = Box::pin(mutex.lock());
        enters(scope, 2, &mut ours).await;
        foreign.kill();
        assert!(waits(SHORT, &mut ours).await, "its lease lives on");
        scope.client().lease_revoke(lease).await.unwrap();
        let ours = tokio::time::timeout(PATIENCE, ours).await.expect("our turn").unwrap();
        ours.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn etcdctl_elect_follows_us_and_we_follow_it() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [first, second] = [&a, &b].map(|session| Election::new(session, scope.name()).unwrap());
        let mut observed = second.observe();
        assert_eq!(observed.next().await.unwrap().unwrap().leader, None);
        let ours = first.campaign("ours").await.unwrap();
        let mut foreign_1 = Foreign::elect(etcd(), scope.name(), "foreign one");
        in_line(scope, 2).await;
        let mut waiter = Box::pin(second.campaign("ours, too"));
        enters(scope, 3, &mut waiter).await;
        let mut foreign_2 = Foreign::elect(etcd(), scope.name(), "foreign two");
        in_line(scope, 4).await;
        let candidates = first.candidates().await.unwrap();
        assert_eq!(candidates.len(), 4);
        assert!(foreign_1.said().is_empty() && foreign_2.said().is_empty());

        let token = ours.token();
        ours.resign().await.unwrap();
        let key = foreign_1.wins("foreign one").await;
        let leader = first.leader().await.unwrap().unwrap();
        assert_eq!((leader.key.as_slice(), leader.value.as_slice()), (key.as_bytes(), &b"foreign one"[..]));
        assert_eq!(candidates[1].key, leader.key);
        assert!(waits(SHORT, &mut waiter).await && foreign_2.said().is_empty());
        foreign_1.leave().await;
        let ours = tokio::time::timeout(PATIENCE, waiter).await.expect("our turn").unwrap();
        assert!(ours.token() > token && foreign_2.said().is_empty());
        ours.resign().await.unwrap();
        foreign_2.wins("foreign two").await;
        foreign_2.leave().await;

        let mut values = Vec::new();
        for _ in 0..5 {
            let seen = tokio::time::timeout(PATIENCE, observed.next()).await.unwrap().unwrap().unwrap();
            values.push(seen.leader.map(|leader| String::from_utf8(leader.value).unwrap()));
        }
        let values: Vec<_> = values.iter().map(Option::as_deref).collect();
        assert_eq!(values, [Some("ours"), Some("foreign one"), Some("ours, too"), Some("foreign two"), None]);
        drop(observed);
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn etcdctl_elect_listens_to_us() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = Election::new(&session, scope.name()).unwrap();
        let ours = election.campaign("first").await.unwrap();
        let key = String::from_utf8(ours.key().to_vec()).unwrap();
        let mut listener = Foreign::listen(etcd(), scope.name());
        assert_eq!([listener.line().await, listener.line().await], [key.clone(), "first".into()]);
        ours.proclaim("second").await.unwrap();
        assert_eq!([listener.line().await, listener.line().await], [key, "second".into()]);
        ours.resign().await.unwrap();
        let ours = election.campaign("third").await.unwrap();
        let key = String::from_utf8(ours.key().to_vec()).unwrap();
        assert_eq!([listener.line().await, listener.line().await], [key, "third".into()]);
        ours.resign().await.unwrap();
        listener.kill();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_lock_and_its_neighbours_with_similar_names_do_not_see_each_other() {
    scoped(async |scope| {
        let session = session(scope).await;
        let ours = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        // The same name and more: another lock, for us and for etcdctl.
        let longer = format!("{}2", scope.name());
        let other = Mutex::new(&session, &longer).unwrap().try_lock().await.unwrap().expect("free");
        other.unlock().await.unwrap();
        let mut foreign = Foreign::lock(etcd(), &longer);
        foreign.token().await;
        foreign.leave().await;
        ours.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// The lock and election services of etcd itself, which clients in several languages call.
#[tokio::test]
async fn services_of_etcd_wait_for_us_and_we_wait_for_them() {
    if lacking(Needs::Locks) {
        return;
    }
    scoped(async |scope| {
        let (session, mut client) = (session(scope).await, scope.client());
        let lease = client.lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);

        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let ours = mutex.lock().await.unwrap();
        let (mut caller, name) = (scope.client(), scope.name().to_owned());
        let options = LockOptions::new().with_lease(lease);
        let theirs = background().spawn(async move { caller.lock(name, Some(options)).await });
        in_line(scope, 2).await;
        assert!(!theirs.is_finished());
        let token = ours.token();
        ours.unlock().await.unwrap();
        let theirs = theirs.await.unwrap().unwrap();
        assert!(theirs.header().unwrap().revision() > token);
        let mut waiting = Box::pin(mutex.lock());
        enters(scope, 2, &mut waiting).await;
        client.unlock(theirs.key()).await.unwrap();
        let ours = waiting.await.unwrap();
        assert!(ours.token() > theirs.header().unwrap().revision());
        ours.unlock().await.unwrap();
        drop(mutex);

        let election = Election::new(&session, scope.name()).unwrap();
        let ours = election.campaign("ours").await.unwrap();
        let (mut caller, name) = (scope.client(), scope.name().to_owned());
        let theirs = background().spawn(async move { caller.campaign(name, "theirs", lease).await });
        in_line(scope, 2).await;
        assert_eq!(client.leader(scope.name()).await.unwrap().kv().unwrap().value(), b"ours");
        ours.resign().await.unwrap();
        let theirs = theirs.await.unwrap().unwrap();
        assert_eq!(election.leader().await.unwrap().unwrap().value, b"theirs");
        let mut waiting = Box::pin(election.campaign("again"));
        enters(scope, 2, &mut waiting).await;
        let leader = theirs.leader().unwrap().clone();
        client.resign(Some(ResignOptions::new().with_leader(leader))).await.unwrap();
        waiting.await.unwrap().resign().await.unwrap();

        client.lease_revoke(lease).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
