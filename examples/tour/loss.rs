//! Locks that are lost, and what that does to those who thought they held them.

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::etcd_client::{Txn, TxnOp};
use etcd_recipes::{Mutex, SessionState};

use super::{Cast, chapter, is_lost, lease, read, see, tell};

/// An operator deletes the key of Alice's lock.
pub(crate) async fn delete_key(cast: &mut Cast) -> Result<()> {
    chapter("An old holder is refused");
    let (name, key) = (format!("{}/exports", cast.name), format!("{}/export", cast.name));
    let put = |by: &str| [TxnOp::put(key.as_str(), by, None)];

    tell(
        "Alice holds a lock and writes what it guards, in a transaction that counts only while she holds it.",
    );
    let alice = Mutex::new(&cast.alice, &name)?.lock().await?;
    alice.txn(Txn::new().and_then(put("by alice"))).await?;
    see(&format!("the export was written {}", read(&mut cast.operator, &key).await?));

    tell("Now an operator deletes her key from outside, and Bob locks.");
    cast.operator.delete(alice.key(), None).await?;
    let bob = Mutex::new(&cast.bob, &name)?.lock().await?;
    see(&format!("bob has it, with the token {} after {} of alice", bob.token(), alice.token()));

    tell("Alice is told. Asking is as good, and costs next to nothing.");
    alice.lost().await;
    ensure!(!alice.is_held(), "Alice believes to hold a lock that is deleted");
    see("alice.is_held(): false");

    tell(
        "She does not ask and writes all the same. Her guard refuses; and if a transaction of her own has the",
    );
    tell(
        "guard's compare, etcd refuses, so that a write is stopped, too, that was on its way when the lock was lost.",
    );
    let late = alice.txn(Txn::new().and_then(put("by alice, late"))).await;
    ensure!(is_lost(late), "Alice's write was not refused");
    let own = Txn::new().when([alice.compare()]).and_then(put("by alice, late"));
    let own = cast.alice.client().txn(own).await?;
    ensure!(!own.succeeded(), "Alice's own transaction was not refused");
    bob.txn(Txn::new().and_then(put("by bob"))).await?;
    let written = read(&mut cast.operator, &key).await?;
    ensure!(written == "by bob", "somebody wrote {written}");
    see(&format!("alice: refused, refused; bob: the export was written {written}"));
    ensure!(is_lost(alice.unlock().await), "unlocking a lost lock went well");

    bob.unlock().await?;
    cast.operator.delete(key, None).await?;
    Ok(())
}

/// An operator revokes Alice's lease.
pub(crate) async fn revoke_lease(cast: &mut Cast) -> Result<()> {
    chapter("A lease is lost, and the session goes on");
    let mutex = Mutex::new(&cast.alice, format!("{}/imports", cast.name))?;
    let guard = mutex.lock().await?;
    let (token, old) = (guard.token(), lease(&cast.alice)?);

    tell("Alice holds a lock. Her lease is revoked from outside, as it would expire after a long silence.");
    cast.operator.lease_revoke(old).await?;
    guard.lost().await;
    ensure!(!guard.is_held(), "the guard outlived its lease");
    see("her guard is lost, for ever");

    tell("The session takes a new lease by itself: its next generation.");
    let mut state = cast.alice.watch_state();
    let renewed = || cast.alice.lease_id().is_some_and(|lease| lease != old);
    state
        .wait_for(|state| matches!(state, SessionState::Connected { .. }) && renewed())
        .await
        .context("no new lease")?;
    ensure!(lease(&cast.alice)? != old && !guard.is_held(), "the old generation came back");
    see(&format!("alice  lease {:016x}  {:?}", lease(&cast.alice)?, cast.alice.state()));

    tell("What she locks from now on lives on the new lease, and the old guard stays lost.");
    let again = mutex.lock().await?;
    ensure!(again.is_held() && again.token() > token, "she cannot lock again");
    see(&format!("alice has the lock again, with the token {} after {token}", again.token()));
    again.unlock().await?;
    Ok(())
}
