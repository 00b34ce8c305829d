//! A test body in a process of its own, to be paused or killed.
//!
//! The body is an ordinary test marked `#[ignore]` that begins with
//! `let Some(role) = child::role() else { return };`. The test that uses it starts it by its full name with
//! [`Child::spawn`], and the two talk in lines.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitStatus, Stdio};

use tokio::sync::mpsc;

use super::process::Process;
use super::server::PATIENCE;

/// Marks the lines that are said, among those of the test harness.
const MARK: &str = "@@ ";
/// Tells a process that it is a child.
const VARIABLE: &str = "ETCD_RECIPES_TEST_CHILD";

/// The parent's side.
#[derive(Debug)]
pub(crate) struct Child {
    process: Process,
    stdin: std::process::ChildStdin,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Child {
    /// Starts the ignored test `name` (as `cargo test` lists it, for example `session::pause::body`) of this
    /// test binary with these variables.
    pub(crate) fn spawn(name: &str, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("no path of this test binary"));
        command.args([name, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(VARIABLE, "1").envs(variables.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command, None).expect("cannot run this test binary");
        let stdin = process.child().stdin.take().expect("stdin was asked for");
        let stdout = process.child().stdout.take().expect("stdout was asked for");
        let (sender, lines) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(said) = line.strip_prefix(MARK) {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Self { process, stdin, lines }
    }

    /// The next line it says. Panics when it ends without, or takes too long.
    pub(crate) async fn line(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv()).await.expect("the child says nothing");
        line.expect("the child ended (was its name right?)")
    }

    /// Waits for this line; no other may come before.
    pub(crate) async fn expect(&mut self, line: &str) {
        assert_eq!(self.line().await, line);
    }

    /// The lines it said since the last look, without waiting.
    pub(crate) fn said(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.lines.try_recv().ok()).collect()
    }

    /// Sends it a line.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("the child does not listen");
    }

    /// Freezes it with SIGSTOP. Returns when it stands still.
    pub(crate) fn pause(&mut self) {
        self.process.pause();
    }

    /// Lets it go on with SIGCONT.
    pub(crate) fn resume(&mut self) {
        self.process.resume();
    }

    /// Kills it with SIGKILL, waits for its end, and returns what it had still said.
    pub(crate) async fn kill(mut self) -> Vec<String> {
        self.process.kill();
        let mut said = Vec::new();
        let rest = async {
            while let Some(line) = self.lines.recv().await {
                said.push(line);
            }
        };
        tokio::time::timeout(PATIENCE, rest).await.expect("somebody else has its output");
        said
    }

    /// Waits for its own end.
    pub(crate) async fn wait(mut self) -> ExitStatus {
        self.process.wait(PATIENCE).await
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }
}

/// The child's side.
#[derive(Debug)]
pub(crate) struct Role {
    lines: mpsc::UnboundedReceiver<String>,
}

/// The role of this process if it is a child, else `None`. A child ends when its parent does.
pub(crate) fn role() -> Option<Role> {
    std::env::var_os(VARIABLE)?;
    let (sender, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
        std::process::exit(3);
    });
    Some(Role { lines })
}

impl Role {
    /// Says a line to the parent.
    #[allow(clippy::unused_self)]
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        // The harness may have left its own line unfinished. One write, so that lines of threads stay whole.
        let text = format!("\n{MARK}{}\n", line.as_ref());
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).expect("the parent does not listen");
    }

    /// The next line of the parent.
    pub(crate) async fn hear(&mut self) -> String {
        self.lines.recv().await.expect("the parent is gone")
    }

    /// A variable the parent set.
    #[allow(clippy::unused_self)]
    pub(crate) fn variable(&self, name: &str) -> String {
        std::env::var(name).unwrap_or_else(|_| panic!("the parent did not set {name}"))
    }
}
