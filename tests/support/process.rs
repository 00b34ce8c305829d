//! A child process that cannot outlive this one, however this one ends.

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Waits for the end of its input, kills process `$1`, and removes directory `$2` if given. A killed process
/// may still make files for a moment, so that is tried until it holds.
const WATCHDOG: &str = r#"
read -r _
kill -9 "$1" 2>/dev/null
[ -n "$2" ] || exit
for try in 1 2 3 4 5 6 7 8 9 10; do
    rm -rf -- "$2" 2>/dev/null
    sleep 0.1
    [ -e "$2" ] || exit
done
"#;

/// A started process with a watchdog.
///
/// The watchdog is a small shell that waits for the end of its standard input, which comes when this process
/// is gone (destructors of statics do not run, and a killed process runs none at all); it then kills the
/// process by its id and removes its directory.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    watchdog: Child,
}

impl Process {
    /// Starts `command` in a process group of its own (a Ctrl-C at the terminal reaches only the test
    /// process). `directory` is removed by the watchdog if this process dies first.
    pub(crate) fn spawn(mut command: Command, directory: Option<&Path>) -> std::io::Result<Self> {
        let child = command.process_group(0).spawn()?;
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "watchdog", &child.id().to_string()])
            .arg(directory.unwrap_or_else(|| Path::new("")))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        match watchdog {
            Ok(watchdog) => Ok(Self { child, watchdog }),
            Err(error) => {
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The child itself, to take its pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. Panics when it has ended: once waited for, its id may be another's.
    pub(crate) fn signal(&mut self, signal: Signal) {
        assert!(self.try_signal(signal), "process {} has ended", self.id());
    }

    /// Sends a signal, unless it has ended.
    fn try_signal(&mut self, signal: Signal) -> bool {
        if self.ended().is_some() {
            return false;
        }
        let id = i32::try_from(self.child.id()).expect("process id out of range");
        kill(Pid::from_raw(id), signal).expect("cannot signal our own child");
        true
    }

    /// Freezes it with SIGSTOP. Returns when no thread of it runs, which takes the system a moment.
    pub(crate) fn pause(&mut self) {
        self.signal(Signal::SIGSTOP);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.runs() {
            assert!(Instant::now() < deadline, "process {} does not stop", self.id());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whether one of its threads is not stopped, where the system tells.
    fn runs(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.id())) else { return false };
        threads.flatten().any(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state follows the program's name, which stands in parentheses and may contain some.
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('T'))
        })
    }

    /// Lets it go on with SIGCONT.
    pub(crate) fn resume(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    /// How it ended, or `None` while it runs.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("cannot wait for our own child")
    }

    /// Waits for its end. Panics after `timeout`.
    pub(crate) async fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} did not end in {timeout:?}", self.id());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Asks it to end (also when paused) and waits.
    pub(crate) async fn terminate(mut self, timeout: Duration) -> ExitStatus {
        for signal in [Signal::SIGTERM, Signal::SIGCONT] {
            self.try_signal(signal);
        }
        self.wait(timeout).await
    }

    /// Kills it and waits: at most the time the system needs.
    pub(crate) fn kill(mut self) {
        self.kill_and_wait();
    }

    fn kill_and_wait(&mut self) {
        // No error: `Child` refuses to signal a process that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_and_wait();
        let _ = self.watchdog.kill();
        let _ = self.watchdog.wait();
    }
}

/// Whether a process was ended by `signal`.
pub(crate) fn ended_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}
