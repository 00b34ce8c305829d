//! `work_queue`: a queue for shell scripts.

use std::process::Command;
use std::time::Duration;

use etcd_recipes::{Queue, Session};
use nix::sys::signal::Signal;

use super::{Program, example};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, session};

fn work_queue(scope: &Scope, arguments: &[&str]) -> Program {
    Program::start(command(scope, arguments))
}

fn command(scope: &Scope, arguments: &[&str]) -> Command {
    let mut command = example("work_queue", scope.endpoint());
    command.args(["--connect-timeout=60", "--ttl=2"]).args(arguments);
    command
}

/// Runs it to its end, with a successful exit.
async fn done(mut program: Program) {
    assert_eq!(program.code().await, 0, "{:?}", program.seen);
}

#[tokio::test]
async fn work_queue_runs_a_command_for_each_item_in_order() {
    scoped(async |scope| {
        done(work_queue(scope, &["push", scope.name(), "one", "two", "with a space"])).await;
        let script = r#"echo "got $(cat) $ETCD_ITEM_ATTEMPT ${ETCD_ITEM_KEY%%/*}""#;
        let mut worker =
            work_queue(scope, &["work", scope.name(), "--until-empty", "--", "sh", "-c", script]);
        for item in ["one", "two", "with a space"] {
            assert_eq!(worker.line("got ").await, format!("{item} 1 {}", scope.name()));
        }
        done(worker).await;
        assert!(scope.keys().await.is_empty());
    })
    .await;
}

#[tokio::test]
async fn work_queue_pushes_the_lines_of_its_input() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        let mut push = work_queue(scope, &["push", scope.name()]);
        for n in 0..150 {
            push.tell(&n.to_string());
        }
        drop(push.process.child().stdin.take());
        assert_eq!(push.line("pushed ").await, "150");
        done(push).await;
        for n in 0..150 {
            assert_eq!(queue.dequeue().await.unwrap().value, n.to_string().as_bytes());
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn work_queue_tries_again_and_gives_up() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        queue.enqueue_all(["bad", "good"]).await.unwrap();
        let script = r#"item=$(cat); echo "got $item"; test "$item" = good"#;
        let options = ["work", scope.name(), "--max-attempts=2", "--retry-delay=0.1", "--until-empty"];
        let mut worker = work_queue(scope, &[&options[..], &["--", "sh", "-c", script]].concat());
        for item in ["bad", "good", "bad"] {
            assert_eq!(worker.line("got ").await, item);
        }
        done(worker).await;
        let letters = queue.dead_letters().await.unwrap();
        assert_eq!((letters[0].value.as_slice(), letters[0].attempts), (&b"bad"[..], 2));
        queue.purge(&letters[0]).await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn work_queue_ends_after_its_item_or_gives_it_back() {
    scoped(async |scope| {
        let session = session(scope).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        let worker = |script: &str| work_queue(scope, &["work", scope.name(), "--", "sh", "-c", script]);
        queue.enqueue("1").await.unwrap();
        // Told to end once, it lets the command end.
        let mut polite = worker("echo up; sleep 0.5; echo end");
        polite.line("up").await;
        polite.signal(Signal::SIGTERM);
        polite.line("end").await;
        done(polite).await;
        assert_eq!(queue.length().await.unwrap(), 0);

        // Told twice, it stops it and gives the item back; while it waits, it ends at once.
        queue.enqueue("2").await.unwrap();
        let mut insistent = worker("echo up; sleep 100");
        insistent.line("up").await;
        insistent.signal(Signal::SIGTERM);
        tokio::time::sleep(Duration::from_millis(50)).await;
        insistent.signal(Signal::SIGINT);
        done(insistent).await;
        let claim = queue.claim().await.unwrap();
        assert_eq!((claim.value(), claim.attempt()), (&b"2"[..], 2));
        claim.ack().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn work_queue_stops_the_command_when_the_item_is_lost() {
    scoped(async |scope| {
        let session = connect(scope, Session::builder([scope.endpoint()])).await;
        let queue = Queue::new(&session, scope.name()).unwrap();
        queue.enqueue("work").await.unwrap();
        let mut worker = work_queue(
            scope,
            &[
                "work",
                scope.name(),
                "--",
                "sh",
                "-c",
                r#"test $ETCD_ITEM_ATTEMPT = 1 || exit 0; echo up $$; sleep 100"#,
            ],
        );
        let process: i32 = worker.line("up ").await.parse().unwrap();
        let claims = format!("_etcd-recipes/queue/{}/work/claim/", scope.name());
        let options = etcd_client::DeleteOptions::new().with_prefix();
        scope.client().delete(claims, Some(options)).await.unwrap();
        worker.line("work_queue: ").await;
        super::until_state(process, None).await;
        eventually(PATIENCE, "the next attempt acks", async || queue.length().await.unwrap() == 0).await;
        worker.signal(Signal::SIGTERM);
        done(worker).await;
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn work_queue_says_what_is_wrong() {
    scoped(async |scope| {
        let code = async |arguments: &[&str]| work_queue(scope, arguments).code().await;
        assert_eq!(code(&["work", scope.name()]).await, 64);
        assert_eq!(code(&["push", "", "x"]).await, 64);
        assert_eq!(code(&["work", scope.name(), "--max-attempts=0", "--", "true"]).await, 64);
        done(work_queue(scope, &["push", scope.name(), "x"])).await;
        assert_eq!(code(&["work", scope.name(), "--", "/nonexistent/command"]).await, 71);
        done(work_queue(scope, &["work", scope.name(), "--until-empty", "--", "true"])).await;
        let nobody = format!("--endpoints=127.0.0.1:{}", crate::support::ports::free_port());
        assert_eq!(code(&["push", scope.name(), "x", &nobody, "--connect-timeout=0.2"]).await, 69);
    })
    .await;
}
