//! What registrations cost: ten thousand in one process on one session, next to as many single raw puts.
//!
//! `cargo xtask bench service [-- --quick] [--only SUBSTR]` prints a table and writes `target/bench/service.json`.

#[path = "../common/mod.rs"]
mod common;
mod registrations;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::common::table::{self, Case, case, ratio, row};
use crate::registrations::{Bench, Measure};

/// Measures the table of the service benchmark.
#[derive(Debug, Parser)]
#[command(name = "service")]
struct Options {
    /// Measure fewer registrations, to try it out
    #[arg(long)]
    quick: bool,
    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "SUBSTR", default_value = "")]
    only: String,
    /// etcd's client URL; `cargo xtask bench service` starts an etcd and sets it
    #[arg(long, env = "ETCD_ENDPOINTS")]
    endpoints: String,
    /// The URL of its metrics [default: the endpoint's]
    #[arg(long, env = "ETCD_METRICS")]
    metrics: Option<String>,
    /// Measure the memory of this process, and print one line
    #[arg(long, hide = true)]
    memory: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    // cargo adds one argument of its own.
    let options = Options::parse_from(std::env::args().filter(|arg| arg != "--bench"));
    let endpoint = options.endpoints.split(',').next().unwrap_or_default().to_owned();
    let metrics = options.metrics.as_deref().unwrap_or(&endpoint).trim_end_matches("/metrics").to_owned();
    let count = if options.quick { 1000 } else { 10_000 };
    let bench = Bench { endpoint, metrics, count, quick: options.quick };
    if options.memory {
        println!("{}", serde_json::to_string(&bench.own_memory().await?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let complete =
        table::run("service", cases(count), &options.only, async |measure| bench.measure(measure).await)
            .await?;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything that is measured.
fn cases(count: usize) -> Vec<Case<Measure>> {
    let all = |what: &str| format!("{count} registrations on one session: {what}");
    let time = [
        ratio(all("time over single raw puts, 64 in flight")).at_most(0.3),
        row(all("unary RPCs each"), "RPCs"),
        row(all("leases"), "leases").at_most(1.0),
    ];
    let back = row(all("back after a lost lease, beyond the time to register"), "s").at_most(2.0);
    let beats = row(all("keepalives in each third of the TTL"), "messages").at_most(1.1);
    vec![
        case(Measure::Time, time),
        case(Measure::Back, [back]),
        case(Measure::Keepalives, [beats]),
        case(Measure::Memory, [row(all("memory each"), "bytes").at_most(3072.0)]),
    ]
}
