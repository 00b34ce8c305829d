//! What locks cost, next to the raw RPCs of the same work and to etcd's own Go package.
//!
//! Two ways to run it:
//!
//! - `cargo xtask bench locks [-- --quick] [--only SUBSTR]` measures the whole table: ratios, each within one run and in
//!   alternating rounds, and counts from etcd's own metrics. It prints the table and writes `target/bench/locks.json`.
//!   With `PEER_GO=/path/to/bench`, the peers' Go program, it also compares with that.
//! - `PROGRAM WORKLOAD [-n 8 -dur 5s …]` runs one workload and prints one JSON line: the names, flags and fields of the
//!   other peers, so that their `run.sh` and `matrix.py` take this program as one more.
//!
//! A sample of a contended lock runs from "release called" by one holder to "acquire returned" in the next.

#[path = "../common/mod.rs"]
mod common;
mod floor;
mod load;
mod measure;
mod memory;
mod plan;
mod recipes;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::common::line::Line;
use crate::common::table;
use crate::load::{Load, Workload};
use crate::measure::Bench;

/// Measures the table of the lock benchmark.
#[derive(Debug, Parser)]
#[command(
    name = "locks",
    after_help = "With a workload as its first argument it takes other flags: see WORKLOAD --help."
)]
struct Options {
    /// Measure shorter, to try it out
    #[arg(long)]
    quick: bool,
    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "SUBSTR", default_value = "")]
    only: String,
    /// etcd's client URL; `cargo xtask bench locks` starts an etcd and sets it
    #[arg(long, env = "ETCD_ENDPOINTS")]
    endpoints: String,
    /// The URL of its metrics [default: the endpoint's]
    #[arg(long, env = "ETCD_METRICS")]
    metrics: Option<String>,
    /// The peers' Go program, to compare with
    #[arg(long, env = "PEER_GO")]
    go: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    // cargo adds one argument of its own.
    let args: Vec<String> = std::env::args().filter(|arg| arg != "--bench").collect();
    if args.get(1).is_some_and(|first| !first.starts_with('-')) {
        let line = run(&Load::parse_args(&args)).await?;
        println!("{}", serde_json::to_string(&line)?);
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse_from(args);
    let endpoint = options.endpoints.split(',').next().unwrap_or_default().to_owned();
    let metrics = options.metrics.as_deref().unwrap_or(&endpoint).trim_end_matches("/metrics").to_owned();
    let bench = Bench { endpoint, metrics, quick: options.quick, go: options.go };
    let complete =
        table::run("locks", plan::cases(), &options.only, async |measure| bench.measure(measure).await)
            .await?;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one workload.
async fn run(load: &Load) -> Result<Line> {
    let line = match load.workload {
        Workload::Session => recipes::session_rate(load).await,
        Workload::MutexUncontended => recipes::mutex_uncontended(load).await,
        Workload::MutexContended => recipes::mutex_contended(load).await,
        Workload::Election => recipes::election(load).await,
        Workload::FloorPut => floor::put(load).await,
        Workload::FloorLockpair => floor::lock_pair(load).await,
        Workload::FloorLease => floor::lease(load).await,
        Workload::FloorWatch => floor::watch(load).await,
        Workload::FloorHandoff => floor::handoff(load).await,
        Workload::MemorySessions => memory::sessions(load).await,
        Workload::MemoryWaiters => memory::waiters(load).await,
    };
    line.with_context(|| format!("{} -n {} -mode '{}'", load.workload.name(), load.n, load.mode))
}
