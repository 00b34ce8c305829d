//! Writes of a holder that does not know yet that it lost: etcd refuses them.

use std::sync::Arc;

use etcd_client::{Client, Txn, TxnOp};
use etcd_recipes::{Error, Mutex, MutexGuard, Session};

use crate::support::check::{Scope, scoped};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::rounds;

/// Trials of each kind: the third counts twice, so 100 by default.
#[track_caller]
fn trials() -> usize {
    rounds(25, 250)
}

/// A holder that hears nothing from its watches, and another that waits for the lock.
struct Pair {
    faults: Faults,
    old: Session,
    new: Session,
    client: Client,
    name: String,
    data: String,
}

impl Pair {
    async fn connect(scope: &Scope) -> Self {
        let faults = Faults::new(scope.endpoint());
        let old = Session::with_client(faults.client().await).await.unwrap();
        let new = Session::connect([scope.endpoint()]).await.unwrap();
        scope.owns_lease(new.lease_id().unwrap());
        Self { faults, old, new, client: scope.client(), name: scope.key("lock"), data: scope.key("data") }
    }

    async fn lock(&self, session: &Session) -> MutexGuard {
        Mutex::new(session, &self.name).unwrap().lock().await.unwrap()
    }

    fn put(&self, value: &str) -> TxnOp {
        TxnOp::put(self.data.as_str(), value, None)
    }

    /// Takes the lock over, and writes.
    async fn take_over(&self) -> MutexGuard {
        let guard = self.lock(&self.new).await;
        assert!(guard.txn(Txn::new().and_then([self.put("new")])).await.unwrap().succeeded());
        guard
    }

    /// The old holder's write must have been refused, by etcd.
    async fn refused(&self, old: MutexGuard, result: Result<etcd_client::TxnResponse, Error>) {
        let error = result.unwrap_err();
        assert!(error.is_lost(), "{error:?}");
        assert!(!old.is_held(), "a refused write tells the loss");
        let mut client = self.client.clone();
        let compared =
            client.txn(Txn::new().when([old.compare()]).and_then([self.put("old")])).await.unwrap();
        assert!(!compared.succeeded());
        let value = client.get(self.data.as_str(), None).await.unwrap();
        assert_eq!(value.kvs()[0].value(), b"new", "an old holder wrote");
        assert!(old.unlock().await.unwrap_err().is_lost());
    }

    async fn close(mut self) {
        self.client.delete(self.data.as_str(), None).await.unwrap();
        self.old.close().await.unwrap();
        self.new.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_after_the_key_was_deleted_is_refused() {
    scoped(async |scope| {
        let pair = Pair::connect(scope).await;
        scope.owns_lease(pair.old.lease_id().unwrap());
        pair.faults.swallow_answers("Watch", usize::MAX);
        for _ in 0..trials() {
            let old = pair.lock(&pair.old).await;
            pair.client.clone().delete(old.key(), None).await.unwrap();
            let new = pair.take_over().await;
            assert!(old.is_held(), "it was not to hear of it");
            let result = old.txn(Txn::new().and_then([pair.put("old")])).await;
            pair.refused(old, result).await;
            new.unlock().await.unwrap();
        }
        pair.faults.clear();
        pair.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_arrives_after_the_key_was_deleted_is_refused() {
    scoped(async |scope| {
        let pair = Pair::connect(scope).await;
        scope.owns_lease(pair.old.lease_id().unwrap());
        pair.faults.swallow_answers("Watch", usize::MAX);
        for _ in 0..trials() {
            let old = Arc::new(pair.lock(&pair.old).await);
            let write = pair.faults.on("Txn").containing(&pair.data).inject(Fault::Hold(Until::Released));
            let (writer, put) = (old.clone(), Txn::new().and_then([pair.put("old")]));
            let writing = tokio::spawn(async move { writer.txn(put).await });
            write.hit(1).await;
            pair.client.clone().delete(old.key(), None).await.unwrap();
            let new = pair.take_over().await;
            assert!(old.is_held(), "it was not to hear of it");
            write.release();
            let result = writing.await.unwrap();
            pair.refused(Arc::into_inner(old).unwrap(), result).await;
            new.unlock().await.unwrap();
        }
        pair.faults.clear();
        pair.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_after_the_lease_was_revoked_is_refused() {
    scoped(async |scope| {
        let pair = Pair::connect(scope).await;
        for _ in 0..trials() * 2 {
            let old = pair.lock(&pair.old).await;
            let lease = pair.old.lease_id().unwrap();
            scope.owns_lease(lease);
            // At once, while nobody watches the key yet.
            pair.client.clone().lease_revoke(lease).await.unwrap();
            let new = pair.take_over().await;
            let result = old.txn(Txn::new().and_then([pair.put("old")])).await;
            pair.refused(old, result).await;
            new.unlock().await.unwrap();
        }
        pair.close().await;
    })
    .await;
}

/// The session hears of the end while a write is on its way. Its answer, a moment later, says that it was not done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_under_way_when_the_lease_ends_is_told_of_it() {
    scoped(async |scope| {
        let pair = Pair::connect(scope).await;
        let mut told = 0;
        for _ in 0..5 {
            let old = Arc::new(pair.lock(&pair.old).await);
            let lease = pair.old.lease_id().unwrap();
            scope.owns_lease(lease);
            let write = pair.faults.on("Txn").containing(&pair.data).inject(Fault::Hold(Until::Released));
            let (writer, put) = (old.clone(), Txn::new().and_then([pair.put("old")]));
            let writing = tokio::spawn(async move { writer.txn(put).await });
            write.hit(1).await;
            let mut state = pair.old.watch_state();
            let connected = *state.borrow_and_update();
            pair.client.clone().lease_revoke(lease).await.unwrap();
            // It meets the end of the lease.
            let other = Mutex::new(&pair.old, scope.key("other")).unwrap();
            let meeting = tokio::spawn(async move { other.lock().await?.unlock().await });
            state.wait_for(|state| *state != connected).await.unwrap();
            write.release();
            told += usize::from(writing.await.unwrap().unwrap_err().is_lost());
            meeting.await.unwrap().unwrap();
        }
        // The answer of a slow machine may come too late.
        assert!(told > 0, "nobody was told");
        pair.close().await;
    })
    .await;
}
