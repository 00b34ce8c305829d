//! Tokens that are refused: another is taken and nobody notices, as long as the password is right.

use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions};
use etcd_recipes::{Error, Mutex, Result, Session, SessionState};
use tonic::Status;

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::faults::{Fault, Faults};
use crate::support::holds::States;
use crate::support::needs::{Needs, lacking};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, generation};
use crate::support::users::Guarded;

/// What etcd says of a signed token after a change of users or permissions. The client asks for no other by itself.
fn refused() -> Status {
    Status::invalid_argument("etcdserver: revision of auth store is old")
}

/// Runs a test on a server where alice may do what it needs.
async fn as_alice(body: impl AsyncFnOnce(&Scope, Client)) {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[scope.name(), "_etcd-recipes/"]).await;
        guarded.on().await;
        body(scope, guarded.root().await).await;
        guarded.off().await;
    })
    .await;
}

/// A session of alice whose requests meet faults.
async fn through(scope: &Scope, faults: &Faults) -> Session {
    let client = faults.client_with(ConnectOptions::new().with_user("alice", "pw")).await;
    connect(scope, Session::builder_with_client(client).ttl(Duration::from_secs(6))).await
}

/// Waits for an answer to a keepalive, the `count`th of its session. The opening of each stream has one more.
async fn renewed(faults: &Faults, count: usize) {
    let answers = async || faults.messages_received("LeaseKeepAlive") >= count;
    eventually(PATIENCE, "it is renewed", answers).await;
}

/// Whether the lease is renewed as if nothing had been.
fn unnoticed(states: &States) -> bool {
    states.never_lost();
    states.seen().len() == 1
}

/// Runs the same three times at once. A machine that stands still for half a second suspends a session as well.
async fn once_of_three(what: impl AsyncFn() -> bool) {
    let unnoticed = futures::join!(what(), what(), what());
    assert!(unnoticed.0 || unnoticed.1 || unnoticed.2, "all were suspended");
}

/// A newer etcd looks at the token of each renewal, and the next change of permissions may void the new one as well.
#[tokio::test]
async fn a_keepalive_stream_that_is_refused_is_opened_again_at_once() {
    as_alice(async |scope, _| {
        once_of_three(async || {
            let faults = Faults::new(scope.endpoint());
            faults.next("LeaseKeepAlive", Fault::FailWith(refused()));
            let session = through(scope, &faults).await;
            let states = States::of(&session);
            renewed(&faults, 2).await;
            let unnoticed = unnoticed(&states) && faults.calls("LeaseKeepAlive") == 2;
            session.close().await.unwrap();
            unnoticed
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_keepalive_that_was_sent_when_its_stream_was_refused_is_sent_again_at_once() {
    as_alice(async |scope, _| {
        once_of_three(async || {
            let faults = Faults::new(scope.endpoint());
            let session = through(scope, &faults).await;
            let states = States::of(&session);
            renewed(&faults, 2).await;
            let logins = faults.calls("Authenticate");
            faults.swallow_answers("LeaseKeepAlive", 1);
            renewed(&faults, 3).await;
            faults.end_streams("LeaseKeepAlive", refused());
            renewed(&faults, 5).await;
            let unnoticed = unnoticed(&states) && faults.calls("LeaseKeepAlive") == 2;
            assert_eq!(
                faults.calls("Authenticate"),
                logins + 1,
                "it goes on with the token that was refused"
            );
            session.close().await.unwrap();
            unnoticed
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_watch_stream_that_is_refused_goes_on_with_another_token() {
    as_alice(async |scope, _| {
        let faults = Faults::new(scope.endpoint());
        let holder = connect(scope, Session::builder([scope.endpoint()]).user("alice", "pw")).await;
        let waiter = through(scope, &faults).await;
        let [first, second] = [&holder, &waiter].map(|session| Mutex::new(session, scope.name()).unwrap());
        let guard = first.lock().await.unwrap();

        // When it is opened, and when it is open.
        faults.next("Watch", Fault::FailWith(refused()));
        let logins = faults.calls("Authenticate");
        let mut waiting = tokio::spawn(async move { second.lock().await });
        let told = async || faults.messages_received("Watch") > 0;
        eventually(PATIENCE, "the watch is there", told).await;
        assert_eq!(faults.calls("Authenticate"), logins + 1);
        let received = faults.messages_received("Watch");
        faults.end_streams("Watch", refused());
        let told = async || faults.messages_received("Watch") > received;
        eventually(PATIENCE, "the watch is there again", told).await;
        assert_eq!(faults.calls("Authenticate"), logins + 2);

        guard.unlock().await.unwrap();
        let guard = tokio::time::timeout(PATIENCE, &mut waiting).await.expect("its turn").unwrap().unwrap();
        guard.unlock().await.unwrap();
        holder.close().await.unwrap();
        waiter.close().await.unwrap();
    })
    .await;
}

/// Whoever asks is told, and nobody logs in again and again as fast as it can.
#[tokio::test]
async fn a_password_that_was_changed_is_told() {
    as_alice(async |scope, mut root| {
        let faults = Faults::new(scope.endpoint());
        let own = Session::builder([scope.endpoint()]).user("alice", "pw").ttl(Duration::from_secs(6));
        let sessions = [through(scope, &faults).await, connect(scope, own).await];
        let mut guards = Vec::new();
        for (session, name) in sessions.iter().zip(["one", "other"]) {
            guards.push(Mutex::new(session, scope.key(name)).unwrap().lock().await.unwrap());
        }
        let (begin, logins) = (Instant::now(), faults.calls("Authenticate"));
        // This makes every token of the user void.
        root.user_change_password("alice", "new").await.unwrap();
        let all = sessions.iter().zip(guards).map(async |(session, guard)| {
            let mutex = Mutex::new(session, scope.key("lock")).unwrap();
            let calls = (0..10).map(|_| told(mutex.try_lock()));
            futures::join!(futures::future::join_all(calls), told(guard.unlock()), told(mutex.lock()));
            let mut lost = session.watch_state();
            let lost = lost.wait_for(|state| matches!(state, SessionState::Lost { .. }));
            tokio::time::timeout(PATIENCE, lost).await.expect("its lease is renewed").unwrap();
        });
        futures::future::join_all(all).await;
        let (logins, time) = (faults.calls("Authenticate") - logins, begin.elapsed());
        // One a second for keepalives, and one for all else.
        assert!(logins as u64 <= 2 * (time.as_secs() + 2), "{logins} logins in {time:?}");

        root.user_change_password("alice", "pw").await.unwrap();
        for session in sessions {
            generation(scope, &session, 2).await;
            let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
            mutex.lock().await.unwrap().unlock().await.unwrap();
            session.close().await.unwrap();
        }
    })
    .await;
}

/// As in a `select` that went on with something else.
#[tokio::test]
async fn a_call_that_is_not_polled_any_more_keeps_nobody_from_a_token() {
    as_alice(async |scope, _| {
        let faults = Faults::new(scope.endpoint());
        let session = through(scope, &faults).await;
        let [first, second] = ["first", "second"].map(|name| Mutex::new(&session, scope.key(name)).unwrap());
        let arm = |name: &str| faults.on("Txn").containing(scope.key(name));
        let stuck = arm("first").always().inject(Fault::FailWith(refused()));
        let mut call = Box::pin(first.lock());
        // It logs in and is refused again; then the next login is not to be made for a second.
        let waits = async {
            stuck.hit(3).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        };
        tokio::select! {
            _ = &mut call => panic!("nothing was refused"),
            () = waits => {}
        }
        arm("second").inject(Fault::FailWith(refused()));
        let guard = tokio::time::timeout(PATIENCE, second.lock()).await.expect("it waits for the other");
        guard.unwrap().unlock().await.unwrap();
        faults.clear();
        drop(call);
        session.close().await.unwrap();
    })
    .await;
}

/// Waits for a call that fails because of the password.
async fn told<T: std::fmt::Debug>(call: impl Future<Output = Result<T>>) {
    let result = tokio::time::timeout(PATIENCE, call).await.expect("nobody is told");
    assert!(matches!(result, Err(Error::AuthFailed { .. })), "{result:?}");
}
