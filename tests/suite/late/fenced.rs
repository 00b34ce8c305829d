//! A user's transaction, committed only while the lock is held: once at most, whatever happens to its requests.

use std::time::Duration;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use etcd_recipes::{Error, MutexGuard};

use super::{COPIES, Rig, arrive};
use crate::support::check::{Scope, alive_tasks, eventually, scoped};
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

#[tokio::test]
async fn lost_answer_is_found_again() {
    scoped(async |scope| {
        for fault in [Fault::LoseAnswer, Fault::NeverAnswer] {
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
        }
    })
    .await;
}

/// With conditions of the user's own it cannot be told afterwards whether they held.
#[tokio::test]
async fn lost_answer_of_a_conditional_transaction_is_unknown() {
    scoped(async |scope| {
        for fault in [Fault::LoseAnswer, Fault::NeverAnswer] {
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
        }
    })
    .await;
}

/// An attempt that was not committed leaves nothing unknown: the next one decides.
#[tokio::test]
async fn lost_request_is_sent_again() {
    scoped(async |scope| {
        for fault in [Fault::FailBefore, Fault::NeverSend] {
            let (rig, written, guard) = locked(scope).await;
            written.meets(&rig, fault.clone());
            assert!(guard.txn(written.create()).await.unwrap().succeeded());
            written.meets(&rig, fault.clone());
            assert!(!guard.txn(written.create()).await.unwrap().succeeded());
            assert_eq!(written.times().await, 1, "{fault:?}");
            written.remove().await;
            guard.unlock().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}

#[tokio::test]
async fn late_copy_is_refused() {
    scoped(async |scope| {
        for copy in COPIES {
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
        }
    })
    .await;
}

/// The call is dropped, the lock is released and taken again, under the same key; then the request arrives.
#[tokio::test]
async fn request_that_arrives_after_the_hold_is_refused() {
    scoped(async |scope| {
        for again in [false, true] {
            let (rig, written, guard) = locked(scope).await;
            let late = written.meets(&rig, Fault::Hold(Until::Released));
            let resent = written.meets(&rig, Fault::Hold(Until::After(Duration::ZERO)));
            tokio::select! {
                biased;
                done = guard.txn(written.put()) => panic!("not held back: {done:?}"),
                () = late.hit(1) => {}
            }
            let key = guard.key().to_vec();
            guard.unlock().await.unwrap();
            let next = if again { Some(rig.mutex().lock().await.unwrap()) } else { None };
            assert!(next.as_ref().is_none_or(|next| next.key() == key), "the name was not used again");
            // Until it is sent again the session still waits for the answer.
            resent.hit(1).await;
            arrive(&late).await;
            assert_eq!(written.times().await, 0, "again: {again}");
            if let Some(next) = next {
                assert!(next.txn(written.put()).await.unwrap().succeeded());
                next.unlock().await.unwrap();
                assert_eq!(written.times().await, 1);
                written.remove().await;
            }
            rig.close().await;
        }
    })
    .await;
}

/// The hold ends while an attempt is unanswered: what is said of it is what was done.
#[tokio::test]
async fn loss_of_the_hold_tells_what_was_written() {
    scoped(async |scope| {
        for (fault, plain) in [
            (Fault::NeverAnswer, true),
            (Fault::NeverAnswer, false),
            (Fault::NeverSend, true),
            (Fault::NeverSend, false),
        ] {
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
        }
    })
    .await;
}

/// A dropped call is followed to its end, once.
#[tokio::test]
async fn dropped_call_commits_once_at_most() {
    scoped(async |scope| {
        for fault in [Fault::LoseAnswer, Fault::NeverAnswer, Fault::NeverSend] {
            let (rig, written, guard) = locked(scope).await;
            eventually(super::AT_ONCE, "it is watched", async || rig.faults.messages_received("Watch") > 0)
                .await;
            let tasks = alive_tasks();
            let met = written.meets(&rig, fault.clone());
            tokio::select! {
                biased;
                done = guard.txn(written.put()) => panic!("answered: {done:?}"),
                () = met.hit(1) => {}
            }
            eventually(2 * super::AT_ONCE, "it is followed to its end", async || alive_tasks() <= tasks)
                .await;
            assert_eq!(written.times().await, 1, "{fault:?}");
            written.remove().await;
            guard.unlock().await.unwrap();
            rig.close().await;
        }
    })
    .await;
}
