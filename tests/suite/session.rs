//! The session: its lease, its generations, its states, and its end.

use std::time::Duration;

use etcd_recipes::{Election, Error, Mutex, Session, SessionState};

use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::faults::{Fault, Faults};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, generation, owns, reaches, session};

const TTL: Duration = Duration::from_secs(3);

/// A session that hears of its lease once a second.
async fn brisk(scope: &Scope, endpoint: &str) -> Session {
    connect(scope, Session::builder([endpoint]).ttl(TTL)).await
}

async fn revoke(scope: &Scope, session: &Session) {
    scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_session_has_a_lease_that_it_keeps_alive() {
    scoped(async |scope| {
        let session = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(2))).await;
        assert_eq!(session.state(), SessionState::Connected { generation: 1 });
        assert_eq!(session.ttl(), Duration::from_secs(2));
        assert!(session.is_alive());
        let lease = session.lease_id().unwrap();
        let mut client = scope.client();
        assert_eq!(client.lease_time_to_live(lease, None).await.unwrap().granted_ttl(), 2);
        // Longer than it would live by itself.
        let mut states = session.watch_state();
        states.borrow_and_update();
        let lost = states.wait_for(|state| !matches!(state, SessionState::Connected { generation: 1 }));
        let lost = tokio::time::timeout(Duration::from_secs(5), lost).await;
        // On a machine that stalls a keepalive may be late; the lease stays.
        assert!(lost.is_err() || session.state() == SessionState::Connected { generation: 1 });
        assert_eq!(session.lease_id(), Some(lease));
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_revoked_lease_is_lost_and_the_next_generation_follows() {
    scoped(async |scope| {
        let session = brisk(scope, scope.endpoint()).await;
        for number in 1..=3 {
            let old = session.lease_id().unwrap();
            let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
            revoke(scope, &session).await;
            reaches(&session, SessionState::Lost { generation: number }).await;
            assert!(!guard.is_held());
            let new = generation(scope, &session, number + 1).await;
            assert_ne!(old, new);
            assert!(session.is_alive());
            // What was lost stays lost.
            assert!(!guard.is_held());
            assert!(guard.unlock().await.unwrap_err().is_lost());
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_silent_etcd_suspends_the_session_and_its_voice_resumes_it() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let builder = Session::builder([proxy.endpoint()]).ttl(Duration::from_secs(20));
        let session = connect(scope, builder).await;
        let lease = session.lease_id();
        proxy.set(Mode::HoleBoth).await;
        reaches(&session, SessionState::Suspended { generation: 1 }).await;
        assert!(session.is_alive(), "overdue is not lost");
        assert_eq!(session.lease_id(), lease);
        proxy.set(Mode::Pass).await;
        reaches(&session, SessionState::Connected { generation: 1 }).await;
        assert_eq!(session.lease_id(), lease);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_session_without_etcd_is_lost_at_its_deadline_and_begins_anew_when_etcd_is_back() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let session = brisk(scope, &proxy.endpoint()).await;
        let old = session.lease_id().unwrap();
        proxy.set(Mode::HoleBoth).await;
        reaches(&session, SessionState::Lost { generation: 1 }).await;
        assert_eq!((session.is_alive(), session.lease_id()), (false, None));
        proxy.set(Mode::Pass).await;
        generation(scope, &session, 2).await;
        // The old lease may still have lived at etcd; then it was revoked before the new one was granted.
        assert!(!server.leases().await.contains(&old));
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_lost_lease_that_still_lives_is_revoked_before_the_next_is_used() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let session = connect(scope, Session::builder([proxy.endpoint()]).ttl(TTL)).await;
        let old = session.lease_id().unwrap();
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        proxy.set(Mode::HoleBoth).await;
        // Somebody else renews it, as a leader change would.
        let mut client = scope.client();
        let (mut keeper, mut answers) = client.lease_keep_alive(old).await.unwrap();
        let renewed = async {
            loop {
                keeper.keep_alive().await.unwrap();
                answers.message().await.unwrap();
                tokio::time::sleep(TTL / 6).await;
            }
        };
        tokio::select! {
            () = renewed => {}
            () = reaches(&session, SessionState::Lost { generation: 1 }) => {}
        }
        assert!(!guard.is_held() && server.leases().await.contains(&old));
        assert_eq!(scope.keys().await.len(), 1, "the key outlives the hold");
        proxy.set(Mode::Pass).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        let next = tokio::time::timeout(PATIENCE, mutex.lock()).await.expect("not in its own way").unwrap();
        owns(scope, &session);
        assert!(!server.leases().await.contains(&old));
        next.unlock().await.unwrap();
        drop(guard);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn close_leaves_nothing_and_ends_whatever_waits() {
    scoped(async |scope| {
        let (ours, theirs) = (session(scope).await, session(scope).await);
        let name = |rest| scope.key(rest);
        let held = Mutex::new(&ours, name("held")).unwrap().lock().await.unwrap();
        let leads = Election::new(&ours, name("leads")).unwrap().campaign("x").await.unwrap();
        let detached = Election::new(&ours, name("detached")).unwrap().campaign("x").await.unwrap().detach();
        let busy = Mutex::new(&theirs, name("busy")).unwrap().lock().await.unwrap();
        let (lock, run) = (Mutex::new(&ours, name("busy")).unwrap(), Mutex::new(&ours, name("run")).unwrap());
        let waiting = [
            tokio::spawn({
                let lock = lock.clone();
                async move { lock.lock().await }
            }),
            tokio::spawn({
                let lock = lock.clone();
                async move { lock.lock().await }
            }),
        ];
        let candidate = Election::new(&theirs, name("e")).unwrap().campaign("x").await.unwrap();
        let election = Election::new(&ours, name("e")).unwrap();
        let campaign = tokio::spawn({
            let election = election.clone();
            async move { election.campaign("y").await }
        });
        eventually(PATIENCE, "all are in line", async || scope.keys().await.len() == 3 + 3 + 2).await;
        let mut running = Box::pin(async {
            let guard = run.lock().await.unwrap();
            guard.run(std::future::pending::<()>()).await
        });
        assert!(crate::support::sessions::waits(Duration::from_millis(100), &mut running).await);

        let (lost, other) = (held.lost(), ours.clone());
        let (lease, closed) = (ours.lease_id().unwrap(), ours.close());
        closed.await.unwrap();
        // When it returns, everything is gone, in one stroke.
        assert_eq!(scope.keys().await.len(), 2, "those of the other session");
        assert!(scope.client().lease_time_to_live(lease, None).await.unwrap().ttl() <= 0);
        assert_eq!((other.state(), other.lease_id(), other.is_alive()), (SessionState::Closed, None, false));
        lost.await;
        assert!(!held.is_held() && !leads.is_held());
        assert!(running.await.unwrap_err().is_lost());
        for waiting in waiting {
            assert!(matches!(waiting.await.unwrap(), Err(Error::Closed)));
        }
        assert!(matches!(campaign.await.unwrap(), Err(Error::Closed)));
        // And nothing new begins.
        assert!(matches!(lock.lock().await, Err(Error::Closed)));
        assert!(matches!(lock.try_lock().await, Err(Error::Closed)));
        assert!(matches!(election.campaign("z").await, Err(Error::Closed)));
        assert!(matches!(election.resume(&detached).await, Err(Error::Closed)));
        assert!(leads.proclaim("z").await.unwrap_err().is_lost());
        assert!(held.unlock().await.unwrap_err().is_lost());
        other.close().await.unwrap();
        busy.unlock().await.unwrap();
        candidate.resign().await.unwrap();
        theirs.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn close_goes_on_when_it_is_not_waited_for() {
    scoped(async |scope| {
        let session = session(scope).await;
        let mut client = scope.client();
        let lease = session.lease_id().unwrap();
        let _ = crate::support::poll::drop_after_polls(1, session.close()).await;
        reaches(&session, SessionState::Closed).await;
        assert!(client.lease_time_to_live(lease, None).await.unwrap().ttl() <= 0);
    })
    .await;
}

#[tokio::test]
async fn close_waits_for_an_etcd_that_does_not_answer_no_longer_than_the_lease_lives() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let session = brisk(scope, &proxy.endpoint()).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        proxy.set(Mode::HoleBoth).await;
        let closed = tokio::time::timeout(TTL + Duration::from_secs(3), session.close()).await;
        closed.expect("not for ever").unwrap();
        assert_eq!(session.state(), SessionState::Closed);
        assert!(!guard.is_held());
        drop(guard);
    })
    .await;
}

#[tokio::test]
async fn a_session_that_is_between_two_leases_closes_at_once() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let session = brisk(scope, &proxy.endpoint()).await;
        let waiting = Mutex::new(&session, scope.name()).unwrap();
        proxy.set(Mode::Refuse).await;
        reaches(&session, SessionState::Lost { generation: 1 }).await;
        let waiting = tokio::spawn(async move { waiting.lock().await });
        let closed = tokio::time::timeout(TTL + Duration::from_secs(3), session.close()).await;
        closed.expect("not for ever").unwrap();
        assert!(matches!(waiting.await.unwrap(), Err(Error::Closed)));
        assert_eq!(session.state(), SessionState::Closed);
    })
    .await;
}

/// What is on a lost lease would be in the way of the next generation.
#[tokio::test]
async fn a_lost_lease_that_cannot_be_revoked_yet_holds_up_the_next() {
    const TIMES: usize = 5;
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let client = faults.client().await;
        let session = Session::builder_with_client(client).ttl(TTL).connect().await.unwrap();
        let lease = owns(scope, &session);
        let denied = tonic::Status::permission_denied("etcdserver: permission denied");
        let denied = faults.on("LeaseRevoke").always().inject(Fault::FailWith(denied));
        // It lives on at etcd, and the session hears that it is gone.
        faults.on("LeaseKeepAlive").always().inject(Fault::FailBefore);
        faults.end_streams("LeaseKeepAlive", tonic::Status::aborted("ended"));
        reaches(&session, SessionState::Lost { generation: 1 }).await;
        denied.hit(TIMES).await;
        assert_eq!(faults.calls("LeaseGrant"), 1, "it has another lease while the lost one lives");
        faults.clear();
        generation(scope, &session, 2).await;
        assert!(scope.client().lease_time_to_live(lease, None).await.unwrap().ttl() <= 0);
        session.close().await.unwrap();
    })
    .await;
}
