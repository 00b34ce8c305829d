//! Sessions of a test, whose leases its scope looks after, and what tests ask of guards.

use std::time::Duration;

use etcd_client::proto::{PbTargetUnion, PbTxnRequest};
use etcd_client::{Compare, Txn};
use etcd_recipes::{Session, SessionBuilder, SessionState};

use super::check::Scope;
use super::server::PATIENCE;

/// A session on the scope's server. The TTL is longer than a slow machine pauses.
pub(crate) async fn session(scope: &Scope) -> Session {
    connect(scope, Session::builder([scope.endpoint()])).await
}

/// As [`session`], with options.
pub(crate) async fn connect(scope: &Scope, builder: SessionBuilder) -> Session {
    let session = builder.connect().await.expect("cannot connect a session");
    owns(scope, &session);
    session
}

/// Has the scope check that the session's lease of now is gone at the end.
pub(crate) fn owns(scope: &Scope, session: &Session) -> i64 {
    let lease = session.lease_id().expect("the session has no lease");
    scope.owns_lease(lease);
    lease
}

/// Waits until the session has this generation, whose lease the scope then looks after as well.
pub(crate) async fn generation(scope: &Scope, session: &Session, number: u64) -> i64 {
    reaches(session, SessionState::Connected { generation: number }).await;
    owns(scope, session)
}

/// Waits until the session is in this state.
pub(crate) async fn reaches(session: &Session, state: SessionState) {
    let mut states = session.watch_state();
    let reached = tokio::time::timeout(PATIENCE, states.wait_for(|now| *now == state)).await;
    let last = *session.watch_state().borrow();
    reached.unwrap_or_else(|_| panic!("{last:?}, never {state:?}")).expect("the session's task is gone");
}

/// The create revision of a guard's key, out of its compare.
pub(crate) fn create_revision(compare: Compare) -> i64 {
    let request = PbTxnRequest::from(Txn::new().when([compare]));
    match request.compare[0].target_union {
        Some(PbTargetUnion::CreateRevision(revision)) => revision,
        ref other => panic!("compares {other:?}"),
    }
}

/// Whether a future is still waiting after this time: only for what must *not* happen.
pub(crate) async fn waits<F: Future + Unpin>(time: Duration, future: &mut F) -> bool {
    tokio::time::timeout(time, future).await.is_err()
}
