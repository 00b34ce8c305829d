//! Project tasks: `cargo xtask …`.
//!
//! Every task does its own set-up: it finds or unpacks the etcd it needs and
//! hands cargo a protobuf compiler, so a clean clone needs nothing else.

mod apt;
mod cargo;
mod etcd;
mod server;
mod sources;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::cargo::Cargo;
use crate::etcd::LINES;
use crate::server::Server;

/// The benches `cargo xtask bench` knows: targets of `benches/`.
const BENCHES: [&str; 4] = ["locks", "queue", "service", "config"];

/// Project tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run the `tour` example: on `ETCD_ENDPOINTS`, or an etcd on this machine, or the embedded server
    Demo,
    /// Run all tests, the integration suite once per etcd release line and once on the embedded server
    Test(TestArgs),
    /// Check formatting, lints and documentation, then run all tests
    Check(TestArgs),
    /// Unpack etcd and etcdctl of both release lines under target/etcd
    Etcd,
    /// Start an etcd with its data in memory and run a bench against it
    Bench(BenchArgs),
}

/// How to run the tests.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Run the long version of the suite
    #[arg(long)]
    full: bool,
    /// Arguments for libtest, such as a part of a test's name
    #[arg(last = true)]
    libtest: Vec<String>,
}

/// Which bench to run, and how.
#[derive(Debug, Args)]
struct BenchArgs {
    /// Name of the bench
    #[arg(value_parser = PossibleValuesParser::new(BENCHES))]
    name: String,
    /// Release line of the etcd to start [default: the newest]
    #[arg(long, value_parser = PossibleValuesParser::new(LINES.map(|line| line.name)))]
    line: Option<String>,
    /// Arguments for the bench
    #[arg(last = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one task; `Ok(false)` when it ran and something in it failed.
fn run(task: Task) -> Result<bool> {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").context("run this as `cargo xtask`")?;
    let root = PathBuf::from(manifest).parent().context("xtask has no workspace above it")?.to_path_buf();
    match task {
        Task::Etcd => {
            for etcd in etcd::all(&root)? {
                println!("{etcd}");
            }
            Ok(true)
        }
        Task::Demo => {
            // Without endpoints it runs on the embedded server, so nothing else is needed.
            let cargo = Cargo::new(&root)?;
            cargo.run(&["run", "--example", "tour"], &[])
        }
        Task::Bench(BenchArgs { name, line, args }) => {
            let etcd = etcd::one(&root, line.as_deref())?;
            let cargo = Cargo::new(&root)?;
            cargo.must(&["bench", "--no-run", "--bench", &name], &[])?;
            let server = Server::start(&root, &etcd, "bench")?;
            let mut command = vec!["bench", "--bench", &name, "--"];
            command.extend(args.iter().map(String::as_str));
            cargo.run(&command, &server.env())
        }
        Task::Test(args) => suite::test(&root, &args),
        Task::Check(args) => suite::check(&root, &args),
    }
}
