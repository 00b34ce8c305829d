//! The command: started, sent signals, and stopped for sure.

use std::ffi::OsStr;
use std::io::IsTerminal as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use etcd_recipes::MutexGuard;
use nix::sys::signal::{Signal, kill, killpg, raise};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Args;

/// The signals that the command gets as well.
pub(crate) const PASSED_ON: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// The command while it runs; killed when dropped.
pub(crate) struct Job {
    child: Child,
    id: Pid,
    grace: Duration,
    /// In our own process group, where only the command itself can be sent signals.
    foreground: bool,
    /// Ctrl-Z.
    stops: mpsc::Receiver<Signal>,
}

impl Job {
    /// Starts the command with the lock's key and token in its environment.
    pub(crate) fn start(args: &Args, guard: &MutexGuard) -> std::io::Result<Self> {
        let (program, arguments) = args.command.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
        let mut command = Command::new(program);
        command.args(arguments);
        command.env("ETCD_LOCK_KEY", OsStr::from_bytes(guard.key()));
        command.env("ETCD_LOCK_REV", guard.token().to_string());
        if !args.foreground {
            command.process_group(0);
            if std::io::stdin().is_terminal() {
                // Reading from the terminal would stop the command for ever.
                command.stdin(Stdio::null());
            }
        }
        // Before the command runs: it must not go on without us.
        let stops = listen(if args.foreground { &[] } else { &[Signal::SIGTSTP] })?;
        let child = command.spawn()?;
        let id = child.id().and_then(|id| i32::try_from(id).ok()).ok_or(std::io::ErrorKind::InvalidData)?;
        Ok(Self { child, id: Pid::from_raw(id), grace: args.grace, foreground: args.foreground, stops })
    }

    /// Waits for the end of the command, or ends it when the lock is lost: then `None`.
    pub(crate) async fn supervise(
        &mut self,
        guard: &MutexGuard,
        signals: &mut mpsc::Receiver<Signal>,
    ) -> std::io::Result<Option<ExitStatus>> {
        loop {
            tokio::select! {
                biased;
                () = guard.lost() => {
                    eprintln!("guard: the lock is lost; stopping the command");
                    return self.stop().await.map(|_| None);
                }
                status = self.child.wait() => return status.map(Some),
                Some(signal) = signals.recv() => match signal {
                    // The terminal has sent it to the command, too.
                    Signal::SIGINT | Signal::SIGQUIT if self.foreground => {}
                    signal => self.send(signal),
                },
                Some(_) = self.stops.recv() => {
                    self.send(Signal::SIGSTOP);
                    raise(Signal::SIGSTOP)?;
                    // However long we stood still: this knows.
                    if guard.is_held() {
                        self.send(Signal::SIGCONT);
                    }
                }
            }
        }
    }

    /// Asks the whole group to end, and makes it after the grace time.
    async fn stop(&mut self) -> std::io::Result<ExitStatus> {
        self.send(Signal::SIGTERM);
        self.send(Signal::SIGCONT);
        let (child, id, foreground) = (&mut self.child, self.id, self.foreground);
        let gone = async {
            let status = child.wait().await;
            // The command may have ended before processes that it started.
            while !foreground && killpg(id, None).is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            status
        };
        if let Ok(status) = tokio::time::timeout(self.grace, gone).await {
            return status;
        }
        self.kill();
        self.child.wait().await
    }

    /// Ends what is left. A command that has been waited for is not sent anything: its id may be another's.
    fn kill(&self) {
        if !self.foreground || self.child.id().is_some() {
            self.send(Signal::SIGKILL);
        }
    }

    /// Sends a signal to the command, which has not been waited for, or to its group.
    fn send(&self, signal: Signal) {
        let sent = if self.foreground { kill(self.id, signal) } else { killpg(self.id, signal) };
        if let Err(error) = sent {
            tracing::debug!(%signal, %error, "not sent");
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Only after an error: otherwise it has been waited for.
        if self.child.id().is_some() {
            self.kill();
        }
    }
}

/// The exit code that stands for how a command ended.
pub(crate) fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.unwrap_or_else(|| killed_by(status.signal().unwrap_or_default()))
}

/// The exit code of who was ended by a signal.
pub(crate) fn killed_by(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |signal| signal.saturating_add(128))
}

/// The signals of these kinds as they come, except those that were ignored when we were started (`nohup`): they stay
/// ignored, by the command too.
pub(crate) fn listen(kinds: &[Signal]) -> std::io::Result<mpsc::Receiver<Signal>> {
    let (sender, receiver) = mpsc::channel(16);
    let ignored = ignored();
    for &kind in kinds.iter().filter(|kind| ignored >> (**kind as i32 - 1) & 1 == 0) {
        let (mut stream, sender) = (signal(SignalKind::from_raw(kind as i32))?, sender.clone());
        tokio::spawn(
            async move { while stream.recv().await.is_some() && sender.send(kind).await.is_ok() {} },
        );
    }
    Ok(receiver)
}

/// One bit for each ignored signal, where the system tells.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
