//! Taking a lock, and asking who has it.

use etcd_recipes::{MutexGuard, Result};

use super::enter;
use super::stage::{Stage, every_cut};
use crate::support::line::Foreign;

async fn lock(stage: &Stage<'_>) -> Result<MutexGuard> {
    stage.mutex().lock().await
}

pub(super) async fn dropped_lock_of_a_free_name() {
    enter::alone(lock).await;
}

pub(super) async fn dropped_lock_behind_a_foreign_holder() {
    enter::behind_a_foreign_holder(lock).await;
}

pub(super) async fn dropped_lock_behind_a_holder_of_its_session() {
    enter::behind_a_holder_of_its_session(lock).await;
}

pub(super) async fn dropped_lock_behind_a_holder_of_another_session() {
    enter::behind_a_holder_of_another_session(lock).await;
}

pub(super) async fn dropped_lock_far_back_in_a_long_line() {
    enter::far_back_in_a_long_line(lock).await;
}

pub(super) async fn dropped_lock_that_loses_its_lease() {
    enter::losing_the_lease(lock).await;
}

pub(super) async fn dropped_try_lock_of_a_free_name() {
    enter::alone(async |stage: &Stage<'_>| Ok(stage.mutex().try_lock().await?.expect("it is free"))).await;
}

pub(super) async fn dropped_try_lock_of_a_held_name() {
    every_cut(async |stage, knife| {
        let holder = Foreign::enter(stage.scope, &stage.name).await;
        let mutex = stage.mutex();
        let refused = knife.of(mutex.try_lock()).await;
        stage.line_of(1).await;
        holder.leave().await;
        assert!(refused?.unwrap().is_none());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_holder() {
    every_cut(async |stage, knife| {
        let holder = Foreign::enter(stage.scope, &stage.name).await;
        let mutex = stage.mutex();
        let found = knife.of(mutex.holder()).await;
        holder.leave().await;
        assert!(found?.unwrap().is_some());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_waiters() {
    every_cut(async |stage, knife| {
        let line = Foreign::crowd(stage.scope, &stage.name, 3).await;
        let mutex = stage.mutex();
        let found = knife.of(mutex.waiters()).await;
        line.leave().await;
        assert_eq!(found?.unwrap().len(), 2);
        Some(())
    })
    .await;
}
