//! Lines of locks whose watches begin too late, and entries that find themselves there.

use std::time::Duration;

use etcd_client::{PutOptions, Txn, TxnOp};
use etcd_recipes::Mutex;
use etcd_recipes::embedded::{Fault, Server};
use tokio::time::{Instant, timeout};

use super::unanswered::begin;

/// Further ahead than this, a waiter does not look.
const NEAR: usize = 7;
const AHEAD: usize = 12;

/// A waiter behind many keys. The furthest that it knows of goes between its entry and the beginning of its watch, and
/// nothing more is told of it; perhaps it comes back, behind the waiter.
async fn wait_for_a_key_that_goes(comes_back: bool) {
    let (server, link, session) = begin().await;
    let mut foreign = server.client().await.unwrap();
    let key = |number: usize| format!("lock/{number:02}");
    for number in 0..AHEAD {
        foreign.put(key(number), "", None).await.unwrap();
    }
    let watch = link.inject("Watch", Fault::Hold, 1);
    let mutex = Mutex::new(&session, "lock").unwrap();
    let waiter = tokio::spawn(async move { mutex.lock().await.unwrap() });
    watch.hit(1).await;
    for number in 0..AHEAD - NEAR {
        assert_eq!(foreign.delete(key(number), None).await.unwrap().deleted(), 1);
        if comes_back {
            foreign.put(key(number), "", None).await.unwrap();
        }
    }
    watch.release();
    // Time for all that comes of it.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!waiter.is_finished());
    for number in AHEAD - NEAR..AHEAD {
        foreign.delete(key(number), None).await.unwrap();
    }
    let guard =
        timeout(Duration::from_secs(60), waiter).await.expect("it waits for a key that is gone").unwrap();
    guard.unlock().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_key_far_ahead_that_goes_before_it_is_watched_is_not_waited_for() {
    wait_for_a_key_that_goes(false).await;
}

#[tokio::test(start_paused = true)]
async fn a_key_far_ahead_that_comes_back_before_it_is_watched_is_not_waited_for() {
    wait_for_a_key_that_goes(true).await;
}

/// Something on the way sends a request twice, and the answer to the second copy is the one that comes back: it did
/// nothing, because the first had done everything. Here the test is the first copy.
#[tokio::test(start_paused = true)]
async fn an_entry_whose_first_copy_is_not_answered_for_finds_its_place() {
    let (server, _link, session) = begin().await;
    let lease = session.lease_id().unwrap();
    let (key, slot) = (format!("lock/{lease:x}-0"), format!("_etcd-recipes/{lease:x}/op/0"));
    let mut client = server.client().await.unwrap();
    let put = |key: &str| TxnOp::put(key, "", Some(PutOptions::new().with_lease(lease)));
    let copy = Txn::new().and_then([put(&key), put(&slot)]);
    let entered = client.txn(copy).await.unwrap().header().unwrap().revision();
    let guard = Mutex::new(&session, "lock").unwrap().lock().await.unwrap();
    assert_eq!((guard.key(), guard.create_revision()), (key.as_bytes(), entered));
    guard.unlock().await.unwrap();
    assert!(server.keys("lock/").is_empty());
    // Only the slot was moved: the next entry knows no more than that it was not applied.
    client.put(slot, "", Some(PutOptions::new().with_lease(lease))).await.unwrap();
    let guard = Mutex::new(&session, "lock").unwrap().lock().await.unwrap();
    assert!(guard.create_revision() > entered + 2);
    assert_eq!((session.lease_id(), server.keys("lock/").len()), (Some(lease), 1));
}

/// etcd keeps an index entry of every name, and each lock's range walks over all of its own.
#[tokio::test(start_paused = true)]
async fn a_line_has_the_same_key_again_whatever_else_the_session_locks() {
    let (_server, _link, session) = begin().await;
    let (one, other) = (Mutex::new(&session, "one").unwrap(), Mutex::new(&session, "other").unwrap());
    let mut keys = Vec::new();
    for one_first in [true, false, false, true] {
        let (first, second) = if one_first { (&one, &other) } else { (&other, &one) };
        let guards = [first.lock().await.unwrap(), second.lock().await.unwrap()];
        keys.extend(guards.iter().map(|guard| guard.key().to_vec()));
        for guard in guards {
            guard.unlock().await.unwrap();
        }
    }
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 2);
}

/// After a silence of 15 s a read tells how far the store is. Nobody waits for its answer.
#[tokio::test(start_paused = true)]
async fn a_watch_is_heard_while_a_silence_is_looked_into() {
    let server = Server::start();
    let link = server.link();
    // Keepalives are confirmed by reads as well, but not so soon.
    let ttl = Duration::from_secs(9_000_000);
    let session = server.session(&link).await.unwrap().ttl(ttl).connect().await.unwrap();
    let mut holder = server.client().await.unwrap();
    holder.put("lock/held", "", None).await.unwrap();
    let mutex = Mutex::new(&session, "lock").unwrap();
    let waiter = tokio::spawn(async move { mutex.lock().await.unwrap() });
    // By then it follows the line.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let read = link.inject("Range", Fault::Hold, usize::MAX);
    read.hit(1).await;
    let begun = Instant::now();
    holder.delete("lock/held", None).await.unwrap();
    let guard = timeout(Duration::from_secs(60), waiter).await.expect("it hears nothing").unwrap();
    assert!(begun.elapsed() < Duration::from_millis(10), "after {:?}", begun.elapsed());
    read.release();
    guard.unlock().await.unwrap();
}
