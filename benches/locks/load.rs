//! What to run: a workload and its flags, named like those of the peers.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use etcd_client::Client;
use serde_json::json;

use crate::common::crew::Run;
use crate::common::open;

/// How many connections `-mode few` opens.
const FEW: usize = 8;

/// One workload. Flags are written as the peers write them, with a single dash: `-n 8 -hold 5ms`.
#[derive(Debug, Clone, Parser)]
#[command(name = "locks")]
pub(crate) struct Load {
    /// What to do
    pub(crate) workload: Workload,
    /// etcd's client URL
    #[arg(long, default_value = "http://127.0.0.1:2379")]
    pub(crate) endpoint: String,
    /// The URL whose /metrics is read [default: the endpoint]
    #[arg(long)]
    pub(crate) metrics: Option<String>,
    /// Measured time
    #[arg(long, value_parser = duration, default_value = "5s")]
    pub(crate) dur: Duration,
    /// Warm-up before it
    #[arg(long, value_parser = duration, default_value = "1s")]
    pub(crate) warm: Duration,
    /// Tasks, waiters or candidates
    #[arg(long, default_value_t = 1)]
    pub(crate) n: usize,
    /// Variant. mutex-contended, election: own connections (empty), `shared`, `few` (eight connections), `one`
    /// (session). floor-watch: puts (empty), `delete`
    #[arg(long, default_value = "")]
    pub(crate) mode: String,
    /// Time spent inside the critical section
    #[arg(long, value_parser = duration, default_value = "0s")]
    pub(crate) hold: Duration,
    /// TTL of leases, seconds
    #[arg(long, default_value_t = 10)]
    pub(crate) ttl: u64,
    /// Bytes of a value
    #[arg(long, default_value_t = 16)]
    pub(crate) size: usize,
    /// memory-waiters: lock names that the waiters are spread over
    #[arg(long, default_value_t = 100)]
    pub(crate) names: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    Session,
    MutexUncontended,
    MutexContended,
    Election,
    FloorPut,
    FloorLockpair,
    FloorLease,
    FloorWatch,
    FloorHandoff,
    MemorySessions,
    MemoryWaiters,
}

impl Workload {
    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

impl Load {
    /// Reads the command line of a workload.
    pub(crate) fn parse_args(args: &[String]) -> Self {
        let double = |arg: &String| match arg.strip_prefix('-') {
            Some(flag) if flag.starts_with(char::is_alphabetic) => format!("--{flag}"),
            _ => arg.clone(),
        };
        Self::parse_from(args.iter().map(double))
    }

    /// The command line that says the same, to this program and to the peers.
    pub(crate) fn args(&self) -> Vec<String> {
        let millis = |time: Duration| format!("{}ms", time.as_millis());
        let mut args = vec![self.workload.name(), "-endpoint".into(), self.endpoint.clone()];
        let mut add = |flag: &str, value: String| args.extend([format!("-{flag}"), value]);
        add("metrics", self.metrics_url().to_owned());
        add("dur", millis(self.dur));
        add("warm", millis(self.warm));
        add("n", self.n.to_string());
        add("ttl", self.ttl.to_string());
        if !self.mode.is_empty() {
            add("mode", self.mode.clone());
        }
        if !self.hold.is_zero() {
            add("hold", millis(self.hold));
        }
        if self.workload == Workload::MemoryWaiters {
            add("names", self.names.to_string());
        }
        args
    }

    /// What a crew needs to know of it.
    pub(crate) fn run(&self) -> Run {
        Run {
            workload: self.workload.name(),
            params: json!({ "n": self.n, "mode": self.mode, "hold_ms": self.hold.as_secs_f64() * 1e3 }),
            metrics: self.metrics_url().to_owned(),
            warm: self.warm,
            dur: self.dur,
        }
    }

    pub(crate) fn metrics_url(&self) -> &str {
        self.metrics.as_deref().unwrap_or(&self.endpoint)
    }

    /// A connection of etcd-client's own, for the floor.
    pub(crate) async fn connect(&self) -> Result<Client> {
        Ok(Client::connect([&self.endpoint], None).await?)
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

/// Reads a duration in Go's notation, with one unit.
fn duration(text: &str) -> Result<Duration> {
    let unit = text.find(|c: char| c.is_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => bail!("a duration is a number and one of us, ms, s, m"),
    };
    Ok(Duration::try_from_secs_f64(number.parse::<f64>()? * seconds)?)
}
