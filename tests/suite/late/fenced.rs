//! A user's transaction, committed only while the lock is held: once at most, whatever happens to its requests.

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use etcd_recipes::{Error, MutexGuard};

use super::{COPIES, PATIENCE, Rig, arrive, side_by_side};
use crate::support::check::{Scope, alive_tasks, eventually};
use crate::support::faults::{Fault, Injection, Until};

/// A key that a user writes.
struct Written<'a> {
    scope: &'a Scope,
    key: String,
}

impl<'a> Written<'a> {
    fn new(scope: &'a Scope) -> Self {
        Self { scope, key: scope.key("written") }
    }

    /// A transaction without conditions.
    fn put(&self) -> Txn {
        Txn::new().and_then([TxnOp::put(self.key.as_str(), "", None)])
    }

    /// A transaction with a condition of the user's own, which holds.
    fn create(&self) -> Txn {
        let absent = Compare::create_revision(self.key.as_str(), CompareOp::Equal, 0);
        Txn::new().when([absent]).and_then([TxnOp::put(self.key.as_str(), "", None)])
    }

    /// Arms a fault for the next transaction that writes it.
    fn meets(&self, rig: &Rig<'_>, fault: Fault) -> Injection {
        rig.faults.on("Txn").containing(&self.key).inject(fault)
    }

    /// How often it was written.
    async fn times(&self) -> i64 {
        let found = self.scope.client().get(self.key.as_str(), None).await.unwrap();
        found.kvs().first().map_or(0, etcd_client::KeyValue::version)
    }

    async fn remove(&self) {
        self.scope.client().delete(self.key.as_str(), None).await.unwrap();
    }
}

async fn locked<'a>(scope: &'a Scope) -> (Rig<'a>, Written<'a>, MutexGuard) {
    let rig = Rig::new(scope, "lock").await;
    let guard = rig.mutex().lock().await.unwrap();
    (rig, Written::new(scope), guard)
}

#[test]
fn lost_answer_is_found_again() {
    side_by_side([Fault::LoseAnswer, Fault::NeverAnswer], async |scope, fault| {
        let (rig, written, guard) = locked(scope).await;
        written.meets(&rig, fault.clone());
        assert!(guard.txn(written.put()).await.unwrap().succeeded());
        assert_eq!(written.times().await, 1, "{fault:?}");
        // The next one is another.
        assert!(guard.txn(written.put()).await.unwrap().succeeded());
        assert_eq!(written.times().await, 2, "{fault:?}");
        written.remove().await;
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}

/// With conditions of the user's own it cannot be told afterwards whether they held.
#[test]
fn lost_answer_of_a_conditional_transaction_is_unknown() {
    side_by_side([Fault::LoseAnswer, Fault::NeverAnswer], async |scope, fault| {
        let (rig, written, guard) = locked(scope).await;
        written.meets(&rig, fault.clone());
        let result = guard.txn(written.create()).await;
        assert!(matches!(result, Err(Error::OutcomeUnknown { .. })), "{result:?}");
        assert_eq!(written.times().await, 1, "{fault:?}");
        assert!(!guard.txn(written.create()).await.unwrap().succeeded());
        assert!(guard.txn(written.put()).await.unwrap().succeeded());
        assert_eq!(written.times().await, 2, "{fault:?}");
        written.remove().await;
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}

/// An attempt that was not committed leaves nothing unknown: the next one decides.
#[test]
fn lost_request_is_sent_again() {
    side_by_side([Fault::FailBefore, Fault::NeverSend], async |scope, fault| {
        let (rig, written, guard) = locked(scope).await;
        written.meets(&rig, fault.clone());
        assert!(guard.txn(written.create()).await.unwrap().succeeded());
        written.meets(&rig, fault.clone());
        assert!(!guard.txn(written.create()).await.unwrap().succeeded());
        assert_eq!(written.times().await, 1, "{fault:?}");
        written.remove().await;
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}

#[test]
fn late_copy_is_refused() {
    side_by_side(COPIES, async |scope, copy| {
        let (rig, written, guard) = locked(scope).await;
        let late = written.meets(&rig, copy.fault());
        assert!(guard.txn(written.put()).await.unwrap().succeeded());
        arrive(&late).await;
        assert_eq!(written.times().await, 1, "{copy:?}");

        let late = written.meets(&rig, copy.fault());
        assert!(guard.txn(written.put()).await.unwrap().succeeded());
        guard.unlock().await.unwrap();
        let next = rig.mutex().lock().await.unwrap();
        arrive(&late).await;
        assert_eq!(written.times().await, 2, "{copy:?}");
        assert!(next.txn(written.put()).await.unwrap().succeeded());
        assert_eq!(written.times().await, 3, "{copy:?}");
        written.remove().await;
        next.unlock().await.unwrap();
        rig.close().await;
    });
}

/// The call is dropped, the lock is released and taken again, under the same key; then the request arrives.
#[test]
fn request_that_arrives_after_the_hold_is_refused() {
    side_by_side([false, true], async |scope, again| {
        let (rig, written, guard) = locked(scope).await;
        let late = written.meets(&rig, Fault::Hold(Until::Released));
        tokio::select! {
            biased;
            done = guard.txn(written.put()) => panic!("not held back: {done:?}"),
            () = late.hit(1) => {}
        }
        let key = guard.key().to_vec();
        guard.unlock().await.unwrap();
        let next = if again { Some(rig.mutex().lock().await.unwrap()) } else { None };
        assert!(next.as_ref().is_none_or(|next| next.key() == key), "the name was not used again");
        arrive(&late).await;
        assert_eq!(written.times().await, 0, "again: {again}");
        if let Some(next) = next {
            assert!(next.txn(written.put()).await.unwrap().succeeded());
            next.unlock().await.unwrap();
            assert_eq!(written.times().await, 1);
            written.remove().await;
        }
        rig.close().await;
    });
}

/// The hold ends while an attempt is unanswered: what is said of it is what was done.
#[test]
fn loss_of_the_hold_tells_what_was_written() {
    side_by_side(
        [
            (Fault::NeverAnswer, true),
            (Fault::NeverAnswer, false),
            (Fault::NeverSend, true),
            (Fault::NeverSend, false),
        ],
        async |scope, (fault, plain)| {
            let (rig, written, guard) = locked(scope).await;
            let committed = matches!(fault, Fault::NeverAnswer);
            let first = written.meets(&rig, fault);
            let delete = async {
                first.hit(1).await;
                if committed {
                    first.answered(1).await;
                }
                scope.client().delete(guard.key(), None).await.unwrap();
            };
            let txn = if plain { written.put() } else { written.create() };
            let (result, ()) = tokio::join!(guard.txn(txn), delete);
            let times = written.times().await;
            match result {
                Ok(response) => assert!(committed && plain && response.succeeded() && times == 1),
                Err(Error::OutcomeUnknown { .. }) => assert!(committed && !plain && times == 1),
                Err(Error::Lost { .. }) => assert!(!committed && times == 0),
                Err(other) => panic!("{other}"),
            }
            written.remove().await;
            assert!(guard.unlock().await.unwrap_err().is_lost());
            rig.close().await;
        },
    );
}

/// A dropped call is settled: committed once, or never to be committed.
#[test]
fn dropped_call_commits_once_at_most() {
    side_by_side([Fault::LoseAnswer, Fault::NeverAnswer, Fault::NeverSend], async |scope, fault| {
        let (rig, written, guard) = locked(scope).await;
        eventually(PATIENCE, "it is watched", async || rig.faults.messages_received("Watch") > 0).await;
        let tasks = alive_tasks();
        let met = written.meets(&rig, fault.clone());
        let committed = !matches!(fault, Fault::NeverSend);
        let cut = async {
            met.hit(1).await;
            if committed {
                met.answered(1).await;
            }
        };
        tokio::select! {
            biased;
            done = guard.txn(written.put()) => panic!("answered: {done:?}"),
            () = cut => {}
        }
        eventually(PATIENCE, "it is settled", async || alive_tasks() <= tasks).await;
        assert_eq!(written.times().await, i64::from(committed), "{fault:?}");
        written.remove().await;
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}
