//! Renewals whose answers are late or lost: a deadline counts from the sending, and one of several is enough.

use std::sync::Arc;
use std::time::Duration;

use etcd_recipes::{Mutex, Session, SessionState};

use crate::support::check::{eventually, scoped};
use crate::support::clock::boottime;
use crate::support::faults::Faults;
use crate::support::holds::{Belief, Deletions, States, reaches};
use crate::support::proxy::{Mode, Proxy};
use crate::support::rounds;
use crate::support::server::PATIENCE;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deadline_counts_from_the_sending_of_the_last_renewal() {
    scoped(async |scope| {
        let ttl = Duration::from_secs(2);
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let proxy = Proxy::start(scope.endpoint()).await;
        let faults = Faults::new(proxy.endpoint());
        let builder = Session::builder_with_client(faults.client().await).ttl(ttl);
        let session = builder.connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let guard = Arc::new(Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap());
        let asked = guard.clone();
        let belief = Belief::of(move || asked.is_held());
        // Answers take a fifth of the TTL, which a session lives with; the last of them arrives long after etcd began
        // to count.
        let to_client = ttl / 5;
        proxy.set(Mode::Delay { to_server: Duration::ZERO, to_client }).await;
        let sent = faults.messages_sent("LeaseKeepAlive");
        eventually(PATIENCE, "two renewals are sent", async || {
            faults.messages_sent("LeaseKeepAlive") >= sent + 2
        })
        .await;
        // This one was the last that etcd hears of.
        faults.swallow_requests("LeaseKeepAlive", usize::MAX);
        let last = boottime();
        let ended = belief.end().await;
        assert!(ended < last + ttl, "held {:?} after the last renewal was sent", ended - last);
        belief.ended_before(deletions.of(guard.key()).await);
        states.suspended_before_lost().await;
        drop(belief);
        faults.clear();
        proxy.set(Mode::Pass).await;
        assert!(Arc::into_inner(guard).unwrap().unlock().await.unwrap_err().is_lost());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_lost_answers_in_a_row_do_not_lose_a_session() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let builder = Session::builder_with_client(faults.client().await).ttl(Duration::from_secs(5));
        let session = builder.connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        for _ in 0..rounds(5, 100) {
            let before = faults.messages_received("LeaseKeepAlive");
            faults.swallow_answers("LeaseKeepAlive", 3);
            eventually(PATIENCE, "three answers are lost", async || {
                faults.messages_received("LeaseKeepAlive") >= before + 3
            })
            .await;
            // The next ones arrive: one opens a stream, the other is the renewal's.
            reaches(&session, SessionState::Connected { generation: 1 }).await;
            assert!(guard.is_held());
        }
        states.never_lost();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
