//! An etcd in memory, for development: what [`etcd_recipes::embedded`] offers, for several processes.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;
use etcd_recipes::embedded::Server;
use tokio::signal::unix::{SignalKind, signal};

/// Serves etcd's API from memory until it is told to stop. For development and tests only: what it
/// keeps is gone when it ends.
///
/// Exit codes: 0 after SIGTERM or SIGINT, 1 when the address cannot be listened on, 2 for bad
/// arguments.
#[derive(Debug, Parser)]
#[command(name = "dev_server", verbatim_doc_comment)]
struct Args {
    /// Where to listen; port 0 lets the system choose.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:2379")]
    listen: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match serve(&args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dev_server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: &Args) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server =
        Server::listen(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = server.address().context("it has no address")?;
    println!("listening on http://{address}");
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    Ok(())
}
