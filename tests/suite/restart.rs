//! A single etcd is killed and comes back: within the TTL nobody notices; later everything is made anew at once.

use std::time::Duration;

use etcd_recipes::{Mutex, MutexGuard, Session, SessionState};
use tokio::task::JoinHandle;

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::clock::boottime;
use crate::support::holds::{States, reaches};
use crate::support::measure::Samples;
use crate::support::needs::{Needs, lacking};
use crate::support::rounds;
use crate::support::server::{PATIENCE, Server};

async fn sessions(scope: &Scope, count: usize, ttl: u64) -> Vec<(Session, States)> {
    let mut sessions = Vec::new();
    for _ in 0..count {
        let builder = Session::builder([scope.endpoint()]).ttl(Duration::from_secs(ttl));
        let session = builder.connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        sessions.push((session, states));
    }
    sessions
}

/// A call for a lock, which is in line when this returns.
async fn in_line(scope: &Scope, session: &Session, name: &str) -> JoinHandle<MutexGuard> {
    let before = scope.keys().await.len();
    let mutex = Mutex::new(session, scope.key(name)).unwrap();
    let call = tokio::spawn(async move { mutex.lock().await.unwrap() });
    eventually(PATIENCE, "in line", async || scope.keys().await.len() > before).await;
    call
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_within_the_ttl_hurts_nobody() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let sessions = sessions(scope, 3, 6).await;
        for _ in 0..rounds(3, 20) {
            let mut calls = Vec::new();
            for (session, _) in &sessions {
                calls.push(in_line(scope, session, "lock").await);
            }
            let mut calls = calls.into_iter();
            let mut holder = calls.next().unwrap().await.unwrap();
            let mut before = 0;
            for next in calls {
                server.kill();
                tokio::time::sleep(Duration::from_millis(500)).await;
                server.launch();
                server.ready().await;
                assert!(holder.is_held());
                assert!(holder.token() > before);
                before = holder.token();
                holder.unlock().await.unwrap();
                holder = next.await.unwrap();
            }
            // Also with the release under way.
            server.kill();
            let release = tokio::spawn(holder.unlock());
            server.restart().await;
            release.await.unwrap().unwrap();
        }
        for (session, states) in sessions {
            states.never_lost();
            session.close().await.unwrap();
        }
    })
    .await;
}

/// From when etcd answers again to the next generation.
const PROMPT: Duration = Duration::from_millis(250);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_lost_in_an_outage_are_made_anew_at_once() {
    if lacking(Needs::Disk) {
        return;
    }
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let sessions = sessions(scope, 8, 2).await;
        let mut late = Samples::default();
        for generation in 1..=rounds(3, 20) {
            let mut calls = Vec::new();
            let (first, others) = sessions.split_first().unwrap();
            let lock = Mutex::new(&first.0, scope.key("lock")).unwrap();
            let held = lock.lock().await.unwrap();
            for (session, _) in others {
                calls.push(in_line(scope, session, "lock").await);
            }
            server.kill();
            for (session, _) in &sessions {
                reaches(session, SessionState::Lost { generation }).await;
            }
            assert!(!held.is_held());
            // They go on trying for a while.
            tokio::time::sleep(Duration::from_secs(1)).await;
            server.launch();
            server.ready().await;
            let answered = boottime();
            let next = SessionState::Connected { generation: generation + 1 };
            for (session, states) in &sessions {
                reaches(session, next).await;
                scope.owns_lease(session.lease_id().unwrap());
                eventually(PATIENCE, "noted", async || states.at(next).is_some()).await;
                late.add(states.at(next).unwrap().saturating_sub(answered));
            }
            assert!(held.unlock().await.unwrap_err().is_lost());
            // The calls take new places, in some order, and each gets its turn.
            let turns = calls.into_iter().map(async |call| call.await.unwrap().unlock().await.unwrap());
            let all = futures::future::join_all(turns);
            tokio::time::timeout(PATIENCE, all).await.expect("a call got no turn");
        }
        late.report("next generation after etcd's first answer");
        assert!(late.median() <= PROMPT, "{late:?}");
        for (session, _) in sessions {
            session.close().await.unwrap();
        }
    })
    .await;
}
