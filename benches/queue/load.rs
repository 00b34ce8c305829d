//! What to run: a workload and its flags, named like those of the peers.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use etcd_client::Client;
use etcd_recipes::Session;
use serde_json::json;

use crate::common::crew::Run;
use crate::common::open;

/// One workload. Flags are written as the peers write them, with a single dash: `-n 4 -preload 20000`.
#[derive(Debug, Clone, Parser)]
#[command(name = "queue")]
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
    /// Consumers, or producers that put
    #[arg(long, default_value_t = 1)]
    pub(crate) n: usize,
    /// Variant. queue-drain, queue-mixed: taken at once (empty), `claim` (claimed and acked). queue-enqueue: one at a
    /// time (empty), `batch` (100 in one transaction)
    #[arg(long, default_value = "")]
    pub(crate) mode: String,
    /// Items in the queue before
    #[arg(long, default_value_t = 20_000)]
    pub(crate) preload: usize,
    /// Stop draining after so many items [default: all]
    #[arg(long)]
    pub(crate) items: Option<usize>,
    /// Producers of queue-mixed
    #[arg(long, default_value_t = 1)]
    pub(crate) producers: usize,
    /// Items per second of all producers
    #[arg(long, default_value_t = 200.0)]
    pub(crate) rate: f64,
    /// TTL of leases, seconds
    #[arg(long, default_value_t = 60)]
    pub(crate) ttl: u64,
    /// Bytes of a value
    #[arg(long, default_value_t = 16)]
    pub(crate) size: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    QueueEnqueue,
    QueueDrain,
    QueueMixed,
    QueueMemory,
    FloorPut,
    FloorWatch,
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
        add("preload", self.preload.to_string());
        add("producers", self.producers.to_string());
        add("rate", self.rate.to_string());
        add("size", self.size.to_string());
        args
    }

    /// What a crew needs to know of it.
    pub(crate) fn run(&self) -> Run {
        Run {
            workload: self.workload.name(),
            params: json!({ "n": self.n, "mode": self.mode, "preload": self.preload, "rate": self.rate }),
            metrics: self.metrics_url().to_owned(),
            warm: self.warm,
            dur: self.dur,
        }
    }

    pub(crate) fn metrics_url(&self) -> &str {
        self.metrics.as_deref().unwrap_or(&self.endpoint)
    }

    /// A connection of etcd-client's own.
    pub(crate) async fn connect(&self) -> Result<Client> {
        Ok(Client::connect([&self.endpoint], None).await?)
    }

    /// A session on connections of its own.
    pub(crate) async fn session(&self) -> Result<Session> {
        let client = self.connect().await?;
        Ok(Session::builder_with_client(client).ttl(Duration::from_secs(self.ttl)).connect().await?)
    }

    pub(crate) async fn sessions(&self) -> Result<Vec<Session>> {
        open(self.n, |_| self.session()).await
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
