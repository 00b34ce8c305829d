//! Sessions beside each other: leases of their own over shared connections and streams.

use std::time::{Duration, Instant};

use etcd_recipes::{Error, Mutex, Session, SessionState};
use futures::future::join_all;

use crate::support::check::{Scope, eventually, scoped, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, generation, owns, reaches};

const TTL: Duration = Duration::from_secs(3);

async fn first(scope: &Scope) -> Session {
    connect(scope, Session::builder([scope.endpoint()]).ttl(TTL)).await
}

async fn another(scope: &Scope, beside: &Session) -> Session {
    let session = beside.beside().await.unwrap();
    owns(scope, &session);
    session
}

#[tokio::test]
async fn each_has_a_lease_of_its_own_and_one_that_is_revoked_is_no_loss_to_the_other() {
    scoped(async |scope| {
        let one = first(scope).await;
        let two = another(scope, &one).await;
        assert_ne!(one.lease_id(), two.lease_id());
        assert_eq!((two.ttl(), two.state()), (TTL, SessionState::Connected { generation: 1 }));
        let held = Mutex::new(&one, scope.key("one")).unwrap().lock().await.unwrap();
        let lost = Mutex::new(&two, scope.key("two")).unwrap().lock().await.unwrap();
        let mut waiting = tokio::spawn({
            let mutex = Mutex::new(&two, scope.key("one")).unwrap();
            async move { mutex.lock().await }
        });

        scope.client().lease_revoke(two.lease_id().unwrap()).await.unwrap();
        generation(scope, &two, 2).await;
        assert!(!lost.is_held());
        assert!(held.is_held());
        assert_eq!(one.state(), SessionState::Connected { generation: 1 });

        // Two locks of one name exclude each other, also on sessions beside each other.
        assert!(tokio::time::timeout(TTL, &mut waiting).await.is_err(), "two hold one lock");
        assert!(held.is_held(), "not renewed any more");
        held.unlock().await.unwrap();
        let guard = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
        guard.unlock().await.unwrap();
        two.close().await.unwrap();
        one.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_connections_end_with_the_last_and_not_with_the_first() {
    scoped(async |scope| {
        let one = first(scope).await;
        let two = another(scope, &one).await;
        let held = Mutex::new(&two, scope.name()).unwrap().lock().await.unwrap();
        one.close().await.unwrap();
        assert_eq!((one.state(), one.lease_id()), (SessionState::Closed, None));
        assert!(matches!(one.beside().await, Err(Error::Closed)));

        // Longer than a lease lives that nobody renews, and with a hand-off over the watch they shared.
        tokio::time::sleep(TTL * 2).await;
        assert!(held.is_held());
        let three = another(scope, &two).await;
        let next = Mutex::new(&three, scope.name()).unwrap();
        let (next, ()) = tokio::join!(next.lock(), async {
            eventually(PATIENCE, "a waiter", async || scope.keys().await.len() == 2).await;
            held.unlock().await.unwrap();
        });
        next.unwrap().unlock().await.unwrap();
        drop(two);
        three.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_keepalive_thread_serves_all_and_ends_with_the_last() {
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "etcd-keepalive").count()
    };
    scoped(async |scope| {
        let one = connect(scope, Session::builder([scope.endpoint()]).ttl(TTL).keepalive_thread()).await;
        let two = another(scope, &one).await;
        assert!(threads() >= 1);
        one.close().await.unwrap();
        // Blocks the runtime of this test: only the thread can have renewed the lease.
        std::thread::sleep(TTL * 2);
        assert!(two.is_alive());
        two.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn all_wait_over_one_watch_stream_and_live_by_one_keepalive_stream() {
    if lacking(Needs::Metrics) {
        return;
    }
    const SESSIONS: usize = 50;
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let one = first(scope).await;
        let held = Mutex::new(&one, scope.name()).unwrap().lock().await.unwrap();
        let begin = server.metrics().await;
        let others = join_all((1..SESSIONS).map(|_| another(scope, &one))).await;
        let waiting = others.iter().map(|session| {
            let mutex = Mutex::new(session, scope.name()).unwrap();
            tokio::spawn(async move { mutex.lock().await.unwrap().unlock().await.unwrap() })
        });
        let waiting: Vec<_> = waiting.collect();
        eventually(PATIENCE, "all wait", async || scope.keys().await.len() == SESSIONS).await;
        // Every lease is renewed, some more than once.
        let beats = async || server.metrics().await.messages_received("LeaseKeepAlive");
        let enough = begin.messages_received("LeaseKeepAlive") + 2 * SESSIONS as u64;
        eventually(PATIENCE, "keepalives of all", async || beats().await >= enough).await;
        assert!(others.iter().all(Session::is_alive));

        held.unlock().await.unwrap();
        for waiter in waiting {
            tokio::time::timeout(PATIENCE, waiter).await.expect("stuck").unwrap();
        }
        let end = server.metrics().await;
        let streams = |method| end.calls(method) - begin.calls(method);
        assert!(streams("Watch") <= 1, "{} watch streams", streams("Watch"));
        // One that was slow may have been replaced.
        assert!(streams("LeaseKeepAlive") <= 2, "{} keepalive streams", streams("LeaseKeepAlive"));
        join_all(others.iter().map(Session::close)).await;
        one.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn sessions_that_begin_together_do_not_beat_together() {
    if lacking(Needs::Metrics) {
        return;
    }
    const SESSIONS: usize = 60;
    /// How long one look at the counters stands for.
    const SLOT: Duration = Duration::from_millis(100);
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let one = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(6))).await;
        let others = join_all((1..SESSIONS).map(|_| another(scope, &one))).await;
        let beats = async || server.metrics().await.messages_received("LeaseKeepAlive");
        let (mut last, begin) = (beats().await, beats().await);
        let (mut most, mut looks, mut calm) = (0, 0, true);
        while last < begin + 2 * SESSIONS as u64 {
            let start = Instant::now();
            tokio::time::sleep(SLOT).await;
            let now = beats().await;
            // A machine that stood still has more to tell at once, then and right after.
            let before = std::mem::replace(&mut calm, start.elapsed() < SLOT * 2);
            if calm && before {
                (most, looks) = (most.max(now - last), looks + 1);
            }
            last = now;
        }
        assert!(looks >= 10, "only {looks} looks count");
        // Evenly there are 3 in a slot; in step, all.
        assert!(most < SESSIONS as u64 / 2, "{most} of {SESSIONS} at once");
        join_all(others.iter().map(Session::close)).await;
        one.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_goes_silent_suspends_all_and_all_recover_through_another_stream() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let faults = crate::support::faults::Faults::new(scope.endpoint());
        let builder = Session::builder_with_client(faults.client().await).ttl(Duration::from_secs(5));
        let one = connect(scope, builder).await;
        let two = another(scope, &one).await;
        for round in 0..3 {
            let (before, streams) =
                (faults.messages_received("LeaseKeepAlive"), faults.calls("LeaseKeepAlive"));
            faults.swallow_answers("LeaseKeepAlive", 2);
            let swallowed = async || faults.messages_received("LeaseKeepAlive") >= before + 2;
            eventually(PATIENCE, "two answers lost", swallowed).await;
            for session in [&one, &two] {
                reaches(session, SessionState::Connected { generation: 1 }).await;
            }
            let renewed = async || faults.messages_received("LeaseKeepAlive") >= before + 6;
            eventually(PATIENCE, "keepalives answered again", renewed).await;
            assert!(faults.calls("LeaseKeepAlive") > streams, "round {round}: on the stream that lost them");
        }
        two.close().await.unwrap();
        one.close().await.unwrap();
    })
    .await;
}
