//! Granting the session's lease with a request whose answer is lost, that is late, or that is sent twice: one session
//! has one lease, and a call that was dropped has none.

use std::collections::BTreeSet;
use std::time::Duration;

use etcd_recipes::{Error, Mutex, Session};
use futures::future::join_all;

use super::{PATIENCE, TTL};
use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::faults::{Fault, Faults, Injection, Until};
use crate::support::rounds;
use crate::support::server::Server;

/// For leases that are to expire in the test. An attempt is given up after a second.
const SHORT: Duration = Duration::from_secs(5);
/// By then etcd has ended them, also on a machine under load.
const EXPIRED: Duration = Duration::from_secs(30);

/// How often each: 100 times in full length.
#[track_caller]
fn times() -> usize {
    rounds(25, 100)
}

/// A session whose grant meets a fault.
struct Granted {
    faults: Faults,
    grant: Injection,
    session: Session,
}

async fn connect(scope: &Scope, ttl: Duration, fault: Fault) -> Granted {
    let faults = Faults::new(scope.endpoint());
    let grant = faults.next("LeaseGrant", fault);
    let builder = Session::builder_with_client(faults.client().await).ttl(ttl).connect_timeout(TTL);
    let session = builder.connect().await.unwrap();
    Granted { faults, grant, session }
}

async fn leases(scope: &Scope) -> BTreeSet<i64> {
    let answer = scope.client().leases().await.unwrap();
    answer.leases().iter().map(etcd_client::LeaseStatus::id).collect()
}

/// Every session has its lease, and there is no other; and it works.
async fn assert_one_lease_each(scope: &Scope, granted: &[Granted]) {
    let own: BTreeSet<i64> = granted.iter().map(|one| one.session.lease_id().unwrap()).collect();
    assert_eq!(own.len(), granted.len());
    assert_eq!(leases(scope).await, own);
    join_all(granted.iter().enumerate().map(async |(number, one)| {
        let mutex = Mutex::new(&one.session, scope.key(&number.to_string())).unwrap();
        mutex.lock().await.unwrap().unlock().await.unwrap();
    }))
    .await;
}

async fn close(granted: Vec<Granted>) {
    join_all(granted.iter().map(|one| one.session.close())).await;
}

#[tokio::test]
async fn lost_answer_of_a_grant_leaves_one_lease() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        for fault in [Fault::LoseAnswer, Fault::NeverAnswer] {
            let granted = join_all((0..times()).map(|_| connect(scope, TTL, fault.clone()))).await;
            assert_one_lease_each(scope, &granted).await;
            close(granted).await;
            assert!(leases(scope).await.is_empty(), "{fault:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn late_grant_does_not_touch_the_lease() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        for fault in [Fault::Twice(Until::Released), Fault::Hold(Until::Released)] {
            let granted = join_all((0..times()).map(|_| connect(scope, TTL, fault.clone()))).await;
            for one in &granted {
                one.grant.release();
                assert!(one.grant.answered(1).await[0].is_err(), "{fault:?}: granted a second time");
            }
            assert_one_lease_each(scope, &granted).await;
            assert!(granted.iter().all(|one| one.session.is_alive()));
            close(granted).await;
            assert!(leases(scope).await.is_empty(), "{fault:?}");
        }
    })
    .await;
}

/// Nobody keeps alive what a late grant brings back, so it goes after its time.
#[tokio::test]
async fn late_grant_after_the_end_expires() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        for fault in [Fault::Twice(Until::Released), Fault::Hold(Until::Released)] {
            let granted = join_all((0..times()).map(|_| connect(scope, SHORT, fault.clone()))).await;
            let late: Vec<(Faults, Injection)> =
                granted.iter().map(|one| (one.faults.clone(), one.grant.clone())).collect();
            close(granted).await;
            for (faults, grant) in &late {
                let calls = faults.calls("LeaseGrant");
                grant.release();
                grant.answered(1).await;
                assert_eq!(faults.calls("LeaseGrant"), calls);
            }
            eventually(EXPIRED, "no lease is left", async || leases(scope).await.is_empty()).await;
        }
    })
    .await;
}

#[tokio::test]
async fn cancelled_connect_leaves_no_lease() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let cancelled = join_all((0..times()).map(async |_| {
            let faults = Faults::new(scope.endpoint());
            let grant = faults.next("LeaseGrant", Fault::Hold(Until::Released));
            let builder = Session::builder_with_client(faults.client().await).ttl(SHORT);
            // Less than the pause before another attempt joins, so that it is the held request that is cancelled.
            let call = tokio::time::timeout(Duration::from_millis(100), builder.connect());
            assert!(call.await.is_err(), "it was not held back");
            (faults, grant)
        }))
        .await;
        // In the background the session goes on until it knows that the lease is gone.
        eventually(PATIENCE, "the cancelled calls have no lease", async || {
            let revoked = cancelled.iter().all(|(faults, _)| faults.calls("LeaseRevoke") > 0);
            revoked && leases(scope).await.is_empty()
        })
        .await;
        for (_, grant) in &cancelled {
            grant.release();
            grant.answered(1).await;
        }
        eventually(EXPIRED, "no lease is left", async || leases(scope).await.is_empty()).await;
        let next = connect(scope, TTL, Fault::FailBefore).await;
        assert_one_lease_each(scope, std::slice::from_ref(&next)).await;
        close(vec![next]).await;
    })
    .await;
}

/// That a lease exists does not tell for how long; a keepalive does, and the stream it is sent on may stand still.
#[tokio::test]
async fn lost_answer_of_a_grant_does_not_wait_for_a_silent_stream() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let faults = Faults::new(scope.endpoint());
        faults.next("LeaseGrant", Fault::NeverAnswer);
        faults.swallow_requests("LeaseKeepAlive", 1);
        // An attempt is given up after two seconds, a stream after four.
        let builder = Session::builder_with_client(faults.client().await).ttl(TTL);
        let session = builder.connect_timeout(Duration::from_secs(3)).connect().await.unwrap();
        assert_eq!(leases(scope).await, BTreeSet::from([session.lease_id().unwrap()]));
        assert!(faults.calls("LeaseKeepAlive") >= 2);
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn connect_that_cannot_learn_of_its_lease_leaves_none() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let faults = Faults::new(scope.endpoint());
        let grant = faults.next("LeaseGrant", Fault::NeverAnswer);
        faults.swallow_requests("LeaseKeepAlive", usize::MAX);
        let builder = Session::builder_with_client(faults.client().await).ttl(TTL);
        let failed = builder.connect_timeout(Duration::from_secs(1)).connect().await.unwrap_err();
        assert!(matches!(failed, Error::Unreachable { .. }), "{failed}");
        assert!(grant.answered(1).await[0].is_ok());
        eventually(PATIENCE, "the lease is revoked", async || leases(scope).await.is_empty()).await;
    })
    .await;
}
