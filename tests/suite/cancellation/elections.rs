//! Running for an election, leading, and watching who leads.

use std::sync::atomic::Ordering;

use etcd_client::Txn;
use etcd_recipes::{Leadership, Result};
use futures::StreamExt as _;

use super::enter;
use super::guards::{Written, work};
use super::stage::{Stage, every_cut};
use crate::support::line::{Foreign, text};

async fn campaign(stage: &Stage<'_>) -> Result<Leadership> {
    stage.election().campaign("ours").await
}

async fn leading(stage: &Stage<'_>) -> Leadership {
    campaign(stage).await.unwrap()
}

pub(super) async fn dropped_campaign_in_an_empty_election() {
    enter::alone(campaign).await;
}

pub(super) async fn dropped_campaign_behind_a_foreign_leader() {
    enter::behind_a_foreign_holder(campaign).await;
}

pub(super) async fn dropped_campaign_behind_a_leader_of_its_session() {
    enter::behind_a_holder_of_its_session(campaign).await;
}

pub(super) async fn dropped_campaign_far_back_in_a_long_line() {
    enter::far_back_in_a_long_line(campaign).await;
}

pub(super) async fn dropped_campaign_that_loses_its_lease() {
    enter::losing_the_lease(campaign).await;
}

pub(super) async fn dropped_leader() {
    every_cut(async |stage, knife| {
        let leader = Foreign::enter(stage.scope, &stage.name).await;
        let election = stage.election();
        let found = knife.of(election.leader()).await;
        leader.leave().await;
        assert!(found?.unwrap().is_some());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_candidates() {
    every_cut(async |stage, knife| {
        let line = Foreign::crowd(stage.scope, &stage.name, 3).await;
        let election = stage.election();
        let found = knife.of(election.candidates()).await;
        line.leave().await;
        assert_eq!(found?.unwrap().len(), 3);
        Some(())
    })
    .await;
}

/// What a dropped `next` would have said, the following one says.
pub(super) async fn dropped_next_observation_is_not_lost() {
    every_cut(async |stage, knife| {
        let election = stage.election();
        let mut observe = election.observe();
        let first = knife.of(observe.next()).await;
        let cut_first = first.is_none();
        if cut_first {
            assert_eq!(observe.next().await.unwrap().unwrap().leader, None);
        }
        let leading = tokio::spawn(async move { election.campaign("ours").await });
        let second = knife.of(observe.next()).await;
        let cut_second = second.is_none();
        let second = match second {
            Some(second) => second,
            None => observe.next().await,
        };
        assert_eq!(text(&second.unwrap().unwrap().leader.expect("nobody leads").value), "ours");
        leading.await.unwrap().unwrap().resign().await.unwrap();
        assert_eq!(observe.next().await.unwrap().unwrap().leader, None);
        (!cut_first && !cut_second).then_some(())
    })
    .await;
}

pub(super) async fn dropped_resume_stays_detached() {
    every_cut(async |stage, knife| {
        let detached = leading(stage).await.detach();
        let election = stage.election();
        let resumed = knife.of(election.resume(&detached)).await;
        assert_eq!(stage.line().await.len(), 1, "{:?}: the leadership is over", knife.cut);
        let complete = resumed.is_some();
        let leadership = match resumed {
            Some(leadership) => leadership,
            None => election.resume(&detached).await,
        };
        leadership.unwrap().expect("the leadership is over").resign().await.unwrap();
        complete.then_some(())
    })
    .await;
}

pub(super) async fn dropped_resign_ends_the_leadership() {
    every_cut(async |stage, knife| {
        let leadership = leading(stage).await;
        let resigned = knife.of(leadership.resign()).await;
        stage.line_of(0).await;
        resigned?.unwrap();
        Some(())
    })
    .await;
}

/// It is made or not made; and the next one comes after it.
pub(super) async fn dropped_proclaim_goes_on() {
    every_cut(async |stage, knife| {
        let leadership = leading(stage).await;
        let proclaimed = knife.of(leadership.proclaim("cut")).await;
        if proclaimed.is_some() {
            assert_eq!(stage.line().await[0].value, "cut");
        }
        leadership.proclaim("next").await.unwrap();
        assert_eq!(stage.line().await[0].value, "next", "{:?}", knife.cut);
        leadership.resign().await.unwrap();
        proclaimed?.unwrap();
        Some(())
    })
    .await;
}

pub(super) async fn dropped_txn_of_a_leader_commits_once_at_most() {
    every_cut(async |stage, knife| {
        let leadership = leading(stage).await;
        let written = Written::new(stage);
        let answer = knife.of(leadership.txn(written.txn())).await;
        assert!(leadership.is_held());
        leadership.txn(Txn::new()).await.unwrap();
        leadership.resign().await.unwrap();
        stage.idle().await;
        let times = written.times(stage).await;
        assert!(times <= 1, "{:?}: committed {times} times", knife.cut);
        assert!(answer?.unwrap().succeeded());
        assert_eq!(times, 1);
        Some(())
    })
    .await;
}

pub(super) async fn dropped_run_of_a_leader_keeps_leading() {
    every_cut(async |stage, knife| {
        let leadership = leading(stage).await;
        let (work, over) = work(stage);
        let done = knife.of(leadership.run(work)).await;
        assert!(over.load(Ordering::SeqCst), "{:?}: the work goes on", knife.cut);
        assert!(leadership.is_held());
        leadership.resign().await.unwrap();
        assert_eq!(done?.unwrap(), 0);
        Some(())
    })
    .await;
}

pub(super) async fn dropped_lost_of_a_leader_does_nothing() {
    every_cut(async |stage, knife| {
        let leadership = leading(stage).await;
        let mut client = stage.scope.client();
        let deletes = async { client.delete(leadership.key(), None).await.unwrap() };
        let lost = knife.during(leadership.lost(), deletes).await;
        if lost.is_some() {
            assert!(!leadership.is_held());
        }
        // It may or may not have been deleted when the future was dropped.
        let _ = leadership.resign().await;
        lost
    })
    .await;
}
