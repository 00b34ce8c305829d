//! Foreign keys that are deleted and created again under their old names, as etcd's Go package does it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_recipes::etcd_client::PutOptions;
use etcd_recipes::{Mutex, MutexGuard, Session};
use tokio::task::JoinHandle;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::Faults;
use crate::support::rounds;
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, session};

const SHORT: Duration = Duration::from_millis(200);

/// Keys of another program, on a lease of its own.
struct Other<'a> {
    scope: &'a Scope,
    lease: i64,
}

impl<'a> Other<'a> {
    async fn new(scope: &'a Scope) -> Self {
        // Nobody renews it, and many rounds take their time.
        let lease = scope.client().lease_grant(3600, None).await.unwrap().id();
        scope.owns_lease(lease);
        Self { scope, lease }
    }

    async fn put(&self, name: &str) {
        let options = PutOptions::new().with_lease(self.lease);
        self.scope.client().put(self.scope.key(name), "", Some(options)).await.unwrap();
    }

    async fn delete(&self, name: &str) {
        self.scope.client().delete(self.scope.key(name), None).await.unwrap();
    }

    async fn recreate(&self, name: &str) {
        self.delete(name).await;
        self.put(name).await;
    }

    async fn end(self) {
        self.scope.client().lease_revoke(self.lease).await.unwrap();
    }
}

fn lock(session: &Session, scope: &Scope) -> JoinHandle<MutexGuard> {
    let mutex = Mutex::new(session, scope.name()).unwrap();
    tokio::spawn(async move { mutex.lock().await.unwrap() })
}

async fn in_line(scope: &Scope, count: usize) {
    eventually(PATIENCE, &format!("{count} in line"), async || scope.keys().await.len() == count).await;
}

async fn taken(waiter: JoinHandle<MutexGuard>) -> MutexGuard {
    tokio::time::timeout(PATIENCE, waiter).await.expect("it waits for a key that comes later").unwrap()
}

/// Whether it still waits after a moment in which it could have gone on.
async fn still_waits(waiter: &JoinHandle<MutexGuard>) -> bool {
    tokio::time::sleep(SHORT).await;
    !waiter.is_finished()
}

/// A session whose watch answers can be held back, and whose requests go their way meanwhile.
async fn delayed(scope: &Scope) -> (Faults, Session) {
    let faults = Faults::new(scope.endpoint());
    let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
    (faults, session)
}

#[tokio::test]
async fn a_key_that_was_created_again_stands_behind_us() {
    scoped(async |scope| {
        let (session, other) = (session(scope).await, Other::new(scope).await);
        other.put("k").await;
        let waiter = lock(&session, scope);
        in_line(scope, 2).await;
        other.recreate("k").await;
        let guard = taken(waiter).await;
        assert_eq!(scope.keys().await[0].as_bytes(), guard.key());
        // And we stand behind it again.
        let waiter = lock(&session, scope);
        in_line(scope, 3).await;
        guard.unlock().await.unwrap();
        assert!(still_waits(&waiter).await);
        other.recreate("k").await;
        taken(waiter).await.unlock().await.unwrap();
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_key_created_again_does_not_stand_for_another_that_is_still_ahead() {
    scoped(async |scope| {
        let (session, other) = (session(scope).await, Other::new(scope).await);
        other.put("k").await;
        other.put("x").await;
        let waiter = lock(&session, scope);
        in_line(scope, 3).await;
        other.recreate("k").await;
        other.recreate("k").await;
        assert!(still_waits(&waiter).await);
        other.recreate("x").await;
        taken(waiter).await.unlock().await.unwrap();
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_deletion_that_is_told_late_does_not_count_for_the_key_created_since() {
    scoped(async |scope| {
        let (faults, session) = delayed(scope).await;
        let other = Other::new(scope).await;
        // The first hold comes by the watch, which goes on while it lasts.
        other.put("k").await;
        let waiter = lock(&session, scope);
        in_line(scope, 2).await;
        other.recreate("k").await;
        let guard = taken(waiter).await;

        // From here on deletions are told late.
        let heard = faults.messages_received("Watch");
        faults.hold_answers("Watch", true);
        other.recreate("k").await;
        let waiter = lock(&session, scope);
        in_line(scope, 3).await;
        guard.unlock().await.unwrap();
        assert!(still_waits(&waiter).await);
        // Now the old deletion is told, and the key is there: the new one.
        faults.hold_answers("Watch", false);
        eventually(PATIENCE, "it is told", async || faults.messages_received("Watch") > heard + 1).await;
        assert!(still_waits(&waiter).await);
        other.delete("k").await;
        taken(waiter).await.unlock().await.unwrap();
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

/// The keys of a session are created again under their old names, too.
#[tokio::test]
async fn a_deletion_of_the_hold_before_that_is_told_late_does_not_end_the_next_one() {
    scoped(async |scope| {
        let (faults, session) = delayed(scope).await;
        let other = Other::new(scope).await;
        // The first hold comes by the watch, which the second finds still there.
        other.put("k").await;
        let waiter = lock(&session, scope);
        in_line(scope, 2).await;
        other.delete("k").await;
        let first = taken(waiter).await;
        let (name, heard) = (first.key().to_vec(), faults.messages_received("Watch"));
        faults.hold_answers("Watch", true);
        first.unlock().await.unwrap();
        let second = taken(lock(&session, scope)).await;
        assert_eq!(second.key(), name, "it has another name");
        faults.hold_answers("Watch", false);
        eventually(PATIENCE, "it is told", async || faults.messages_received("Watch") > heard).await;
        assert!(tokio::time::timeout(SHORT, second.lost()).await.is_err(), "it was the deletion before");
        second.unlock().await.unwrap();
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_key_created_again_before_the_watch_is_confirmed_stands_behind_us() {
    scoped(async |scope| {
        let (faults, session) = delayed(scope).await;
        let other = Other::new(scope).await;
        for round in 0..10 {
            // A lock of its own each time, so that its watch is new.
            let (lock, key) = (format!("lock-{round}"), format!("lock-{round}/k"));
            let mutex = Mutex::new(&session, scope.key(&lock)).unwrap();
            other.put(&key).await;
            let (begun, before) = (faults.messages_sent("Watch"), scope.keys().await.len());
            faults.hold_answers("Watch", true);
            let waiter = tokio::spawn(async move { mutex.lock().await.unwrap() });
            in_line(scope, before + 1).await;
            // Before it is asked for, after, or at the same time.
            if round % 2 == 0 {
                eventually(PATIENCE, "it watches", async || faults.messages_sent("Watch") > begun).await;
            }
            other.recreate(&key).await;
            other.recreate(&key).await;
            faults.hold_answers("Watch", false);
            taken(waiter).await.unlock().await.unwrap();
            assert_eq!(scope.keys().await.len(), before);
        }
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_key_watched_from_afar_may_be_created_again_as_well() {
    const AHEAD: usize = 12;
    scoped(async |scope| {
        let (session, other) = (session(scope).await, Other::new(scope).await);
        for number in 0..AHEAD {
            other.put(&format!("k{number}")).await;
        }
        let waiter = lock(&session, scope);
        in_line(scope, AHEAD + 1).await;
        // All of them, those in front last.
        for number in (1..AHEAD).rev() {
            other.recreate(&format!("k{number}")).await;
        }
        assert!(still_waits(&waiter).await);
        other.recreate("k0").await;
        let guard = taken(waiter).await;
        assert_eq!(scope.keys().await[0].as_bytes(), guard.key());
        guard.unlock().await.unwrap();
        other.end().await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_foreign_keys_do_and_however_late_it_is_told_a_holder_is_first_in_line() {
    let rounds = rounds(300, 3000);
    scoped(async |scope| {
        let other = Other::new(scope).await;
        let (inside, done) = (AtomicBool::new(false), Arc::new(AtomicUsize::new(0)));
        let sessions = [delayed(scope).await, delayed(scope).await];
        let foreign = async {
            let mut there = [false; 3];
            while done.load(Ordering::SeqCst) < rounds {
                let number = fastrand::usize(..there.len());
                let name = format!("k{number}");
                match (there[number], fastrand::bool()) {
                    (true, true) => other.recreate(&name).await,
                    (true, false) => other.delete(&name).await,
                    (false, _) => other.put(&name).await,
                }
                there[number] = !there[number] || scope.keys().await.contains(&scope.key(&name));
                tokio::time::sleep(Duration::from_micros(fastrand::u64(..3000))).await;
            }
        };
        let delays = async {
            while done.load(Ordering::SeqCst) < rounds {
                for (faults, _) in &sessions {
                    faults.hold_answers("Watch", fastrand::bool());
                }
                tokio::time::sleep(Duration::from_millis(fastrand::u64(..8))).await;
            }
            sessions.iter().for_each(|(faults, _)| faults.hold_answers("Watch", false));
        };
        let ours = async |session: &Session| {
            let mutex = Mutex::new(session, scope.name()).unwrap();
            let mut last = 0;
            while done.fetch_add(1, Ordering::SeqCst) < rounds {
                let guard = mutex.lock().await.unwrap();
                assert!(!inside.swap(true, Ordering::SeqCst), "two hold the lock");
                assert!(guard.token() > last);
                last = guard.token();
                assert_eq!(scope.keys().await[0].as_bytes(), guard.key(), "it was not its turn");
                inside.store(false, Ordering::SeqCst);
                guard.unlock().await.unwrap();
            }
        };
        // When all rounds are begun the foreign keys must not be in the way of the last ones.
        let foreign = async {
            foreign.await;
            scope.client().lease_revoke(other.lease).await.unwrap();
        };
        let [(_, a), (_, b)] = &sessions;
        tokio::join!(foreign, delays, ours(a), ours(a), ours(b), ours(b));
        for (_, session) in &sessions {
            session.close().await.unwrap();
        }
    })
    .await;
}
