//! What the config cache costs, next to a plain map and to the raw requests of the same work.
//!
//! `cargo xtask bench config [-- --quick] [--only SUBSTR]` measures the whole table: ratios, each within one run and in
//! alternating rounds. It prints the table and writes `target/bench/config.json`. What is told of memory is measured in a
//! process of its own (`PROGRAM memory ENDPOINT NAME`).

#[path = "../common/mod.rs"]
mod common;
mod notify;
mod reads;
mod sync;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::common::compare::Figure;
use crate::common::table::{self, Case, case, ratio, row};

/// Keys in the large prefix, with values of [`VALUE`] bytes.
const KEYS: usize = 100_000;
const VALUE: usize = 100;

/// Measures the table of the config benchmark.
#[derive(Debug, Parser)]
#[command(name = "config")]
struct Options {
    /// Measure shorter, to try it out
    #[arg(long)]
    quick: bool,
    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "SUBSTR", default_value = "")]
    only: String,
    /// etcd's client URL; `cargo xtask bench config` starts an etcd and sets it
    #[arg(long, env = "ETCD_ENDPOINTS")]
    endpoints: String,
    /// The URL of its metrics [default: the endpoint's]
    #[arg(long, env = "ETCD_METRICS")]
    metrics: Option<String>,
}

/// What is measured together.
enum Measure {
    Reads,
    Sync,
    Memory,
    Notify { handlers: usize },
}

/// Where and how long.
struct Bench {
    endpoint: String,
    metrics: String,
    quick: bool,
}

fn cases() -> Vec<Case<Measure>> {
    let name = |what: &str| {
        format!("{what}, 100,000 keys, 2 readers, 1 writer: over a plain HashMap without a writer")
    };
    let mut cases = vec![
        case(
            Measure::Reads,
            [
                ratio(name("read of bytes")).at_most(2.0),
                ratio(name("read of a type")).at_most(2.0),
                ratio(name("read of bytes in a snapshot")),
            ],
        ),
        case(
            Measure::Sync,
            [ratio("first list, 100,000 keys of 100 bytes: over the bare paged range").at_most(1.5)],
        ),
        case(
            Measure::Memory,
            [ratio("peak memory above idle, 100,000 keys of 100 bytes: over keys and values").at_most(3.0)],
        ),
    ];
    for (handlers, limit) in [(1, 1.5), (1000, 3.0)] {
        let what =
            if handlers == 1 { "a handler".to_owned() } else { format!("the last of {handlers} handlers") };
        cases.push(case(
            Measure::Notify { handlers },
            [
                ratio(format!("publish to {what}: p50 over a raw put and its notification")).at_most(limit),
                row(format!("watch messages out per publication, {what}"), "messages").at_most(1.1),
            ],
        ));
    }
    cases
}

impl Bench {
    async fn measure(&self, measure: Measure) -> Result<Vec<Option<Figure>>> {
        let figures = match measure {
            Measure::Reads => reads::measure(self).await?,
            Measure::Sync => sync::time(self).await?,
            Measure::Memory => sync::memory(self).await?,
            Measure::Notify { handlers } => notify::measure(self, handlers).await?,
        };
        Ok(figures.into_iter().map(Some).collect())
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    // cargo adds one argument of its own.
    let args: Vec<String> = std::env::args().filter(|arg| arg != "--bench").collect();
    if let [_, workload, endpoint, name] = args.as_slice()
        && workload == "memory"
    {
        println!("{}", serde_json::to_string(&sync::peak(endpoint, name).await?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse_from(args);
    let endpoint = options.endpoints.split(',').next().unwrap_or_default().to_owned();
    let metrics = options.metrics.as_deref().unwrap_or(&endpoint).trim_end_matches("/metrics").to_owned();
    let bench = Bench { endpoint, metrics, quick: options.quick };
    let measured = table::run("config", cases(), &options.only, async |measure| bench.measure(measure).await);
    Ok(if measured.await? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
