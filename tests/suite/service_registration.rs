//! Registrations: on the lease, back when lost, given up when superseded, gone when deregistered.

use std::time::{Duration, Instant};

use etcd_client::PutOptions;
use etcd_recipes::service::formats::GoZero;
use etcd_recipes::service::{Instance, Registration, RegistrationState, Services};
use etcd_recipes::{Error, Session};
use futures::future::join_all;
use futures::poll;
use serde_json::{Value, json};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, generation, session};

/// From etcd answering to a lost registration being back.
const BACK: Duration = Duration::from_secs(2);

/// The services of a scope, below its name.
pub(crate) fn services(scope: &Scope, session: &Session) -> Services {
    Services::with_format(session, etcd_recipes::service::formats::Json::under(scope.key("")))
}

fn instance(id: &str) -> Instance {
    Instance::new("courseware", "127.0.0.1:8400").id(id)
}

/// The value of a key, and its lease.
async fn entry(scope: &Scope, key: &[u8]) -> Option<(Value, i64)> {
    let answer = scope.client().get(key, None).await.unwrap();
    let kv = answer.kvs().first()?;
    Some((serde_json::from_slice(kv.value()).unwrap(), kv.lease()))
}

async fn weight(scope: &Scope, registration: &Registration) -> Option<Value> {
    entry(scope, registration.key()).await.map(|(value, _)| value["weight"].clone())
}

async fn comes_back(scope: &Scope, registration: &Registration, lease: i64) {
    eventually(BACK, "it is back", async || {
        entry(scope, registration.key()).await.is_some_and(|(_, found)| found == lease)
            && registration.state() == RegistrationState::Registered
    })
    .await;
}

#[tokio::test]
async fn registration_is_one_key_on_the_lease_until_it_is_deregistered() {
    scoped(async |scope| {
        let session = session(scope).await;
        let registration = services(scope, &session).register(instance("a").weight(2)).await.unwrap();
        assert_eq!(registration.key(), scope.key("courseware/a").as_bytes());
        assert_eq!(registration.state(), RegistrationState::Registered);
        let (value, lease) = entry(scope, registration.key()).await.unwrap();
        assert_eq!(value, json!({"address": "127.0.0.1:8400", "weight": 2}));
        assert_eq!(Some(lease), session.lease_id());

        registration.update(|instance| instance.weight = 3).await.unwrap();
        assert_eq!(registration.instance().weight, 3);
        let (value, lease) = entry(scope, registration.key()).await.unwrap();
        assert_eq!((value["weight"].clone(), Some(lease)), (json!(3), session.lease_id()));

        registration.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        assert_eq!(registration.state(), RegistrationState::Deregistered);
        registration.deregister().await.unwrap();
        assert!(registration.update(|_| {}).await.unwrap_err().is_lost());
        session.close().await.unwrap();
    })
    .await;
}

/// As in a `select` that went on with something else.
#[tokio::test]
async fn updates_that_are_not_polled_any_more_keep_nobody_waiting() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let registration = services(scope, &session).register(instance("a")).await.unwrap();
        let held = faults.on("Txn").containing(registration.key()).inject(Fault::Hold(Until::Released));
        let mut under_way = Box::pin(registration.update(|instance| instance.weight = 2));
        let mut waiting = Box::pin(registration.update(|instance| instance.tags.push("blue".into())));
        assert!(poll!(&mut under_way).is_pending() && poll!(&mut waiting).is_pending());
        held.hit(1).await;
        held.release();
        let next = registration.update(|instance| instance.weight += 1);
        tokio::time::timeout(PATIENCE, next).await.expect("it waits for the others").unwrap();
        assert_eq!(weight(scope, &registration).await, Some(json!(3)));
        under_way.await.unwrap();
        waiting.await.unwrap();
        assert_eq!(registration.instance().tags, ["blue"]);
        registration.deregister().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn updates_that_were_given_up_while_etcd_is_away_come_into_effect() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let registration = services(scope, &session).register(instance("a")).await.unwrap();
        let away = faults.on("Txn").always().inject(Fault::FailBefore);
        for number in 2..5 {
            let mut given_up = Box::pin(registration.update(|instance| instance.weight = number));
            assert!(poll!(&mut given_up).is_pending());
            away.hit(1).await;
        }
        assert_eq!(registration.instance().weight, 4);
        faults.clear();
        let last = async || weight(scope, &registration).await == Some(json!(4));
        eventually(PATIENCE, "the last is there", last).await;
        registration.deregister().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn dropped_registration_is_deregistered() {
    scoped(async |scope| {
        let session = session(scope).await;
        let registration = services(scope, &session).register(instance("a")).await.unwrap();
        drop(registration);
        eventually(PATIENCE, "it is gone", async || scope.keys().await.is_empty()).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn registration_comes_back_after_its_key_was_deleted() {
    scoped(async |scope| {
        let session = session(scope).await;
        let registration = services(scope, &session).register(instance("a")).await.unwrap();
        for round in 2..5 {
            scope.client().delete(registration.key(), None).await.unwrap();
            comes_back(scope, &registration, session.lease_id().unwrap()).await;
            // What it says is the newest, and updates go on.
            registration.update(|instance| instance.weight = round).await.unwrap();
            assert_eq!(weight(scope, &registration).await, Some(json!(round)));
        }
        registration.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn registrations_come_back_on_the_next_lease() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let names: Vec<String> = (0..300).map(|number| number.to_string()).collect();
        let all = join_all(names.iter().map(|name| services.register(instance(name)))).await;
        let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
        all[7].update(|instance| instance.weight = 7).await.unwrap();
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        assert!(scope.keys().await.is_empty());
        let began = Instant::now();
        let lease = generation(scope, &session, 2).await;
        eventually(BACK, "all are back", async || scope.keys().await.len() == 300).await;
        println!("back after {:?}", began.elapsed());
        for registration in &all {
            let (_, found) = entry(scope, registration.key()).await.unwrap();
            assert_eq!(found, lease);
            let there = async || registration.state() == RegistrationState::Registered;
            eventually(PATIENCE, "it knows", there).await;
        }
        assert_eq!(weight(scope, &all[7]).await, Some(json!(7)));
        for result in join_all(all.iter().map(Registration::deregister)).await {
            result.unwrap();
        }
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn newer_registration_of_an_id_stays() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let old = services(scope, &a).register(instance("a").weight(1)).await.unwrap();
        let also_old = services(scope, &a).register(instance("b").weight(1)).await.unwrap();
        let new = services(scope, &b).register(instance("a").weight(2)).await.unwrap();
        tokio::time::timeout(PATIENCE, old.superseded()).await.expect("it does not hear of it");
        assert_eq!(old.state(), RegistrationState::Superseded);
        let error = old.update(|instance| instance.weight = 9).await.unwrap_err();
        assert!(matches!(error, Error::Superseded { .. }), "{error}");
        assert_eq!(old.instance().weight, 1);
        assert!(matches!(old.deregister().await, Err(Error::Superseded { .. })));
        // Nor does it come back when the newer one goes.
        assert_eq!(weight(scope, &new).await, Some(json!(2)));
        // And one that has not heard of it, because it asks at once.
        let newer = services(scope, &b).register(instance("b").weight(2)).await.unwrap();
        assert!(matches!(also_old.deregister().await, Err(Error::Superseded { .. })));
        assert_eq!(weight(scope, &newer).await, Some(json!(2)));
        new.deregister().await.unwrap();
        newer.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn later_registration_in_one_session_takes_the_place_of_the_earlier() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let first = services.register(instance("a").weight(1)).await.unwrap();
        let second = services.register(instance("a").weight(2)).await.unwrap();
        assert_eq!(first.state(), RegistrationState::Superseded);
        assert!(matches!(first.update(|_| {}).await, Err(Error::Superseded { .. })));
        drop(first);
        second.update(|instance| instance.weight = 3).await.unwrap();
        assert_eq!(weight(scope, &second).await, Some(json!(3)));
        // At once: some supersede others before those are through.
        let several = join_all((0..5).map(|weight| services.register(instance("b").weight(weight)))).await;
        assert!(several.last().unwrap().is_ok());
        let last = several.into_iter().last().unwrap().unwrap();
        assert_eq!(weight(scope, &last).await, Some(json!(4)));
        last.deregister().await.unwrap();
        second.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn put_of_another_program_ends_the_registration() {
    scoped(async |scope| {
        let session = session(scope).await;
        let registration = services(scope, &session).register(instance("a")).await.unwrap();
        let lease = scope.client().lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let options = PutOptions::new().with_lease(lease);
        scope.client().put(registration.key(), "not ours", Some(options)).await.unwrap();
        tokio::time::timeout(PATIENCE, registration.superseded()).await.expect("it does not hear of it");
        // Also when the lease is lost it stays away from it.
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        generation(scope, &session, 2).await;
        let other = services(scope, &session).register(instance("b")).await.unwrap();
        let found = scope.client().get(registration.key(), None).await.unwrap();
        assert_eq!(found.kvs()[0].value(), b"not ours");
        scope.client().lease_revoke(lease).await.unwrap();
        drop(registration);
        other.deregister().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_registered_is_refused() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        for bad in
            [instance(""), instance("a/b"), instance("a\0"), Instance::new("", "x:1"), Instance::new("a", "")]
        {
            let error = services.register(bad).await.unwrap_err();
            assert!(matches!(error, Error::InvalidInstance { .. }), "{error}");
        }
        let own =
            Services::with_format(&session, etcd_recipes::service::formats::Json::under("_etcd-recipes/"));
        assert!(matches!(own.register(instance("a")).await, Err(Error::InvalidName { .. })));
        let large = instance("a").metadata("large", "x".repeat(2 << 20));
        assert!(matches!(services.register(large).await, Err(Error::TooLarge { .. })));
        let registration = services.register(instance("a")).await.unwrap();
        let moved = registration.update(|instance| instance.id = "b".into()).await;
        assert!(matches!(moved, Err(Error::InvalidInstance { .. })));
        let large = registration.update(|instance| instance.tags = vec!["x".repeat(2 << 20)]).await;
        assert!(matches!(large, Err(Error::TooLarge { .. })));
        assert!(registration.instance().tags.is_empty());
        registration.deregister().await.unwrap();
        assert!(scope.keys().await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

/// Values that fill a batch by their size, some of them more than one each.
#[tokio::test]
async fn large_registrations_share_batches_as_far_as_they_fit() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let sizes = [1_400_000, 10, 700_000, 700_000, 10, 1_000_000, 300_000, 300_000, 300_000, 300_000];
        let large = |(number, size): (usize, &usize)| {
            services.register(instance(&number.to_string()).metadata("large", "x".repeat(*size)))
        };
        let all = join_all(sizes.iter().enumerate().map(large)).await;
        let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
        assert_eq!(scope.keys().await.len(), sizes.len());
        join_all(all.iter().map(Registration::deregister)).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn formats_stand_side_by_side() {
    scoped(async |scope| {
        let session = session(scope).await;
        let name = scope.key("user.rpc");
        let go_zero = Services::with_format(&session, GoZero);
        let user = Instance::new(&name, "192.168.1.5:8081").id("7587869134816538142");
        let theirs = go_zero.register(user).await.unwrap();
        let ours = services(scope, &session).register(instance("a")).await.unwrap();
        let found = scope.client().get(format!("{name}/7587869134816538142"), None).await.unwrap();
        assert_eq!(found.kvs()[0].value(), b"192.168.1.5:8081");
        theirs.deregister().await.unwrap();
        ours.deregister().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// A registration waits for a lease, and one that is waited for no more leaves nothing.
#[tokio::test]
async fn closing_the_session_ends_everything() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let registration = services.register(instance("a")).await.unwrap();
        session.close().await.unwrap();
        assert!(scope.keys().await.is_empty());
        assert!(matches!(services.register(instance("b")).await, Err(Error::Closed)));
        assert!(matches!(registration.update(|_| {}).await, Err(Error::Closed)));
        registration.deregister().await.unwrap();
    })
    .await;
}
