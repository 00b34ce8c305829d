//! Tokens that expire every two seconds, users who come and change meanwhile: a session with a user lives on, and says
//! clearly when it is let in no more.

use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use etcd_recipes::{Error, Mutex, Session, SessionBuilder, SessionState};
use tokio::time::sleep;

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::holds::{States, reaches};
use crate::support::proxy::Proxy;
use crate::support::server::{Options, PATIENCE, Server};
use crate::support::{client_with, full};

const PASSWORD: &str = "correct horse";

/// Adds `root`, and `app` with rights on what the crate needs for this scope; then asks everybody who they are.
async fn enable(scope: &Scope) -> Client {
    let mut client = scope.client();
    client.user_add("root", PASSWORD, None).await.unwrap();
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("app", PASSWORD, None).await.unwrap();
    client.role_add("app").await.unwrap();
    for prefix in [format!("{}/", scope.name()), "_etcd-recipes/".to_owned()] {
        let permission = Permission::new(PermissionType::Readwrite, prefix).with_prefix();
        client.role_grant_permission("app", permission).await.unwrap();
    }
    client.user_grant_role("app", "app").await.unwrap();
    client.auth_enable().await.unwrap();
    let options = ConnectOptions::new().with_user("root", PASSWORD).with_auto_token_refresh(true);
    client_with([scope.endpoint()], options).await
}

fn builder(endpoint: &str) -> SessionBuilder {
    Session::builder([endpoint]).user("app", PASSWORD).ttl(Duration::from_secs(6))
}

/// Changes users until stopped by being dropped.
async fn change_users(mut root: Client, scope: &Scope) {
    for number in 0.. {
        let name = format!("{}-{number}", scope.name());
        // A token may be refused just when it is used.
        let _ = root.user_add(name.as_str(), "first", None).await;
        sleep(Duration::from_millis(500)).await;
        let _ = root.user_change_password(name.as_str(), "second").await;
        sleep(Duration::from_millis(500)).await;
    }
}

async fn lives(server: &Server) {
    let _ = tracing_subscriber::fmt()
        .with_env_filter("etcd_recipes=debug")
        .with_writer(std::io::stderr)
        .try_init();
    scoped_on(server, async |scope| {
        let mut root = enable(scope).await;
        let proxy = Proxy::start(scope.endpoint()).await;
        let connect = async |endpoint: &str| {
            let session = builder(endpoint).connect().await.unwrap();
            scope.owns_lease(session.lease_id().unwrap());
            let states = States::of(&session);
            (session, states)
        };
        // One works, one only holds, and one only waits, with a connection that breaks now and then.
        let (working, holding, waiting) = (
            connect(scope.endpoint()).await,
            connect(scope.endpoint()).await,
            connect(&proxy.endpoint()).await,
        );
        let name = scope.key("waited for");
        let held = Mutex::new(&holding.0, &name).unwrap().lock().await.unwrap();
        let waits = Mutex::new(&waiting.0, &name).unwrap();
        let call = tokio::spawn(async move { waits.lock().await });
        let mutex = Mutex::new(&working.0, scope.key("lock")).unwrap();
        let (mut locks, mut stall) = (0, Duration::ZERO);
        let work = async {
            let end = Instant::now() + Duration::from_secs(if full() { 300 } else { 20 });
            let mut reset = Instant::now();
            while Instant::now() < end {
                let started = Instant::now();
                let guard = mutex.lock().await.unwrap();
                guard.unlock().await.unwrap();
                stall = started.elapsed().max(stall);
                locks += 1;
                if reset.elapsed() > Duration::from_secs(5) {
                    proxy.reset_all().await;
                    reset = Instant::now();
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = change_users(root.clone(), scope) => {}
        }
        println!("{locks} locks, the longest took {stall:.1?}");
        assert!(held.is_held() && !call.is_finished());
        held.unlock().await.unwrap();
        let guard = tokio::time::timeout(PATIENCE, call).await.expect("no turn").unwrap().unwrap();
        guard.unlock().await.unwrap();
        for (session, states) in [working, holding, waiting] {
            states.never_lost();
            session.close().await.unwrap();
        }
        root.auth_disable().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_outlives_its_simple_tokens() {
    lives(&Server::with(Options::fast().arg("--auth-token-ttl=2")).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_outlives_its_json_web_tokens() {
    // Every change of a user ends every token of this kind.
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("key");
    std::fs::write(&key, "a secret of thirty-two characters").unwrap();
    let token = format!("--auth-token=jwt,sign-method=HS256,priv-key={},ttl=2s", key.display());
    lives(&Server::with(Options::fast().arg(token)).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_password_is_told_and_not_tried_in_a_storm() {
    let server = Server::with(Options::fast().arg("--auth-token-ttl=2")).await;
    scoped_on(&server, async |scope| {
        let mut root = enable(scope).await;
        let session = builder(scope.endpoint()).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
        let held = mutex.lock().await.unwrap();
        root.user_change_password("app", "another").await.unwrap();
        let logins = server.metrics().await.calls("Authenticate");
        let other = Mutex::new(&session, scope.key("other")).unwrap();
        let refused = other.lock().await.unwrap_err();
        assert!(matches!(refused, Error::AuthFailed { .. }), "{refused:?}");
        let wrong = builder(scope.endpoint()).connect().await.unwrap_err();
        assert!(matches!(wrong, Error::AuthFailed { .. }), "{wrong:?}");

        reaches(&session, SessionState::Lost { generation: 1 }).await;
        states.suspended_before_lost();
        assert!(!held.is_held());
        sleep(Duration::from_secs(5)).await;
        let tried = server.metrics().await.calls("Authenticate") - logins;
        println!("{tried} logins in about ten seconds");
        assert!(tried < 60, "{tried} logins");

        root.user_change_password("app", PASSWORD).await.unwrap();
        reaches(&session, SessionState::Connected { generation: 2 }).await;
        scope.owns_lease(session.lease_id().unwrap());
        assert!(held.unlock().await.unwrap_err().is_lost());
        mutex.lock().await.unwrap().unlock().await.unwrap();
        session.close().await.unwrap();
        root.auth_disable().await.unwrap();
        eventually(PATIENCE, "nothing is left", async || scope.keys().await.is_empty()).await;
    })
    .await;
}
