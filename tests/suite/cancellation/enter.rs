//! Calls that enter the line, cut on their way in the situations they may meet. Locks and elections share these.

use etcd_recipes::{Leadership, Mutex, MutexGuard, Result};

use super::stage::{PATIENCE, Stage, every_cut};
use crate::support::check::eventually;
use crate::support::line::Foreign;

/// More than any contender follows.
const CROWD: usize = 12;

/// What a call that entered the line returns.
pub(super) trait Hold {
    fn is_held(&self) -> bool;
    async fn leave(self);
}

impl Hold for MutexGuard {
    fn is_held(&self) -> bool {
        MutexGuard::is_held(self)
    }

    async fn leave(self) {
        self.unlock().await.unwrap();
    }
}

impl Hold for Leadership {
    fn is_held(&self) -> bool {
        Leadership::is_held(self)
    }

    async fn leave(self) {
        self.resign().await.unwrap();
    }
}

/// Leaves if the call is complete.
async fn leave(entered: Option<Result<impl Hold>>) -> Option<()> {
    let hold = entered?.unwrap();
    assert!(hold.is_held());
    hold.leave().await;
    Some(())
}

/// Nobody else is there.
pub(super) async fn alone<H: Hold>(enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    every_cut(async |stage, knife| leave(knife.of(enter(stage)).await).await).await;
}

/// Behind foreign keys, which go when the call waits.
async fn behind_a_crowd<H: Hold>(count: usize, enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    every_cut(async |stage, knife| {
        let mut crowd = Foreign::crowd(stage.scope, &stage.name, count).await;
        let goes = async {
            stage.line_of(count + 1).await;
            crowd.leave_one_by_one().await;
        };
        let entered = knife.during(enter(stage), goes).await;
        if entered.is_none() {
            only_foreign(stage, &crowd).await;
        }
        crowd.leave().await;
        leave(entered).await
    })
    .await;
}

/// Our place in the line is given up, while others stand there.
async fn only_foreign(stage: &Stage<'_>, crowd: &Foreign) {
    eventually(PATIENCE, "the place in line is given up", async || {
        stage.line().await.iter().all(|entry| entry.lease == crowd.lease())
    })
    .await;
}

pub(super) async fn behind_a_foreign_holder<H: Hold>(enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    behind_a_crowd(1, enter).await;
}

pub(super) async fn far_back_in_a_long_line<H: Hold>(enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    behind_a_crowd(CROWD, enter).await;
}

/// Behind a holder that unlocks when the call waits.
async fn behind_one_of_us<H: Hold>(
    holder: impl Fn(&Stage<'_>) -> Mutex,
    enter: impl AsyncFn(&Stage<'_>) -> Result<H>,
) {
    every_cut(async |stage, knife| {
        let mutex = holder(stage);
        let mut guard = Some(mutex.lock().await.unwrap());
        let goes = async {
            stage.line_of(2).await;
            if let Some(guard) = guard.take() {
                guard.unlock().await.unwrap();
            }
        };
        let entered = knife.during(enter(stage), goes).await;
        if entered.is_none()
            && let Some(guard) = guard
        {
            stage.line_of(1).await;
            assert!(guard.is_held());
            guard.unlock().await.unwrap();
        }
        leave(entered).await
    })
    .await;
}

pub(super) async fn behind_a_holder_of_its_session<H: Hold>(enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    behind_one_of_us(|stage| stage.mutex(), enter).await;
}

pub(super) async fn behind_a_holder_of_another_session<H: Hold>(
    enter: impl AsyncFn(&Stage<'_>) -> Result<H>,
) {
    behind_one_of_us(|stage| Mutex::new(&stage.other, &stage.name).unwrap(), enter).await;
}

/// The session's lease is revoked while the call waits; it takes a new place on the next one.
pub(super) async fn losing_the_lease<H: Hold>(enter: impl AsyncFn(&Stage<'_>) -> Result<H>) {
    every_cut(async |stage, knife| {
        let mut crowd = Foreign::enter(stage.scope, &stage.name).await;
        let loses = async {
            // Not always what the session believes: it may not have noticed the last loss.
            let first = stage.line_of(2).await[1].lease;
            stage.scope.client().lease_revoke(first).await.unwrap();
            let what = "a new place in line";
            eventually(PATIENCE, what, async || {
                stage.line().await.get(1).is_some_and(|entry| entry.lease != first)
            })
            .await;
            crowd.leave_one_by_one().await;
        };
        let entered = knife.during(enter(stage), loses).await;
        if entered.is_none() {
            only_foreign(stage, &crowd).await;
        }
        crowd.leave().await;
        leave(entered).await
    })
    .await;
}
