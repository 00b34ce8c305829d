//! The command line of one workload: flags named like those of the peers.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Parser, ValueEnum};
use etcd_client::Client;
use serde_json::Value;

use super::crew::Run;
use super::options::Options;

/// A workload, and what it is run with. Flags are written as the peers write them, with a single dash: `-n 8 -dur 5s`.
#[derive(Debug, Clone, Parser)]
pub(crate) struct Load<W: ValueEnum + Send + Sync + 'static, F: Args> {
    /// What to do
    #[arg(value_enum)]
    pub(crate) workload: W,
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
    /// How many tasks do it at once: waiters, candidates, consumers or producers
    #[arg(long, default_value_t = 1)]
    pub(crate) n: usize,
    /// Variant of the workload
    #[arg(long, default_value = "")]
    pub(crate) mode: String,
    /// TTL of leases, seconds
    #[arg(long, default_value_t = 10)]
    pub(crate) ttl: u64,
    /// Bytes of a value
    #[arg(long, default_value_t = 16)]
    pub(crate) size: usize,
    /// What only some workloads have.
    #[command(flatten)]
    pub(crate) own: F,
}

impl<W: ValueEnum + Send + Sync + 'static, F: Args> Load<W, F> {
    /// A load for one round of a table.
    pub(crate) fn new(options: &Options, workload: W, n: usize, dur: Duration, own: F) -> Self {
        Self {
            workload,
            endpoint: options.endpoint.clone(),
            metrics: Some(options.metrics().to_owned()),
            dur,
            warm: Duration::from_secs(1),
            n,
            mode: String::new(),
            ttl: 10,
            size: 16,
            own,
        }
    }

    /// Reads the command line of a workload; `None` if it begins with an option and so is that of a table.
    pub(crate) fn parse_args(args: &[String]) -> Option<Self> {
        args.get(1).filter(|first| !first.starts_with('-'))?;
        let double = |arg: &String| match arg.strip_prefix('-') {
            Some(flag) if flag.starts_with(char::is_alphabetic) => format!("--{flag}"),
            _ => arg.clone(),
        };
        Some(Self::parse_from(args.iter().map(double)))
    }

    /// The command line that says the same, to this program and to the peers; `own` are flags of some workloads only.
    pub(crate) fn args_with(&self, own: impl IntoIterator<Item = (&'static str, String)>) -> Vec<String> {
        let mut flags = vec![
            ("endpoint", self.endpoint.clone()),
            ("metrics", self.metrics_url().to_owned()),
            ("dur", millis(self.dur)),
            ("warm", millis(self.warm)),
            ("n", self.n.to_string()),
            ("ttl", self.ttl.to_string()),
            ("size", self.size.to_string()),
        ];
        flags.extend((!self.mode.is_empty()).then(|| ("mode", self.mode.clone())));
        flags.extend(own);
        let flags = flags.into_iter().flat_map(|(flag, value)| [format!("-{flag}"), value]);
        [self.name()].into_iter().chain(flags).collect()
    }

    /// What a crew needs to know of it; `params` go to the result line.
    pub(crate) fn run_with(&self, params: Value) -> Run {
        Run {
            workload: self.name(),
            params,
            metrics: self.metrics_url().to_owned(),
            warm: self.warm,
            dur: self.dur,
        }
    }

    /// The name of the workload on the command line.
    pub(crate) fn name(&self) -> String {
        self.workload.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(crate) fn metrics_url(&self) -> &str {
        self.metrics.as_deref().unwrap_or(&self.endpoint)
    }

    /// A connection of etcd-client's own.
    pub(crate) async fn connect(&self) -> Result<Client> {
        Ok(Client::connect([&self.endpoint], None).await?)
    }
}

/// Writes a duration in Go's notation.
pub(crate) fn millis(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

/// Reads a duration in Go's notation, with one unit.
pub(crate) fn duration(text: &str) -> Result<Duration> {
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
