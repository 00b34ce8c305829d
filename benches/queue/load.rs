//! The workloads of this bench and the flags that only they have.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use etcd_recipes::Session;
use serde_json::json;

use crate::common::crew::Run;
use crate::common::{load, open};

pub(crate) type Load = load::Load<Workload, Flags>;

#[derive(Debug, Clone, Args)]
pub(crate) struct Flags {
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Modes: one at a time (empty), `batch` (100 in one transaction)
    QueueEnqueue,
    /// Modes: taken at once (empty), `claim` (claimed and acked)
    QueueDrain,
    /// Modes: as those of queue-drain
    QueueMixed,
    QueueMemory,
    FloorPut,
    FloorWatch,
}

impl Load {
    /// The command line that says the same, to this program and to the peers.
    pub(crate) fn args(&self) -> Vec<String> {
        let Flags { preload, producers, rate, .. } = &self.own;
        let own = [("preload", preload.to_string()), ("producers", producers.to_string())];
        self.args_with(own.into_iter().chain([("rate", rate.to_string())]))
    }

    /// What a crew needs to know of it.
    pub(crate) fn run(&self) -> Run {
        let Flags { preload, rate, .. } = &self.own;
        self.run_with(json!({ "n": self.n, "mode": self.mode, "preload": preload, "rate": rate }))
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
