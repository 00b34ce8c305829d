//! Passwords are in no text that this crate makes: neither in `Debug` nor in logs, at any level.

use std::io::Write;
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use etcd_recipes::etcd_client::{Txn, TxnOp};
use etcd_recipes::{Election, Mutex, Session};
use futures::StreamExt as _;
use tracing_subscriber::fmt::MakeWriter;

use crate::support::check::{eventually, scoped_on};
use crate::support::needs::{Needs, lacking};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, generation};
use crate::support::users::Guarded;

const PASSWORD: &str = "pw-canary-7Kq2";
const VALUE: &str = "value-canary-9Zx4";

/// Everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<StdMutex<Vec<u8>>>);

impl Log {
    /// Collects what this thread logs from now on, of every crate and at every level.
    ///
    /// Of a single subscriber in the process, tracing asks whichever thread comes first to a place in the code whether
    /// anybody listens there, and that may be one of another test: so there are two.
    fn begin(&self) -> (tracing::subscriber::DefaultGuard, tracing::Dispatch) {
        let subscriber = || {
            let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_ansi(false);
            tracing::Dispatch::new(subscriber.with_writer(self.clone()).finish())
        };
        let second = subscriber();
        (tracing::dispatcher::set_default(&subscriber()), second)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// A text in the ways it could be written: as it is, and as a list of bytes.
fn says(text: &str, secret: &str) -> bool {
    let bytes: Vec<String> = secret.bytes().map(|byte| byte.to_string()).collect();
    let escaped = secret.escape_default().to_string();
    [secret, &escaped, &bytes.join(", ")].iter().any(|form| text.contains(*form))
}

#[test]
fn a_secret_is_found_in_every_form() {
    assert!(says(&format!("{:?}", PASSWORD.as_bytes()), PASSWORD));
    assert!(says(&format!("x{PASSWORD}x"), PASSWORD) && !says("pw-canary", PASSWORD));
}

#[tokio::test]
async fn no_log_and_no_debug_text_says_a_password_and_none_of_ours_a_value() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        guarded.user("alice", PASSWORD, &[&scope.key(""), "_etcd-recipes/"]).await;
        guarded.on().await;
        let log = Log::default();
        let collecting = log.begin();
        let mut texts = Vec::new();

        let builder = || {
            let builder = Session::builder([scope.endpoint()]).user("alice", PASSWORD);
            builder.ttl(Duration::from_secs(3)).identity("anna")
        };
        texts.push(format!("{:?} {:#?}", builder(), builder()));
        let wrong = format!("{PASSWORD}-wrong");
        let refused = Session::builder([scope.endpoint()]).user("alice", wrong).connect().await.unwrap_err();
        texts.push(format!("{refused} {refused:?} {:?}", std::error::Error::source(&refused)));
        let session = connect(scope, builder()).await;
        let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
        let guard = mutex.lock().await.unwrap();
        guard.txn(Txn::new().and_then([TxnOp::put(scope.key("data"), VALUE, None)])).await.unwrap();
        guard.txn(Txn::new().and_then([TxnOp::delete(scope.key("data"), None)])).await.unwrap();
        let election = Election::new(&session, scope.key("election")).unwrap();
        let leadership = election.campaign(VALUE).await.unwrap();
        leadership.proclaim(format!("{VALUE}2")).await.unwrap();
        let mut observe = election.observe();
        assert!(observe.next().await.unwrap().is_ok());
        texts.push(format!("{session:?} {mutex:?} {guard:?} {election:?} {leadership:?} {observe:?}"));
        texts.push(format!("{:#?} {:#?} {:#?}", session, mutex, guard));

        // A denied request, a login anew, a lost lease and the next one.
        let denied = Mutex::new(&session, "denied").unwrap().lock().await.unwrap_err();
        texts.push(format!("{denied} {denied:?}"));
        guarded.off().await;
        guarded.on().await;
        mutex.holder().await.unwrap();
        guarded.ctl(&["lease", "revoke", &format!("{:x}", session.lease_id().unwrap())]).await;
        generation(scope, &session, 2).await;
        let lost = guard.unlock().await.unwrap_err();
        texts.push(format!("{lost} {lost:?}"));
        drop((leadership, observe));
        session.close().await.unwrap();
        drop((session, mutex, election));
        drop(collecting);
        guarded.off().await;

        for text in texts {
            assert!(!says(&text, PASSWORD), "{text}");
            assert!(!text.contains(VALUE), "{text}");
        }
        let text = log.text();
        for (level, target) in [("TRACE", "h2::"), ("INFO", "etcd_recipes::")] {
            assert!(
                text.lines().any(|line| line.contains(level) && line.contains(target)),
                "nothing collected"
            );
        }
        let line = text.lines().find(|line| says(line, PASSWORD));
        assert!(line.is_none(), "a password was logged: {line:?}");
        let line = text.lines().find(|line| line.contains("etcd_recipes") && says(line, VALUE));
        assert!(line.is_none(), "a value was logged by this crate: {line:?}");
    })
    .await;
}

#[tokio::test]
async fn the_log_tells_of_losses_and_states_with_names_that_cannot_forge_lines() {
    if lacking(Needs::Users) {
        return;
    }
    let guarded = Guarded::start().await;
    scoped_on(&guarded.server, async |scope| {
        let log = Log::default();
        let collecting = log.begin();
        let session = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(3))).await;
        let lease = session.lease_id().unwrap();
        let name = format!("{}\n2026-01-01 ERROR forged", scope.name());
        scope.client().put(format!("{name}/no-lease"), "", None).await.unwrap();
        let mutex = Mutex::new(&session, &name).unwrap();
        let mut waiting = Box::pin(mutex.lock());
        assert!(crate::support::sessions::waits(Duration::from_millis(300), &mut waiting).await);
        drop(waiting);
        scope.client().lease_revoke(lease).await.unwrap();
        generation(scope, &session, 2).await;
        session.close().await.unwrap();
        scope.client().delete(format!("{name}/no-lease"), None).await.unwrap();
        eventually(PATIENCE, "nothing is left", async || scope.keys().await.is_empty()).await;
        drop(collecting);

        let text = log.text();
        let ours = |level: &str, says: &str| {
            text.lines()
                .any(|line| line.contains(level) && line.contains("etcd_recipes::") && line.contains(says))
        };
        assert!(ours("WARN", "without a lease blocks"), "the key that blocks for ever is told");
        assert!(ours("WARN", "lease lost") && ours("WARN", &format!("{lease:x}")));
        assert!(ours("INFO", "lease granted"));
        assert!(!text.lines().any(|line| line.starts_with("2026-01-01 ERROR forged")), "a line was forged");
    })
    .await;
}
