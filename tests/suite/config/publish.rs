//! Writes: once, whatever becomes of requests and answers.

use std::time::Duration;

use etcd_recipes::{ConfigCache, Session};

use super::{at_etcd, put, wipe};
use crate::support::check::{Scope, scoped, scoped_on};
use crate::support::faults::{Fault, Faults, Injection, Until};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{owns, session};

#[tokio::test]
async fn what_is_published_is_read_back() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        for round in 0..20 {
            let revision = config.publish("a", round.to_string()).await.unwrap();
            config.wait_for(revision).await.unwrap();
            let entry = config.get("a").unwrap();
            assert_eq!((entry.value(), entry.revision()), (round.to_string().as_bytes(), revision));
        }
        let revision = config.delete("a").await.unwrap().unwrap();
        config.wait_for(revision).await.unwrap();
        assert!(config.get("a").is_none());
        assert_eq!(config.delete("a").await.unwrap(), None);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn conditions_are_kept() {
    scoped(async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        let first = config.publish_if("a", 0, "1").await.unwrap().unwrap();
        assert_eq!(config.publish_if("a", 0, "2").await.unwrap(), None);
        let foreign = put(scope, "a", "foreign").await;
        assert_eq!(config.publish_if("a", first, "2").await.unwrap(), None);
        assert_eq!(config.delete_if("a", first).await.unwrap(), None);
        assert_eq!(at_etcd(scope).await[&b"a"[..]], (b"foreign".to_vec(), foreign));
        let third = config.publish_if("a", foreign, "3").await.unwrap().unwrap();
        assert!(config.delete_if("a", third).await.unwrap().unwrap() > third);
        assert_eq!(config.delete_if("a", 0).await.unwrap(), None, "there is nothing to delete");
        assert!(at_etcd(scope).await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

async fn behind_faults(scope: &Scope) -> (Faults, Session, ConfigCache) {
    let faults = Faults::new(scope.endpoint());
    let session = Session::builder_with_client(faults.client().await).connect().await.unwrap();
    owns(scope, &session);
    let config = ConfigCache::open(&session, scope.name()).await.unwrap();
    (faults, session, config)
}

fn next_write(faults: &Faults, scope: &Scope, fault: Fault) -> Injection {
    faults.on("Txn").containing(scope.key("a")).inject(fault)
}

#[tokio::test]
async fn a_lost_answer_does_not_write_twice() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let (faults, session, config) = behind_faults(scope).await;
        for fault in [Fault::LoseAnswer, Fault::NeverAnswer, Fault::FailBefore] {
            next_write(&faults, scope, fault);
            let revision = config.publish("a", "1").await.unwrap();
            assert_eq!(at_etcd(scope).await[&b"a"[..]].1, revision);
        }
        // A conditional write whose answer is lost did what it did.
        let seen = at_etcd(scope).await[&b"a"[..]].1;
        next_write(&faults, scope, Fault::LoseAnswer);
        let revision = config.publish_if("a", seen, "2").await.unwrap();
        assert_eq!(revision, Some(at_etcd(scope).await[&b"a"[..]].1));
        next_write(&faults, scope, Fault::LoseAnswer);
        assert_eq!(config.publish_if("a", seen, "3").await.unwrap(), None);
        let read = scope.client().get(format!("{}/a", scope.name()), None).await.unwrap();
        assert_eq!(read.kvs()[0].version(), 4, "each took effect once");
        next_write(&faults, scope, Fault::LoseAnswer);
        assert!(config.delete("a").await.unwrap().is_some());
        assert!(at_etcd(scope).await.is_empty());
        session.close().await.unwrap();
    })
    .await;
}

/// A copy that comes late, after others have written, changes nothing.
#[tokio::test]
async fn a_late_copy_does_not_come_back() {
    scoped(async |scope| {
        for fault in [Fault::Twice(Until::Released), Fault::Hold(Until::Released)] {
            let (faults, session, config) = behind_faults(scope).await;
            let late = next_write(&faults, scope, fault);
            config.publish("a", "late").await.unwrap();
            put(scope, "a", "newer").await;
            late.release();
            late.answered(late.hits()).await;
            assert_eq!(at_etcd(scope).await[&b"a"[..]].0, b"newer");
            config.delete("a").await.unwrap();
            session.close().await.unwrap();
        }
        for fault in [Fault::Twice(Until::Released), Fault::Hold(Until::Released)] {
            let (faults, session, config) = behind_faults(scope).await;
            put(scope, "a", "1").await;
            let late = next_write(&faults, scope, fault);
            config.delete("a").await.unwrap();
            put(scope, "a", "again").await;
            late.release();
            late.answered(late.hits()).await;
            assert_eq!(at_etcd(scope).await[&b"a"[..]].0, b"again");
            session.close().await.unwrap();
        }
        wipe(scope).await;
    })
    .await;
}

#[tokio::test]
async fn a_publication_waits_for_etcd() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let session = session(scope).await;
        let config = ConfigCache::open(&session, scope.name()).await.unwrap();
        server.pause();
        let publishing = tokio::spawn({
            let config = config.clone();
            async move { config.publish("a", "1").await }
        });
        server.resume();
        let revision = tokio::time::timeout(PATIENCE, publishing).await.expect("stuck").unwrap().unwrap();
        config.wait_for(revision).await.unwrap();
        assert_eq!(config.get("a").unwrap().revision(), revision);
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}

/// A deletion leaves nothing that is newer; only the number of keys tells.
#[tokio::test]
async fn a_deletion_that_was_not_told_yet_is_waited_for() {
    scoped(async |scope| {
        let (faults, session, config) = behind_faults(scope).await;
        put(scope, "b", "1").await;
        let written = config.publish("a", "1").await.unwrap();
        config.wait_for(written).await.unwrap();
        faults.hold_answers("Watch", true);
        let deleted = config.delete("a").await.unwrap().unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(500), config.wait_for(deleted)).await;
        assert!(waits.is_err() && config.get("a").is_some());
        faults.hold_answers("Watch", false);
        config.wait_for(deleted).await.unwrap();
        assert!(config.get("a").is_none());
        wipe(scope).await;
        session.close().await.unwrap();
    })
    .await;
}
