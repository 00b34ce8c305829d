//! What is done with a lock that is held.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use etcd_client::{Txn, TxnOp};
use etcd_recipes::Mutex;

use super::stage::{Knife, PATIENCE, Stage, every_cut};

pub(super) async fn dropped_unlock_releases() {
    every_cut(async |stage, knife| {
        let guard = stage.mutex().lock().await.unwrap();
        let unlocked = knife.of(guard.unlock()).await;
        stage.line_of(0).await;
        unlocked?.unwrap();
        Some(())
    })
    .await;
}

/// Another waits when the lock is released.
async fn hands_over(stage: &Stage<'_>, knife: Knife<'_>, next: Mutex) -> Option<()> {
    let guard = stage.mutex().lock().await.unwrap();
    let next = tokio::spawn(async move { next.lock().await });
    stage.line_of(2).await;
    let unlocked = knife.of(guard.unlock()).await;
    let next = tokio::time::timeout(PATIENCE, next).await.expect("not handed over");
    next.unwrap().unwrap().unlock().await.unwrap();
    unlocked?.unwrap();
    Some(())
}

pub(super) async fn dropped_unlock_hands_over_in_its_session() {
    every_cut(async |stage, knife| hands_over(stage, knife, stage.mutex()).await).await;
}

pub(super) async fn dropped_unlock_hands_over_to_another_session() {
    every_cut(async |stage, knife| {
        hands_over(stage, knife, Mutex::new(&stage.other, &stage.name).unwrap()).await
    })
    .await;
}

/// A key that a cut transaction writes, and how often it was written.
pub(super) struct Written {
    key: String,
}

impl Written {
    pub(super) fn new(stage: &Stage<'_>) -> Self {
        Self { key: stage.scope.key("written") }
    }

    pub(super) fn txn(&self) -> Txn {
        Txn::new().and_then([TxnOp::put(self.key.as_str(), "", None)])
    }

    /// Counts, and takes it away.
    pub(super) async fn times(&self, stage: &Stage<'_>) -> i64 {
        let mut client = stage.scope.client();
        let found = client.get(self.key.as_str(), None).await.unwrap();
        client.delete(self.key.as_str(), None).await.unwrap();
        found.kvs().first().map_or(0, etcd_client::KeyValue::version)
    }
}

pub(super) async fn dropped_txn_commits_once_at_most() {
    every_cut(async |stage, knife| {
        let guard = stage.mutex().lock().await.unwrap();
        let written = Written::new(stage);
        let answer = knife.of(guard.txn(written.txn())).await;
        assert!(guard.is_held());
        // Nothing of it is under way any more when the next one is through and the guard has gone.
        guard.txn(Txn::new()).await.unwrap();
        guard.unlock().await.unwrap();
        stage.idle().await;
        let times = written.times(stage).await;
        assert!(times <= 1, "{:?}: committed {times} times", knife.cut);
        assert!(answer?.unwrap().succeeded());
        assert_eq!(times, 1);
        Some(())
    })
    .await;
}

/// Says when it is dropped.
pub(super) struct Dropped(pub(super) Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Work that takes some requests, and whether it is over.
pub(super) fn work(stage: &Stage<'_>) -> (impl Future<Output = i64> + use<>, Arc<AtomicBool>) {
    let over = Arc::new(AtomicBool::new(false));
    let (mut client, dropped) = (stage.scope.client(), Dropped(over.clone()));
    let work = async move {
        let _dropped = dropped;
        tokio::task::yield_now().await;
        client.get("nothing", None).await.unwrap();
        client.get("nothing", None).await.unwrap().count()
    };
    (work, over)
}

pub(super) async fn dropped_run_keeps_the_lock() {
    every_cut(async |stage, knife| {
        let guard = stage.mutex().lock().await.unwrap();
        let (work, over) = work(stage);
        let done = knife.of(guard.run(work)).await;
        assert!(over.load(Ordering::SeqCst), "{:?}: the work goes on", knife.cut);
        assert!(guard.is_held());
        guard.unlock().await.unwrap();
        assert_eq!(done?.unwrap(), 0);
        Some(())
    })
    .await;
}

pub(super) async fn dropped_lost_does_nothing() {
    every_cut(async |stage, knife| {
        let guard = stage.mutex().lock().await.unwrap();
        let mut client = stage.scope.client();
        let deletes = async {
            // The future has been polled when this is: it comes first.
            client.delete(guard.key(), None).await.unwrap();
        };
        let lost = knife.during(guard.lost(), deletes).await;
        if lost.is_some() {
            assert!(!guard.is_held());
        }
        // It may or may not have been deleted when the future was dropped.
        let _ = guard.unlock().await;
        lost
    })
    .await;
}
