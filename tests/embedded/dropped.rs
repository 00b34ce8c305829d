//! Calls that are dropped while etcd is away: what they asked for does not happen later.

use std::time::Duration;

use etcd_recipes::embedded::{Fault, Link, Server};
use etcd_recipes::{Queue, Session};
use tokio::time::{sleep, timeout};

use super::unanswered::{applied, begin};

/// Longer than anything that is sent again waits.
const LATER: Duration = Duration::from_secs(30);

async fn values(server: &Server, queue: &str) -> Vec<Vec<u8>> {
    sleep(LATER).await;
    server.keys(format!("{queue}/")).into_iter().map(|key| key.value).collect()
}

#[tokio::test(start_paused = true)]
async fn an_enqueue_does_not_come_when_etcd_is_back() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    let lease = session.lease_id();
    link.cut();
    timeout(Duration::from_secs(1), queue.enqueue("late")).await.unwrap_err();
    link.restore();
    assert!(values(&server, "queue").await.is_empty(), "it came later");
    // The session lives on as before, and so does the queue.
    assert_eq!(session.lease_id(), lease);
    queue.enqueue("next").await.unwrap();
    assert_eq!(values(&server, "queue").await, [b"next"]);
}

/// One of its requests is on its way all the time, and arrives when everything is over.
#[tokio::test(start_paused = true)]
async fn a_request_of_a_dropped_enqueue_finds_that_it_is_over() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    let held = link.inject("Txn", Fault::Hold, 1);
    timeout(Duration::from_millis(500), queue.enqueue("late")).await.unwrap_err();
    assert_eq!(held.hits(), 1);
    sleep(Duration::from_secs(2)).await;
    held.release();
    assert!(values(&server, "queue").await.is_empty(), "it came later");
}

/// A queue of one item, and two that come at once: one of them over a link that fails after it was put.
async fn put_over_the_bound(server: &Server, link: &Link, session: &Session) -> Queue {
    let bounded = |session: &Session| Queue::builder(session, "queue").bound(1).build().unwrap();
    let (queue, other) = (bounded(session), server.session(&server.link()).await.unwrap());
    let other = bounded(&other.connect().await.unwrap());
    let held = link.inject("Txn", Fault::Hold, 1);
    let call = tokio::spawn({
        let queue = queue.clone();
        async move { queue.enqueue("second").await }
    });
    held.hit(1).await;
    other.enqueue("first").await.unwrap();
    let before = server.revision();
    link.stall();
    held.release();
    applied(server, before).await;
    assert_eq!(server.keys("queue/").len(), 2);
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    link.restore();
    queue
}

#[tokio::test(start_paused = true)]
async fn an_enqueue_that_was_applied_does_not_stay_over_the_bound() {
    let (server, link, session) = begin().await;
    let queue = put_over_the_bound(&server, &link, &session).await;
    assert_eq!(values(&server, "queue").await, [b"first"]);
    assert_eq!(queue.try_enqueue("third").await.unwrap(), None);
    assert_eq!(queue.dequeue().await.unwrap().value, b"first");
    assert!(queue.try_enqueue("third").await.unwrap().is_some());
}
