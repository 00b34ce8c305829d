//! Handlers, streams and channels.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use etcd_recipes::{ConfigCache, ConfigProblem};
use futures::StreamExt as _;

use super::{Told, at_etcd, put, remove, wipe};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

#[tokio::test]
async fn handlers_are_told_what_is_there_and_every_change_of_theirs() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "a/1", "x").await;
        put(scope, "b", "y").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let note = |who: &'static str| {
            let told = told.clone();
            move |change: &etcd_recipes::ConfigChange| {
                let key = String::from_utf8(change.key().to_vec()).unwrap();
                let value = change.value().map(|value| String::from_utf8(value.to_vec()).unwrap());
                told.lock().unwrap().push((who, key, value));
                Ok::<_, std::convert::Infallible>(())
            }
        };
        let _b = config.on_key("b", note("b"));
        let a = config.on_prefix("a/", note("a/"));
        let (all, _all) = Told::by(&config);
        put(scope, "a/2", "z").await;
        put(scope, "ab", "not theirs").await;
        remove(scope, "b").await;
        remove(scope, "a/1").await;
        put(scope, "b", "again").await;
        let expect = |who, key: &str, value: Option<&str>| (who, key.to_owned(), value.map(str::to_owned));
        let of_a =
            [expect("a/", "a/1", Some("x")), expect("a/", "a/2", Some("z")), expect("a/", "a/1", None)];
        let of_b = [expect("b", "b", Some("y")), expect("b", "b", None), expect("b", "b", Some("again"))];
        eventually(PATIENCE, "all are told", async || told.lock().unwrap().len() == 6).await;
        let told_to =
            |who| told.lock().unwrap().iter().filter(|told| told.0 == who).cloned().collect::<Vec<_>>();
        assert_eq!((told_to("a/"), told_to("b")), (of_a.to_vec(), of_b.to_vec()));
        all.converges(&at_etcd(scope).await).await;
        // A handler that is dropped hears no more.
        drop(a);
        put(scope, "a/3", "z").await;
        all.converges(&at_etcd(scope).await).await;
        assert_eq!(told.lock().unwrap().len(), 6);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn handlers_that_fail_or_panic_are_reported_and_called_again() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let problems = Arc::new(Mutex::new(Vec::new()));
        let list = problems.clone();
        let _reports = config.on_problem(move |problem| list.lock().unwrap().push(problem.clone()));
        let _touchy = config.on_problem(|_| panic!("this one too"));
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        let _fails = config.on_key("a", |_| Err("no"));
        let _panics = config.on_key("a", move |_| -> Result<(), &str> {
            counter.fetch_add(1, Ordering::SeqCst);
            panic!("oh")
        });
        let (told, _handler) = Told::by(&config);
        put(scope, "a", "1").await;
        put(scope, "a", "2").await;
        told.converges(&at_etcd(scope).await).await;
        eventually(PATIENCE, "both are called twice", async || problems.lock().unwrap().len() == 4).await;
        let reason = |reason: &str| ConfigProblem::Handler { key: b"a".to_vec(), reason: reason.into() };
        let expected = [reason("no"), reason("it panicked: oh"), reason("no"), reason("it panicked: oh")];
        assert!(matches!(&expected[0], ConfigProblem::Handler { .. }));
        assert_eq!(*problems.lock().unwrap(), expected);
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn slow_followers_delay_nobody_and_come_to_the_newest_state() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let mut slow = config.changes("");
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let list = seen.clone();
        let _blocking = config.on_prefix("", move |change| {
            // The first call hangs until the test lets it go.
            let _ = blocked.recv();
            list.lock().unwrap().push((change.key().to_vec(), change.value().map(<[u8]>::to_vec)));
            Ok::<_, std::convert::Infallible>(())
        });
        let mut quick = config.changes("");
        let watch = config.watch("7");
        let mut last = 0;
        for round in 0..500 {
            let ops: Vec<_> = (0..10)
                .map(|n| etcd_client::TxnOp::put(scope.key(&n.to_string()), format!("{round}"), None))
                .collect();
            let txn = etcd_client::Txn::new().and_then(ops);
            last = scope.client().txn(txn).await.unwrap().header().unwrap().revision();
        }
        tokio::time::timeout(PATIENCE, config.wait_for(last))
            .await
            .expect("a handler delays the cache")
            .unwrap();
        for _ in 0..100 {
            quick.next().await.unwrap();
        }
        assert_eq!(watch.borrow().as_ref().unwrap().value(), b"499");
        // The stream that was not read has not kept 5,000 changes, and ends at the newest.
        let mut count = 0;
        let mut newest = std::collections::BTreeMap::new();
        while newest.len() < 10 || newest.values().any(|value| value != "499") {
            let change = tokio::time::timeout(PATIENCE, slow.next()).await.expect("more changes").unwrap();
            newest
                .insert(change.key().to_vec(), String::from_utf8(change.value().unwrap().to_vec()).unwrap());
            count += 1;
        }
        assert!(count <= 1100, "{count} changes were kept");
        drop(release);
        eventually(PATIENCE, "the handler comes to the newest state", async || {
            let seen = seen.lock().unwrap();
            seen.iter().rev().take(10).all(|(_, value)| value.as_deref() == Some(b"499")) && !seen.is_empty()
        })
        .await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_thousand_handlers_share_one_watch() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let handlers: Vec<_> = (0..1000)
            .map(|n| {
                let calls = calls.clone();
                let call = move |_: &etcd_recipes::ConfigChange| {
                    calls.fetch_add(1, Ordering::SeqCst);
                    Ok::<_, std::convert::Infallible>(())
                };
                if n % 2 == 0 { config.on_key("a", call) } else { config.on_prefix("", call) }
            })
            .collect();
        put(scope, "a", "1").await;
        eventually(PATIENCE, "all are called", async || calls.load(Ordering::SeqCst) == 1000).await;
        put(scope, "b", "1").await;
        eventually(PATIENCE, "half are called", async || calls.load(Ordering::SeqCst) == 1500).await;
        drop(handlers);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
