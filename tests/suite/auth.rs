//! Passwords and permissions: refused with an error of their own, and lived with.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_recipes::etcd_client::{Client, ConnectOptions, Txn, TxnOp};
use etcd_recipes::{Election, Error, Mutex, Result, Session, SessionBuilder, SessionState};
use futures::StreamExt as _;

use crate::support::check::{Scope, alive_tasks, eventually, scoped, scoped_on};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::needs::{Needs, lacking};
use crate::support::server::{Options, PATIENCE};
use crate::support::sessions::{connect, owns, waits};
use crate::support::users::Guarded;

const BOOKKEEPING: &str = "_etcd-recipes/";

fn auth_failed<T>(result: Result<T>) {
    match result.map(|_| ()) {
        Err(error @ Error::AuthFailed { .. }) => {
            assert!(error.to_string().contains("user name or password"), "{error}");
        }
        other => panic!("not refused as it should be: {other:?}"),
    }
}

fn denied<T>(result: Result<T>, key: &str) {
    match result.map(|_| ()) {
        Err(error @ Error::PermissionDenied { .. }) => {
            let text = error.to_string();
            assert!(text.contains("permission") && text.contains(key), "{key} is not named: {text}");
        }
        other => panic!("not denied as it should be: {other:?}"),
    }
}

fn builder(scope: &Scope) -> SessionBuilder {
    Session::builder([scope.endpoint()]).ttl(Duration::from_secs(3))
}

#[tokio::test]
async fn without_the_right_password_nobody_gets_a_session() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "right", &[scope.name(), BOOKKEEPING]).await;
        guarded.on().await;
        let mut root = guarded.root().await;
        let mut revision = async || root.get("x", None).await.unwrap().header().unwrap().revision();
        let (begin, before) = (Instant::now(), revision().await);
        auth_failed(builder(scope).user("alice", "wrong").connect().await);
        auth_failed(builder(scope).user("nobody", "right").connect().await);
        auth_failed(builder(scope).connect().await);
        auth_failed(builder(scope).keepalive_thread().connect().await);
        let client = Client::connect([scope.endpoint()], None).await.unwrap();
        auth_failed(Session::with_client(client).await);
        assert!(begin.elapsed() < Duration::from_secs(5), "a refusal needs no second try");
        assert_eq!(revision().await, before, "something was written");
        let session = connect(scope, builder(scope).user("alice", "right")).await;
        Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap().unlock().await.unwrap();
        session.close().await.unwrap();
        guarded.off().await;
        assert!(guarded.server.leases().await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_password_for_a_server_that_asks_for_none_is_refused() {
    scoped(async |scope| auth_failed(builder(scope).user("alice", "right").connect().await)).await;
}

#[tokio::test]
async fn a_user_without_permission_is_told_which_key_it_lacks() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        // One may do nothing at all, one has no locks, one no bookkeeping.
        guarded.user("nothing", "pw", &[]).await;
        guarded.user("lockless", "pw", &[BOOKKEEPING]).await;
        guarded.user("bookless", "pw", &[scope.name()]).await;
        guarded.on().await;
        denied(builder(scope).user("nothing", "pw").connect().await, BOOKKEEPING);
        denied(builder(scope).user("bookless", "pw").connect().await, BOOKKEEPING);

        let session = connect(scope, builder(scope).user("lockless", "pw")).await;
        let mutex = Mutex::new(&session, scope.name()).unwrap();
        denied(mutex.lock().await, scope.name());
        denied(mutex.try_lock().await, scope.name());
        denied(mutex.holder().await, scope.name());
        denied(mutex.waiters().await, scope.name());
        let election = Election::new(&session, scope.name()).unwrap();
        denied(election.campaign("x").await, scope.name());
        denied(election.leader().await, scope.name());
        let mut observed = election.observe();
        denied(observed.next().await.unwrap(), scope.name());
        assert!(observed.next().await.is_none());
        assert!(session.is_alive(), "a denied key is no loss");
        session.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

/// A refusal is an answer, and nothing is sent again. But the network may have a second copy.
#[tokio::test]
async fn a_copy_of_what_was_denied_does_nothing_when_it_is_allowed() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[BOOKKEEPING]).await;
        guarded.on().await;
        let faults = Faults::new(scope.endpoint());
        let client = faults.client_with(ConnectOptions::new().with_user("alice", "pw")).await;
        let session = connect(scope, Session::builder_with_client(client)).await;
        let tasks = alive_tasks();
        let late = faults.on("Txn").containing(scope.name()).times(3).inject(Fault::Twice(Until::Released));
        let (mutex, election) = (
            Mutex::new(&session, scope.key("lock")).unwrap(),
            Election::new(&session, scope.key("election")).unwrap(),
        );
        denied(mutex.lock().await, scope.name());
        denied(mutex.try_lock().await, scope.name());
        denied(election.campaign("x").await, scope.name());
        eventually(PATIENCE, "what was denied is settled", async || alive_tasks() <= tasks).await;
        guarded.ctl(&["role", "grant-permission", "--prefix=true", "alice", "readwrite", scope.name()]).await;
        late.release();
        late.answered(3).await;
        let left = guarded.ctl(&["get", "--prefix", "--keys-only", scope.name()]).await;
        assert_eq!(left.trim(), "");
        session.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

/// Whether this etcd checks permissions inside nested transactions; older ones have a hole there
/// (CVE-2026-33343).
fn checks_nested(guarded: &Guarded) -> bool {
    let version = guarded.server.version();
    if version < (3, 5, 0) { version >= (3, 4, 42) } else { version >= (3, 5, 28) }
}

#[tokio::test]
async fn a_transaction_on_a_key_without_permission_is_denied_and_the_lock_stays() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[&scope.key("lock"), BOOKKEEPING]).await;
        guarded.on().await;
        let session = connect(scope, builder(scope).user("alice", "pw")).await;
        let guard = Mutex::new(&session, scope.key("lock")).unwrap().lock().await.unwrap();
        let txn = Txn::new().and_then([TxnOp::put(scope.key("data"), "", None)]);
        if checks_nested(&guarded) {
            denied(guard.txn(txn).await, scope.name());
        }
        assert!(guard.is_held());
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

#[tokio::test]
async fn a_user_with_permission_for_the_name_and_the_bookkeeping_has_everything() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[&scope.key(""), BOOKKEEPING]).await;
        guarded.on().await;
        let (a, b) = (
            connect(scope, builder(scope).user("alice", "pw")).await,
            connect(scope, builder(scope).user("alice", "pw").keepalive_thread()).await,
        );
        let [first, second] = [&a, &b].map(|session| Mutex::new(session, scope.key("lock")).unwrap());
        let guard = first.lock().await.unwrap();
        let waiter = tokio::spawn({
            let second = second.clone();
            async move { second.lock().await.unwrap() }
        });
        eventually(PATIENCE, "it waits", async || first.waiters().await.unwrap().len() == 1).await;
        let txn = Txn::new().and_then([TxnOp::put(scope.key("data"), "", None)]);
        guard.txn(txn).await.unwrap();
        guard.txn(Txn::new().and_then([TxnOp::delete(scope.key("data"), None)])).await.unwrap();
        guard.unlock().await.unwrap();
        waiter.await.unwrap().unlock().await.unwrap();

        let election = Election::new(&a, scope.key("election")).unwrap();
        let mut observed = Election::new(&b, scope.key("election")).unwrap().observe();
        assert!(observed.next().await.unwrap().unwrap().leader.is_none());
        let leadership = election.campaign("x").await.unwrap();
        assert!(observed.next().await.unwrap().unwrap().leader.is_some());
        leadership.proclaim("y").await.unwrap();
        leadership.resign().await.unwrap();
        // Longer than the lease lives without keepalives.
        let mut lost = Box::pin(async {
            let guard = first.lock().await.unwrap();
            guard.lost().await;
        });
        assert!(waits(Duration::from_secs(4), &mut lost).await);
        drop((lost, observed));
        a.close().await.unwrap();
        b.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

#[tokio::test]
async fn tokens_that_expire_are_renewed_without_anybody_noticing() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::with(Options::fast().arg("--auth-token-ttl=1")).await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[&scope.key(""), BOOKKEEPING]).await;
        guarded.on().await;
        let long = || Session::builder([scope.endpoint()]).ttl(Duration::from_secs(30)).user("alice", "pw");
        let (a, b) = (connect(scope, long()).await, connect(scope, long()).await);
        let [first, second] = [&a, &b].map(|session| Mutex::new(session, scope.key("lock")).unwrap());
        for _ in 0..2 {
            let guard = first.lock().await.unwrap();
            let mut waiter = Box::pin(second.lock());
            // Nothing uses the tokens now, so they expire.
            assert!(waits(Duration::from_millis(3500), &mut waiter).await);
            guard.unlock().await.unwrap();
            let guard = tokio::time::timeout(PATIENCE, waiter).await.expect("its turn").unwrap();
            guard.unlock().await.unwrap();
        }
        assert!(a.is_alive() && b.is_alive());
        a.close().await.unwrap();
        b.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

#[tokio::test]
async fn a_session_survives_the_switching_on_of_authentication_if_it_has_a_password() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[&scope.key(""), BOOKKEEPING]).await;
        guarded.on().await;
        let session = connect(scope, builder(scope).user("alice", "pw")).await;
        let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
        let guard = mutex.lock().await.unwrap();
        // Off and on again: every token there was is void.
        guarded.off().await;
        guarded.on().await;
        guard.unlock().await.unwrap();
        let guard = mutex.lock().await.unwrap();
        let mut lost = Box::pin(guard.lost());
        assert!(waits(Duration::from_secs(4), &mut lost).await, "the keepalives go on");
        guard.unlock().await.unwrap();
        owns(scope, &session);
        session.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_notices_that_tokens_expire_and_permissions_change_all_the_time() {
    if !lacking(Needs::Users) {
        unnoticed(Options::fast().arg("--auth-token-ttl=1")).await;
    }
}

/// Such a token also says at which revision of users and permissions it was made, and is refused after each change. The
/// client asks by itself for another when one has expired, but not for this.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_notices_that_signed_tokens_are_of_an_old_revision_all_the_time() {
    if lacking(Needs::Users) {
        return;
    }
    let mut key = tempfile::NamedTempFile::new().unwrap();
    key.write_all(b"the key that signs the tokens").unwrap();
    let signed = format!("--auth-token=jwt,priv-key={},sign-method=HS256,ttl=1h", key.path().display());
    unnoticed(Options::fast().arg(signed)).await;
}

/// Works while permissions change all the time.
async fn unnoticed(options: Options) {
    const TTL: Duration = Duration::from_secs(5);
    /// So often they change at least.
    const CHANGES: usize = 40;
    let guarded = Guarded::with(options).await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[&scope.key(""), BOOKKEEPING]).await;
        guarded.user("bob", "pw", &[]).await;
        guarded.on().await;
        let alice = || builder(scope).ttl(TTL).user("alice", "pw");
        let one = connect(scope, alice()).await;
        let sessions = [one.beside().await.unwrap(), one, connect(scope, alice()).await];
        owns(scope, &sessions[0]);
        let worked = Arc::new(AtomicUsize::new(0));
        let working = sessions.iter().map(|session| {
            let (mutex, worked) = (Mutex::new(session, scope.key("lock")).unwrap(), worked.clone());
            tokio::spawn(async move {
                loop {
                    mutex.lock().await?.unlock().await?;
                    worked.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        });
        let mut working: Vec<tokio::task::JoinHandle<Result<()>>> = working.collect();
        // Sessions that begin meanwhile, beside another and by themselves.
        let (begun, other) = (Arc::new(AtomicUsize::new(0)), sessions[0].clone());
        let endpoint = scope.endpoint().to_owned();
        let count = begun.clone();
        working.push(tokio::spawn(async move {
            loop {
                other.beside().await?.close().await?;
                let alice = Session::builder([&*endpoint]).ttl(TTL).user("alice", "pw");
                alice.connect().await?.close().await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
        }));
        let begin = Instant::now();
        // A lease that is not renewed ends meanwhile.
        for change in (0..).take_while(|change| *change < CHANGES || begin.elapsed() < TTL * 2) {
            let what = if change % 2 == 0 { "grant-permission" } else { "revoke-permission" };
            let kind: &[&str] = if change % 2 == 0 { &["bob", "read", "other"] } else { &["bob", "other"] };
            guarded.ctl(&[&["role", what], kind].concat()).await;
        }
        for session in &sessions {
            let state = session.state();
            let first = matches!(
                state,
                SessionState::Connected { generation: 1 } | SessionState::Suspended { generation: 1 }
            );
            assert!(first, "{state:?}");
        }
        for work in &working {
            assert!(!work.is_finished(), "an error came to the user");
            work.abort();
        }
        // A second has few logins at worst, and after each there is a moment.
        let (worked, begun) = (worked.load(Ordering::Relaxed), begun.load(Ordering::Relaxed));
        assert!(worked > 9, "they had the lock only {worked} times");
        assert!(begun > 0, "no session could begin");
        for work in working {
            let _ = work.await;
        }
        for session in sessions {
            session.close().await.unwrap();
        }
        guarded.off().await;
    })
    .await;
}

#[tokio::test]
async fn who_may_not_release_any_more_is_told_and_the_release_goes_on() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", "pw", &[scope.name(), BOOKKEEPING]).await;
        guarded.on().await;
        let long = Session::builder([scope.endpoint()]).ttl(Duration::from_secs(60)).user("alice", "pw");
        let session = connect(scope, long).await;
        let guard = Mutex::new(&session, scope.name()).unwrap().lock().await.unwrap();
        guarded.ctl(&["role", "revoke-permission", "--prefix=true", "alice", scope.name()]).await;
        let told = tokio::time::timeout(Duration::from_secs(10), guard.unlock()).await;
        denied(told.expect("it waits for the end of the lease"), scope.name());
        let there = || async { guarded.ctl(&["get", "--prefix", "--keys-only", scope.name()]).await };
        assert!(there().await.contains(scope.name()));

        // As soon as it may again, and long before the lease is over.
        guarded.ctl(&["role", "grant-permission", "--prefix=true", "alice", "readwrite", scope.name()]).await;
        eventually(PATIENCE / 2, "the release goes on", async || !there().await.contains(scope.name())).await;
        session.close().await.unwrap();
        guarded.off().await;
    })
    .await;
}
