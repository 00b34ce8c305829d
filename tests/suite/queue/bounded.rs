//! Queues with a bound, and ids that are taken once.

use std::time::Duration;

use etcd_recipes::{Error, Queue};

use super::{SHORT, books, claim, dequeue, text};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{session, waits};

#[tokio::test]
async fn who_finds_the_queue_full_waits_or_is_told() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] =
            [&a, &b].map(|session| Queue::builder(session, scope.name()).bound(3).build().unwrap());
        ours.enqueue_all(["1", "2"]).await.unwrap();
        assert!(theirs.try_enqueue("3").await.unwrap().is_some());
        assert_eq!(theirs.try_enqueue("no").await.unwrap(), None);
        let mut waiting = Box::pin(theirs.enqueue("4"));
        assert!(waits(SHORT, &mut waiting).await);
        // A claimed item still takes its place.
        let claimed = claim(&ours).await;
        assert!(waits(SHORT, &mut waiting).await);
        claimed.ack().await.unwrap();
        waiting.await.unwrap();
        assert!(waits(SHORT, &mut Box::pin(ours.enqueue_all(["a", "b"]))).await);
        assert!(matches!(ours.enqueue_all(["x"; 4]).await, Err(Error::TooLarge { .. })));
        for value in ["2", "3", "4"] {
            assert_eq!(text(&dequeue(&ours).await.value), value);
        }
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn many_producers_do_not_pass_the_bound() {
    scoped(async |scope| {
        let mut tasks = tokio::task::JoinSet::new();
        for producer in 0..4 {
            let session = session(scope).await;
            let queue = Queue::builder(&session, scope.name()).bound(5).build().unwrap();
            tasks.spawn(async move {
                for n in 0..15 {
                    queue.enqueue(format!("{producer}-{n:02}")).await.unwrap();
                }
                session.close().await.unwrap();
            });
        }
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        let mut taken = Vec::new();
        for _ in 0..60 {
            // One in the middle of being withdrawn may be counted.
            assert!(queue.length().await.unwrap() <= 5 + 4);
            taken.push(text(&dequeue(&queue).await.value).to_owned());
        }
        tasks.join_all().await;
        taken.sort();
        taken.dedup();
        assert_eq!(taken.len(), 60);
        assert_eq!(queue.length().await.unwrap(), 0);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_id_is_enqueued_once_within_its_window() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| {
            Queue::builder(session, scope.name()).once_window(Duration::from_secs(1)).build().unwrap()
        });
        assert!(ours.enqueue_once("order-1", "a").await.unwrap().is_some());
        assert_eq!(theirs.enqueue_once("order-1", "b").await.unwrap(), None);
        assert!(theirs.enqueue_once("order-2", "c").await.unwrap().is_some());
        for value in ["a", "c"] {
            assert_eq!(text(&dequeue(&ours).await.value), value);
        }
        assert_eq!(ours.enqueue_once("order-1", "late").await.unwrap(), None, "taken, and still known");
        for id in ["", &"x".repeat(1025)] {
            assert!(matches!(ours.enqueue_once(id, "").await, Err(Error::InvalidName { .. })));
        }
        let key = format!("_etcd-recipes/queue/{}/once/order-1", scope.name());
        let record = scope.client().get(key, None).await.unwrap();
        let lease = record.kvs()[0].lease();
        assert!(lease != 0 && Some(lease) != a.lease_id(), "it outlives the session, but not its window");
        eventually(PATIENCE, "the window ends", async || {
            books(scope).await.iter().all(|key| key.contains("consumer"))
        })
        .await;
        assert!(ours.enqueue_once("order-1", "again").await.unwrap().is_some());
        assert_eq!(dequeue(&ours).await.value, b"again");

        // The lease of the records is revoked by somebody.
        let key = format!("_etcd-recipes/queue/{}/once/order-1", scope.name());
        let record = scope.client().get(key, None).await.unwrap();
        scope.client().lease_revoke(record.kvs()[0].lease()).await.unwrap();
        assert!(ours.enqueue_once("order-3", "d").await.unwrap().is_some());
        assert_eq!(dequeue(&ours).await.value, b"d");
        a.close().await.unwrap();
        b.close().await.unwrap();
        eventually(PATIENCE, "the window ends", async || books(scope).await.is_empty()).await;
    })
    .await;
}
