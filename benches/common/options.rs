//! The command line of a whole table.

use clap::Args;

/// Where and how thoroughly to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Measure less and shorter, to try it out
    #[arg(long)]
    pub(crate) quick: bool,
    /// Measure only the rows whose name contains this
    #[arg(long, value_name = "SUBSTR", default_value = "")]
    pub(crate) only: String,
    /// etcd's client URL, the first of several; `cargo xtask bench` starts an etcd and sets it
    #[arg(long = "endpoints", value_name = "ENDPOINTS", env = "ETCD_ENDPOINTS", value_parser = first)]
    pub(crate) endpoint: String,
    /// The URL of its metrics [default: the endpoint's]
    #[arg(long, env = "ETCD_METRICS")]
    metrics: Option<String>,
}

impl Options {
    /// The URL whose /metrics is read.
    pub(crate) fn metrics(&self) -> &str {
        self.metrics.as_deref().unwrap_or(&self.endpoint).trim_end_matches("/metrics")
    }
}

fn first(endpoints: &str) -> Result<String, std::convert::Infallible> {
    Ok(endpoints.split(',').next().unwrap_or_default().to_owned())
}

/// The arguments of this program, without the one that cargo adds.
pub(crate) fn args() -> Vec<String> {
    std::env::args().filter(|arg| arg != "--bench").collect()
}
