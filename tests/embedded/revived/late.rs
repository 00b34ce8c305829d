//! First requests that arrive when what they asked for was done by a copy of them, and the lease is over and back.

use std::any::Any;
use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::embedded::{Fault, Injection};
use etcd_recipes::service::{Instance, Services};
use etcd_recipes::{ConfigCache, Election, Mutex, MutexGuard, Queue};
use tokio::time::{sleep, timeout};

use super::{ALL, MOMENT, SOON, Stage, What};

/// Does it, with its first request held back, and undoes it where it can be; gives what is held back, and what must live
/// until the test is over.
async fn done_with_first_late(
    stage: &Stage,
    what: What,
    others: &Queue,
    guard: Option<&MutexGuard>,
) -> (Injection, Option<Box<dyn Any>>) {
    let session = &stage.session;
    let (mutex, queue) = (Mutex::new(session, "lock").unwrap(), Queue::new(session, "queue").unwrap());
    let mut kept: Option<Box<dyn Any>> = None;
    let held = match what {
        What::Lock => {
            let (guard, held) = stage.late(mutex.lock()).await;
            guard.unwrap().unlock().await.unwrap();
            held
        }
        What::TryLock => {
            let (guard, held) = stage.late(mutex.try_lock()).await;
            guard.unwrap().unwrap().unlock().await.unwrap();
            held
        }
        What::Campaign => {
            let (leadership, held) =
                stage.late(Election::new(session, "election").unwrap().campaign("me")).await;
            leadership.unwrap().resign().await.unwrap();
            held
        }
        What::GuardedTxn => {
            let write = Txn::new().and_then([TxnOp::put("written", "", None)]);
            let (written, held) = stage.late(guard.unwrap().txn(write)).await;
            written.unwrap();
            held
        }
        What::Publish => {
            let config = ConfigCache::new(session, "config").unwrap();
            let (published, held) = stage.late(config.publish("a", "1")).await;
            published.unwrap();
            held
        }
        What::Enqueue => {
            let (enqueued, held) = stage.late(queue.enqueue("item")).await;
            enqueued.unwrap();
            others.dequeue().await.unwrap();
            held
        }
        What::EnqueueAll => {
            let (enqueued, held) = stage.late(queue.enqueue_all(["1", "2"])).await;
            enqueued.unwrap();
            others.dequeue().await.unwrap();
            others.dequeue().await.unwrap();
            held
        }
        What::Claim => {
            let (claim, held) = stage.late(queue.claim()).await;
            claim.unwrap().release(Duration::ZERO).await.unwrap();
            held
        }
        What::Register => {
            let instance = Instance::new("courseware", "127.0.0.1:8400").id("a");
            let (registration, held) = stage.late(Services::new(session).register(instance)).await;
            kept = Some(Box::new(registration.unwrap()));
            held
        }
    };
    (held, kept)
}

/// The lease is over, and back, when the first requests arrive: of what is done, and when `busy` of a lock that takes up the
/// session's first slot meanwhile. When `heard`, the session has gone on with another lease before.
async fn comes_too_late(what: What, busy: bool, heard: bool) {
    let stage = Stage::begin().await;
    let mutex = |name| Mutex::new(&stage.session, name).unwrap();
    let others = Queue::new(&stage.other().await, "queue").unwrap();
    let mut guard = None;
    match what {
        What::GuardedTxn => guard = Some(mutex("lock").lock().await.unwrap()),
        What::Claim => drop(others.enqueue("item").await.unwrap()),
        _ => {}
    }
    let mut held = Vec::new();
    let lock = busy.then(|| {
        held.push(stage.link.inject("Txn", Fault::Hold, 1));
        let other = mutex("other");
        tokio::spawn(async move { other.lock().await.unwrap().unlock().await.unwrap() })
    });
    if let Some(first) = held.first() {
        first.hit(1).await;
    }
    let (late, kept) = done_with_first_late(&stage, what, &others, guard.as_ref()).await;
    held.push(late);
    if let Some(lock) = lock {
        timeout(SOON, lock).await.expect("the lock is stuck").unwrap();
    }
    if heard {
        stage.server.expire(stage.lease);
        stage.second_generation().await;
        sleep(SOON).await;
        stage.come_back().await;
    } else {
        stage.link.stall();
        stage.revive().await;
    }
    for held in held {
        let before = stage.keys();
        held.release();
        sleep(MOMENT).await;
        assert_eq!(stage.keys(), before, "{what:?}, busy: {busy}, heard: {heard}");
    }
    stage.link.restore();
    // The session goes on.
    let next = timeout(SOON, mutex("next").lock()).await.expect("the session is stuck");
    next.unwrap().unlock().await.unwrap();
    drop((guard, kept, others));
    stage.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_done_alone_is_not_done_again() {
    for what in ALL {
        comes_too_late(what, false, false).await;
        comes_too_late(what, false, true).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_done_beside_other_work_is_not_done_again() {
    for what in ALL {
        comes_too_late(what, true, false).await;
        comes_too_late(what, true, true).await;
    }
}
