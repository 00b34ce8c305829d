//! Fair and exclusive: holders follow each other in the order of their keys, one at a time, with growing tokens.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use etcd_recipes::{Mutex, MutexGuard, Session};
use tokio::task::JoinHandle;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::etcd;
use crate::support::faults::{Fault, Faults, Until};
use crate::support::foreign::Foreign;
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, create_revision, session, waits};

const ACQUISITIONS: usize = 10_000;
const SESSIONS: usize = 8;
const TASKS_PER_SESSION: usize = 4;

/// What all holders write while they hold the lock.
#[derive(Default)]
struct Ledger {
    held: AtomicBool,
    taken: AtomicUsize,
    holds: StdMutex<Vec<Hold>>,
}

struct Hold {
    created: i64,
    token: i64,
}

impl Ledger {
    /// A section that proves by itself that nobody else is in it.
    async fn section(&self, guard: &MutexGuard) {
        assert!(!self.held.swap(true, Ordering::SeqCst), "two hold the lock");
        let hold = Hold { created: create_revision(guard.compare()), token: guard.token() };
        assert!(hold.token >= hold.created);
        self.holds.lock().unwrap().push(hold);
        tokio::task::yield_now().await;
        assert!(self.held.swap(false, Ordering::SeqCst), "two held the lock");
    }

    /// Fails unless the holds came in the order of their keys, with tokens that grow.
    fn check(&self) -> usize {
        let holds = self.holds.lock().unwrap();
        for pair in holds.windows(2) {
            assert!(pair[0].created < pair[1].created, "a later key was served first");
            assert!(pair[0].token < pair[1].token, "a token did not grow");
        }
        holds.len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_acquisitions_follow_the_order_of_their_keys() {
    scoped(async |scope| {
        let ledger = Arc::new(Ledger::default());
        let (mut sessions, mut tasks) = (Vec::new(), Vec::new());
        for _ in 0..SESSIONS {
            let session = session(scope).await;
            for _ in 0..TASKS_PER_SESSION {
                let mutex = Mutex::new(&session, scope.name()).unwrap();
                let ledger = ledger.clone();
                tasks.push(tokio::spawn(async move {
                    while ledger.taken.fetch_add(1, Ordering::SeqCst) < ACQUISITIONS {
                        let guard = mutex.lock().await.unwrap();
                        ledger.section(&guard).await;
                        guard.unlock().await.unwrap();
                    }
                }));
            }
            sessions.push(session);
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(ledger.check(), ACQUISITIONS);
        for session in sessions {
            session.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_on_one_session_exclude_each_other() {
    const ROUNDS: usize = 200;
    scoped(async |scope| {
        let session = session(scope).await;
        let ledger = Arc::new(Ledger::default());
        let task = || {
            // Two values of one name as well as clones of one.
            let mutex = Mutex::new(&session, scope.name()).unwrap();
            let ledger = ledger.clone();
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    let guard = mutex.lock().await.unwrap();
                    ledger.section(&guard).await;
                    // Both ways of giving back.
                    if round % 2 == 0 {
                        guard.unlock().await.unwrap();
                    }
                }
            })
        };
        let tasks = [task(), task()];
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(ledger.check(), 2 * ROUNDS);
        session.close().await.unwrap();
    })
    .await;
}

/// Writes that have nothing to do with the lock, so that revisions of reads and of keys differ.
async fn unrelated_writes(scope: &Scope) {
    for _ in 0..3 {
        scope.client().put("unrelated", "", None).await.unwrap();
    }
}

/// Waits until this many keys stand in the line.
async fn in_line(scope: &Scope, count: usize) {
    eventually(PATIENCE, &format!("{count} in line"), async || scope.keys().await.len() == count).await;
}

/// A waiter in a task, entered as number `count` of the line.
async fn enter(scope: &Scope, mutex: &Mutex, count: usize) -> JoinHandle<MutexGuard> {
    let mutex = mutex.clone();
    let waiter = tokio::spawn(async move { mutex.lock().await.unwrap() });
    in_line(scope, count).await;
    waiter
}

/// The fencing tokens in the order of the holds, each with the way it was got.
#[derive(Default)]
struct Tokens(Vec<(&'static str, i64)>);

impl Tokens {
    /// Takes the token of a hold and ends it.
    async fn of(&mut self, scope: &Scope, way: &'static str, guard: MutexGuard) {
        self.0.push((way, guard.token()));
        unrelated_writes(scope).await;
        guard.unlock().await.unwrap();
    }

    /// The same for a waiter whose turn it is.
    async fn of_waiter(&mut self, scope: &Scope, way: &'static str, waiter: JoinHandle<MutexGuard>) {
        let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
        self.of(scope, way, guard).await;
    }

    async fn of_foreign(&mut self, scope: &Scope, way: &'static str, mut foreign: Foreign) {
        self.0.push((way, foreign.token().await));
        unrelated_writes(scope).await;
        foreign.leave().await;
    }
}

#[tokio::test]
async fn tokens_grow_over_holders_of_every_path() {
    const ROUNDS: usize = 5;
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let faults = Faults::new(scope.endpoint());
        let f = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let [a_lock, b_lock, f_lock] = [&a, &b, &f].map(|session| Mutex::new(session, scope.name()).unwrap());
        let lose_answer = || faults.on("Txn").containing(scope.name()).inject(Fault::LoseAnswer);
        let mut tokens = Tokens::default();
        for _ in 0..ROUNDS {
            let guard = a_lock.lock().await.unwrap();
            // All stand in line before the first leaves, so that their keys are older than what happens then.
            let watching = enter(scope, &b_lock, 2).await;
            let behind_own = enter(scope, &b_lock, 3).await;
            let foreign = Foreign::lock(etcd(), scope.name());
            in_line(scope, 4).await;
            let behind_foreign = enter(scope, &a_lock, 5).await;
            let lost = lose_answer();
            let resent = enter(scope, &f_lock, 6).await;
            assert_eq!(lost.hits(), 1);

            tokens.of(scope, "uncontended", guard).await;
            tokens.of_waiter(scope, "woken by the watch", watching).await;
            tokens.of_waiter(scope, "handed over in the session", behind_own).await;
            tokens.of_foreign(scope, "foreign", foreign).await;
            tokens.of_waiter(scope, "woken by a foreign release", behind_foreign).await;
            tokens.of_waiter(scope, "resent, in line", resent).await;

            let lost = lose_answer();
            tokens.of(scope, "resent, uncontended", f_lock.lock().await.unwrap()).await;
            assert_eq!(lost.hits(), 1);
            tokens.of(scope, "tried", a_lock.try_lock().await.unwrap().unwrap()).await;
            let lost = lose_answer();
            tokens.of(scope, "tried, resent", f_lock.try_lock().await.unwrap().unwrap()).await;
            assert_eq!(lost.hits(), 1);
        }
        for pair in tokens.0.windows(2) {
            assert!(pair[0].1 < pair[1].1, "{:?} then {:?}", pair[0], pair[1]);
        }
        assert_eq!(tokens.0.len(), 9 * ROUNDS);
        for session in [a, b, f] {
            session.close().await.unwrap();
        }
        scope.client().delete("unrelated", None).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_waiter_is_not_passed_by_who_comes_later() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [a_lock, b_lock] = [&a, &b].map(|session| Mutex::new(session, scope.name()).unwrap());
        let guard = a_lock.lock().await.unwrap();
        let mut first = Box::pin(b_lock.lock());
        tokio::select! {
            _ = &mut first => panic!("it did not wait"),
            () = in_line(scope, 2) => {}
        }
        // Later, and on the session that holds the lock now.
        let mut second = Box::pin(a_lock.lock());
        tokio::select! {
            _ = &mut second => panic!("it did not wait"),
            () = in_line(scope, 3) => {}
        }
        guard.unlock().await.unwrap();
        let guard = first.await.unwrap();
        assert!(waits(Duration::from_millis(200), &mut second).await);
        guard.unlock().await.unwrap();
        second.await.unwrap().unlock().await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

/// As in a `select` that went on with something else.
#[tokio::test]
async fn an_unlock_that_is_not_polled_any_more_hands_over() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let guard = mutex.lock().await.unwrap();
        let next = enter(scope, &mutex, 2).await;
        let held = faults.on("Txn").containing(scope.name()).inject(Fault::Hold(Until::Released));
        let mut unlock = Box::pin(guard.unlock());
        assert!(futures::poll!(&mut unlock).is_pending());
        held.hit(1).await;
        // It enters while the release is on its way.
        let last = tokio::spawn({
            let mutex = mutex.clone();
            async move { mutex.lock().await.unwrap() }
        });
        in_line(scope, 3).await;
        held.release();
        let next = tokio::time::timeout(PATIENCE, next).await.expect("it was not handed over").unwrap();
        next.unlock().await.unwrap();
        last.await.unwrap().unlock().await.unwrap();
        unlock.await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// As a rule: else each hand-over in a busy session would wait until etcd has committed that the last holder stands in
/// line again.
#[tokio::test]
async fn who_has_the_lock_handed_over_sends_before_who_gave_it() {
    const ROUNDS: usize = 10;
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let mut first = 0;
        for _ in 0..ROUNDS {
            let guard = mutex.lock().await.unwrap();
            let next = mutex.clone();
            let next = tokio::spawn(async move { next.lock().await.unwrap().unlock().await.unwrap() });
            in_line(scope, 2).await;
            let key = scope.keys().await.remove(1);
            // Which of the transactions from here on are about the next holder's key. After it was deleted, the key may be
            // that of the one who enters.
            let sent = Arc::new(StdMutex::new(Vec::new()));
            let log = sent.clone();
            let about = move |message: &[u8]| message.windows(key.len()).any(|part| part == key.as_bytes());
            let record = move |message: &[u8]| {
                log.lock().unwrap().push(about(message));
                false
            };
            let _never = faults.on("Txn").when(record).always().inject(Fault::LoseAnswer);
            guard.unlock().await.unwrap();
            let again = mutex.lock().await.unwrap();
            next.await.unwrap();
            faults.clear();
            first += usize::from(sent.lock().unwrap()[..2] == [false, true]);
            again.unlock().await.unwrap();
        }
        // The key of the next can be seen before the session knows that it stands in line: then nothing is handed over.
        assert!(first > ROUNDS / 2, "only {first} of {ROUNDS} sent first");
        session.close().await.unwrap();
    })
    .await;
}
