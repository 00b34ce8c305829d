//! Programs of others, in processes of their own: `etcdctl lock` and `etcdctl elect` as contenders, and any other.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use tokio::sync::mpsc;

use super::process::Process;
use super::server::{PATIENCE, Server};

/// A contender, or a listener. Killed when dropped; its key then stays until its lease expires.
#[derive(Debug)]
pub(crate) struct Foreign {
    process: Process,
    lines: mpsc::UnboundedReceiver<String>,
    /// Holds what a command under the lock waits for. The command ends with it, too.
    gate: Option<TempDir>,
}

impl Foreign {
    /// Contends with `etcdctl lock`, which runs a command that says the token.
    pub(crate) fn lock(server: &Server, name: &str) -> Self {
        let gate = tempfile::tempdir().expect("no temporary directory");
        let held = gate.path().display();
        let command =
            format!("echo $ETCD_LOCK_REV; while [ -d {held} ] && [ ! -e {held}/open ]; do sleep 0.01; done");
        Self::start(server, &["lock", name, "--", "sh", "-c", &command], Some(gate))
    }

    /// Contends with `etcdctl elect`, which says its key and its value when it leads.
    pub(crate) fn elect(server: &Server, name: &str, value: &str) -> Self {
        Self::start(server, &["elect", name, value], None)
    }

    /// Listens with `etcdctl elect -l`, which says key and value of each leader.
    pub(crate) fn listen(server: &Server, name: &str) -> Self {
        Self::start(server, &["elect", "-l", name], None)
    }

    /// Runs some other program.
    pub(crate) fn program(command: Command) -> Self {
        Self::spawn(command, Stdio::piped(), None)
    }

    fn start(server: &Server, args: &[&str], gate: Option<TempDir>) -> Self {
        Self::spawn(server.etcdctl(args), Stdio::null(), gate)
    }

    fn spawn(mut command: Command, stdin: Stdio, gate: Option<TempDir>) -> Self {
        command.stdin(stdin).stdout(Stdio::piped());
        let mut process = Process::spawn(command, None).expect("cannot run the program");
        let stdout = process.child().stdout.take().expect("stdout was asked for");
        let (sender, lines) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { process, lines, gate }
    }

    /// Writes a line to its standard input.
    pub(crate) fn say(&mut self, line: &str) {
        let stdin = self.process.child().stdin.as_mut().expect("it has no input");
        writeln!(stdin, "{line}").expect("it does not listen");
    }

    /// The next line it says.
    pub(crate) async fn line(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await.expect("it says nothing");
        line.expect("it ended")
    }

    /// Waits until a lock is held; its fencing token.
    pub(crate) async fn token(&mut self) -> i64 {
        let line = self.line().await;
        line.trim().parse().unwrap_or_else(|_| panic!("not a token: {line}"))
    }

    /// Waits until an election is won; the key.
    pub(crate) async fn wins(&mut self, value: &str) -> String {
        let key = self.line().await;
        assert_eq!(self.line().await, value);
        key
    }

    /// What it said since the last look, without waiting.
    pub(crate) fn said(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.lines.try_recv().ok()).collect()
    }

    /// Has it give up what it holds, and waits for its end.
    pub(crate) async fn leave(mut self) {
        match &self.gate {
            Some(gate) => {
                std::fs::write(gate.path().join("open"), "").expect("cannot open the gate");
                assert!(self.process.wait(PATIENCE).await.success());
            }
            // Asked to end, it resigns first.
            None => drop(self.process.terminate(PATIENCE).await),
        }
    }

    /// Kills it; its lease stays behind.
    pub(crate) fn kill(self) {
        self.process.kill();
    }
}
