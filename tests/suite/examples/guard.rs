//! `guard`: a command under a lock.

use std::process::Command;
use std::time::{Duration, Instant};

use etcd_client::GetOptions;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpgid};

use super::{Program, example, state, until_state};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::etcd;
use crate::support::ports::free_port;
use crate::support::server::PATIENCE;

/// Says that it runs, and goes on when it is told or its input ends.
const ASKS: &str = "echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; read answer; exit 7";
/// Says that it runs, and does not end by itself. A shell comes to its traps only between two commands.
const TRAPS: &str = "echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; while :; do sleep 0.01; done";
/// As [`TRAPS`], for a script without traps.
const STAYS: &str = "echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; sleep 100; exit 7";
/// With a child in the background that it does not wait for; both do not mind SIGTERM.
const DEAF: &str =
    "trap '' TERM; sleep 100 & echo other $!; echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; sleep 100";

/// What a command says of itself.
struct Up {
    id: i32,
    key: String,
    token: i64,
}

fn command(scope: &Scope, options: &[&str], script: &str) -> Command {
    let mut command = example("guard", scope.endpoint());
    command.args(["--connect-timeout=60"]).args(options).args([scope.name(), "--", "sh", "-c", script]);
    command
}

fn guard(scope: &Scope, options: &[&str], script: &str) -> Program {
    Program::start(command(scope, options, script))
}

/// Waits until the command runs.
async fn up(scope: &Scope, guard: &mut Program) -> Up {
    let line = guard.line("up ").await;
    let [id, key, token] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("not understood: {line}") };
    scope.owns_lease(lease(key));
    Up { id: id.parse().unwrap(), key: key.to_owned(), token: token.parse().unwrap() }
}

/// The lease in a key's name.
fn lease(key: &str) -> i64 {
    let lease = key.rsplit_once('/').and_then(|(_, place)| place.split('-').next());
    i64::from_str_radix(lease.unwrap(), 16).unwrap()
}

/// Waits until so many stand in line: their keys.
async fn line(scope: &Scope, length: usize) -> Vec<String> {
    let mut keys = Vec::new();
    eventually(PATIENCE, &format!("{length} in line"), async || {
        keys = scope.keys().await;
        keys.len() == length
    })
    .await;
    keys
}

#[tokio::test]
async fn command_knows_its_lock_and_its_exit_code_is_returned() {
    scoped(async |scope| {
        let mut guard = guard(scope, &[], ASKS);
        let up = up(scope, &mut guard).await;
        let found = scope.client().get(up.key, None).await.unwrap();
        assert_eq!(
            found.kvs()[0].create_revision(),
            up.token,
            "uncontended, the token is the key's revision"
        );
        assert_ne!(found.kvs()[0].lease(), 0);
        guard.tell("go on");
        assert_eq!(guard.code().await, 7);
        assert!(scope.keys().await.is_empty(), "released before the end");
    })
    .await;
}

#[tokio::test]
async fn exit_codes_are_those_of_a_shell() {
    scoped(async |scope| {
        assert_eq!(guard(scope, &[], "exit 0").code().await, 0);
        assert_eq!(guard(scope, &[], "kill -9 $$").code().await, 128 + 9);
        let run = async |arguments: &[&str]| {
            let mut command = example("guard", scope.endpoint());
            command.args(arguments);
            Program::start(command).code().await
        };
        assert_eq!(run(&[scope.name(), "--", "/nonexistent/command"]).await, 127);
        assert_eq!(run(&[scope.name(), "--", "/dev/null"]).await, 126);
        assert_eq!(run(&[scope.name()]).await, 64);
        assert_eq!(run(&["--try", "--timeout", "1", scope.name(), "--", "true"]).await, 64);
        assert_eq!(run(&["--timeout", "-1", scope.name(), "--", "true"]).await, 64);
        assert_eq!(run(&["--ttl", "0", scope.name(), "--", "true"]).await, 64);
        assert_eq!(run(&["", "--", "true"]).await, 64);
        assert_eq!(run(&["--help"]).await, 0);
        let nobody = format!("--endpoints=127.0.0.1:{}", free_port());
        assert_eq!(run(&[&nobody, scope.name(), "--", "true"]).await, 69);
    })
    .await;
}

#[tokio::test]
async fn a_busy_lock_is_told_and_leaves_nobody_in_line() {
    scoped(async |scope| {
        let mut holder = guard(scope, &[], ASKS);
        let key = up(scope, &mut holder).await.key;
        for options in [&["--try"][..], &["--timeout", "0.2"]] {
            let mut other = guard(scope, options, "echo ran");
            assert_eq!(other.code().await, 75);
            let who = other.line(&format!("guard: {} is held by ", scope.name())).await;
            assert!(who.ends_with(&format!(":{}", holder.process.id())), "{who}");
            assert!(!other.seen.contains(&"ran".to_owned()));
            assert_eq!(scope.keys().await, [key.as_str()]);
        }
        holder.tell("go on");
        assert_eq!(holder.code().await, 7);
        let mut next = guard(scope, &["--try"], ASKS);
        up(scope, &mut next).await;
        next.tell("go on");
        assert_eq!(next.code().await, 7);
    })
    .await;
}

#[tokio::test]
async fn a_signal_ends_waiting_and_leaves_nobody_in_line() {
    scoped(async |scope| {
        let mut holder = guard(scope, &[], ASKS);
        let key = up(scope, &mut holder).await.key;
        let mut waiting = guard(scope, &[], "echo ran");
        let keys = line(scope, 2).await;
        scope.owns_lease(lease(&keys[1]));
        waiting.signal(Signal::SIGTERM);
        assert_eq!(waiting.code().await, 128 + 15);
        assert_eq!(scope.keys().await, [key]);
        holder.tell("go on");
        assert_eq!(holder.code().await, 7);
    })
    .await;
}

#[tokio::test]
async fn signals_reach_the_whole_group_of_the_command() {
    scoped(async |scope| {
        let script = format!("sleep 100 & echo other $!; trap 'echo trapped; exit 3' TERM; {TRAPS}");
        let mut guard = guard(scope, &[], &script);
        let other: i32 = guard.line("other ").await.parse().unwrap();
        let up = up(scope, &mut guard).await;
        assert_eq!(getpgid(Some(Pid::from_raw(up.id))), Ok(Pid::from_raw(up.id)));
        guard.signal(Signal::SIGTERM);
        guard.line("trapped").await;
        assert_eq!(guard.code().await, 3);
        until_state(other, None).await;
    })
    .await;
}

#[tokio::test]
async fn in_the_foreground_the_command_shares_the_group_and_gets_signals_itself() {
    scoped(async |scope| {
        let script =
            "trap 'exit 3' TERM; echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; while :; do sleep 0.01; done";
        let mut guard = guard(scope, &["--foreground"], script);
        let up = up(scope, &mut guard).await;
        assert_eq!(getpgid(Some(Pid::from_raw(up.id))).unwrap().as_raw().unsigned_abs(), guard.process.id());
        guard.signal(Signal::SIGTERM);
        assert_eq!(guard.code().await, 3);
    })
    .await;
}

#[tokio::test]
async fn signals_ignored_at_the_start_stay_ignored() {
    scoped(async |scope| {
        let mut holder = guard(scope, &[], ASKS);
        up(scope, &mut holder).await;
        let ordinary = command(scope, &[], "true");
        // As `nohup` does with SIGHUP.
        let mut deaf = Command::new("sh");
        deaf.args(["-c", r#"trap '' USR1; exec "$0" "$@""#]).env("ETCD_ENDPOINTS", scope.endpoint());
        deaf.arg(ordinary.get_program()).args(ordinary.get_args());
        let mut waiting = Program::start(deaf);
        line(scope, 2).await;
        waiting.signal(Signal::SIGUSR1);
        holder.tell("go on");
        assert_eq!(holder.code().await, 7);
        assert_eq!(waiting.code().await, 0);
    })
    .await;
}

#[tokio::test]
async fn when_the_key_is_deleted_the_command_is_stopped() {
    scoped(async |scope| {
        let mut guard = guard(scope, &["--grace", "60"], STAYS);
        let up = up(scope, &mut guard).await;
        let begin = Instant::now();
        scope.client().delete(up.key, None).await.unwrap();
        assert_eq!(guard.code().await, 74);
        assert_eq!(state(up.id), None);
        assert!(begin.elapsed() < Duration::from_secs(30), "SIGTERM was enough, no need of the grace time");
    })
    .await;
}

#[tokio::test]
async fn when_the_lease_is_revoked_a_command_that_ignores_it_is_killed_with_all_its_processes() {
    scoped(async |scope| {
        let mut guard = guard(scope, &["--grace", "0.3"], DEAF);
        let other: i32 = guard.line("other ").await.parse().unwrap();
        let up = up(scope, &mut guard).await;
        let begin = Instant::now();
        scope.client().lease_revoke(lease(&up.key)).await.unwrap();
        guard.line("guard: the lock is lost").await;
        assert_eq!(guard.code().await, 74);
        assert!(begin.elapsed() >= Duration::from_millis(300), "it had no grace time");
        assert_eq!(state(up.id), None);
        until_state(other, None).await;
    })
    .await;
}

#[tokio::test]
async fn a_guard_that_stood_still_too_long_stops_its_command() {
    scoped(async |scope| {
        let mut first = guard(scope, &["--ttl", "5"], STAYS);
        let first_up = up(scope, &mut first).await;
        let mut second = guard(scope, &[], ASKS);
        line(scope, 2).await;
        first.process.pause();
        let second_up = up(scope, &mut second).await;
        assert!(second_up.token > first_up.token);
        first.process.resume();
        assert_eq!(first.code().await, 74);
        assert_eq!(state(first_up.id), None);
        second.tell("go on");
        assert_eq!(second.code().await, 7);
    })
    .await;
}

#[tokio::test]
async fn ctrl_z_stops_the_command_too_and_it_goes_on_only_under_the_lock() {
    // One process: a shell that is stopped while it starts another counts as sleeping.
    const SLEEPS: &str = "echo up $$ $ETCD_LOCK_KEY $ETCD_LOCK_REV; exec sleep 100";
    for (ttl, expires) in [("60", false), ("5", true)] {
        scoped(async |scope| {
            let mut guard = guard(scope, &["--ttl", ttl], SLEEPS);
            let up = up(scope, &mut guard).await;
            guard.signal(Signal::SIGTSTP);
            until_state(guard.process.id().cast_signed(), Some('T')).await;
            until_state(up.id, Some('T')).await;
            if expires {
                line(scope, 0).await;
                guard.process.resume();
                assert_eq!(guard.code().await, 74);
                assert_eq!(state(up.id), None);
            } else {
                guard.process.resume();
                until_state(up.id, Some('S')).await;
                guard.signal(Signal::SIGTERM);
                assert_eq!(guard.code().await, 128 + 15);
            }
        })
        .await;
    }
}

#[tokio::test]
async fn guards_and_etcdctl_lock_run_one_at_a_time_in_order_with_growing_tokens() {
    scoped(async |scope| {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = |who: &str| {
            let log = log.display();
            format!("echo in {who} $ETCD_LOCK_REV >> {log}; sleep 0.05; echo out {who} >> {log}")
        };
        let mut holder = guard(scope, &[], ASKS);
        let first = up(scope, &mut holder).await.token;
        let mut line_up = Vec::new();
        for (place, who) in ["a", "ctl", "b", "ctl2", "c"].into_iter().enumerate() {
            line_up.push(Program::start(if who.starts_with("ctl") {
                etcd().etcdctl(["lock", scope.name(), "--", "sh", "-c", &script(who)])
            } else {
                command(scope, &[], &script(who))
            }));
            line(scope, place + 2).await;
        }
        holder.tell("go on");
        assert_eq!(holder.code().await, 7);
        for program in &mut line_up {
            assert_eq!(program.code().await, 0);
        }
        let log = std::fs::read_to_string(&log).unwrap();
        let mut entries = log.lines();
        let mut token = first;
        for who in ["a", "ctl", "b", "ctl2", "c"] {
            let next =
                entries.next().unwrap().strip_prefix(&format!("in {who} ")).expect(&log).parse().unwrap();
            assert!(next > token, "{log}");
            token = next;
            assert_eq!(entries.next(), Some(format!("out {who}").as_str()), "{log}");
        }
        let all = GetOptions::new().with_prefix().with_count_only();
        assert_eq!(scope.client().get(scope.name(), Some(all)).await.unwrap().count(), 0);
    })
    .await;
}
