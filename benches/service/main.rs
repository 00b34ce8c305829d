//! What registrations cost: ten thousand in one process on one session, next to as many single raw puts.
//!
//! `cargo xtask bench service [-- --quick] [--only SUBSTR]` prints a table and writes `target/bench/service.json`.

#[path = "../common/mod.rs"]
mod common;
mod registrations;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser as _;

use crate::common::options;
use crate::common::table::{self, Case, case, ratio, row};
use crate::registrations::{Bench, Measure};

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let bench = Bench::parse_from(options::args());
    if bench.memory {
        println!("{}", serde_json::to_string(&bench.own_memory().await?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let cases = cases(bench.count());
    table::run("service", cases, &bench.options.only, async |measure| bench.measure(measure).await).await
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
