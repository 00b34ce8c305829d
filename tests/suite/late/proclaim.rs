//! Late copies of proclamations: what was proclaimed later, or by the next leadership, stands.

use etcd_recipes::{Error, Leadership};

use super::{COPIES, Copy, PATIENCE, Rig, arrive, side_by_side};
use crate::support::check::{alive_tasks, eventually, scoped};
use crate::support::faults::{Fault, Until};
use crate::support::line::text;

impl Rig<'_> {
    /// What everybody sees: the leader's value.
    async fn value(&self) -> String {
        let line = self.line().await;
        assert_eq!(line.len(), 1, "{line:?}");
        line[0].value.clone()
    }

    async fn lead(&self, value: &str) -> Leadership {
        let election = self.election();
        let campaign = tokio::time::timeout(PATIENCE, election.campaign(value));
        let leadership = campaign.await.expect("stuck").unwrap();
        assert_eq!(self.value().await, value);
        leadership
    }
}

#[test]
fn late_proclamation_does_not_undo_a_later_one() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("first").await;
        let late = rig.txns().inject(copy.fault());
        leadership.proclaim("second").await.unwrap();
        leadership.proclaim("third").await.unwrap();
        arrive(&late).await;
        assert_eq!(rig.value().await, "third", "{copy:?}");
        // Its own count of writes is right still: no error, and the value stands.
        leadership.proclaim("fourth").await.unwrap();
        assert_eq!(rig.value().await, "fourth", "{copy:?}");
        leadership.resign().await.unwrap();
        rig.close().await;
    });
}

#[tokio::test]
async fn late_proclamation_does_not_undo_the_same_value_proclaimed_again() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("a").await;
        let late = rig.txns().inject(Copy::Resent.fault());
        leadership.proclaim("b").await.unwrap();
        leadership.proclaim("a").await.unwrap();
        arrive(&late).await;
        assert_eq!(rig.value().await, "a");
        leadership.resign().await.unwrap();
        rig.close().await;
    })
    .await;
}

#[test]
fn late_proclamation_does_not_touch_the_next_leadership() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "election").await;
        let first = rig.lead("first").await;
        let key = text(first.key());
        let late = rig.txns().inject(copy.fault());
        first.proclaim("late").await.unwrap();
        first.resign().await.unwrap();
        let second = rig.lead("second").await;
        assert_eq!(text(second.key()), key, "the name of the key was not used again");
        let before = rig.line().await;
        arrive(&late).await;
        assert_eq!(rig.line().await, before, "{copy:?}");
        assert!(second.is_held());
        second.resign().await.unwrap();
        assert!(rig.line().await.is_empty());
        rig.close().await;
    });
}

#[test]
fn late_proclamation_does_not_lead_again() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("first").await;
        let late = rig.txns().inject(copy.fault());
        leadership.proclaim("late").await.unwrap();
        leadership.resign().await.unwrap();
        arrive(&late).await;
        assert!(rig.line().await.is_empty(), "{copy:?}");
        assert_eq!(rig.election().leader().await.unwrap(), None);
        rig.close().await;
    });
}

/// The proclamation goes on in the session when its future is dropped; a later one waits for it.
#[tokio::test]
async fn dropped_proclamation_comes_before_a_later_one() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("first").await;
        let late = rig.txns().inject(Fault::Hold(Until::Released));
        tokio::select! {
            biased;
            done = leadership.proclaim("dropped") => panic!("not held: {done:?}"),
            () = late.hit(1) => {}
        }
        leadership.proclaim("last").await.unwrap();
        assert_eq!(rig.value().await, "last");
        arrive(&late).await;
        assert_eq!(rig.value().await, "last");
        leadership.resign().await.unwrap();
        rig.close().await;
    })
    .await;
}

/// A guard is given up while its last proclamation is under way, and taken up again.
#[test]
fn dropped_proclamation_does_not_undo_one_after_resuming() {
    side_by_side([Fault::Hold(Until::Released), Fault::NeverAnswer], async |scope, lost| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("first").await;
        // Once the hold is watched, no more tasks are started for it.
        eventually(PATIENCE, "it is watched", async || rig.faults.messages_received("Watch") > 0).await;
        let tasks = alive_tasks();
        let late = rig.txns().inject(lost);
        tokio::select! {
            biased;
            done = leadership.proclaim("dropped") => panic!("not held: {done:?}"),
            () = late.hit(1) => {}
        }
        let resumed = rig.election().resume(&leadership.detach()).await.unwrap().expect("still leading");
        resumed.proclaim("last").await.unwrap();
        assert_eq!(rig.value().await, "last");
        eventually(PATIENCE, "the dropped proclamation is through", async || alive_tasks() <= tasks).await;
        arrive(&late).await;
        assert_eq!(rig.value().await, "last");
        resumed.resign().await.unwrap();
        rig.close().await;
    });
}

/// The leadership ends while an attempt is unanswered: it may have been seen, or not.
#[test]
fn loss_during_a_proclamation_leaves_it_unknown() {
    side_by_side([Fault::NeverAnswer, Fault::NeverSend], async |scope, fault| {
        let rig = Rig::new(scope, "election").await;
        let leadership = rig.lead("first").await;
        let committed = matches!(fault, Fault::NeverAnswer);
        let first = rig.txns().inject(fault);
        let delete = async {
            first.hit(1).await;
            if committed {
                first.answered(1).await;
            }
            scope.client().delete(leadership.key(), None).await.unwrap();
        };
        let (result, ()) = tokio::join!(leadership.proclaim("second"), delete);
        assert!(matches!(result, Err(Error::OutcomeUnknown { .. })), "{result:?}");
        assert!(leadership.proclaim("third").await.unwrap_err().is_lost());
        assert!(leadership.resign().await.unwrap_err().is_lost());
        rig.close().await;
    });
}
