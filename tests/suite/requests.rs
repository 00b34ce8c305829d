//! What a lock costs etcd: requests of its own, and how many processes hear of its release.

use std::time::Duration;

use etcd_recipes::{Mutex, Session};

use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::faults::Faults;
use crate::support::needs::{Needs, lacking};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, session};

/// A lease that has no keepalive to confirm as long as a test takes.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A session whose requests are counted.
async fn counted(scope: &Scope) -> (Faults, Session) {
    let faults = Faults::new(scope.endpoint());
    let client = faults.client().await;
    let session = connect(scope, Session::builder_with_client(client).ttl(DAY)).await;
    (faults, session)
}

/// How long a lock is held.
const MOMENT: Duration = Duration::from_millis(5);

/// The transactions and the reads so far.
fn requests(faults: &Faults) -> (usize, usize) {
    (faults.calls("Txn"), faults.calls("Range"))
}

#[tokio::test]
async fn a_free_lock_is_one_request_to_take_and_one_to_release() {
    const TIMES: usize = 100;
    scoped(async |scope| {
        let (faults, session) = counted(scope).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        for _ in 0..TIMES {
            let (txns, reads) = requests(&faults);
            let guard = mutex.lock().await.unwrap();
            assert_eq!(requests(&faults), (txns + 1, reads), "lock");
            guard.unlock().await.unwrap();
            assert_eq!(requests(&faults), (txns + 2, reads), "unlock");
            let guard = mutex.try_lock().await.unwrap().expect("free");
            assert_eq!(requests(&faults), (txns + 3, reads), "try_lock");
            assert!(mutex.try_lock().await.unwrap().is_none());
            assert_eq!(requests(&faults), (txns + 4, reads), "try_lock of one that is taken");
            guard.unlock().await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

/// Between the release and the return of the next `lock` there is one deletion and what the watch tells.
#[tokio::test]
async fn a_hand_over_takes_no_read() {
    const ROUNDS: usize = 20;
    // Of its own: what others write would make a new watch look once more before it is relied on.
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let ((from, a), (to, b)) = (counted(scope).await, counted(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| Mutex::new(session, scope.name()).unwrap());
        let mut exact = 0;
        for _ in 0..ROUNDS {
            let guard = ours.lock().await.unwrap();
            let next = theirs.clone();
            let told = to.messages_received("Watch");
            let waiter = tokio::spawn(async move { next.lock().await.unwrap() });
            eventually(PATIENCE, "it waits", async || scope.keys().await.len() == 2).await;
            if told == 0 {
                let watches = async || to.messages_received("Watch") > told;
                eventually(PATIENCE, "it watches", watches).await;
            }
            let (before, waited) = (requests(&from), requests(&to));
            let told = to.messages_received("Watch");
            guard.unlock().await.unwrap();
            let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
            let requests = requests(&from) == (before.0 + 1, before.1) && requests(&to) == waited;
            exact += usize::from(requests && to.messages_received("Watch") == told + 1);
            guard.unlock().await.unwrap();
        }
        // The watch stays for a second from one to the next. A machine that stands still for as long has it made anew.
        assert!(exact > ROUNDS / 2, "only {exact} of {ROUNDS} without a read");
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

/// How many unary requests `count` contenders make for each time that one of them has the lock, for a moment.
async fn requests_each(count: usize, times: usize) -> f64 {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let mut sessions = Vec::new();
        for _ in 0..count {
            sessions.push(connect(scope, Session::builder([scope.endpoint()]).ttl(DAY)).await);
        }
        let contend = async |times: usize| {
            let contenders = sessions.iter().map(|session| {
                let mutex = Mutex::new(session, scope.name()).unwrap();
                tokio::spawn(async move {
                    for _ in 0..times {
                        let guard = mutex.lock().await.unwrap();
                        tokio::time::sleep(MOMENT).await;
                        guard.unlock().await.unwrap();
                    }
                })
            });
            for contender in contenders.collect::<Vec<_>>() {
                contender.await.unwrap();
            }
        };
        let unary = async || {
            let metrics = server.metrics().await;
            ["Txn", "Range", "DeleteRange", "Put"].map(|method| metrics.calls(method)).iter().sum::<u64>()
        };
        // Until it is known that the line is worth following.
        contend(2).await;
        let before = unary().await;
        contend(times).await;
        let requests = unary().await - before;
        for session in sessions {
            session.close().await.unwrap();
        }
        #[allow(clippy::cast_precision_loss)]
        let each = requests as f64 / (count * times) as f64;
        each
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_contended_again_and_again_is_little_more_than_two_requests() {
    if lacking(Needs::Metrics) {
        return;
    }
    let (two, eight) = (requests_each(2, 400).await, requests_each(8, 100).await);
    assert!(two <= 2.2 && eight <= 2.2, "{two} with 2 contenders, {eight} with 8");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_contended_lock_is_four_requests_at_most() {
    if lacking(Needs::Metrics) {
        return;
    }
    let many = requests_each(64, 8).await;
    assert!(many <= 4.0, "{many} with 64 contenders");
}

/// Who was in a short line follows it for a moment, in case of coming back. There may be many of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_hear_of_a_release_where_many_come_and_go() {
    const MANY: usize = 40;
    const ROUNDS: usize = 3;
    if lacking(Needs::Metrics) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let mut sessions = Vec::new();
        for _ in 0..MANY {
            sessions.push(session(scope).await);
        }
        let mutexes: Vec<_> =
            sessions.iter().map(|session| Mutex::new(session, scope.name()).unwrap()).collect();
        // One after the other, each waiting for the one before.
        let round = async || {
            let mut guard = mutexes[MANY - 1].lock().await.unwrap();
            for mutex in &mutexes {
                let next = mutex.clone();
                let waiter = tokio::spawn(async move { next.lock().await.unwrap() });
                eventually(PATIENCE, "it waits", async || scope.keys().await.len() == 2).await;
                guard.unlock().await.unwrap();
                guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
            }
            guard.unlock().await.unwrap();
        };
        round().await;
        let told = async || server.metrics().await.messages_sent("Watch");
        let before = told().await;
        for _ in 0..ROUNDS {
            round().await;
        }
        let each = (told().await - before) / (ROUNDS * (MANY + 1)) as u64;
        assert!(each <= 16, "{each} messages for each release");
        for session in sessions {
            session.close().await.unwrap();
        }
    })
    .await;
}
