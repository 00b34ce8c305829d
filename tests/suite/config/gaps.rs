//! Ways to miss a change: none is missed.

use std::time::{Duration, Instant};

use etcd_client::Compare;
use etcd_recipes::{ConfigCache, Session};

use super::{Behind, Told, at_etcd, cached, converges, put, remove, wipe};
use crate::support::check::{eventually, scoped, scoped_on};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::Mode;
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{owns, session};

/// Between the list and the watch, while the watch is held back.
#[tokio::test]
async fn changes_between_the_list_and_the_watch_are_told() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await).connect().await.unwrap();
        owns(scope, &session);
        put(scope, "stays", "1").await;
        put(scope, "goes", "1").await;
        let held = faults.next("Watch", Fault::Hold(Until::Released));
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let (told, _handler) = Told::by(&config);
        held.hit(1).await;
        put(scope, "stays", "2").await;
        remove(scope, "goes").await;
        put(scope, "comes", "1").await;
        assert_eq!(cached(&config).len(), 2);
        held.release();
        converges(scope, &config, PATIENCE).await;
        told.converges(&at_etcd(scope).await).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_compaction_that_was_slept_through_is_made_up_for() {
    let behind = Behind::start().await;
    scoped_on(&behind.server, async |scope| {
        let session = behind.session(scope).await;
        for key in ["deleted", "recreated", "changed", "kept"] {
            put(scope, key, "1").await;
        }
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let (told, _handler) = Told::by(&config);
        told.converges(&at_etcd(scope).await).await;
        behind.proxy.set(Mode::Refuse).await;
        remove(scope, "deleted").await;
        remove(scope, "recreated").await;
        put(scope, "recreated", "1").await;
        put(scope, "changed", "2").await;
        put(scope, "new", "1").await;
        behind.server.compact().await;
        // Not emptied, and known to be old.
        eventually(PATIENCE, "it is stale", async || config.stale_since().is_some()).await;
        assert_eq!(config.snapshot().len(), 4);
        let since = config.stale_since().unwrap();
        assert!(config.age().unwrap() >= since.elapsed());
        behind.proxy.set(Mode::Pass).await;
        converges(scope, &config, PATIENCE).await;
        told.converges(&at_etcd(scope).await).await;
        eventually(PATIENCE, "it is fresh", async || config.stale_since().is_none()).await;
        // What had not changed was not told again.
        assert_eq!(told.all().iter().filter(|change| change.key() == b"kept").count(), 1);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn etcd_may_go_away_and_come_back() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let (told, _handler) = Told::by(&config);
        server.kill();
        eventually(PATIENCE, "it is stale", async || config.stale_since().is_some()).await;
        assert_eq!(config.get("a").unwrap().value(), b"1");
        // A cache that is opened now is ready when etcd is.
        let late = ConfigCache::new(&session, scope.name()).unwrap();
        assert!(!late.is_ready() && late.stale_since().is_some() && late.age().is_none());
        server.launch();
        server.ready().await;
        late.ready().await.unwrap();
        let revision = put(scope, "a", "2").await;
        late.wait_for(revision).await.unwrap();
        config.wait_for(revision).await.unwrap();
        assert_eq!(config.get("a").unwrap().value(), b"2");
        told.converges(&at_etcd(scope).await).await;
        eventually(PATIENCE, "it is fresh", async || config.stale_since().is_none()).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// The store is what it was before some changes, and has other ones since.
#[tokio::test]
async fn a_restored_backup_is_followed() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        put(scope, "old", "1").await;
        put(scope, "changed", "1").await;
        put(scope, "deleted", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        server.back_up().await;
        put(scope, "changed", "2").await;
        remove(scope, "deleted").await;
        for n in 0..20 {
            put(scope, "new", &n.to_string()).await;
        }
        converges(scope, &config, PATIENCE).await;
        let before = config.revision();
        server.restore().await;
        converges(scope, &config, PATIENCE).await;
        assert!(config.revision() < before, "the backup is older");
        let revision = put(scope, "new", "after").await;
        assert!(revision < before);
        converges(scope, &config, PATIENCE).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// Sockets stay open and nothing comes: the stream is given up after 20 seconds.
#[tokio::test]
async fn a_half_open_connection_is_noticed() {
    let behind = Behind::start().await;
    scoped_on(&behind.server, async |scope| {
        let session = behind.session(scope).await;
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        behind.proxy.set(Mode::HoleBoth).await;
        put(scope, "a", "2").await;
        eventually(PATIENCE, "it is stale", async || config.stale_since().is_some()).await;
        assert_eq!(config.get("a").unwrap().value(), b"1");
        behind.proxy.set(Mode::Pass).await;
        converges(scope, &config, PATIENCE).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// The stream alone is silent, while requests are answered.
#[tokio::test]
async fn a_silent_stream_is_replaced() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await);
        let session = session.ttl(Duration::from_secs(60)).connect().await.unwrap();
        owns(scope, &session);
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        eventually(PATIENCE, "it is watched", async || faults.messages_received("Watch") > 0).await;
        faults.swallow_answers("Watch", 1_000_000);
        let start = Instant::now();
        put(scope, "a", "2").await;
        eventually(PATIENCE, "it is stale", async || config.stale_since().is_some()).await;
        faults.swallow_answers("Watch", 0);
        converges(scope, &config, PATIENCE).await;
        assert!(start.elapsed() < Duration::from_secs(40), "it took {:?}", start.elapsed());
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// An idle store gives no reason to replace the stream, nor to call the cache stale.
#[tokio::test]
async fn an_idle_stream_is_kept() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await);
        let session = session.ttl(Duration::from_secs(60)).connect().await.unwrap();
        owns(scope, &session);
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let end = Instant::now() + Duration::from_secs(24);
        while Instant::now() < end {
            assert!(config.stale_since().is_none());
            assert!(config.age().unwrap() < Duration::from_secs(21));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(config.age().unwrap() < Duration::from_secs(15), "it was not asked for a sign of life");
        assert_eq!(faults.calls("Watch"), 1);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// While the prefix is listed page by page, the revision of the first page is compacted away.
#[tokio::test]
async fn a_list_that_is_compacted_in_the_middle_starts_again() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        for n in 0..12 {
            let op = |m| etcd_client::TxnOp::put(scope.key(&format!("{n:02}/{m:03}")), "x", None);
            let txn = etcd_client::Txn::new().and_then((0..100).map(op).collect::<Vec<_>>());
            scope.client().txn(txn).await.unwrap();
        }
        let faults = Faults::new(scope.endpoint());
        let session = Session::builder_with_client(faults.client().await).connect().await.unwrap();
        owns(scope, &session);
        let second = faults.on("Range").containing(scope.name()).skip(1).inject(Fault::Hold(Until::Released));
        let config = ConfigCache::new(&session, scope.name()).unwrap();
        second.hit(1).await;
        put(scope, "00/000", "changed").await;
        server.compact().await;
        second.release();
        tokio::time::timeout(PATIENCE, config.ready()).await.expect("stuck").unwrap();
        converges(scope, &config, PATIENCE).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// A compare on a key of the cache goes with what is cached.
#[tokio::test]
async fn cached_revisions_guard_writes_of_others() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let entry = config.get("a").unwrap();
        let unchanged =
            Compare::mod_revision(entry.full_key(), etcd_client::CompareOp::Equal, entry.revision());
        let answer = scope.client().txn(etcd_client::Txn::new().when([unchanged])).await.unwrap();
        assert!(answer.succeeded());
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
