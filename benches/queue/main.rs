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

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;

use crate::common::line::Line;
use crate::common::{options, table};
use crate::load::{Load, Workload};
use crate::measure::Bench;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let args = options::args();
    if let Some(load) = Load::parse_args(&args) {
        println!("{}", serde_json::to_string(&run(&load).await?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::parse_from(args);
    table::run("queue", plan::cases(), &bench.options.only, async |measure| bench.measure(measure).await)
        .await
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
    line.with_context(|| format!("{} -n {}", load.name(), load.n))
}
