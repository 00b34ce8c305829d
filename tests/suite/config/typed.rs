//! Values as types: the last good one stays.

use std::sync::{Arc, Mutex};

use etcd_recipes::{ConfigCache, ConfigProblem, Error};
use serde::Deserialize;

use super::{put, remove, wipe};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::session;

#[derive(Debug, PartialEq, Deserialize)]
struct Limits {
    requests: u32,
}

#[tokio::test]
async fn a_bad_value_leaves_the_last_good_one_and_is_reported() {
    scoped(async |scope| {
        let session = session(scope).await;
        for n in 0..100 {
            put(scope, &format!("other/{n}"), &format!(r#"{{"requests": {n}}}"#)).await;
        }
        put(scope, "limits", r#"{"requests": 1}"#).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let problems = Arc::new(Mutex::new(Vec::new()));
        let list = problems.clone();
        let _handler = config.on_problem(move |problem| list.lock().unwrap().push(problem.clone()));
        let watch = config.watch_as::<Limits>("limits");

        let first = config.get_as::<Limits>("limits").unwrap().unwrap();
        assert_eq!(first.requests, 1);
        let again = config.get_as::<Limits>("limits").unwrap().unwrap();
        assert!(Arc::ptr_eq(&first, &again), "decoded once");

        let bad = put(scope, "limits", r#"{"requests": "hunter2"}"#).await;
        config.wait_for(bad).await.unwrap();
        assert_eq!(config.get_as::<Limits>("limits").unwrap().unwrap().requests, 1);
        assert_eq!(watch.borrow().as_ref().unwrap().requests, 1);
        let listed = config.bad_values();
        assert_eq!((listed.len(), &listed[0].key[..], listed[0].revision), (1, &b"limits"[..], bad));
        assert!(listed[0].replaced && !listed[0].reason.contains("hunter2"), "{listed:?}");
        eventually(PATIENCE, "it is reported", async || {
            problems.lock().unwrap()[..] == [ConfigProblem::BadValue(listed[0].clone())]
        })
        .await;
        // Read as what it is, it can be read; and so can all others.
        assert_eq!(config.get("limits").unwrap().value(), br#"{"requests": "hunter2"}"#);
        assert_eq!(config.get_as::<Limits>("other/7").unwrap().unwrap().requests, 7);

        let good = put(scope, "limits", r#"{"requests": 2}"#).await;
        config.wait_for(good).await.unwrap();
        assert_eq!(config.get_as::<Limits>("limits").unwrap().unwrap().requests, 2);
        assert!(config.bad_values().is_empty());
        eventually(PATIENCE, "the channel shows it", async || watch.borrow().as_ref().unwrap().requests == 2)
            .await;

        let removed = remove(scope, "limits").await;
        config.wait_for(removed).await.unwrap();
        assert_eq!(config.get_as::<Limits>("limits").unwrap(), None);
        eventually(PATIENCE, "the channel shows it", async || watch.borrow().is_none()).await;
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_value_that_was_never_good_is_an_error() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "limits", "not json, hunter2").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let error = config.get_as::<Limits>("limits").unwrap_err();
        assert!(
            matches!(error, Error::Undecodable { .. }) && !format!("{error:?}").contains("hunter2"),
            "{error:?}"
        );
        assert!(!config.bad_values()[0].replaced);
        // Another type than the first is decoded for itself.
        assert!(config.get_as::<serde_json::Value>("limits").is_err());
        let revision = config.publish_as("limits", &serde_json::json!({"requests": 3})).await.unwrap();
        config.wait_for(revision).await.unwrap();
        assert_eq!(config.get_as::<Limits>("limits").unwrap().unwrap().requests, 3);
        assert_eq!(config.get_as::<serde_json::Value>("limits").unwrap().unwrap()["requests"], 3);
        assert_eq!(config.get("limits").unwrap().decode::<Limits>().unwrap(), Limits { requests: 3 });
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_channel_whose_key_has_never_had_a_good_value_shows_none_until_it_has() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "limits", "not json").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let problems = Arc::new(Mutex::new(Vec::new()));
        let list = problems.clone();
        let _handler = config.on_problem(move |problem| list.lock().unwrap().push(problem.clone()));
        let mut there = config.watch_as::<Limits>("limits");
        let mut to_come = config.watch_as::<Limits>("others");
        assert!(there.borrow().is_none() && to_come.borrow().is_none());
        put(scope, "others", "not json either").await;
        eventually(PATIENCE, "both are reported", async || problems.lock().unwrap().len() == 2).await;
        assert!(!there.has_changed().unwrap() && to_come.borrow().is_none());
        for (key, channel) in [("limits", &mut there), ("others", &mut to_come)] {
            put(scope, key, r#"{"requests": 1}"#).await;
            let shown = channel.wait_for(Option::is_some);
            tokio::time::timeout(PATIENCE, shown).await.expect("it shows nothing").unwrap();
        }
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn who_is_told_of_a_bad_value_may_find_another() {
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "one", "not json").await;
        put(scope, "other", "not json either").await;
        let config = Arc::new(ConfigCache::open(&session, scope.name()).await.unwrap());
        let told = Arc::new(Mutex::new(Vec::new()));
        let (list, cache) = (told.clone(), Arc::downgrade(&config));
        let _handler = config.on_problem(move |problem| {
            let ConfigProblem::BadValue(bad) = problem else { panic!("{problem:?}") };
            list.lock().unwrap().push(String::from_utf8(bad.key.clone()).unwrap());
            assert!(cache.upgrade().unwrap().get_as::<Limits>("other").is_err());
        });
        assert!(config.get_as::<Limits>("one").is_err());
        assert_eq!(*told.lock().unwrap(), ["one", "other"]);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_decoder_that_panics_hurts_only_its_key() {
    #[derive(Debug)]
    struct Touchy;
    impl<'de> Deserialize<'de> for Touchy {
        fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            let text = String::deserialize(from)?;
            assert_ne!(text, "boom");
            Ok(Self)
        }
    }
    scoped(async |scope| {
        let session = session(scope).await;
        put(scope, "touchy", "\"calm\"").await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        assert!(config.get_as::<Touchy>("touchy").unwrap().is_some());
        put(scope, "touchy", "\"boom\"").await;
        let revision = put(scope, "other", "1").await;
        config.wait_for(revision).await.unwrap();
        assert!(config.get_as::<Touchy>("touchy").unwrap().is_some());
        assert_eq!(config.bad_values().len(), 1);
        assert_eq!(config.get("other").unwrap().value(), b"1");
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
