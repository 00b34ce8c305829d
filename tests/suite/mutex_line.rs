//! Long lines, lines with gaps, and lines that somebody else writes into.

use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use etcd_recipes::etcd_client::{PutOptions, Txn, TxnOp};
use etcd_recipes::{Mutex, MutexGuard, Session};
use tokio::task::JoinHandle;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{session, waits};

/// More than a waiter looks ahead (8), several times over.
const LONG: usize = 40;
const SHORT: Duration = Duration::from_millis(200);

/// Waiters behind a holder, each known by its number.
struct Crowd<'a> {
    scope: &'a Scope,
    sessions: Vec<Session>,
    head: MutexGuard,
    waiters: Vec<JoinHandle<()>>,
    served: Arc<StdMutex<Vec<usize>>>,
}

impl<'a> Crowd<'a> {
    /// So many waiters, spread over so many sessions in turn, entered one after the other.
    async fn gather(scope: &'a Scope, waiters: usize, sessions: usize) -> Self {
        let head_session = session(scope).await;
        let head = Mutex::new(&head_session, scope.name()).unwrap().lock().await.unwrap();
        let mut crowd =
            Self { scope, sessions: vec![head_session], head, waiters: Vec::new(), served: Arc::default() };
        for _ in 0..sessions {
            crowd.sessions.push(session(scope).await);
        }
        for number in 0..waiters {
            crowd.enter(1 + number % sessions).await;
        }
        crowd
    }

    /// One more waiter, at the end of the line.
    async fn enter(&mut self, session: usize) {
        let before = self.scope.keys().await.len();
        let mutex = Mutex::new(&self.sessions[session], self.scope.name()).unwrap();
        let (number, served) = (self.waiters.len(), self.served.clone());
        self.waiters.push(tokio::spawn(async move {
            let guard = mutex.lock().await.unwrap();
            served.lock().unwrap().push(number);
            guard.unlock().await.unwrap();
        }));
        self.has(before + 1).await;
    }

    /// Waits until so many keys are in the line.
    async fn has(&self, keys: usize) {
        let what = format!("{keys} keys in line");
        eventually(PATIENCE, &what, async || self.scope.keys().await.len() == keys).await;
    }

    /// A waiter gives up; returns when its key is gone.
    async fn gives_up(&self, number: usize) {
        let keys = self.scope.keys().await.len();
        self.waiters[number].abort();
        self.has(keys - 1).await;
    }

    /// Lets the holder go and waits until everybody was served; gives the order.
    async fn release(self) -> Vec<usize> {
        self.head.unlock().await.unwrap();
        for waiter in self.waiters {
            match tokio::time::timeout(PATIENCE, waiter).await.expect("a waiter is stuck") {
                Ok(()) => {}
                Err(error) => assert!(error.is_cancelled(), "{error}"),
            }
        }
        for session in self.sessions {
            session.close().await.unwrap();
        }
        std::mem::take(&mut *self.served.lock().unwrap())
    }
}

async fn delete(scope: &Scope, key: impl Into<Vec<u8>>) {
    scope.client().delete(key, None).await.unwrap();
}

#[tokio::test]
async fn a_long_line_of_sessions_is_served_in_order() {
    scoped(async |scope| {
        let crowd = Crowd::gather(scope, LONG, LONG).await;
        assert_eq!(crowd.release().await, (0..LONG).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn a_long_line_of_few_sessions_is_served_in_order() {
    scoped(async |scope| {
        let crowd = Crowd::gather(scope, LONG, 7).await;
        assert_eq!(crowd.release().await, (0..LONG).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn a_line_whose_middle_gives_up_is_served_in_order() {
    scoped(async |scope| {
        for sessions in [LONG, 7] {
            let crowd = Crowd::gather(scope, LONG, sessions).await;
            let stay = |number: &usize| number.is_multiple_of(3) || *number > 35;
            for number in (0..LONG).rev().filter(|number| !stay(number)) {
                crowd.gives_up(number).await;
            }
            assert_eq!(crowd.release().await, (0..LONG).filter(stay).collect::<Vec<_>>());
        }
    })
    .await;
}

#[tokio::test]
async fn waiters_far_back_look_again_when_the_key_they_watch_goes_first() {
    scoped(async |scope| {
        let crowd = Crowd::gather(scope, LONG, LONG).await;
        // Whoever stands at 20 watches the key at 12, and the front is not near when that is gone.
        crowd.gives_up(12).await;
        crowd.gives_up(20 - 9).await;
        crowd.gives_up(30).await;
        let rest: Vec<_> = (0..LONG).filter(|number| ![11, 12, 30].contains(number)).collect();
        assert_eq!(crowd.release().await, rest);
    })
    .await;
}

#[tokio::test]
async fn when_the_foremost_of_a_session_gives_up_the_next_takes_over() {
    scoped(async |scope| {
        let mut crowd = Crowd::gather(scope, 4, 1).await;
        crowd.gives_up(0).await;
        crowd.gives_up(2).await;
        crowd.enter(1).await;
        assert_eq!(crowd.release().await, [1, 3, 4]);
    })
    .await;
}

#[tokio::test]
async fn a_waiter_whose_key_was_deleted_takes_a_new_place_at_the_end() {
    scoped(async |scope| {
        let mut crowd = Crowd::gather(scope, 2, 2).await;
        let keys = scope.keys().await;
        delete(scope, keys[1].as_str()).await;
        // The other one was the second and is the first now, the new key comes after it.
        let other = keys[2].clone();
        eventually(PATIENCE, "a new place", async || {
            let now = scope.keys().await;
            now.len() == 3 && now[1] == other
        })
        .await;
        crowd.enter(1).await;
        assert_eq!(crowd.release().await, [1, 0, 2]);
    })
    .await;
}

#[tokio::test]
async fn a_waiter_whose_key_was_deleted_far_back_is_served_as_well() {
    scoped(async |scope| {
        let crowd = Crowd::gather(scope, LONG, LONG).await;
        let keys = scope.keys().await;
        for far in [15, 16, 39] {
            delete(scope, keys[1 + far].as_str()).await;
        }
        let mut served = crowd.release().await;
        let straight: Vec<_> = (0..LONG).filter(|number| ![15, 16, 39].contains(number)).collect();
        assert_eq!(served[..LONG - 3], straight, "who kept the place is served in order");
        served[LONG - 3..].sort_unstable();
        assert_eq!(served[LONG - 3..], [15, 16, 39]);
    })
    .await;
}

#[tokio::test]
async fn when_the_keys_of_all_waiters_of_a_session_are_deleted_all_take_new_places() {
    scoped(async |scope| {
        let mut crowd = Crowd::gather(scope, 4, 1).await;
        let keys = scope.keys().await;
        let deletes = keys[1..].iter().map(|key| TxnOp::delete(key.as_str(), None));
        scope.client().txn(Txn::new().and_then(deletes.collect::<Vec<_>>())).await.unwrap();
        crowd.has(1 + 4).await;
        crowd.sessions.push(session(scope).await);
        crowd.enter(2).await;
        let mut served = crowd.release().await;
        served.sort_unstable();
        assert_eq!(served, [0, 1, 2, 3, 4]);
    })
    .await;
}

#[tokio::test]
async fn a_key_without_a_lease_blocks_until_it_is_deleted() {
    scoped(async |scope| {
        let (key, session) = (scope.key("left-behind"), session(scope).await);
        scope.client().put(key.as_str(), "", None).await.unwrap();
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        assert!(mutex.try_lock().await.unwrap().is_none());
        assert_eq!(
            mutex.holder().await.unwrap().map(|holder| holder.lease),
            Some(0),
            "so that people see why"
        );
        let mut waiter = Box::pin(mutex.lock());
        assert!(waits(SHORT, &mut waiter).await);
        // Writing it does not end it.
        scope.client().put(key.as_str(), "again", None).await.unwrap();
        assert!(waits(SHORT, &mut waiter).await);
        delete(scope, key).await;
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("unblocked").unwrap();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn all_keys_of_one_revision_that_are_ahead_are_waited_for() {
    scoped(async |scope| {
        let lease = scope.client().lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let keys = ["b", "a", "zz"].map(|rest| scope.key(rest));
        let options = || Some(PutOptions::new().with_lease(lease));
        let puts = keys.each_ref().map(|key| TxnOp::put(key.as_str(), "", options()));
        scope.client().txn(Txn::new().and_then(puts)).await.unwrap();
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let mut waiter = Box::pin(mutex.lock());
        for key in keys {
            assert!(waits(SHORT, &mut waiter).await);
            delete(scope, key).await;
        }
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
        guard.unlock().await.unwrap();
        scope.client().lease_revoke(lease).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_foreign_key_that_comes_later_does_not_get_in_front() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        let mut waiter = Box::pin(mutex.lock());
        assert!(waits(SHORT, &mut waiter).await);
        // Its name sorts before all of ours; its revision does not.
        scope.client().put(scope.key("!"), "", None).await.unwrap();
        guard.unlock().await.unwrap();
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
        guard.unlock().await.unwrap();
        delete(scope, scope.key("!")).await;
        session.close().await.unwrap();
    })
    .await;
}
