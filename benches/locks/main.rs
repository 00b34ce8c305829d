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
    table::run("locks", plan::cases(), &bench.options.only, async |measure| bench.measure(measure).await)
        .await
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
    line.with_context(|| format!("{} -n {} -mode '{}'", load.name(), load.n, load.mode))
}
