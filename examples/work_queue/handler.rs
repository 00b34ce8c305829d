//! The command that works on an item.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use etcd_recipes::{Claim, Error};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Done,
    Failed,
    /// The item is not ours any more; the command was stopped.
    Lost,
    /// The command was stopped because this program is to end.
    Stopped,
}

/// How items are worked on.
pub(crate) struct Handler {
    command: Vec<OsString>,
    retry_delay: Duration,
}

/// A command and all that it started, in a process group of its own; killed when dropped.
struct Group {
    child: Child,
    id: Option<Pid>,
}

impl Handler {
    pub(crate) fn new(command: &[OsString], retry_delay: Duration) -> Self {
        Self { command: command.to_vec(), retry_delay }
    }

    /// Runs the command for an item as long as it is ours. When dropped, the command is stopped.
    pub(crate) async fn run(&self, claim: &Claim) -> Result<Ended> {
        let (program, arguments) = self.command.split_first().context("no command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).process_group(0);
        command.env("ETCD_ITEM_KEY", OsStr::from_bytes(&claim.item().key));
        command.env("ETCD_ITEM_ATTEMPT", claim.attempt().to_string());
        command.env("ETCD_ITEM_TOKEN", claim.token().to_string());
        let child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
        let id = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let mut group = Group { child, id };
        let input = group.child.stdin.take();
        let write = async {
            if let Some(mut input) = input {
                // A command need not read its input.
                let _ = input.write_all(claim.value()).await;
            }
            std::future::pending::<()>().await
        };
        tokio::select! {
            biased;
            () = claim.lost() => Ok(Ended::Lost),
            status = group.child.wait() => {
                group.id = None;
                Ok(if status?.success() { Ended::Done } else { Ended::Failed })
            }
            () = write => Ok(Ended::Failed),
        }
    }

    /// Says at etcd what became of the item.
    pub(crate) async fn settle(&self, claim: Claim, ended: Ended) -> Result<()> {
        let key = String::from_utf8_lossy(&claim.item().key).into_owned();
        let attempt = claim.attempt();
        let settled = match ended {
            Ended::Done => claim.ack().await,
            Ended::Failed => {
                eprintln!("work_queue: {key}: attempt {attempt} failed");
                claim.release(self.retry_delay).await
            }
            Ended::Stopped => claim.release(Duration::ZERO).await,
            Ended::Lost => {
                eprintln!("work_queue: {key}: lost to another worker; the command was stopped");
                return Ok(());
            }
        };
        match settled {
            Err(Error::Lost { .. } | Error::OutcomeUnknown { .. }) => {
                eprintln!("work_queue: {key}: the claim was lost, perhaps before the command ended");
                Ok(())
            }
            result => Ok(result?),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // It has not been waited for, so its id is nobody else's.
            let _ = killpg(id, Signal::SIGKILL);
        }
    }
}
