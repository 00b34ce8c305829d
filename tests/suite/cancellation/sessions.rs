//! Taking a lease, and giving it back.

use std::time::Duration;

use etcd_recipes::{Mutex, Result, Session};

use super::stage::PATIENCE;
use crate::support::check::{Scope, alive_tasks, eventually, scoped_on};
use crate::support::poll::{drop_after_polls, drop_when_woken};
use crate::support::server::Server;

/// The timers' resolution.
const STEP: Duration = Duration::from_millis(1);

/// Where a call is cut.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Right after this many polls.
    After(usize),
    /// After this many polls, when what it waited for has come and it does not get to look.
    Woken(usize),
    /// After this time: between the polls, requests are on their way.
    Time(Duration),
}

impl Cut {
    async fn of<F: Future>(self, future: F) -> Option<F::Output> {
        match self {
            Self::After(polls) => drop_after_polls(polls, future).await,
            Self::Woken(polls) => drop_when_woken(polls, future).await,
            Self::Time(time) => tokio::time::timeout(time, future).await.ok(),
        }
    }
}

/// Tries a call with every cut until it is complete. The server is the test's own, so every lease there is the call's.
async fn every_cut(call: impl AsyncFn(&Scope, Cut) -> Option<()>) {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let tasks = alive_tasks();
        let try_cut = async |cut| {
            // Boxed: in debug builds a large future is copied to the stack more often than it has room for.
            let complete = Box::pin(call(scope, cut)).await.is_some();
            look_around(scope, tasks, cut).await;
            complete
        };
        let mut polls = 0;
        while !try_cut(Cut::After(polls)).await {
            polls += 1;
            assert!(polls < 200, "the call does not come to its end");
            try_cut(Cut::Woken(polls)).await;
        }
        assert!(polls > 0, "it was never cut");
        for step in 0.. {
            assert!(step < 1000, "the call does not come to its end");
            if try_cut(Cut::Time(STEP * step)).await {
                break;
            }
        }
    })
    .await;
}

/// No lease is left, long before it would expire, no key, and no task.
async fn look_around(scope: &Scope, tasks: usize, cut: Cut) {
    let what = format!("{cut:?}: no lease is left");
    eventually(PATIENCE, &what, async || scope.client().leases().await.unwrap().leases().is_empty()).await;
    let what = format!("{cut:?}: no task is left");
    eventually(PATIENCE, &what, async || alive_tasks() <= tasks).await;
    assert!(scope.keys().await.is_empty());
}

/// Uses and closes the session if the call is complete.
async fn close(scope: &Scope, connected: Option<Result<Session>>) -> Option<()> {
    let session = connected?.unwrap();
    let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
    assert!(guard.is_held());
    session.close().await.unwrap();
    Some(())
}

pub(super) async fn dropped_connect_leaves_no_lease() {
    every_cut(async |scope, cut| close(scope, cut.of(Session::connect([scope.endpoint()])).await).await)
        .await;
}

pub(super) async fn dropped_with_client_leaves_no_lease() {
    every_cut(async |scope, cut| close(scope, cut.of(Session::with_client(scope.client())).await).await)
        .await;
}

pub(super) async fn dropped_builder_leaves_no_lease() {
    every_cut(async |scope, cut| {
        let builder = Session::builder([scope.endpoint()]).ttl(Duration::from_secs(60));
        close(scope, cut.of(builder.connect()).await).await
    })
    .await;
}

pub(super) async fn dropped_builder_with_a_thread_leaves_no_lease() {
    every_cut(async |scope, cut| {
        let builder = Session::builder([scope.endpoint()]).ttl(Duration::from_secs(60)).keepalive_thread();
        close(scope, cut.of(builder.connect()).await).await
    })
    .await;
}

/// The session beside which it was to be is there before and after.
pub(super) async fn dropped_beside_leaves_no_lease() {
    every_cut(async |scope, cut| {
        let first = Session::connect([scope.endpoint()]).await.unwrap();
        let beside = cut.of(first.beside()).await;
        let only = async || scope.client().leases().await.unwrap().leases().len() == 1;
        let complete = close(scope, beside).await;
        eventually(PATIENCE, &format!("{cut:?}: one lease is left"), only).await;
        close(scope, Some(Ok(first))).await?;
        complete
    })
    .await;
}

/// A close that is dropped goes on; one that was never polled was not asked for.
pub(super) async fn dropped_close_closes() {
    every_cut(async |scope, cut| {
        let session =
            Session::builder([scope.endpoint()]).ttl(Duration::from_secs(60)).connect().await.unwrap();
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        let closed = cut.of(session.close()).await;
        if matches!(cut, Cut::After(0)) && closed.is_none() {
            assert!(guard.is_held());
            return None;
        }
        guard.lost().await;
        assert!(!session.is_alive());
        closed?.unwrap();
        Some(())
    })
    .await;
}
