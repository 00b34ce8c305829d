//! Consumers and producers of a queue that know too little, or too late: etcd decides.

use std::time::Duration;

use etcd_recipes::embedded::{Fault, Link, Server};
use etcd_recipes::{Error, Mutex, Queue, Session};
use tokio::time::{sleep, timeout};

use super::unanswered::begin;

/// Longer than anything takes that is not stuck.
const PATIENCE: Duration = Duration::from_secs(20);

async fn other(server: &Server) -> Session {
    server.session(&server.link()).await.unwrap().connect().await.unwrap()
}

/// A queue of three whose consumer does not hear that the first two are claimed by another, whose claims are given back
/// with it.
async fn blind(server: &Server, link: &Link, session: &Session) -> (Queue, Vec<etcd_recipes::Claim>) {
    let queue = Queue::new(session, "queue").unwrap();
    queue.enqueue_all(["1", "2", "3"]).await.unwrap();
    queue.peek().await.unwrap().unwrap();
    // Its watches break, and cannot be opened again.
    link.inject("Watch", Fault::Refuse, usize::MAX);
    link.cut();
    link.restore();
    sleep(Duration::from_secs(1)).await;
    let seeing = Queue::new(&other(server).await, "queue").unwrap();
    let claims = vec![seeing.claim().await.unwrap(), seeing.claim().await.unwrap()];
    // Its next requests try those first, in vain, and nobody tells.
    link.inject("Txn", Fault::LoseAnswer, 3);
    (queue, claims)
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_is_lost_is_not_taken_for_that_of_another() {
    let (server, link, session) = begin().await;
    let (queue, claims) = blind(&server, &link, &session).await;
    let claim = timeout(PATIENCE, queue.claim()).await.expect("stuck").unwrap();
    assert_eq!(claim.value(), b"3");
    assert_eq!(claim.key(), server.keys("_etcd-recipes/queue/queue/work/claim/")[2].key);
    claim.ack().await.unwrap();
    for claim in claims {
        claim.ack().await.unwrap();
    }
    assert!(server.keys("queue/").is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_item_whose_answer_is_lost_is_not_taken_for_one_that_another_has_claimed() {
    let (server, link, session) = begin().await;
    let (queue, claims) = blind(&server, &link, &session).await;
    let item = timeout(PATIENCE, queue.dequeue()).await.expect("stuck").unwrap();
    assert_eq!(item.value, b"3");
    for claim in claims {
        claim.ack().await.unwrap();
    }
    assert!(server.keys("queue/").is_empty());
}

/// One request tries many items, and its answer is understood all the same.
#[tokio::test(start_paused = true)]
async fn many_items_that_others_have_are_passed_over() {
    const ITEMS: usize = 80;
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue_all((0..ITEMS).map(|number| number.to_string())).await.unwrap();
    queue.peek().await.unwrap().unwrap();
    link.inject("Watch", Fault::Refuse, usize::MAX);
    link.cut();
    link.restore();
    sleep(Duration::from_secs(1)).await;
    let seeing = Queue::new(&other(&server).await, "queue").unwrap();
    for _ in 1..ITEMS {
        timeout(PATIENCE, seeing.dequeue()).await.expect("stuck").unwrap();
    }
    let claim = timeout(PATIENCE, queue.claim()).await.expect("stuck").unwrap();
    assert_eq!(claim.value(), (ITEMS - 1).to_string().as_bytes());
    assert_eq!(claim.attempt(), 1);
    claim.ack().await.unwrap();
}

/// Its call is dropped while the request is on its way, and no other call comes.
#[tokio::test(start_paused = true)]
async fn an_item_taken_for_nobody_is_put_back() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue("item").await.unwrap();
    queue.peek().await.unwrap().unwrap();
    let held = link.inject("Txn", Fault::Hold, 1);
    let call = tokio::spawn({
        let queue = queue.clone();
        async move { queue.try_dequeue().await }
    });
    held.hit(1).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    held.release();
    sleep(Duration::from_millis(500)).await;
    assert!(server.keys("queue/").is_empty(), "it was not taken");
    sleep(PATIENCE).await;
    assert_eq!(server.keys("queue/").len(), 1, "it is lost");
}

/// It was claimed as often as it may be, and taken just before it was given up.
#[tokio::test(start_paused = true)]
async fn an_item_that_was_taken_is_not_given_up() {
    let (server, link, session) = begin().await;
    let queue = Queue::builder(&session, "queue").max_attempts(1).build().unwrap();
    queue.enqueue("item").await.unwrap();
    queue.claim().await.unwrap().release(Duration::ZERO).await.unwrap();
    let taker = Queue::new(&other(&server).await, "queue").unwrap();
    taker.peek().await.unwrap().unwrap();
    // One request says that the consumer waits, the other gives the item up.
    let held = link.inject("Txn", Fault::Hold, 2);
    let claiming = tokio::spawn({
        let queue = queue.clone();
        async move { queue.claim().await }
    });
    held.hit(2).await;
    assert_eq!(taker.dequeue().await.unwrap().value, b"item");
    held.release();
    sleep(PATIENCE).await;
    assert!(queue.dead_letters().await.unwrap().is_empty(), "it was taken and given up");
    claiming.abort();
}

#[tokio::test(start_paused = true)]
async fn a_letter_is_put_back_once() {
    let (server, _link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue("item").await.unwrap();
    queue.claim().await.unwrap().reject("no").await.unwrap();
    let letter = queue.dead_letters().await.unwrap().remove(0);
    assert!(queue.requeue(&letter).await.unwrap());
    queue.claim().await.unwrap().ack().await.unwrap();
    assert!(!queue.requeue(&letter).await.unwrap(), "it came again");
    assert!(server.keys("queue/").is_empty());
}

/// A queue of one item, and another producer that is faster; the id's own item is withdrawn, and comes when there is room.
#[tokio::test(start_paused = true)]
async fn an_item_that_was_withdrawn_is_put_later_under_its_id() {
    let (server, link, session) = begin().await;
    let bounded = |session: &Session| Queue::builder(session, "queue").bound(1).build().unwrap();
    let (queue, faster) = (bounded(&session), bounded(&other(&server).await));
    let held = link.inject("Txn", Fault::Hold, 1);
    let call = tokio::spawn(async move { queue.enqueue_once("id", "second").await });
    held.hit(1).await;
    faster.enqueue("first").await.unwrap();
    held.release();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(server.keys("queue/").len(), 1);
    assert_eq!(faster.dequeue().await.unwrap().value, b"first");
    let put = timeout(PATIENCE, call).await.expect("stuck").unwrap().unwrap();
    assert!(put.is_some(), "it is said to be known, and is nowhere");
    assert_eq!(faster.dequeue().await.unwrap().value, b"second");
}

/// The queue is over its bound, but before the item is withdrawn somebody begins to work on it.
#[tokio::test(start_paused = true)]
async fn an_item_that_is_worked_on_is_not_withdrawn() {
    let (server, link, session) = begin().await;
    let bounded = |session: &Session| Queue::builder(session, "queue").bound(1).build().unwrap();
    let (queue, faster) = (bounded(&session), bounded(&other(&server).await));
    let (put, withdrawal) = (link.inject("Txn", Fault::Hold, 1), link.inject("Txn", Fault::Hold, 1));
    let call = tokio::spawn(async move { queue.enqueue("second").await });
    put.hit(1).await;
    faster.enqueue("first").await.unwrap();
    put.release();
    withdrawal.hit(1).await;
    let claims = [faster.claim().await.unwrap(), faster.claim().await.unwrap()];
    withdrawal.release();
    timeout(PATIENCE, call).await.expect("stuck").unwrap().unwrap();
    for (claim, value) in claims.into_iter().zip(["first", "second"]) {
        assert_eq!(claim.value(), value.as_bytes());
        claim.ack().await.unwrap();
    }
    assert!(server.keys("queue/").is_empty());
}

/// Its call is dropped while the request is on its way, and before the claim is undone somebody takes the item in spite of
/// it.
#[tokio::test(start_paused = true)]
async fn a_claim_for_nobody_leaves_no_count_of_an_item_that_was_taken() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue("item").await.unwrap();
    queue.claim().await.unwrap().release(Duration::ZERO).await.unwrap();
    sleep(PATIENCE).await;
    let books = || server.keys("_etcd-recipes/queue/queue/work/").len();
    assert_eq!(books(), 1, "its count");
    let (claim, undoing) = (link.inject("Txn", Fault::Hold, 1), link.inject("Txn", Fault::Hold, 1));
    let call = tokio::spawn({
        let queue = queue.clone();
        async move { queue.claim().await }
    });
    claim.hit(1).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    claim.release();
    undoing.hit(1).await;
    assert_eq!(books(), 2, "its count and the claim");
    let item = server.keys("queue/").remove(0);
    server.client().await.unwrap().delete(item.key, None).await.unwrap();
    undoing.release();
    sleep(PATIENCE).await;
    assert_eq!(books(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_refused_is_shown_as_it_was_given() {
    let (_server, _link, session) = begin().await;
    let _lock = Mutex::new(&session, "jobs/lock").unwrap();
    let Err(Error::InvalidName { name, .. }) = Queue::new(&session, "jobs") else { panic!("not refused") };
    assert_eq!(name, "jobs");
}
