//! The cancellation harness polls as often as it says and drops when it says.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_client::PutOptions;
use tokio::sync::Notify;

use crate::support::check::scoped;
use crate::support::poll::{cancel_at_every_poll, drop_after_polls, drop_when_woken};

/// Counts its polls, yields `yields` times, and counts its drop.
async fn counted(yields: usize, polls: Arc<AtomicUsize>, drops: Arc<AtomicUsize>) -> &'static str {
    struct OnDrop(Arc<AtomicUsize>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let _on_drop = OnDrop(drops);
    polls.fetch_add(1, Ordering::SeqCst);
    for _ in 0..yields {
        tokio::task::yield_now().await;
        polls.fetch_add(1, Ordering::SeqCst);
    }
    "done"
}

#[tokio::test]
async fn polls_exactly_as_often() {
    for n in 0..6 {
        let (polls, drops) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let output = drop_after_polls(n, counted(4, polls.clone(), drops.clone())).await;
        assert_eq!(output, (n > 4).then_some("done"));
        assert_eq!(polls.load(Ordering::SeqCst), n.min(5));
        assert_eq!(drops.load(Ordering::SeqCst), usize::from(n > 0));
    }
}

#[tokio::test]
async fn polls_only_when_woken() {
    let (wake, polls) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (inner, count) = (wake.clone(), polls.clone());
    let waiting = drop_after_polls(2, async move {
        let mut notified = std::pin::pin!(inner.notified());
        std::future::poll_fn(|context| {
            count.fetch_add(1, Ordering::SeqCst);
            notified.as_mut().poll(context)
        })
        .await;
    });
    let others = async {
        // Wakes of the surrounding task are not wakes of the future.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(polls.load(Ordering::SeqCst), 1);
        wake.notify_one();
    };
    let (output, ()) = tokio::join!(waiting, others);
    assert_eq!((output, polls.load(Ordering::SeqCst)), (Some(()), 2));
}

#[tokio::test]
async fn drops_when_what_it_waited_for_has_come() {
    let lock = Arc::new(tokio::sync::Mutex::new(()));
    let held = lock.clone().lock_owned().await;
    let waiting = tokio::spawn(drop_when_woken(1, lock.clone().lock_owned()));
    tokio::task::yield_now().await;
    drop(held);
    assert!(waiting.await.unwrap().is_none());
    // The turn it was given and did not take is free again.
    drop(lock.lock().await);
}

#[tokio::test]
async fn cancels_a_real_request_everywhere() {
    scoped(async |scope| {
        let (mut client, key) = (scope.client(), scope.key("k"));
        // On a lease, so that a dropped request that takes effect late leaves nothing.
        let lease = client.lease_grant(60, None).await.unwrap().id();
        scope.owns_lease(lease);
        let mut checked = 0;
        let (answer, polls) = cancel_at_every_poll(
            || {
                let (mut client, key) = (client.clone(), key.clone());
                let options = PutOptions::new().with_lease(lease);
                async move { client.put(key, "", Some(options)).await }
            },
            async |n| {
                assert_eq!(n, checked);
                checked += 1;
            },
        )
        .await;
        answer.unwrap();
        assert!(polls > 0);
        assert_eq!(checked, polls);
        client.lease_revoke(lease).await.unwrap();
    })
    .await;
}
