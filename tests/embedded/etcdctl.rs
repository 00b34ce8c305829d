//! etcdctl against the embedded server.

use std::process::{Output, Stdio};
use std::time::Duration;

use etcd_recipes::embedded::Server;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

use crate::support::binaries::binaries;

/// etcdctl on a server that listens.
struct Ctl {
    server: Server,
}

impl Ctl {
    async fn new() -> Self {
        Self { server: Server::listen("127.0.0.1:0").await.unwrap() }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&binaries().etcdctl);
        let endpoint = self.server.address().unwrap().to_string();
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoint, "--command-timeout=10s"]).args(args);
        command.kill_on_drop(true);
        command
    }

    /// What it prints; it must succeed.
    async fn run(&self, args: &[&str]) -> String {
        let output = self.output(self.command(args)).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn output(&self, mut command: Command) -> Output {
        let output = tokio::time::timeout(Duration::from_secs(30), command.output());
        output.await.expect("etcdctl hangs").unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_put_got_and_deleted() {
    let ctl = Ctl::new().await;
    assert_eq!(ctl.run(&["put", "a/1", "one"]).await, "OK\n");
    ctl.run(&["put", "a/2", "two"]).await;
    assert_eq!(ctl.run(&["get", "--prefix", "a/"]).await, "a/1\none\na/2\ntwo\n");
    assert_eq!(
        ctl.run(&["get", "--prefix", "--print-value-only", "--sort-by=MODIFY", "--order=DESCEND", "a/"])
            .await,
        "two\none\n"
    );
    assert_eq!(ctl.run(&["del", "--prefix", "a/"]).await, "2\n");
    assert_eq!(ctl.run(&["get", "--prefix", "a/"]).await, "");
    let mut get = ctl.command(&["get", "--rev=100", "a/1"]);
    get.stdout(Stdio::null());
    let output = ctl.output(get).await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("required revision is a future revision"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_choose_their_side() {
    let ctl = Ctl::new().await;
    ctl.run(&["put", "k", "v"]).await;
    let mut txn = ctl.command(&["txn"]);
    txn.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = txn.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, b"value(\"k\") = \"v\"\n\nput k w\n\nput k x\n\n")
        .await
        .unwrap();
    drop(stdin);
    let output =
        tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("SUCCESS"), "{output:?}");
    assert_eq!(ctl.run(&["get", "--print-value-only", "k"]).await, "w\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_tell_history_and_what_comes() {
    let ctl = Ctl::new().await;
    ctl.run(&["put", "w/1", "old"]).await;
    let mut watch = ctl.command(&["watch", "--prefix", "--rev=1", "w/"]);
    let mut child = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(Duration::from_secs(30), lines.next_line());
        line.await.expect("nothing told").unwrap().unwrap()
    };
    assert_eq!([next().await, next().await, next().await], ["PUT", "w/1", "old"]);
    ctl.run(&["del", "w/1"]).await;
    assert_eq!([next().await, next().await], ["DELETE", "w/1"]);
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_hold_keys_until_they_are_revoked() {
    let ctl = Ctl::new().await;
    let granted = ctl.run(&["lease", "grant", "60"]).await;
    let id = granted.split_whitespace().nth(1).unwrap();
    ctl.run(&["put", "--lease", id, "k", "v"]).await;
    assert!(ctl.run(&["lease", "timetolive", "--keys", id]).await.contains("attached keys([k])"));
    assert!(ctl.run(&["lease", "keep-alive", "--once", id]).await.contains("TTL(60)"));
    assert!(ctl.run(&["lease", "list"]).await.contains(id));
    ctl.run(&["lease", "revoke", id]).await;
    assert_eq!(ctl.run(&["get", "k"]).await, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_elections_work() {
    let ctl = Ctl::new().await;
    assert_eq!(ctl.run(&["lock", "l", "echo", "held"]).await, "held\n");
    let mut elect = ctl.command(&["elect", "e", "me"]);
    let mut child = elect.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let key =
        tokio::time::timeout(Duration::from_secs(30), lines.next_line()).await.unwrap().unwrap().unwrap();
    assert!(key.starts_with("e/"), "{key}");
    let mut listen = ctl.command(&["elect", "--listen", "e"]);
    let mut listener = listen.stdout(Stdio::piped()).spawn().unwrap();
    let mut heard = BufReader::new(listener.stdout.take().unwrap()).lines();
    let leader =
        tokio::time::timeout(Duration::from_secs(30), heard.next_line()).await.unwrap().unwrap().unwrap();
    assert_eq!(leader, key);
    child.kill().await.unwrap();
    listener.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_status_are_told() {
    let ctl = Ctl::new().await;
    let members = ctl.run(&["member", "list"]).await;
    assert!(members.contains("started, embedded, http://127.0.0.1:"), "{members}");
    let status = ctl.run(&["endpoint", "status"]).await;
    assert!(status.contains("3.5.16") && status.contains("true"), "{status}");
    ctl.run(&["endpoint", "health"]).await;
    assert!(ctl.run(&["compact", "1"]).await.contains("compacted revision 1"));
}
