//! Claims: one holder at a time, acked once, given back or lost.

use std::time::{Duration, Instant};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use etcd_recipes::{Error, Queue, Session};

use super::{SHORT, books, claim, comes_first, queue, text};
use crate::support::check::{eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, session, waits};

#[tokio::test]
async fn a_claimed_item_is_hidden_until_it_is_acked() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        ours.enqueue("work").await.unwrap();
        let claimed = claim(&ours).await;
        assert_eq!((claimed.value(), claimed.attempt()), (&b"work"[..], 1));
        assert!(claimed.is_held() && claimed.token() > claimed.item().create_revision);
        let found = scope.client().get(claimed.key(), None).await.unwrap();
        assert_eq!(Some(found.kvs()[0].lease()), a.lease_id());
        assert!(waits(SHORT, &mut Box::pin(theirs.claim())).await);
        assert_eq!(theirs.try_dequeue().await.unwrap(), None);
        assert_eq!(theirs.length().await.unwrap(), 1);
        let lost = claimed.lost();
        claimed.ack().await.unwrap();
        lost.await;
        assert_eq!(theirs.length().await.unwrap(), 0);
        eventually(PATIENCE, "nothing is noted any more", async || {
            books(scope).await.iter().all(|key| key.contains("consumer"))
        })
        .await;
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_claim_comes_back_in_its_place_and_counts() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue_all(["1", "2", "3"]).await.unwrap();
        let first = claim(&queue).await;
        let second = claim(&queue).await;
        assert_eq!((first.value(), second.value()), (&b"1"[..], &b"2"[..]));
        drop(first);
        comes_first(&queue, "1").await;
        let again = claim(&queue).await;
        assert_eq!((again.value(), again.attempt()), (&b"1"[..], 2));
        assert!(again.token() > second.token());
        second.release(Duration::ZERO).await.unwrap();
        comes_first(&queue, "2").await;
        let second = claim(&queue).await;
        assert_eq!((second.value(), second.attempt()), (&b"2"[..], 2));
        again.ack().await.unwrap();
        second.ack().await.unwrap();
        let third = claim(&queue).await;
        assert_eq!((third.value(), third.attempt()), (&b"3"[..], 1));
        third.ack().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_released_item_rests_as_long_as_it_was_told() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        ours.enqueue_all(["1", "2"]).await.unwrap();
        claim(&ours).await.release(Duration::from_secs(1)).await.unwrap();
        let begun = Instant::now();
        let second = claim(&ours).await;
        assert_eq!(second.value(), b"2", "the others do not wait");
        second.ack().await.unwrap();
        let again = claim(&theirs).await;
        assert_eq!((again.value(), again.attempt()), (&b"1"[..], 2));
        assert!(begun.elapsed() > Duration::from_millis(800), "{:?}", begun.elapsed());
        again.ack().await.unwrap();
        eventually(PATIENCE, "nothing is noted any more", async || {
            books(scope).await.iter().all(|key| key.contains("consumer"))
        })
        .await;
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_claim_goes_with_its_lease_and_cannot_be_acked_any_more() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        ours.enqueue("work").await.unwrap();
        let claimed = claim(&ours).await;
        let mut next = Box::pin(theirs.claim());
        assert!(waits(SHORT, &mut next).await);
        scope.client().lease_revoke(a.lease_id().unwrap()).await.unwrap();
        let next = next.await.unwrap();
        assert_eq!((next.value(), next.attempt()), (&b"work"[..], 2));
        assert!(next.token() > claimed.token());
        let fenced = Txn::new().when([claimed.compare()]).and_then([TxnOp::put(scope.key("x"), "", None)]);
        assert!(!scope.client().txn(fenced).await.unwrap().succeeded());
        assert!(matches!(claimed.ack().await, Err(Error::Lost { .. })));
        next.ack().await.unwrap();
        crate::support::sessions::generation(scope, &a, 2).await;
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_claim_whose_key_is_deleted_is_lost() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue("work").await.unwrap();
        let mut claimed = claim(&queue).await;
        let lost = claimed.lost();
        scope.client().delete(claimed.key(), None).await.unwrap();
        tokio::time::timeout(PATIENCE, lost).await.expect("the loss is not heard of");
        assert!(!claimed.is_held());
        assert!(matches!(claimed.txn(Txn::new()).await, Err(Error::Lost { .. })));
        assert!(matches!(claimed.ack_with(Txn::new()).await, Err(Error::Lost { .. })));
        assert!(matches!(claimed.reject("").await, Err(Error::Lost { .. })));
        let again = claim(&queue).await;
        assert_eq!(again.attempt(), 2);
        again.ack().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn ack_with_commits_both_or_nothing() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue_all(["1", "2"]).await.unwrap();
        let put = |key: &str| Txn::new().and_then([TxnOp::put(key, "done", None)]);
        let [one, two] = ["one", "two"].map(|key| format!("{}-{key}", scope.name()));

        let mut claimed = claim(&queue).await;
        assert!(claimed.txn(put(&two)).await.unwrap().succeeded());
        let answer = claimed.ack_with(put(&one)).await.unwrap();
        assert!(answer.succeeded() && answer.header().unwrap().revision() > 0);
        assert_eq!(answer.op_responses().len(), 1);
        assert!(!claimed.is_held());
        assert!(matches!(claimed.ack_with(put(&one)).await, Err(Error::Lost { .. })));
        drop(claimed);
        assert_eq!(queue.length().await.unwrap(), 1);
        let found = scope.client().get(one.as_str(), None).await.unwrap();
        assert_eq!(found.kvs()[0].version(), 1);

        // With a condition that does not hold the other branch is taken, and the item is acked as well.
        let mut claimed = claim(&queue).await;
        let absent = Compare::version(one.as_str(), CompareOp::Equal, 0);
        let large = Txn::new().and_then(vec![TxnOp::get("a", None); 127]);
        assert!(matches!(claimed.ack_with(large).await, Err(Error::TooLarge { .. })));
        assert!(claimed.is_held());
        let conditional = Txn::new().when([absent]).and_then([TxnOp::put(one.as_str(), "", None)]);
        assert!(!claimed.ack_with(conditional).await.unwrap().succeeded());
        assert_eq!(queue.length().await.unwrap(), 0);
        for key in [one, two] {
            scope.client().delete(key, None).await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_handler_that_hangs_loses_its_claim() {
    scoped(async |scope| {
        let session = session(scope).await;
        let limited = Queue::builder(&session, scope.name()).time_limit(SHORT).build().unwrap();
        limited.enqueue("work").await.unwrap();
        let claimed = claim(&limited).await;
        tokio::time::timeout(PATIENCE, claimed.lost()).await.expect("the limit does not come");
        let again = claim(&limited).await;
        assert_eq!(again.attempt(), 2);
        assert!(matches!(claimed.ack().await, Err(Error::Lost { .. })));
        again.ack().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn claims_of_one_process_are_handed_out_in_order_and_at_once() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = queue(&session, scope);
        queue.enqueue_all((0..40).map(|n| format!("{n:02}"))).await.unwrap();
        let mut claims = Vec::new();
        for n in 0..40 {
            let claimed = claim(&queue).await;
            assert_eq!(text(claimed.value()), format!("{n:02}"));
            claims.push(claimed);
        }
        assert!(waits(SHORT, &mut Box::pin(queue.claim())).await);
        for claimed in claims {
            claimed.ack().await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn an_item_comes_back_soon_after_the_death_of_its_consumer() {
    scoped(async |scope| {
        let a = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(1))).await;
        let b = session(scope).await;
        let [ours, theirs] = [&a, &b].map(|session| queue(session, scope));
        ours.enqueue("work").await.unwrap();
        let claimed = claim(&ours).await;
        let mut next = Box::pin(theirs.claim());
        assert!(waits(SHORT, &mut next).await);
        a.close().await.unwrap();
        let begun = Instant::now();
        let next = next.await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert_eq!(next.attempt(), 2);
        assert!(matches!(claimed.ack().await, Err(Error::Lost { .. })));
        next.ack().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}
