//! The workloads of this bench and the flags that only they have.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use etcd_client::Client;
use serde_json::json;

use crate::common::crew::Run;
use crate::common::load::{duration, millis};
use crate::common::{load, open};

/// How many connections `-mode few` opens.
const FEW: usize = 8;

pub(crate) type Load = load::Load<Workload, Flags>;

#[derive(Debug, Clone, Args)]
pub(crate) struct Flags {
    /// Time spent inside the critical section
    #[arg(long, value_parser = duration, default_value = "0s")]
    pub(crate) hold: Duration,
    /// memory-waiters: lock names that the waiters are spread over
    #[arg(long, default_value_t = 100)]
    pub(crate) names: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    Session,
    /// Modes: a session each (empty), `one`
    MutexUncontended,
    /// Modes: own connections (empty), `shared`, `few` (eight connections), `one` (session)
    MutexContended,
    /// Modes: as those of mutex-contended
    Election,
    FloorPut,
    FloorLockpair,
    FloorLease,
    /// Modes: puts (empty), `delete`
    FloorWatch,
    FloorHandoff,
    /// Modes: one connection (empty), `own`
    MemorySessions,
    MemoryWaiters,
}

impl Load {
    /// The command line that says the same, to this program and to the peers.
    pub(crate) fn args(&self) -> Vec<String> {
        let Flags { hold, names } = &self.own;
        let hold = (!hold.is_zero()).then(|| ("hold", millis(*hold)));
        let names = (self.workload == Workload::MemoryWaiters).then(|| ("names", names.to_string()));
        self.args_with([hold, names].into_iter().flatten())
    }

    /// What a crew needs to know of it.
    pub(crate) fn run(&self) -> Run {
        let hold = self.own.hold.as_secs_f64() * 1e3;
        self.run_with(json!({ "n": self.n, "mode": self.mode, "hold_ms": hold }))
    }

    /// One client for each of `n`, over as many connections as the mode says.
    pub(crate) async fn clients(&self) -> Result<Vec<Client>> {
        let connections = match self.mode.as_str() {
            "" => self.n,
            "few" => FEW,
            "shared" => 1,
            mode => bail!("no such mode: {mode}"),
        };
        let clients = open(connections, |_| self.connect()).await?;
        Ok(clients.iter().cycle().take(self.n).cloned().collect())
    }
}
