//! What a session makes of its lease, and of what is left on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_recipes::embedded::{Fault, Server};
use etcd_recipes::{Election, Mutex, SessionState};
use futures::FutureExt as _;
use tokio::time::timeout;

/// An idle session hears of it from the next renewal, not from its clock.
#[tokio::test(start_paused = true)]
async fn a_revoked_lease_is_noticed_by_the_next_renewal() {
    const TTL: Duration = Duration::from_secs(60);
    let server = Server::start();
    let session = server.session(&server.link()).await.unwrap().ttl(TTL).connect().await.unwrap();
    // The stream of the renewals is open by then.
    tokio::time::sleep(TTL).await;
    server.expire(session.lease_id().unwrap());
    let mut state = session.watch_state();
    let next = state.wait_for(|state| *state == SessionState::Connected { generation: 2 });
    timeout(TTL / 2, next).await.expect("it believes on").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_leadership_is_taken_up_again_once() {
    let server = Server::start();
    let session = server.session(&server.link()).await.unwrap().connect().await.unwrap();
    let election = Election::new(&session, "election").unwrap();
    let detached = election.campaign("me").await.unwrap().detach();
    let leadership = election.resume(&detached).await.unwrap().expect("it is over");
    assert!(election.resume(&detached).await.unwrap().is_none(), "two guards of one leadership");
    assert!(leadership.is_held());
    assert_eq!(server.keys("election/").len(), 1);
    leadership.resign().await.unwrap();
    assert!(server.keys("election/").is_empty());
}

/// Somebody puts the very same value, without a lease: the key would stay for ever.
#[tokio::test(start_paused = true)]
async fn a_proclamation_brings_the_key_back_to_its_lease() {
    let server = Server::start();
    let session = server.session(&server.link()).await.unwrap().connect().await.unwrap();
    let leadership = Election::new(&session, "election").unwrap().campaign("one").await.unwrap();
    server.client().await.unwrap().put(leadership.key(), "two", None).await.unwrap();
    leadership.proclaim("two").await.unwrap();
    let key = server.keys("election/").remove(0);
    assert_eq!((key.value, key.lease), (b"two".to_vec(), session.lease_id().unwrap()));
    session.close().await.unwrap();
    assert!(server.keys("election/").is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_application_that_panics_when_it_is_asked_does_not_live() {
    const SOON: Duration = Duration::from_secs(60);
    let (server, dead) = (Server::start(), Arc::new(AtomicBool::new(false)));
    let alive = {
        let dead = dead.clone();
        move || if dead.load(Ordering::Relaxed) { panic!("it is dead") } else { true }
    };
    let builder = server.session(&server.link()).await.unwrap();
    let session = builder.liveness(alive).connect().await.unwrap();
    let mut state = session.watch_state();
    let mut becomes = async |wanted| {
        let state = timeout(SOON, state.wait_for(|state| *state == wanted)).await;
        drop(state.unwrap_or_else(|_| panic!("never {wanted:?}")).expect("its keeper has ended"));
    };
    dead.store(true, Ordering::Relaxed);
    becomes(SessionState::Lost { generation: 1 }).await;
    dead.store(false, Ordering::Relaxed);
    becomes(SessionState::Connected { generation: 2 }).await;
}

/// Nobody looks while time passes, as when the work blocks its thread.
#[tokio::test(start_paused = true)]
async fn work_that_ends_after_the_lease_is_not_told_as_done() {
    const TTL: Duration = Duration::from_secs(10);
    let server = Server::start();
    let session = server.session(&server.link()).await.unwrap().ttl(TTL).connect().await.unwrap();
    let guard = Mutex::new(&session, "lock").unwrap().lock().await.unwrap();
    let work = async {
        tokio::time::advance(TTL).now_or_never();
    };
    assert!(guard.run(work).await.unwrap_err().is_lost());
}

/// Nobody hears that it was granted, and it is over before it is known how long it lives.
#[tokio::test(start_paused = true)]
async fn a_lease_that_is_over_before_it_is_known_is_granted_again() {
    let server = Server::start();
    let link = server.link();
    let lost = link.inject("LeaseGrant", Fault::LoseAnswer, 1);
    let renewal = link.inject("LeaseKeepAlive", Fault::Hold, 1);
    let connecting = tokio::spawn(server.session(&link).await.unwrap().connect());
    renewal.hit(1).await;
    assert_eq!((lost.hits(), server.leases().len()), (1, 1));
    assert!(server.expire(server.leases()[0]));
    renewal.release();
    let session = timeout(Duration::from_secs(60), connecting).await.expect("stuck").unwrap().unwrap();
    assert_eq!(server.leases(), [session.lease_id().unwrap()]);
    Mutex::new(&session, "lock").unwrap().lock().await.unwrap().unlock().await.unwrap();
}

/// The next generation has a lease, and has not begun.
#[tokio::test(start_paused = true)]
async fn a_session_that_is_closed_between_its_leases_leaves_none() {
    const TTL: Duration = Duration::from_secs(60);
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(TTL).connect().await.unwrap();
    let mut client = server.client().await.unwrap();
    let first = session.lease_id().unwrap();
    let begins = link.inject("Txn", Fault::Hold, 1_000_000);
    server.expire(first);
    timeout(TTL, begins.hit(1)).await.expect("no next generation");
    assert_eq!(client.leases().await.unwrap().leases().len(), 1);
    session.close().await.unwrap();
    let gone = async {
        while !client.leases().await.unwrap().leases().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TTL / 2, gone).await.expect("a lease is left");
}
