//! Discovery: who is there, what changes, and what bad entries and an absent etcd do to it.

use std::time::{Duration, Instant};

use etcd_client::PutOptions;
use etcd_recipes::service::formats::{
    Endpoints, Gateway, GoZero, Json, Kitex, Kratos, NameIp, Namespaced, Versioned,
};
use etcd_recipes::service::{Change, Discovery, Format, Instance, RegistrationState, Services};
use etcd_recipes::{Error, Session};
use futures::StreamExt as _;

use super::service_registration::services;
use crate::support::check::{eventually, scoped, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, generation, session};

fn instance(id: &str) -> Instance {
    Instance::new("courseware", "127.0.0.1:8400").id(id)
}

fn ids(discovery: &Discovery) -> Vec<String> {
    discovery.snapshot().instances.iter().map(|instance| instance.id.clone()).collect()
}

async fn shows(discovery: &Discovery, expected: &[&str]) {
    let what = format!("it shows {expected:?}");
    eventually(PATIENCE, &what, async || ids(discovery) == expected).await;
}

/// What is said of each change.
async fn next(changes: &mut etcd_recipes::service::Changes) -> String {
    let change = tokio::time::timeout(PATIENCE, changes.next()).await.expect("no change").expect("the end");
    match change {
        Change::Added(instance) => format!("+{}", instance.id),
        Change::Updated { before, after } => format!("{} {}-{}", after.id, before.weight, after.weight),
        Change::Removed(instance) => format!("-{}", instance.id),
        Change::Malformed(malformed) => format!("!{}", malformed.error),
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn instances_are_shown_as_they_come_change_and_go() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let first = services.register(instance("a").metadata("zone", "b")).await.unwrap();
        let discovery = services.discover("courseware").open().await.unwrap();
        assert_eq!(*discovery.snapshot().instances[0], *first.instance());
        assert_eq!(discovery.stale_for(), None);
        discovery.ready().await.unwrap();
        let mut changes = discovery.changes();
        assert_eq!(next(&mut changes).await, "+a");
        let second = services.register(instance("b")).await.unwrap();
        assert_eq!(next(&mut changes).await, "+b");
        first.update(|instance| instance.weight = 5).await.unwrap();
        assert_eq!(next(&mut changes).await, "a 1-5");
        second.deregister().await.unwrap();
        assert_eq!(next(&mut changes).await, "-b");
        // The same under another lease is no change.
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        assert_eq!(next(&mut changes).await, "-a");
        generation(scope, &session, 2).await;
        assert_eq!(next(&mut changes).await, "+a");
        // Other services are others, also with a name that begins the same.
        let other = services.register(Instance::new("courseware2", "x:1")).await.unwrap();
        let below = services.register(Instance::new("courseware/a", "x:1")).await.unwrap();
        let last = services.register(instance("c")).await.unwrap();
        assert_eq!(next(&mut changes).await, "+c");
        assert_eq!(ids(&discovery), ["a", "c"]);
        session.close().await.unwrap();
        drop((first, other, below, last));
        while changes.next().await.is_some() {}
        assert!(matches!(discovery.ready().await, Ok(()) | Err(Error::Closed)));
    })
    .await;
}

#[tokio::test]
async fn instances_are_chosen_by_version_and_tags() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let both = services.register(instance("a").version("2").tag("blue").tag("big")).await.unwrap();
        let blue = services.register(instance("b").version("1").tag("blue")).await.unwrap();
        let none = services.register(instance("c").version("2")).await.unwrap();
        let open = async |builder: etcd_recipes::service::DiscoveryBuilder| builder.open().await.unwrap();
        let discover = || services.discover("courseware");
        let (two, tagged) = (open(discover().version("2")).await, open(discover().tag("blue")).await);
        let narrow = open(discover().version("2").tag("big").tag("blue")).await;
        assert_eq!((ids(&two), ids(&tagged)), (vec!["a".into(), "c".into()], vec!["a".into(), "b".into()]));
        assert_eq!(ids(&narrow), ["a"]);
        none.update(|instance| instance.tags = vec!["blue".into(), "big".into()]).await.unwrap();
        shows(&narrow, &["a", "c"]).await;
        both.update(|instance| instance.tags.clear()).await.unwrap();
        shows(&narrow, &["c"]).await;
        drop((both, blue, none));
        session.close().await.unwrap();
    })
    .await;
}

/// In each format: one bad entry among good ones, a bad update of a good one, and its repair.
#[tokio::test]
async fn malformed_entry_affects_itself_alone() {
    async fn check(
        scope: &crate::support::check::Scope,
        session: &etcd_recipes::Session,
        format: impl Format,
        kind: &str,
    ) {
        let services = Services::with_format(session, format);
        let name = format!("{}-{kind}", scope.name());
        let good = Instance::new(&name, "127.0.0.1:1").id("1");
        let registered = services.register(good).await.unwrap();
        let second = services.register(Instance::new(&name, "127.0.0.1:2").id("2")).await.unwrap();
        let discovery = services.discover(&name).open().await.unwrap();
        let before = ids(&discovery);
        assert_eq!(before.len(), 2, "{kind}");
        let (key, bad) = (registered.key().to_vec(), b"\xff".to_vec());
        let value = scope.client().get(key.clone(), None).await.unwrap().kvs()[0].value().to_vec();
        scope.client().put(key.clone(), bad.clone(), None).await.unwrap();
        eventually(PATIENCE, "it is reported", async || discovery.snapshot().malformed.len() == 1).await;
        assert_eq!(ids(&discovery), before, "the last good state stays: {kind}");
        assert_eq!(discovery.snapshot().malformed[0].key, key);
        let stray = [&second.key()[..second.key().len() - 1], b"9"].concat();
        scope.client().put(stray.clone(), bad, None).await.unwrap();
        eventually(PATIENCE, "it is reported", async || discovery.snapshot().malformed.len() == 2).await;
        assert_eq!(ids(&discovery), before, "{kind}");
        scope.client().put(key.clone(), value, None).await.unwrap();
        scope.client().delete(stray, None).await.unwrap();
        eventually(PATIENCE, "it is well again", async || discovery.snapshot().malformed.is_empty()).await;
        assert_eq!(ids(&discovery), before, "{kind}");
        scope.client().delete(key, None).await.unwrap();
        eventually(PATIENCE, "it goes", async || ids(&discovery).len() == 1).await;
        second.deregister().await.unwrap();
        drop(registered);
    }
    scoped(async |scope| {
        let session = session(scope).await;
        check(scope, &session, Json::default(), "json").await;
        check(scope, &session, Endpoints, "endpoints").await;
        check(scope, &session, GoZero, "go-zero").await;
        check(scope, &session, Kratos::default(), "kratos").await;
        check(scope, &session, Kitex, "kitex").await;
        check(scope, &session, NameIp, "name").await;
        check(scope, &session, Gateway, "gateway").await;
        check(scope, &session, Versioned, "versioned").await;
        check(scope, &session, Namespaced, "namespaced").await;
        session.close().await.unwrap();
    })
    .await;
}

/// The bytes that the neighbours write, put by a plain client.
#[tokio::test]
async fn entries_of_other_programs_are_understood() {
    scoped(async |scope| {
        let session = session(scope).await;
        let lease = scope.client().lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let name = scope.name();
        let put = async |key: String, value: String| {
            let options = PutOptions::new().with_lease(lease);
            scope.client().put(key, value, Some(options)).await.unwrap();
        };
        let found = async |services: Services| {
            let discovery = services.discover(name).open().await.unwrap();
            let snapshot = discovery.snapshot();
            assert!(snapshot.malformed.is_empty(), "{snapshot:?}");
            snapshot.instances.iter().map(|one| (one.address.clone(), one.weight)).collect::<Vec<_>>()
        };
        let of = |address: &str, weight| vec![(address.to_owned(), weight)];
        put(format!("{name}/10.0.0.1:50051"), r#"{"Op":0,"Addr":"10.0.0.1:50051","Metadata":null}"#.into()).await;
        assert_eq!(found(Services::with_format(&session, Endpoints)).await, of("10.0.0.1:50051", 1));
        scope.client().delete(format!("{name}/10.0.0.1:50051"), None).await.unwrap();
        put(format!("{name}/7587869134816538142"), "192.168.1.5:8081".into()).await;
        put(format!("{name}/7587869134816538143"), "192.168.1.5:8081".into()).await;
        assert_eq!(found(Services::with_format(&session, GoZero)).await, of("192.168.1.5:8081", 1));
        put(
            format!("/microservices/{name}/u1"),
            format!(r#"{{"id":"u1","name":"{name}","version":"v1.2.0","metadata":{{"weight":"10"}},"endpoints":["http://127.0.0.1:8000?isSecure=false","grpc://127.0.0.1:9000?isSecure=false"]}}"#),
        )
        .await;
        assert_eq!(found(Services::with_format(&session, Kratos::default())).await, of("127.0.0.1:9000", 10));
        let kitex = r#"{"network":"tcp","address":"192.168.196.240:8888","weight":10,"tags":null}"#;
        put(format!("kitex/registry-etcd/{name}/192.168.196.240:8888"), kitex.into()).await;
        assert_eq!(found(Services::with_format(&session, Kitex)).await, of("192.168.196.240:8888", 10));
        let versioned = format!(r#"{{"name":"{name}","addr":"10.0.0.1:8089","version":"1.0.0","weight":3}}"#);
        put(format!("/{name}/1.0.0/10.0.0.1:8089"), versioned).await;
        assert_eq!(found(Services::with_format(&session, Versioned)).await, of("10.0.0.1:8089", 3));
        put(format!("/ns/{name}/127.0.0.1:3000"), "127.0.0.1:3000".into()).await;
        assert_eq!(found(Services::with_format(&session, Namespaced)).await, of("127.0.0.1:3000", 1));
        // A name that does not end in a digit.
        put(format!("{name}x7587869134816538142"), "127.0.0.1:8500".into()).await;
        let gateway = Services::with_format(&session, Gateway).discover(format!("{name}x")).open().await.unwrap();
        assert_eq!(gateway.snapshot().instances[0].address, "127.0.0.1:8500");
        scope.client().lease_revoke(lease).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// An outage longer than the lease: the list stays, is known to be stale, and everything is back soon afterwards.
#[tokio::test]
async fn last_known_instances_stay_while_etcd_is_away() {
    if lacking(Needs::Disk) {
        return;
    }
    const TTL: Duration = Duration::from_secs(2);
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let builder = || Session::builder([scope.endpoint()]).ttl(TTL);
        let (serving, watching) = (connect(scope, builder()).await, connect(scope, builder()).await);
        let registration = services(scope, &serving).register(instance("a")).await.unwrap();
        let discovery = services(scope, &watching).discover("courseware").open().await.unwrap();
        assert_eq!(ids(&discovery), ["a"]);
        server.kill();
        eventually(PATIENCE, "it is stale", async || discovery.stale_for().is_some()).await;
        let away = async || registration.state() == RegistrationState::Away;
        eventually(PATIENCE, "the lease is lost", away).await;
        let begin = Instant::now();
        while begin.elapsed() < TTL {
            assert_eq!(ids(&discovery), ["a"]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.launch();
        server.ready().await;
        let begin = Instant::now();
        let back =
            async || registration.state() == RegistrationState::Registered && discovery.stale_for().is_none();
        eventually(PATIENCE, "it is back", back).await;
        let after = begin.elapsed();
        assert!(after < Duration::from_secs(2), "back after {after:?}");
        shows(&discovery, &["a"]).await;
        for session in [&serving, &watching] {
            generation(scope, session, 2).await;
        }
        registration.deregister().await.unwrap();
        shows(&discovery, &[]).await;
        serving.close().await.unwrap();
        watching.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn those_who_vanish_together_are_kept_when_asked_for() {
    scoped(async |scope| {
        let (watching, serving) = (session(scope).await, session(scope).await);
        let registered = services(scope, &serving);
        let mut all = Vec::new();
        for id in ["a", "b", "c"] {
            all.push(registered.register(instance(id)).await.unwrap());
        }
        let plain = services(scope, &watching).discover("courseware").open().await.unwrap();
        let builder = services(scope, &watching).discover("courseware");
        let guarded = builder.clone().protect(0.5, Duration::from_secs(60)).open().await.unwrap();
        assert!(matches!(
            builder.protect(1.5, Duration::ZERO).open().await,
            Err(Error::InvalidOption { .. })
        ));
        all.pop().unwrap().deregister().await.unwrap();
        shows(&guarded, &["a", "b"]).await;
        drop(all);
        serving.close().await.unwrap();
        shows(&plain, &[]).await;
        shows(&guarded, &["a", "b", "c"]).await;
        assert_eq!(guarded.snapshot().kept, 3);
        watching.close().await.unwrap();
    })
    .await;
}

/// A reader that sleeps sees the newest state, not everything that was.
#[tokio::test]
async fn slow_reader_gets_the_newest_state() {
    scoped(async |scope| {
        let session = session(scope).await;
        let services = services(scope, &session);
        let registration = services.register(instance("a").weight(0)).await.unwrap();
        let discovery = services.discover("courseware").open().await.unwrap();
        let mut changes = discovery.changes();
        assert_eq!(next(&mut changes).await, "+a");
        for weight in 1..=100 {
            registration.update(|instance| instance.weight = weight).await.unwrap();
        }
        let newest = async || discovery.snapshot().instances[0].weight == 100;
        eventually(PATIENCE, "the last is seen", newest).await;
        assert_eq!(next(&mut changes).await, "a 0-100");
        registration.deregister().await.unwrap();
        assert_eq!(next(&mut changes).await, "-a");
        session.close().await.unwrap();
    })
    .await;
}
