//! Streams whose token is refused: they take another, and nobody notices.

use std::time::Duration;

use etcd_recipes::etcd_client::ConnectOptions;
use etcd_recipes::{Mutex, Session};
use tonic::Status;

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::faults::{Fault, Faults};
use crate::support::holds::States;
use crate::support::needs::{Needs, lacking};
use crate::support::server::PATIENCE;
use crate::support::sessions::connect;
use crate::support::users::Guarded;

/// What etcd says of a signed token after a change of users or permissions. The client asks for no other by itself.
fn refused() -> Status {
    Status::invalid_argument("etcdserver: revision of auth store is old")
}

/// Runs a test on a server where alice may do what it needs.
async fn as_alice(body: impl AsyncFnOnce(&Scope)) {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[scope.name(), "_etcd-recipes/"]).await;
        guarded.on().await;
        body(scope).await;
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
    as_alice(async |scope| {
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
    as_alice(async |scope| {
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
    as_alice(async |scope| {
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
        assert_eq!((faults.calls("Watch"), faults.calls("Authenticate")), (2, logins + 1));
        let received = faults.messages_received("Watch");
        faults.end_streams("Watch", refused());
        let told = async || faults.messages_received("Watch") > received;
        eventually(PATIENCE, "the watch is there again", told).await;
        assert_eq!((faults.calls("Watch"), faults.calls("Authenticate")), (3, logins + 2));

        guard.unlock().await.unwrap();
        let guard = tokio::time::timeout(PATIENCE, &mut waiting).await.expect("its turn").unwrap().unwrap();
        guard.unlock().await.unwrap();
        holder.close().await.unwrap();
        waiter.close().await.unwrap();
    })
    .await;
}
