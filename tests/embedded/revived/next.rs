//! What a session does whose lease is over and back: renewals are answered again, but its keys are gone.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::embedded::{Fault, Injection, Server};
use etcd_recipes::service::{Instance, RegistrationState, Services};
use etcd_recipes::{ConfigCache, Election, Error, Mutex, Queue, Result};
use tokio::time::{sleep, timeout};

use super::{ALL, MOMENT, SOON, Stage, What};

/// The result of a call; if an answer was lost, it may not be known whether it was done before the lease was over.
async fn certain<T>(call: impl AsyncFn() -> Result<T>, lost: usize) -> T {
    match call().await {
        Err(Error::OutcomeUnknown { .. }) if lost > 0 => call().await.unwrap(),
        result => result.unwrap(),
    }
}

/// What a session does next, when its lease is over and back and it has heard nothing of it.
async fn next(stage: &Stage, what: What, lost: usize) {
    let session = &stage.session;
    let queue = Queue::new(session, "queue").unwrap();
    match what {
        What::Lock => drop(Mutex::new(session, "lock").unwrap().lock().await.unwrap()),
        What::TryLock => {
            // It may be told that its lease was lost, but not that somebody else has the lock.
            let mutex = Mutex::new(session, "lock").unwrap();
            match mutex.try_lock().await {
                Ok(taken) => assert!(taken.is_some(), "nobody has it"),
                Err(error) => {
                    assert!(error.is_lost(), "{error}");
                    drop(mutex.try_lock().await.unwrap().unwrap());
                }
            }
        }
        What::Campaign => {
            drop(Election::new(session, "election").unwrap().campaign("me").await.unwrap());
        }
        What::Publish => {
            let config = ConfigCache::new(session, "config").unwrap();
            let revision = certain(async || config.publish("a", "1").await, lost).await;
            assert_eq!(stage.server.keys("config/")[0].mod_revision, revision);
        }
        What::Enqueue => {
            certain(async || queue.enqueue("item").await, lost).await;
            assert_eq!(stage.server.keys("queue/").len(), 1);
        }
        What::EnqueueAll => {
            certain(async || queue.enqueue_all(["1", "2"]).await, lost).await;
            assert_eq!(stage.server.keys("queue/").len(), 2);
        }
        What::Claim => queue.claim().await.unwrap().ack().await.unwrap(),
        What::Register => {
            let instance = Instance::new("courseware", "127.0.0.1:8400").id("a");
            let registration = Services::new(session).register(instance).await.unwrap();
            assert_eq!(stage.server.keys(registration.key())[0].lease, session.lease_id().unwrap());
        }
        What::GuardedTxn => unreachable!("its key is gone"),
    }
}

/// Its renewals are answered again, but its next write tells.
#[tokio::test(start_paused = true)]
async fn who_goes_on_finds_out_with_the_next_write() {
    for what in ALL.into_iter().filter(|what| !matches!(what, What::GuardedTxn)) {
        for busy in [false, true] {
            for lost in [0, 1] {
                let stage = Stage::begin().await;
                if matches!(what, What::Claim) {
                    let others = Queue::new(&stage.other().await, "queue").unwrap();
                    others.enqueue("item").await.unwrap();
                }
                stage.revive_unheard().await;
                // Something else takes up the first slot, and does not get ahead.
                let held = busy.then(|| stage.link.inject("Txn", Fault::Hold, 1));
                if let Some(held) = &held {
                    let other = Mutex::new(&stage.session, "other").unwrap();
                    tokio::spawn(async move { other.lock().await.unwrap() });
                    held.hit(1).await;
                }
                stage.link.inject("Txn", Fault::LoseAnswer, lost);
                let case = format!("{what:?}, busy: {busy}, answers lost: {lost}");
                let next = timeout(SOON, next(&stage, what, lost)).await;
                stage.no_hot_loop(&case);
                next.unwrap_or_else(|_| panic!("{case}: it is stuck"));
                stage.second_generation().await;
                held.iter().for_each(Injection::release);
                sleep(MOMENT).await;
                assert!(!stage.server.leases().contains(&stage.lease), "{case}: the lease is left");
                stage.end().await;
            }
        }
    }
}

/// Nobody calls anything: what is kept up is put again, on a lease that is known to live.
#[tokio::test(start_paused = true)]
async fn a_registration_comes_back() {
    let stage = Stage::begin().await;
    let instance = Instance::new("courseware", "127.0.0.1:8400").id("a");
    let registration = Services::new(&stage.session).register(instance).await.unwrap();
    // The watch is open by then.
    sleep(Duration::from_secs(1)).await;
    stage.revive_unheard().await;
    stage.second_generation().await;
    sleep(Duration::from_secs(1)).await;
    let lease = stage.server.keys(registration.key()).first().map(|key| key.lease);
    assert_eq!(lease, stage.session.lease_id());
    assert_eq!(registration.state(), RegistrationState::Registered);
    stage.no_hot_loop("it goes on");
    drop(registration);
    stage.end().await;
}

#[tokio::test(start_paused = true)]
async fn one_that_waits_in_line_takes_another_place() {
    let stage = Stage::begin().await;
    let ahead = Mutex::new(&stage.other().await, "lock").unwrap().lock().await.unwrap();
    let mutex = Mutex::new(&stage.session, "lock").unwrap();
    let waiting = tokio::spawn(async move { mutex.lock().await });
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.server.keys("lock/").len(), 2);
    stage.revive_unheard().await;
    stage.second_generation().await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.server.keys("lock/").len(), 2);
    ahead.unlock().await.unwrap();
    let guard = timeout(SOON, waiting).await.expect("it is stuck").unwrap().unwrap();
    assert!(guard.is_held());
    stage.no_hot_loop("it goes on");
    guard.unlock().await.unwrap();
    stage.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_is_told_and_writes_nothing() {
    let stage = Stage::begin().await;
    let mutex = Mutex::new(&stage.session, "lock").unwrap();
    let guard = mutex.lock().await.unwrap();
    stage.revive_unheard().await;
    let write = Txn::new().and_then([TxnOp::put("written", "", None)]);
    let written = timeout(SOON, guard.txn(write)).await.expect("it is stuck");
    assert!(written.unwrap_err().is_lost());
    assert!(!guard.is_held() && stage.server.keys("written").is_empty());
    assert!(guard.unlock().await.unwrap_err().is_lost());
    timeout(SOON, mutex.lock()).await.expect("it is stuck").unwrap().unlock().await.unwrap();
    stage.no_hot_loop("it goes on");
    stage.end().await;
}

/// A call is dropped with its request on its way, when the lease is over and back: giving it up ends as well.
#[tokio::test(start_paused = true)]
async fn a_call_that_is_dropped_is_given_up() {
    for what in ALL.into_iter().filter(|what| !matches!(what, What::GuardedTxn | What::Claim)) {
        let stage = Stage::begin().await;
        let held = stage.link.inject("Txn", Fault::Hold, 1);
        {
            let next = std::pin::pin!(next(&stage, what, 0));
            tokio::select! {
                biased;
                () = next => panic!("{what:?} is done"),
                () = held.hit(1) => {}
            }
            stage.revive_unheard().await;
        }
        sleep(SOON).await;
        held.release();
        sleep(SOON).await;
        assert!(stage.keys().is_empty(), "{what:?}: {:?}", stage.keys());
        stage.no_hot_loop(&format!("{what:?}"));
        timeout(SOON, next(&stage, What::Lock, 0)).await.expect("the session is stuck");
        stage.end().await;
    }
}

/// The session's first write is on its way still as well: it puts a slot that is none of those there were.
#[tokio::test(start_paused = true)]
async fn what_is_sent_again_is_not_taken_for_done_because_of_another_slot() {
    for what in ALL.into_iter().filter(|what| !matches!(what, What::GuardedTxn)) {
        for lost in [0, 1] {
            let server = Server::start();
            let link = server.link();
            let slot = link.inject("Txn", Fault::Hold, 1);
            let stage = Stage::begin_over(link, server).await;
            assert_eq!(slot.hits(), 1);
            if matches!(what, What::Claim) {
                let others = Queue::new(&stage.other().await, "queue").unwrap();
                others.enqueue("item").await.unwrap();
            }
            stage.link.stall();
            stage.revive().await;
            slot.release();
            sleep(MOMENT).await;
            assert_eq!(stage.server.keys("").iter().filter(|key| key.lease == stage.lease).count(), 1);
            stage.link.restore();
            stage.link.inject("Txn", Fault::LoseAnswer, lost);
            let case = format!("{what:?}, answers lost: {lost}");
            let next = timeout(SOON, next(&stage, what, lost)).await;
            next.unwrap_or_else(|_| panic!("{case}: it is stuck"));
            stage.end().await;
        }
    }
}
