//! What the queue costs, next to the raw RPCs of the same work and to Go's `recipe.Queue`.
//!
//! Two ways to run it, as for the bench of the locks:
//!
//! - `cargo xtask bench queue [-- --quick] [--only SUBSTR]` measures the whole table and writes `target/bench/queue.json`.
//!   With `PEER_GO=/path/to/bench`, the peers' Go program, it also compares with that.
//! - `PROGRAM WORKLOAD [-n 4 -preload 20000 …]` runs one workload and prints one JSON line, as the peers do.

#[path = "../common/mod.rs"]
mod common;
mod load;
mod measure;
mod memory;
mod plan;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::common::line::Line;
use crate::common::table;
use crate::load::{Load, Workload};
use crate::measure::Bench;

/// Measures the table of the queue benchmark.
#[derive(Debug, Parser)]
#[command(
    name = "queue",
    after_help = "With a workload as its first argument it takes other flags: see WORKLOAD --help."
)]
struct Options {
    /// Measure shorter, to try it out
    #[arg(long)]
    quick: bool,
    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "SUBSTR", default_value = "")]
    only: String,
    /// etcd's client URL; `cargo xtask bench queue` starts an etcd and sets it
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
        table::run("queue", plan::cases(), &options.only, async |measure| bench.measure(measure).await)
            .await?;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one workload.
async fn run(load: &Load) -> Result<Line> {
    let line = match load.workload {
        Workload::QueueEnqueue => work::enqueue(load).await,
        Workload::QueueDrain => work::drain(load).await,
        Workload::QueueMixed => work::mixed(load).await,
        Workload::QueueMemory => memory::consumer(load).await,
        Workload::FloorPut => work::put(load).await,
        Workload::FloorWatch => work::watch(load).await,
    };
    line.with_context(|| format!("{} -n {}", load.workload.name(), load.n))
}
