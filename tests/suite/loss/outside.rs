//! The key deleted, or the lease revoked, by somebody else: the watch of the own key tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::Client;
use etcd_recipes::{Election, Mutex, MutexGuard, Session, SessionState};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::holds::{Deletions, reaches};
use crate::support::measure::Samples;
use crate::support::rounds;
use crate::support::server::PATIENCE;

/// What a guard older than 50 ms must know by then, in the median.
const PROMPT: Duration = Duration::from_millis(100);

/// Trials of each kind.
#[track_caller]
fn trials() -> usize {
    rounds(30, 200)
}

/// A guard of this age is watched.
const AGE: Duration = Duration::from_millis(50);

/// Measures from just before `harm` is sent until the guard's loss resolves.
async fn noticed(guard: &MutexGuard, harm: impl AsyncFnOnce()) -> Duration {
    tokio::time::sleep(AGE).await;
    assert!(guard.is_held());
    let lost = guard.lost();
    let (sent, waiting) = (
        Instant::now(),
        tokio::spawn(async move {
            lost.await;
            Instant::now()
        }),
    );
    harm().await;
    let lost = tokio::time::timeout(PATIENCE, waiting).await.expect("the loss is never noticed").unwrap();
    assert!(!guard.is_held(), "lost, and still held");
    lost - sent
}

fn lost_in_the_median(samples: &Samples, what: &str) {
    samples.report(what);
    assert!(samples.median() <= PROMPT, "{what}: {samples:?}");
}

/// Writes keys that have nothing to do with anything, until stopped.
async fn write_others(mut client: Client, key: String, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        client.put(key.as_str(), "", None).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    client.delete(key, None).await.unwrap();
}

async fn session(scope: &Scope) -> Session {
    let session = Session::connect([scope.endpoint()]).await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_key_is_noticed_within_100_ms() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        for busy in [false, true] {
            let stop = Arc::new(AtomicBool::new(!busy));
            let others =
                tokio::spawn(write_others(scope.client(), format!("{}-others", scope.name()), stop.clone()));
            let mut samples = Samples::default();
            for _ in 0..trials() {
                let guard = mutex.lock().await.unwrap();
                let (mut client, key) = (scope.client(), guard.key().to_vec());
                let time = noticed(&guard, async || {
                    client.delete(key, None).await.unwrap();
                });
                samples.add(time.await);
                assert!(guard.unlock().await.unwrap_err().is_lost());
            }
            stop.store(true, Ordering::Relaxed);
            others.await.unwrap();
            let store = if busy { "a store that others write to" } else { "a quiet store" };
            lost_in_the_median(&samples, &format!("key deleted, {store}: noticed"));
        }
        // The lease was never in question.
        assert_eq!(session.state(), SessionState::Connected { generation: 1 });
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_lease_is_noticed_within_100_ms_and_replaced() {
    scoped(async |scope| {
        let session = session(scope).await;
        let (mutex, election) = (
            Mutex::new(&session, scope.name()).unwrap(),
            Election::new(&session, format!("{}-election", scope.name())).unwrap(),
        );
        let (mut noticed_after, mut locked_after) = (Samples::default(), Samples::default());
        for generation in 1.. {
            let guard = mutex.lock().await.unwrap();
            let leadership = election.campaign("me").await.unwrap();
            assert_eq!(session.state(), SessionState::Connected { generation });
            let (mut client, lease) = (scope.client(), session.lease_id().unwrap());
            scope.owns_lease(lease);
            if noticed_after.count() == trials() {
                leadership.resign().await.unwrap();
                guard.unlock().await.unwrap();
                break;
            }
            let time = noticed(&guard, async || {
                client.lease_revoke(lease).await.unwrap();
            });
            noticed_after.add(time.await);
            tokio::time::timeout(PATIENCE, leadership.lost()).await.expect("the leadership goes as well");
            assert!(leadership.proclaim("still me").await.unwrap_err().is_lost());
            // The dead lease is found out by the next request and replaced by another.
            let again = Instant::now();
            let next = mutex.lock().await.unwrap();
            locked_after.add(again.elapsed());
            assert!(next.token() > guard.token());
            assert!(guard.unlock().await.unwrap_err().is_lost());
            assert!(next.is_held(), "the old guard took the new one's key along");
            next.unlock().await.unwrap();
        }
        lost_in_the_median(&noticed_after, "lease revoked: noticed");
        lost_in_the_median(&locked_after, "lease revoked: locked again");
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_waiter_whose_lease_is_revoked_goes_to_the_end_of_the_line() {
    scoped(async |scope| {
        let (first, second, third) = (session(scope).await, session(scope).await, session(scope).await);
        let name = scope.name().to_owned();
        let holder = Mutex::new(&first, &name).unwrap().lock().await.unwrap();
        let lock = |session: &Session| {
            let mutex = Mutex::new(session, &name).unwrap();
            tokio::spawn(async move { mutex.lock().await.unwrap() })
        };
        let line = async |count| {
            eventually(PATIENCE, "the line grows", async || scope.keys().await.len() == count).await;
            scope.keys().await
        };
        let revoked = lock(&second);
        let before = line(2).await;
        let patient = lock(&third);
        let deletions = Deletions::below(scope.endpoint(), &name).await;
        line(3).await;

        scope.client().lease_revoke(second.lease_id().unwrap()).await.unwrap();
        deletions.of(before[1].as_bytes()).await;
        let lost = Instant::now();
        reaches(&second, SessionState::Connected { generation: 2 }).await;
        scope.owns_lease(second.lease_id().unwrap());
        let after = line(3).await;
        println!("waiter's lease revoked: in line again after {:?}", lost.elapsed());
        assert!(lost.elapsed() < Duration::from_millis(250) + AGE, "{:?}", lost.elapsed());
        assert!(!after.contains(&before[1]), "the old place is still there");
        assert!(!revoked.is_finished() && !patient.is_finished());

        holder.unlock().await.unwrap();
        let holder = patient.await.unwrap();
        assert!(!revoked.is_finished(), "it won with a place that is gone");
        let token = holder.token();
        holder.unlock().await.unwrap();
        let last = revoked.await.unwrap();
        assert!(last.token() > token);
        last.unlock().await.unwrap();
        for session in [first, second, third] {
            session.close().await.unwrap();
        }
    })
    .await;
}
