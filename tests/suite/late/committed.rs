//! Calls that are dropped when their transaction is committed and its answer has not come.

use std::time::{Duration, Instant};

use etcd_recipes::Result;
use tokio::time::timeout;

use super::{PATIENCE, Rig, assert_holds};
use crate::support::check::{eventually, scoped};
use crate::support::faults::Fault;

/// Until the next one has its turn.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Drops a call when etcd has committed its transaction; nothing of it is left, and the next passes at once. What the
/// call brought under way, when dropped without a fault, is the same.
async fn dropped_after_commit<T>(rig: &Rig<'_>, call: impl Future<Output = Result<T>>) {
    let met = rig.txns().inject(Fault::NeverAnswer);
    tokio::select! {
        _ = call => panic!("it had its answer"),
        _ = met.answered(1) => {}
    }
    let dropped = Instant::now();
    eventually(PATIENCE, "no key is left", async || rig.line().await.is_empty()).await;
    let next = timeout(PATIENCE, rig.mutex().lock()).await.expect("stuck").unwrap();
    let took = dropped.elapsed();
    assert_holds(rig, &next).await;
    next.unlock().await.unwrap();
    // An attempt that is not answered is given up after two seconds, when it has to be waited for.
    assert!(took < AT_ONCE * 2, "the next waited for {took:?}");
}

#[tokio::test]
async fn calls_dropped_after_their_commit_leave_nothing() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "committed").await;
        for _ in 0..3 {
            let (mutex, election) = (rig.mutex(), rig.election());
            dropped_after_commit(&rig, mutex.lock()).await;
            dropped_after_commit(&rig, mutex.try_lock()).await;
            dropped_after_commit(&rig, election.campaign("value")).await;
            let guard = mutex.lock().await.unwrap();
            dropped_after_commit(&rig, guard.unlock()).await;
            let leadership = election.campaign("value").await.unwrap();
            dropped_after_commit(&rig, leadership.resign()).await;
        }
        rig.close().await;
    })
    .await;
}
