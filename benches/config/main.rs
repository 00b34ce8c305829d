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
use crate::common::options::{self, Options};
use crate::common::table::{self, Case, case, ratio, row};

/// Keys in the large prefix, with values of [`VALUE`] bytes.
const KEYS: usize = 100_000;
const VALUE: usize = 100;

/// What is measured together.
enum Measure {
    Reads,
    Sync,
    Memory,
    Notify { handlers: usize },
}

/// Measures the table of the config benchmark.
#[derive(Debug, Parser)]
#[command(name = "config")]
struct Bench {
    #[command(flatten)]
    options: Options,
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
    let args = options::args();
    if let [_, workload, endpoint, name] = args.as_slice()
        && workload == "memory"
    {
        println!("{}", serde_json::to_string(&sync::peak(endpoint, name).await?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let bench = Bench::parse_from(args);
    table::run("config", cases(), &bench.options.only, async |measure| bench.measure(measure).await).await
}
