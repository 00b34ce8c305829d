//! Waiters and holders whose watch missed something: cut off, compacted, restarted.

use std::time::Duration;

use etcd_recipes::etcd_client::{CompactionOptions, Txn, TxnOp};
use etcd_recipes::{Mutex, MutexGuard, Session};
use tokio::task::JoinHandle;

use crate::support::background;
use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::line::{Foreign, line};
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::{connect, session};

fn mutex(session: &Session, scope: &Scope) -> Mutex {
    Mutex::new(session, scope.name()).unwrap()
}

fn lock(mutex: Mutex) -> JoinHandle<MutexGuard> {
    tokio::spawn(async move { mutex.lock().await.unwrap() })
}

async fn in_line(scope: &Scope, count: usize) {
    eventually(PATIENCE, &format!("{count} in line"), async || scope.keys().await.len() == count).await;
}

async fn taken(waiter: JoinHandle<MutexGuard>) -> MutexGuard {
    tokio::time::timeout(PATIENCE, waiter).await.expect("its turn was missed").unwrap()
}

/// A session that nothing short of a minute's silence loses.
async fn patient(scope: &Scope, endpoint: String) -> Session {
    connect(scope, Session::builder([endpoint]).ttl(Duration::from_secs(60))).await
}

#[tokio::test]
async fn a_waiter_that_was_cut_off_when_its_turn_came_gets_it() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let (near, far) = (session(scope).await, patient(scope, proxy.endpoint()).await);
        for (mode, compact) in
            [(Mode::Refuse, false), (Mode::Refuse, true), (Mode::Drop, true), (Mode::HoleBoth, true)]
        {
            let held = mutex(&near, scope).lock().await.unwrap();
            let waiter = lock(mutex(&far, scope));
            in_line(scope, 2).await;
            proxy.set(mode).await;
            let token = held.token();
            held.unlock().await.unwrap();
            if compact {
                // At the very revision of the deletion, which servers may then forget to tell.
                server.compact().await;
            }
            proxy.set(Mode::Pass).await;
            let guard = taken(waiter).await;
            assert!(guard.token() > token);
            guard.unlock().await.unwrap();
        }
        near.close().await.unwrap();
        far.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn waiters_far_back_survive_a_cut_and_a_compaction() {
    const MANY: usize = 12;
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let (near, far) = (session(scope).await, patient(scope, proxy.endpoint()).await);
        let held = mutex(&near, scope).lock().await.unwrap();
        let others: Vec<_> = (0..MANY).map(|_| lock(mutex(&near, scope))).collect();
        in_line(scope, 1 + MANY).await;
        let waiter = lock(mutex(&far, scope));
        in_line(scope, 2 + MANY).await;
        proxy.set(Mode::Refuse).await;
        held.unlock().await.unwrap();
        let turns = others.into_iter().map(|other| async { taken(other).await.unlock().await.unwrap() });
        futures::future::join_all(turns).await;
        server.compact().await;
        proxy.set(Mode::Pass).await;
        taken(waiter).await.unlock().await.unwrap();
        near.close().await.unwrap();
        far.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn holders_and_waiters_survive_a_restart_and_a_crash_of_etcd() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let (a, b) = (patient(scope, server.endpoint()).await, patient(scope, server.endpoint()).await);
        let held = mutex(&a, scope).lock().await.unwrap();
        let waiter = lock(mutex(&b, scope));
        in_line(scope, 2).await;
        server.restart().await;
        server.kill();
        server.launch();
        server.ready().await;
        assert!(held.is_held() && !waiter.is_finished());
        in_line(scope, 2).await;
        held.unlock().await.unwrap();
        let guard = taken(waiter).await;
        guard.unlock().await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

/// How many watches the server has.
async fn watchers(server: &Server) -> f64 {
    server.metrics().await.value("etcd_debugging_mvcc_watcher_total").expect("no such metric")
}

#[tokio::test]
async fn a_holder_whose_key_was_deleted_and_compacted_away_notices() {
    if lacking(Needs::Metrics) {
        return;
    }
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let (near, far) = (session(scope).await, patient(scope, proxy.endpoint()).await);
        // At once, with nothing in between, and before its key is watched: the session's runtime stands still.
        let held = mutex(&near, scope).lock().await.unwrap();
        let (mut client, key) = (scope.client(), held.key().to_vec());
        let gone = async move {
            let deleted = client.delete(key, None).await.unwrap().header().unwrap().revision();
            let options = CompactionOptions::new().with_physical();
            client.compact(deleted, Some(options)).await.unwrap();
        };
        std::thread::spawn(|| background().block_on(gone)).join().unwrap();
        tokio::time::timeout(PATIENCE, held.lost()).await.expect("the loss is noticed");
        drop(held);

        // Watched, and cut off.
        for watched in [false, true] {
            let before = watchers(&server).await;
            let held = mutex(&far, scope).lock().await.unwrap();
            if watched {
                eventually(PATIENCE, "its key is watched", async || watchers(&server).await > before).await;
            }
            proxy.set(Mode::Refuse).await;
            scope.client().delete(held.key(), None).await.unwrap();
            server.compact().await;
            assert!(held.is_held(), "nobody told it yet");
            proxy.set(Mode::Pass).await;
            tokio::time::timeout(PATIENCE, held.lost()).await.expect("the loss is noticed");
            assert!(held.unlock().await.unwrap_err().is_lost());
        }
        near.close().await.unwrap();
        far.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_holder_that_was_cut_off_while_nothing_happened_keeps_the_lock() {
    let server = Server::fast().await;
    let proxy = Proxy::start(server.endpoint()).await;
    scoped_on(&server, async |scope| {
        let far = patient(scope, proxy.endpoint()).await;
        let held = mutex(&far, scope).lock().await.unwrap();
        for mode in [Mode::Refuse, Mode::Drop, Mode::HoleBoth] {
            proxy.set(mode).await;
            scope.client().put("unrelated", "", None).await.unwrap();
            server.compact().await;
            proxy.set(Mode::Pass).await;
            proxy.reset_all().await;
            assert!(held.is_held());
        }
        // Gone from the watch's history, not from etcd: a read tells.
        let mut lost = Box::pin(held.lost());
        assert!(crate::support::sessions::waits(Duration::from_millis(500), &mut lost).await);
        held.unlock().await.unwrap();
        far.close().await.unwrap();
        scope.client().delete("unrelated", None).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_waiter_whose_new_watch_may_lag_does_not_rely_on_it() {
    const MANY: usize = 60;
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let others = Foreign::crowd(scope, scope.name(), MANY).await;
        let faults = Faults::new(scope.endpoint());
        let builder = Session::builder_with_client(faults.client().await).ttl(Duration::from_secs(60));
        let session = connect(scope, builder).await;
        let waiter = lock(mutex(&session, scope));
        let created = async || faults.messages_received("Watch") == 1;
        eventually(PATIENCE, "it watches a key some places ahead", created).await;
        let looks = || faults.on("Range").containing(format!("{}/", scope.name()));
        let look = looks().inject(Fault::Hold(Until::Released));
        let further = looks().always().inject(Fault::Hold(Until::After(Duration::ZERO)));
        let (mut client, unrelated) = (scope.client(), format!("{}-unrelated", scope.name()));
        let gone = line(&mut client, scope.name()).await.into_iter().take(MANY - 7);
        let leave: Vec<TxnOp> = gone.map(|entry| TxnOp::delete(entry.key, None)).collect();
        client.txn(Txn::new().and_then(leave)).await.unwrap();
        // It watches the line now. This may be the write that etcd takes for an earlier one.
        look.hit(1).await;
        client.put(unrelated.as_str(), "", None).await.unwrap();
        look.release();
        // Nothing happens for longer than it took the others.
        further.hit(1).await;
        // The second time nothing came between, so nothing is in doubt.
        let again = tokio::time::timeout(Duration::from_millis(500), further.hit(2)).await;
        assert!(again.is_err(), "it looks again and again");
        others.leave().await;
        taken(waiter).await.unlock().await.unwrap();
        client.delete(unrelated, None).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
