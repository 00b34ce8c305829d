//! Registrations whose watch has missed changes: they are found by a look at what is there.

use std::time::Duration;

use etcd_recipes::embedded::{Fault, Link, Server};
use etcd_recipes::service::{Instance, Registration, RegistrationState, Services};
use etcd_recipes::{Error, Session};
use tokio::time::{sleep, timeout};

async fn register(session: &Session, weight: u32) -> Registration {
    let instance = Instance::new("courseware", "127.0.0.1:8400").id("a").weight(weight);
    Services::new(session).register(instance).await.unwrap()
}

/// A registration whose link is cut while `meanwhile` happens, which is compacted before the link works again.
async fn cut_off(meanwhile: impl AsyncFnOnce(&Server, &[u8])) -> (Server, Link, Session, Registration) {
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(Duration::from_secs(60)).connect().await.unwrap();
    let registration = register(&session, 1).await;
    // The watch is open by then.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(server.watches(), 1);
    link.cut();
    meanwhile(&server, registration.key()).await;
    server.client().await.unwrap().put("elsewhere", "", None).await.unwrap();
    server.compact(server.revision()).unwrap();
    link.restore();
    (server, link, session, registration)
}

#[tokio::test(start_paused = true)]
async fn one_that_was_deleted_comes_back() {
    let delete = async |server: &Server, key: &[u8]| {
        server.client().await.unwrap().delete(key, None).await.unwrap();
    };
    let (server, _link, session, registration) = cut_off(delete).await;
    let back = async {
        while server.keys(registration.key()).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), back).await.expect("it does not come back");
    assert_eq!(server.keys(registration.key())[0].lease, session.lease_id().unwrap());
    registration.update(|instance| instance.weight = 2).await.unwrap();
    assert_eq!(registration.state(), RegistrationState::Registered);
}

/// What its session has put on a lease that ended before it knew is heard of when it has none.
#[tokio::test(start_paused = true)]
async fn one_is_not_superseded_by_itself() {
    const ALL: usize = 1_000_000;
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(Duration::from_secs(5)).connect().await.unwrap();
    let registration = register(&session, 1).await;
    sleep(Duration::from_secs(1)).await;
    let wait_for = async |what: &str, reached: &dyn Fn() -> bool| {
        let reached = async {
            while !reached() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(30), reached).await.unwrap_or_else(|_| panic!("never: {what}"));
    };
    // It is told nothing, neither by its watch nor by answers.
    link.inject("Watch", Fault::Refuse, ALL);
    // Only that the next generation has begun.
    let begins = link.inject("Txn", Fault::Hold, 1);
    link.inject("Txn", Fault::LoseAnswer, ALL);
    link.cut();
    link.restore();
    let first = session.lease_id().unwrap();
    server.expire(first);
    begins.hit(1).await;
    begins.release();
    let lease = || server.keys(registration.key()).first().map(|key| key.lease);
    wait_for("it is put again", &|| lease().is_some_and(|lease| lease != first)).await;
    server.expire(lease().unwrap());
    link.inject("LeaseGrant", Fault::Refuse, ALL);
    wait_for("the session has no lease", &|| session.lease_id().is_none()).await;
    link.clear();
    link.inject("LeaseGrant", Fault::Refuse, ALL);
    let superseded = || registration.state() == RegistrationState::Superseded;
    wait_for("it watches again", &|| server.watches() > 0 || superseded()).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!superseded());
    link.clear();
    wait_for("it is registered", &|| registration.state() == RegistrationState::Registered).await;
    assert_eq!(lease(), session.lease_id());
    registration.update(|instance| instance.weight = 2).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_whose_place_was_taken_hears_of_it() {
    let mut taken = None;
    let take = async |server: &Server, _: &[u8]| {
        let link = server.link();
        let session = server.session(&link).await.unwrap().connect().await.unwrap();
        taken = Some(register(&session, 7).await);
    };
    let (server, _link, _session, registration) = cut_off(take).await;
    let superseded = timeout(Duration::from_secs(10), registration.superseded()).await;
    superseded.expect("it does not hear of it");
    let updated = registration.update(|instance| instance.weight = 2).await;
    assert!(matches!(updated, Err(Error::Superseded { .. })), "{updated:?}");
    drop(registration);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(server.keys(taken.unwrap().key()).len(), 1);
}
