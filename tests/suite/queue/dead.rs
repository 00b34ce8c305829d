//! Dead letters: what is given up does not hold up the others, and is not lost.

use std::time::SystemTime;

use etcd_client::TxnOp;
use etcd_recipes::Queue;

use super::{SHORT, books, claim, comes_first, queue};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{session, waits};

#[tokio::test]
async fn an_item_is_delivered_exactly_as_often_as_it_may_be() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let limited = |session| Queue::builder(session, scope.name()).max_attempts(3).build().unwrap();
        let [ours, theirs] = [&a, &b].map(limited);
        ours.enqueue_all(["poison", "fine"]).await.unwrap();
        for attempt in 1..=3 {
            let claimed = claim(if attempt == 2 { &theirs } else { &ours }).await;
            assert_eq!((claimed.value(), claimed.attempt()), (&b"poison"[..], attempt));
            drop(claimed);
            if attempt < 3 {
                comes_first(&ours, "poison").await;
                comes_first(&theirs, "poison").await;
            }
        }
        let fine = claim(&ours).await;
        assert_eq!(fine.value(), b"fine");
        fine.ack().await.unwrap();
        // Whoever claims next finds that it was claimed often enough.
        assert!(waits(SHORT, &mut Box::pin(theirs.claim())).await);
        let mut letters = Vec::new();
        eventually(PATIENCE, "it is among the dead letters", async || {
            letters = ours.dead_letters().await.unwrap();
            !letters.is_empty()
        })
        .await;
        let [letter] = letters.as_slice() else { panic!("{letters:?}") };
        assert_eq!((letter.value.as_slice(), letter.attempts), (&b"poison"[..], 3));
        assert!(!letter.reason.is_empty() && letter.since.unwrap() <= SystemTime::now());
        assert!(!format!("{letter:?}").contains("poison"));
        assert_eq!(ours.length().await.unwrap(), 0);

        // Back at the end of the queue, and counted anew.
        ours.enqueue("before").await.unwrap();
        assert!(theirs.requeue(letter).await.unwrap());
        assert!(!theirs.requeue(letter).await.unwrap());
        assert!(!theirs.purge(letter).await.unwrap());
        claim(&ours).await.ack().await.unwrap();
        let again = claim(&ours).await;
        assert_eq!((again.value(), again.attempt()), (&b"poison"[..], 1));
        again.ack().await.unwrap();
        assert!(ours.dead_letters().await.unwrap().is_empty());
        a.close().await.unwrap();
        b.close().await.unwrap();
        assert!(books(scope).await.is_empty(), "{:?}", books(scope).await);
    })
    .await;
}

#[tokio::test]
async fn rejected_items_are_kept_with_the_reason_until_they_are_purged() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        let large = vec![b'x'; 1536 * 1024 - 3 * 8 * 1024];
        queue.enqueue("1").await.unwrap();
        queue.enqueue(large.clone()).await.unwrap();
        claim(&queue).await.reject("no such customer").await.unwrap();
        claim(&queue).await.reject(&"é".repeat(2000)).await.unwrap();
        let letters = queue.dead_letters().await.unwrap();
        assert_eq!((letters[0].value.as_slice(), letters[0].attempts), (&b"1"[..], 1));
        assert_eq!(letters[0].reason, "no such customer");
        assert_eq!(letters[1].value, large);
        assert_eq!(letters[1].reason, "é".repeat(512));
        for letter in &letters {
            assert!(queue.purge(letter).await.unwrap());
            assert!(!queue.purge(letter).await.unwrap());
        }
        assert!(queue.dead_letters().await.unwrap().is_empty());
        session.close().await.unwrap();
        assert!(books(scope).await.is_empty(), "{:?}", books(scope).await);
    })
    .await;
}

#[tokio::test]
async fn many_dead_letters_are_read_in_order() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue_all((0..100).map(|n| n.to_string())).await.unwrap();
        queue.enqueue_all((100..150).map(|n| n.to_string())).await.unwrap();
        for n in 0..150 {
            claim(&queue).await.reject(&format!("reason {n}")).await.unwrap();
        }
        let letters = queue.dead_letters().await.unwrap();
        assert_eq!(letters.len(), 150);
        for (n, letter) in letters.iter().enumerate() {
            assert_eq!(letter.value, n.to_string().as_bytes());
            assert_eq!(letter.reason, format!("reason {n}"));
            queue.purge(letter).await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_item_put_again_under_its_old_key_is_counted_anew() {
    scoped(async |scope| {
        let session = session(scope).await;
        let limited = Queue::builder(&session, scope.name()).max_attempts(2).build().unwrap();
        let put = TxnOp::put(scope.key("1"), "first", None);
        scope.client().txn(etcd_client::Txn::new().and_then([put])).await.unwrap();
        drop(claim(&limited).await);
        comes_first(&limited, "first").await;
        let second = claim(&limited).await;
        assert_eq!(second.attempt(), 2);
        // Somebody takes it in spite of the claim, and puts another.
        scope.client().delete(scope.key("1"), None).await.unwrap();
        scope.client().put(scope.key("1"), "second", None).await.unwrap();
        assert!(second.ack().await.is_err());
        let other = claim(&limited).await;
        assert_eq!((other.value(), other.attempt()), (&b"second"[..], 1));
        other.ack().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
