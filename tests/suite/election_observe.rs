//! Observers see every change, through restarts, compaction and lost connections, and never go back.

use std::time::Duration;

use etcd_recipes::{Election, Error, Observation, Observe, Session};
use futures::StreamExt as _;

use crate::support::check::{Scope, scoped, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, session, waits};

const SHORT: Duration = Duration::from_millis(200);

/// An observer that checks what holds for all observations.
struct Observer {
    stream: Observe,
    last: i64,
}

impl Observer {
    fn of(election: &Election) -> Self {
        Self { stream: election.observe(), last: 0 }
    }

    async fn next(&mut self) -> Observation {
        let next = tokio::time::timeout(PATIENCE, self.stream.next()).await.expect("nothing is observed");
        let seen = next.expect("the stream ended").unwrap();
        assert!(seen.revision > self.last, "revision {} after {}", seen.revision, self.last);
        self.last = seen.revision;
        if let Some(leader) = &seen.leader {
            assert!(leader.create_revision <= seen.revision, "from the future");
        }
        seen
    }

    /// The value of the next leader, or `None` for no leader.
    async fn value(&mut self) -> Option<String> {
        self.next().await.leader.map(|leader| String::from_utf8(leader.value).unwrap())
    }

    /// Reads on until this is said. What came before may be skipped, as after a compaction.
    async fn until(&mut self, value: Option<&str>) {
        while self.value().await.as_deref() != value {}
    }

    async fn is_silent(&mut self) -> bool {
        waits(SHORT, &mut self.stream.next()).await
    }
}

fn election(session: &Session, scope: &Scope) -> Election {
    Election::new(session, scope.name()).unwrap()
}

#[tokio::test]
async fn observers_see_no_leader_each_leader_and_each_proclamation() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (ours, theirs) = (election(&a, scope), election(&b, scope));
        let mut observer = Observer::of(&theirs);
        assert_eq!(observer.value().await, None);
        assert!(observer.is_silent().await);

        let leadership = ours.campaign("a").await.unwrap();
        let seen = observer.next().await;
        let leader = seen.leader.expect("a leads");
        assert_eq!((leader.key.as_slice(), leader.value.as_slice()), (leadership.key(), &b"a"[..]));
        assert_eq!((seen.revision, Some(leader.lease)), (leader.create_revision, a.lease_id()));
        leadership.proclaim("a2").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("a2"));

        // Candidates are no news; nor is what happens under other names.
        let mut waiting = Box::pin(theirs.campaign("b"));
        assert!(waits(SHORT, &mut waiting).await);
        scope.client().put(format!("{}2/x", scope.name()), "", None).await.unwrap();
        assert!(observer.is_silent().await);
        leadership.resign().await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("b"), "there was always a leader");
        drop(waiting.await.unwrap());
        assert_eq!(observer.value().await, None);

        // One that comes later begins with what is now.
        let leadership = ours.campaign("last").await.unwrap();
        assert_eq!(Observer::of(&ours).value().await.as_deref(), Some("last"));
        assert_eq!(observer.value().await.as_deref(), Some("last"));
        drop((leadership, observer));
        scope.client().delete(format!("{}2/x", scope.name()), None).await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_slow_observer_sees_every_change_in_order() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let mut observer = Observer::of(&election);
        assert_eq!(observer.value().await, None);
        let leadership = election.campaign("0").await.unwrap();
        for number in 1..100 {
            leadership.proclaim(number.to_string()).await.unwrap();
        }
        for number in 0..100 {
            assert_eq!(observer.value().await, Some(number.to_string()));
        }
        drop(observer);
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_observer_survives_a_restart_of_etcd() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (ours, theirs) = (election(&a, scope), election(&b, scope));
        let mut observer = Observer::of(&theirs);
        assert_eq!(observer.value().await, None);
        let leadership = ours.campaign("before").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("before"));
        server.restart().await;
        leadership.proclaim("after").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("after"));
        server.kill();
        server.launch();
        leadership.proclaim("again").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("again"));
        leadership.resign().await.unwrap();
        assert_eq!(observer.value().await, None);
        drop(observer);
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

/// An observer behind a proxy, and a session that is not.
struct Behind {
    server: Server,
    proxy: Proxy,
}

impl Behind {
    async fn start() -> Self {
        let server = Server::fast().await;
        let proxy = Proxy::start(server.endpoint()).await;
        Self { server, proxy }
    }

    /// A session through the proxy.
    async fn session(&self, scope: &Scope) -> Session {
        connect(scope, Session::builder([self.proxy.endpoint()]).ttl(Duration::from_secs(60))).await
    }
}

#[tokio::test]
async fn an_observer_survives_a_cut_stream() {
    let behind = Behind::start().await;
    scoped_on(&behind.server, async |scope| {
        let (near, far) = (session(scope).await, behind.session(scope).await);
        let ours = election(&near, scope);
        let mut observer = Observer::of(&election(&far, scope));
        assert_eq!(observer.value().await, None);
        let leadership = ours.campaign("0").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("0"));
        for number in 1..10 {
            // Cut, and changed while nothing gets through: every change is told all the same.
            behind.proxy.set(if number % 2 == 0 { Mode::Refuse } else { Mode::Drop }).await;
            leadership.proclaim(format!("{number}")).await.unwrap();
            leadership.proclaim(format!("{number}b")).await.unwrap();
            behind.proxy.set(Mode::Pass).await;
            assert_eq!(observer.value().await, Some(format!("{number}")));
            assert_eq!(observer.value().await, Some(format!("{number}b")));
        }
        drop(observer);
        leadership.resign().await.unwrap();
        near.close().await.unwrap();
        far.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_observer_survives_a_compaction_it_slept_through() {
    let behind = Behind::start().await;
    scoped_on(&behind.server, async |scope| {
        let (near, far) = (session(scope).await, behind.session(scope).await);
        let ours = election(&near, scope);
        let mut observer = Observer::of(&election(&far, scope));
        assert_eq!(observer.value().await, None);
        let leadership = ours.campaign("a").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("a"));

        // A new value, compacted away before it could be heard of.
        behind.proxy.set(Mode::Refuse).await;
        for number in 0..20 {
            leadership.proclaim(number.to_string()).await.unwrap();
        }
        behind.server.compact().await;
        behind.proxy.set(Mode::Pass).await;
        observer.until(Some("19")).await;

        // The end of the leadership, likewise.
        behind.proxy.set(Mode::Refuse).await;
        leadership.resign().await.unwrap();
        behind.server.compact().await;
        behind.proxy.set(Mode::Pass).await;
        observer.until(None).await;

        // And another leader in between.
        behind.proxy.set(Mode::Refuse).await;
        ours.campaign("b").await.unwrap().resign().await.unwrap();
        let leadership = ours.campaign("c").await.unwrap();
        behind.server.compact().await;
        behind.proxy.set(Mode::Pass).await;
        observer.until(Some("c")).await;
        assert!(observer.is_silent().await);
        drop(observer);
        leadership.resign().await.unwrap();
        near.close().await.unwrap();
        far.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_observer_outlives_the_lease_of_its_session() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let ours = election(&a, scope);
        let mut observer = Observer::of(&election(&b, scope));
        assert_eq!(observer.value().await, None);
        scope.client().lease_revoke(b.lease_id().unwrap()).await.unwrap();
        crate::support::sessions::generation(scope, &b, 2).await;
        let leadership = ours.campaign("a").await.unwrap();
        assert_eq!(observer.value().await.as_deref(), Some("a"));
        leadership.resign().await.unwrap();
        assert_eq!(observer.value().await, None);
        drop(observer);
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn observing_ends_with_the_session() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let (mut early, mut late) = (election.observe(), election.observe());
        assert!(early.next().await.unwrap().unwrap().leader.is_none());
        session.close().await.unwrap();
        for stream in [&mut early, &mut late] {
            let end = tokio::time::timeout(PATIENCE, stream.next()).await.expect("it ends").unwrap();
            assert!(matches!(end, Err(Error::Closed)), "{end:?}");
            assert!(stream.next().await.is_none());
        }
    })
    .await;
}
