//! Reads: bytes, snapshots, JSON; names; the life of a cache.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::{ConfigCache, Error};
use futures::StreamExt as _;

use super::{cached, converges, put, remove, wipe};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

#[tokio::test]
async fn what_is_there_can_be_read_and_changes_follow() {
    scoped(async |scope| {
        let session = session(scope).await;
        let written = put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        assert!(config.is_ready() && config.stale_since().is_none());
        let entry = config.get("a").unwrap();
        assert_eq!((entry.key(), entry.value(), entry.revision()), (&b"a"[..], &b"1"[..], written));
        assert_eq!((entry.create_revision(), entry.full_key()), (written, scope.key("a").as_bytes()));
        assert!(config.get("b").is_none());

        let before = config.snapshot();
        let written = put(scope, "b", "2").await;
        config.wait_for(written).await.unwrap();
        assert_eq!(config.get("b").unwrap().value(), b"2");
        let removed = remove(scope, "a").await;
        config.wait_for(removed).await.unwrap();
        assert!(config.get("a").is_none() && config.revision() >= removed);
        // A snapshot stays as it was.
        assert_eq!((before.len(), before.get("a").unwrap().value()), (1, &b"1"[..]));
        assert!(config.age().unwrap() < PATIENCE);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn many_keys_and_large_values_are_listed_in_pages() {
    scoped(async |scope| {
        let session = session(scope).await;
        for page in 0..20 {
            let put = |n| TxnOp::put(scope.key(&format!("{n:05}")), format!("value {n}"), None);
            scope
                .client()
                .txn(Txn::new().and_then((page * 100..page * 100 + 100).map(put).collect::<Vec<_>>()))
                .await
                .unwrap();
        }
        for n in 0..6 {
            put(scope, &format!("large {n}"), &"x".repeat(1024 * 1024)).await;
        }
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        assert_eq!(config.snapshot().len(), 2006);
        converges(scope, &config, PATIENCE).await;
        wipe(scope).await;
        eventually(PATIENCE, "everything is deleted", async || config.snapshot().is_empty()).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn one_revision_is_applied_as_a_whole() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let reader = {
            let (config, stop) = (config.clone(), stop.clone());
            tokio::task::spawn_blocking(move || {
                let mut seen = 0;
                while !stop.is_cancelled() {
                    let snapshot = config.snapshot();
                    let values: Vec<_> = snapshot.iter().map(|entry| entry.value().to_vec()).collect();
                    assert!(values.windows(2).all(|pair| pair[0] == pair[1]), "half a transaction");
                    assert!(values.is_empty() || values.len() == 100);
                    seen += 1;
                }
                seen
            })
        };
        let mut last = 0;
        for round in 0..50 {
            let put = |n: usize| TxnOp::put(scope.key(&n.to_string()), format!("{round}"), None);
            let txn = Txn::new().and_then((0..100).map(put).collect::<Vec<_>>());
            last = scope.client().txn(txn).await.unwrap().header().unwrap().revision();
        }
        config.wait_for(last).await.unwrap();
        stop.cancel();
        assert!(reader.await.unwrap() > 0);
        converges(scope, &config, PATIENCE).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_is_written_as_json() {
    scoped(async |scope| {
        let session = session(scope).await;
        let text = put(scope, "text", "a \"quoted\" word").await;
        let bytes = scope.client().put(scope.key("bytes"), [0xff, 0], None).await.unwrap();
        let key = [format!("{}/", scope.name()).as_bytes(), &[0xff]].concat();
        let odd = scope.client().put(key, "odd key", None).await.unwrap();
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let shown = serde_json::to_value(config.snapshot()).unwrap();
        let revision = |answer: etcd_client::PutResponse| answer.header().unwrap().revision();
        let expected = serde_json::json!({
            "prefix": format!("{}/", scope.name()),
            "revision": config.revision(),
            "entries": {
                "text": {"value": "a \"quoted\" word", "revision": text},
                "bytes": {"value_base64": "/wA=", "revision": revision(bytes)},
            },
            "entries_base64": {"/w==": {"value": "odd key", "revision": revision(odd)}},
        });
        assert_eq!(shown, expected);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn wait_for_sees_revisions_of_other_keys() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        for round in 0..5 {
            let elsewhere = scope
                .client()
                .put(format!("{}-other", scope.name()), format!("{round}"), None)
                .await
                .unwrap();
            let elsewhere = elsewhere.header().unwrap().revision();
            tokio::time::timeout(PATIENCE, config.wait_for(elsewhere)).await.expect("stuck").unwrap();
            // Ours before theirs: what was written before is there.
            let own = put(scope, "a", &format!("{round}")).await;
            let elsewhere = scope.client().put(format!("{}-other", scope.name()), "", None).await.unwrap();
            config.wait_for(elsewhere.header().unwrap().revision()).await.unwrap();
            assert_eq!(config.get("a").unwrap().revision(), own);
        }
        // One that is not there yet is waited for.
        // Others write here as well.
        let future = config.revision() + 1_000_000;
        let early = tokio::time::timeout(Duration::from_millis(300), config.wait_for(future)).await;
        assert!(early.is_err(), "it is not there yet: {early:?}");
        scope.client().delete(format!("{}-other", scope.name()), None).await.unwrap();
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn unusable_names_and_keys_are_refused() {
    scoped(async |scope| {
        let session = session(scope).await;
        for name in ["", "a\0b", "_etcd-recipes", &"x".repeat(1025)] {
            let refused = ConfigCache::open(&session, name).await;
            assert!(matches!(refused, Err(Error::InvalidName { .. })), "{refused:?}");
        }
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        assert!(matches!(config.publish("", "x").await, Err(Error::InvalidName { .. })));
        let large = config.publish("a", "x".repeat(1_600_000)).await;
        assert!(matches!(large, Err(Error::TooLarge { .. })), "{large:?}");
        assert!(cached(&config).is_empty());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_cache_ends_with_its_last_handle_and_with_the_session() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "a", "1").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let (mut changes, mut watch) = (config.clone().changes(""), config.watch("a"));
        assert_eq!(changes.next().await.unwrap().value(), Some(&b"1"[..]));
        assert_eq!(watch.borrow_and_update().as_ref().unwrap().value(), b"1");
        drop(config);
        assert!(tokio::time::timeout(PATIENCE, changes.next()).await.expect("it ends").is_none());
        assert!(tokio::time::timeout(PATIENCE, watch.changed()).await.expect("it ends").is_err());

        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let mut changes = config.changes("");
        assert!(changes.next().await.is_some());
        session.close().await.unwrap();
        assert!(tokio::time::timeout(PATIENCE, changes.next()).await.expect("it ends").is_none());
        assert!(matches!(config.wait_for(i64::MAX).await, Err(Error::Closed)));
        assert!(matches!(config.publish("a", "2").await, Err(Error::Closed)));
        // What is known stays, and is said to be old.
        assert_eq!(config.get("a").unwrap().value(), b"1");
        assert!(config.stale_since().is_some());
        assert!(matches!(ConfigCache::open(&session, scope.name()).await, Err(Error::Closed)));
        wipe(scope).await;
    })
    .await;
}
