//! Late copies of the requests of one hold, while the next hold of the same session has the same key.

use etcd_client::{Txn, TxnOp};
use etcd_recipes::{Mutex, MutexGuard};

use super::{COPIES, Copy, PATIENCE, Rig, arrive, assert_holds, each, side_by_side};
use crate::support::check::{eventually, scoped};
use crate::support::faults::{Fault, Injection, Until};
use crate::support::line::{Foreign, grown_to, text};

impl Rig<'_> {
    /// Waits until the session may use the number of this key again, and makes it the next one. All names draw from
    /// one pool.
    async fn reuse(&self, key: &str) {
        let number = |key: &str| key.rsplit('-').next().map(str::to_owned);
        let mut others = Vec::new();
        eventually(PATIENCE, "the number of the key is used again", async || {
            let other = self.scope.key(&format!("other{}", others.len()));
            others.push(Mutex::new(&self.session, other).unwrap().lock().await.unwrap());
            others.last().is_some_and(|other| number(&text(other.key())) == number(key))
        })
        .await;
        for other in others {
            other.unlock().await.unwrap();
        }
    }
}

/// Locks again and makes sure that key names are used again, without which these tests show nothing.
async fn lock_again(rig: &Rig<'_>, key: &str) -> MutexGuard {
    let guard = tokio::time::timeout(PATIENCE, rig.mutex().lock()).await.expect("stuck").unwrap();
    assert_eq!(text(guard.key()), key, "the name of the key was not used again");
    guard
}

#[test]
fn late_entry_does_not_touch_the_next_hold() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "lock").await;
        let late = rig.txns().inject(copy.fault());
        let first = rig.mutex().lock().await.unwrap();
        let (key, token) = (text(first.key()), first.token());
        first.unlock().await.unwrap();
        let second = lock_again(&rig, &key).await;
        assert!(second.token() > token);
        let before = rig.line().await;
        arrive(&late).await;
        assert_eq!(rig.line().await, before, "{copy:?}");
        assert_holds(&rig, &second).await;
        second.unlock().await.unwrap();
        assert!(rig.line().await.is_empty(), "{copy:?}");
        rig.close().await;
    });
}

/// Whoever tries and does not get the lock is done with it, also when it is free by the time a copy arrives.
#[test]
fn late_try_that_failed_does_not_take_the_lock() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "lock").await;
        let holder = Foreign::enter(scope, &rig.name).await;
        let late = rig.txns().inject(copy.fault());
        assert!(rig.mutex().try_lock().await.unwrap().is_none());
        holder.leave().await;
        arrive(&late).await;
        assert!(rig.line().await.is_empty(), "{copy:?}");
        let guard = rig.mutex().try_lock().await.unwrap().expect("somebody has it");
        assert_holds(&rig, &guard).await;
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}

#[test]
fn late_entry_does_not_move_the_next_waiter() {
    side_by_side(COPIES, async |scope, copy| {
        let rig = Rig::new(scope, "lock").await;
        let late = rig.txns().inject(copy.fault());
        let first = rig.mutex().lock().await.unwrap();
        let key = text(first.key());
        first.unlock().await.unwrap();
        let holder = Foreign::enter(scope, &rig.name).await;
        let mutex = rig.mutex();
        let waiting = tokio::spawn(async move { mutex.lock().await });
        let before = grown_to(&scope.client(), &rig.name, 2).await;
        assert_eq!(before[1].key, key, "the name of the key was not used again");
        let last = Foreign::enter(scope, &rig.name).await;
        arrive(&late).await;
        assert_eq!(rig.line().await[..2], before, "{copy:?}");
        holder.leave().await;
        let second = waiting.await.unwrap().unwrap();
        assert!(second.token() > before[1].created);
        second.unlock().await.unwrap();
        last.leave().await;
        rig.close().await;
    });
}

#[test]
fn late_release_does_not_touch_the_next_hold() {
    side_by_side(each(COPIES, [false, true]), async |scope, (copy, dropped)| {
        let rig = Rig::new(scope, "lock").await;
        let first = rig.mutex().lock().await.unwrap();
        let (key, token) = (text(first.key()), first.token());
        let late = rig.txns().inject(copy.fault());
        if dropped {
            drop(first);
            let what = "the dropped guard is released";
            eventually(PATIENCE, what, async || rig.line().await.is_empty()).await;
            rig.reuse(&key).await;
        } else {
            first.unlock().await.unwrap();
        }
        let second = lock_again(&rig, &key).await;
        assert!(second.token() > token);
        let before = rig.line().await;
        arrive(&late).await;
        assert_eq!(rig.line().await, before, "{copy:?}, dropped: {dropped}");
        assert_holds(&rig, &second).await;
        second.unlock().await.unwrap();
        rig.close().await;
    });
}

/// Cancels the session's first call, whose entry meets a fault, and waits until the session has given it up. Copies of
/// that are on their way then.
async fn give_up(rig: &Rig<'_>, entry: Fault, copy: Copy) -> Injection {
    let committed = matches!(entry, Fault::NeverAnswer);
    let entry = rig.txns().inject(entry);
    // One transaction moves the op slot, or finds that the entry was made; then another deletes it.
    let late = rig.faults.on("Txn").containing("/op/").times(1 + usize::from(committed)).inject(copy.fault());
    let mutex = rig.mutex();
    let cancelled = tokio::spawn(async move { mutex.lock().await });
    if committed {
        entry.answered(1).await;
        assert_eq!(rig.line().await[0].key, rig.first_key());
    } else {
        entry.hit(1).await;
    }
    cancelled.abort();
    late.hit(1).await;
    rig.idle().await;
    assert!(rig.line().await.is_empty());
    late
}

/// A call that is cancelled while its request is under way gives up: a transaction sees to it that no copy of the
/// entry leaves a key. Copies of that transaction arrive late here.
#[test]
fn late_giving_up_does_not_touch_the_next_hold() {
    side_by_side(each(COPIES, [Fault::NeverAnswer, Fault::NeverSend]), async |scope, (copy, entry)| {
        let rig = Rig::new(scope, "lock").await;
        let late = give_up(&rig, entry, copy).await;
        let second = lock_again(&rig, &rig.first_key()).await;
        let before = rig.line().await;
        arrive(&late).await;
        assert_eq!(rig.line().await, before, "{copy:?}");
        assert_holds(&rig, &second).await;
        second.unlock().await.unwrap();
        rig.close().await;
    });
}

/// The op slot that the cancelled call moved is used by a later transaction, which must not take the late copy of the
/// giving up for its own.
#[test]
fn late_giving_up_is_not_taken_for_a_users_transaction() {
    side_by_side(each(COPIES, [Fault::NeverAnswer, Fault::NeverSend]), async |scope, (copy, entry)| {
        let rig = Rig::new(scope, "lock").await;
        let late = give_up(&rig, entry, copy).await;
        let guard = lock_again(&rig, &rig.first_key()).await;
        // The first attempt is late; before the second, the copy arrives.
        let written = scope.key("written");
        let lost = rig.faults.on("Txn").containing(&written).inject(Fault::Hold(Until::Released));
        let put = Txn::new().and_then([TxnOp::put(written.as_str(), "", None)]);
        let (result, ()) = tokio::join!(guard.txn(put), async {
            lost.hit(1).await;
            arrive(&late).await;
        });
        result.unwrap();
        let mut client = scope.client();
        let found = client.get(written.as_str(), None).await.unwrap();
        assert_eq!(found.kvs().len(), 1, "{copy:?}: it was said to be committed");
        client.delete(written.as_str(), None).await.unwrap();
        arrive(&lost).await;
        assert!(client.get(written, None).await.unwrap().kvs().is_empty(), "{copy:?}");
        guard.unlock().await.unwrap();
        rig.close().await;
    });
}

/// A `try_lock` that was refused by its second attempt, while the first is still on its way.
#[tokio::test]
async fn refused_try_lock_takes_nothing_later() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let late = rig.txns().inject(Copy::Resent.fault());
        let mutex = rig.mutex();
        let trying = tokio::spawn(async move { mutex.try_lock().await });
        late.hit(1).await;
        let holder = Foreign::enter(scope, &rig.name).await;
        assert!(trying.await.unwrap().unwrap().is_none());
        holder.leave().await;
        arrive(&late).await;
        assert!(rig.line().await.is_empty(), "{:?}", rig.line().await);
        rig.pass().await;
        rig.close().await;
    })
    .await;
}

#[tokio::test]
async fn late_entry_of_a_lost_lease_is_refused() {
    scoped(async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let lease = rig.session.lease_id().unwrap();
        let late = rig.txns().inject(Copy::Twice.fault());
        let guard = rig.mutex().lock().await.unwrap();
        scope.client().lease_revoke(lease).await.unwrap();
        guard.lost().await;
        let next = rig.mutex().lock().await.unwrap();
        let renewed = rig.session.lease_id().unwrap();
        assert_ne!(renewed, lease);
        scope.owns_lease(renewed);
        let before = rig.line().await;
        late.release();
        late.answered(1).await;
        assert_eq!(rig.line().await, before);
        assert_holds(&rig, &next).await;
        assert!(guard.unlock().await.unwrap_err().is_lost());
        next.unlock().await.unwrap();
        rig.close().await;
    })
    .await;
}
