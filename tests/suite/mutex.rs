//! The mutex and its guard: taken, asked, lost and given back.

use std::time::Duration;

use etcd_recipes::etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, Txn, TxnOp};
use etcd_recipes::{Error, Mutex, Session};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, create_revision, session, waits};

const SHORT: Duration = Duration::from_millis(200);

async fn delete(scope: &Scope, key: &[u8]) {
    scope.client().delete(key, None).await.unwrap();
}

/// The value of a key, if it is there.
async fn value(scope: &Scope, key: &str) -> Option<Vec<u8>> {
    let answer = scope.client().get(key, None).await.unwrap();
    answer.kvs().first().map(|kv| kv.value().to_vec())
}

fn put(key: &str, value: &str) -> Txn {
    Txn::new().and_then([TxnOp::put(key, value, None)])
}

#[tokio::test]
async fn a_lock_is_one_key_on_the_lease_of_the_session() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        assert!(guard.is_held());
        let answer = scope.client().get(guard.key(), None).await.unwrap();
        let key = &answer.kvs()[0];
        assert_eq!(Some(key.lease()), session.lease_id());
        let lease = session.lease_id().unwrap();
        let start = format!("{}/{lease:x}-", scope.name());
        assert!(guard.key().starts_with(start.as_bytes()), "{:?}", String::from_utf8_lossy(guard.key()));
        assert_eq!(scope.keys().await.len(), 1);
        assert!(guard.token() >= key.create_revision());
        guard.unlock().await.unwrap();
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn try_lock_takes_a_free_lock_and_leaves_a_busy_one() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| Mutex::new(session, scope.name()).unwrap());
        let guard = ours.try_lock().await.unwrap().expect("free");
        assert!(theirs.try_lock().await.unwrap().is_none());
        assert!(ours.try_lock().await.unwrap().is_none(), "not reentrant");
        assert_eq!(scope.keys().await.len(), 1, "who does not get it was never in line");

        // A waiter is as good as a holder: nobody may pass it.
        let mut waiter = Box::pin(theirs.lock());
        assert!(waits(SHORT, &mut waiter).await);
        guard.unlock().await.unwrap();
        let guard = waiter.await.unwrap();
        assert!(ours.try_lock().await.unwrap().is_none());
        guard.unlock().await.unwrap();
        let guard = ours.try_lock().await.unwrap().expect("free again");
        guard.unlock().await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn holder_and_waiters_tell_who_stands_where() {
    scoped(async |scope| {
        let before = std::time::SystemTime::now() - Duration::from_secs(2);
        let named = |name: &str| Session::builder([scope.endpoint()]).identity(name);
        let a = connect(scope, named("anna")).await;
        let b = connect(scope, named("bert")).await;
        let c = connect(scope, named("carl")).await;
        let [anna, bert, carl] = [&a, &b, &c].map(|session| Mutex::new(session, scope.name()).unwrap());
        assert_eq!(carl.holder().await.unwrap(), None);
        assert!(carl.waiters().await.unwrap().is_empty());

        let guard = anna.lock().await.unwrap();
        let holder = carl.holder().await.unwrap().expect("anna holds it");
        assert_eq!(holder.identity.as_deref(), Some("anna"));
        assert_eq!((holder.key.as_slice(), Some(holder.lease)), (guard.key(), a.lease_id()));
        assert_eq!(holder.create_revision, create_revision(guard.compare()));
        assert!(holder.since.is_some_and(|since| since > before && since <= std::time::SystemTime::now()));
        assert!(carl.waiters().await.unwrap().is_empty());

        let mut first = Box::pin(bert.lock());
        assert!(waits(SHORT, &mut first).await);
        // A key of another program, whose value says nothing in our words.
        let lease = scope.client().lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let options = etcd_recipes::etcd_client::PutOptions::new().with_lease(lease);
        scope.client().put(scope.key("foreign"), "{\"identity\":7}", Some(options)).await.unwrap();
        let waiters = anna.waiters().await.unwrap();
        let identities: Vec<_> = waiters.iter().map(|waiter| waiter.identity.as_deref()).collect();
        assert_eq!(identities, [Some("bert"), None]);
        assert_eq!((waiters[1].lease, waiters[1].since), (lease, None));
        assert!(waiters[0].create_revision < waiters[1].create_revision);

        scope.client().lease_revoke(lease).await.unwrap();
        guard.unlock().await.unwrap();
        first.await.unwrap().unlock().await.unwrap();
        for session in [a, b, c] {
            session.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn unlock_after_the_key_was_deleted_says_lost() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();

        // At once: nobody can have heard of it.
        let guard = mutex.lock().await.unwrap();
        delete(scope, guard.key()).await;
        let error = guard.unlock().await.unwrap_err();
        assert!(matches!(error, Error::Lost { .. }) && error.is_lost(), "{error}");
        assert!(error.to_string().contains(scope.name()), "{error}");

        // And after it was noticed.
        let guard = mutex.lock().await.unwrap();
        let lost = guard.lost();
        delete(scope, guard.key()).await;
        tokio::time::timeout(PATIENCE, lost).await.expect("the loss is noticed");
        assert!(!guard.is_held());
        assert!(guard.unlock().await.unwrap_err().is_lost());

        // A lost lock is free.
        mutex.try_lock().await.unwrap().expect("free").unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn unlock_after_the_lease_was_revoked_says_lost() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        assert!(guard.unlock().await.unwrap_err().is_lost());
        // A new lock needs a new lease.
        let guard = mutex.lock().await.unwrap();
        crate::support::sessions::owns(scope, &session);
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn unlock_leaves_the_key_of_another_hold_alone() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        // Deleted and made again by somebody else: the same name, another hold.
        let key = guard.key().to_vec();
        delete(scope, &key).await;
        scope.client().put(key.clone(), "another", None).await.unwrap();
        assert!(guard.unlock().await.unwrap_err().is_lost());
        assert_eq!(scope.keys().await.len(), 1);

        // It stands in line like any other, and the next place has another key.
        assert!(mutex.try_lock().await.unwrap().is_none());
        let mut waiter = Box::pin(mutex.lock());
        assert!(waits(SHORT, &mut waiter).await);
        let found = scope.client().get(key.clone(), None).await.unwrap();
        assert_eq!((found.kvs()[0].value(), found.kvs()[0].version()), (&b"another"[..], 1));
        delete(scope, &key).await;
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
        assert_ne!(guard.key(), key);
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_guard_releases_the_lock() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| Mutex::new(session, scope.name()).unwrap());
        let guard = ours.lock().await.unwrap();
        let mut waiter = Box::pin(theirs.lock());
        assert!(waits(SHORT, &mut waiter).await);
        drop(guard);
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("released").unwrap();
        drop(guard);
        eventually(PATIENCE, "the key is gone", async || scope.keys().await.is_empty()).await;
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_transaction_commits_while_the_lock_is_held_and_not_after() {
    scoped(async |scope| {
        let session = session(scope).await;
        let lock = format!("{}-lock", scope.name());
        let mutex = Mutex::new(&session, &lock).unwrap();
        let data = scope.key("data");
        let guard = mutex.lock().await.unwrap();
        let before = scope.client().get("x", None).await.unwrap().header().unwrap().revision();
        let answer = guard.txn(put(&data, "1")).await.unwrap();
        assert!(answer.succeeded());
        assert!(answer.header().unwrap().revision() > before);
        assert_eq!(value(scope, &data).await.as_deref(), Some(&b"1"[..]));

        // Conditions of the user's own decide between the branches, and the results are those of the user's.
        let condition = Compare::value(data.as_str(), CompareOp::Equal, "0");
        let read = TxnOp::get(data.as_str(), None);
        let txn =
            Txn::new().when([condition]).and_then([TxnOp::put(data.as_str(), "2", None)]).or_else([read]);
        let answer = guard.txn(txn).await.unwrap();
        assert!(!answer.succeeded());
        assert_eq!(answer.op_responses().len(), 1);
        assert_eq!(value(scope, &data).await.as_deref(), Some(&b"1"[..]));

        // The lock goes without this process being told; etcd is asked in the transaction itself.
        delete(scope, guard.key()).await;
        let error = guard.txn(put(&data, "3")).await.unwrap_err();
        assert!(error.is_lost(), "{error}");
        assert!(!guard.is_held(), "an answer of etcd is enough to know");
        assert!(guard.txn(put(&data, "4")).await.unwrap_err().is_lost());
        assert_eq!(value(scope, &data).await.as_deref(), Some(&b"1"[..]));
        drop(guard);
        scope.client().delete(data, None).await.unwrap();
        session.close().await.unwrap();
        let left = scope.client().get(lock, Some(GetOptions::new().with_prefix())).await.unwrap();
        assert!(left.kvs().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_transaction_of_an_old_holder_is_refused_when_somebody_else_has_the_lock() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [old, new] = [&a, &b].map(|session| Mutex::new(session, scope.key("lock")).unwrap());
        let data = scope.key("data");
        let old = old.lock().await.unwrap();
        delete(scope, old.key()).await;
        let new = new.lock().await.unwrap();
        new.txn(put(&data, "new")).await.unwrap();
        assert!(old.txn(put(&data, "old")).await.unwrap_err().is_lost());
        assert_eq!(value(scope, &data).await.as_deref(), Some(&b"new"[..]));
        assert!(new.token() > old.token());
        drop((old, new));
        scope.client().delete(data, None).await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_compare_of_a_guard_guards_a_plain_transaction() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
        let data = scope.key("data");
        let guard = mutex.lock().await.unwrap();
        let (compare, mut client) = (guard.compare(), session.client());
        let guarded =
            |text: &str| Txn::new().when([compare.clone()]).and_then([TxnOp::put(data.as_str(), text, None)]);
        assert!(client.txn(guarded("held")).await.unwrap().succeeded());
        guard.unlock().await.unwrap();
        assert!(!client.txn(guarded("free")).await.unwrap().succeeded());
        // The next hold may even use the same key: it is not the same hold.
        let next = mutex.lock().await.unwrap();
        assert!(!client.txn(guarded("next")).await.unwrap().succeeded());
        assert_eq!(value(scope, &data).await.as_deref(), Some(&b"held"[..]));
        drop(next);
        client.delete(data, Some(DeleteOptions::new())).await.unwrap();
        drop(client);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn run_gives_the_result_and_stops_the_work_when_the_lock_is_lost() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        assert_eq!(guard.run(async { 7 }).await.unwrap(), 7);

        let (running, ran) = tokio::sync::oneshot::channel();
        let (dropped, gone) = tokio::sync::oneshot::channel::<()>();
        let work = async move {
            let _alive = dropped;
            running.send(()).unwrap();
            std::future::pending::<()>().await;
        };
        let key = guard.key().to_vec();
        let (result, ()) = tokio::join!(guard.run(work), async {
            ran.await.unwrap();
            delete(scope, &key).await;
        });
        assert!(result.unwrap_err().is_lost());
        assert!(gone.await.is_err(), "the work was dropped before `run` returned");
        // Nothing is begun on a lost lock.
        let begun = guard.run(async { panic!("begun") }).await;
        assert!(begun.unwrap_err().is_lost());
        drop(guard);
        session.close().await.unwrap();
    })
    .await;
}
