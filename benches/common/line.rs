//! The result of one run: the JSON line that all peers print.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::counters::{self, Counters};

/// One result line; field by field the same as the peers', so that lines can be compared.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Line {
    pub(crate) peer: String,
    pub(crate) workload: String,
    pub(crate) params: Value,
    pub(crate) secs: f64,
    pub(crate) ops: u64,
    pub(crate) ops_per_s: f64,
    pub(crate) client_cpu_s: f64,
    pub(crate) client_peak_rss_kib: u64,
    #[serde(flatten)]
    pub(crate) latency: Option<Latency>,
    /// Each of etcd's counters, divided by the operations.
    pub(crate) per_op: Counters,
    pub(crate) rpc_unary_per_op: f64,
    pub(crate) stream_in_per_op: f64,
    pub(crate) stream_out_per_op: f64,
    pub(crate) streams_per_op: f64,
    pub(crate) client_cpu_us_per_op: f64,
    pub(crate) server_cpu_us_per_op: f64,
    /// What only some workloads tell.
    #[serde(flatten)]
    pub(crate) extra: Map<String, Value>,
}

/// How long operations took.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
    pub(crate) samples: usize,
}

/// What was measured, before it is divided.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub(crate) secs: f64,
    pub(crate) ops: u64,
    /// In nanoseconds.
    pub(crate) samples: Vec<u64>,
    pub(crate) counted: Counters,
    pub(crate) own_cpu_s: f64,
    pub(crate) peak_rss_kib: u64,
}

impl Line {
    pub(crate) fn new(peer: &str, workload: String, params: Value, measured: Measured) -> Self {
        let Measured { secs, ops, samples, counted, own_cpu_s, peak_rss_kib } = measured;
        // Without operations everything is zero, as the peers have it.
        let per_op = |value: f64| if ops > 0 { round(value / ops as f64) } else { 0.0 };
        Self {
            peer: peer.to_owned(),
            workload,
            params,
            secs: round(secs),
            ops,
            ops_per_s: round(ops as f64 / secs),
            client_cpu_s: round(own_cpu_s),
            client_peak_rss_kib: peak_rss_kib,
            latency: Latency::of(samples),
            rpc_unary_per_op: per_op(counters::sum(&counted, "unary")),
            stream_in_per_op: per_op(counters::sum(&counted, "in")),
            stream_out_per_op: per_op(counters::sum(&counted, "out")),
            streams_per_op: per_op(counters::sum(&counted, "stream")),
            client_cpu_us_per_op: per_op(own_cpu_s * 1e6),
            server_cpu_us_per_op: per_op(counted.get("server_cpu_s").unwrap_or(&0.0) * 1e6),
            per_op: counted.into_iter().map(|(name, value)| (name, per_op(value))).collect(),
            extra: Map::new(),
        }
    }

    pub(crate) fn p50(&self) -> f64 {
        self.latency.as_ref().map_or(f64::NAN, |latency| latency.p50_us)
    }

    pub(crate) fn p99(&self) -> f64 {
        self.latency.as_ref().map_or(f64::NAN, |latency| latency.p99_us)
    }

    pub(crate) fn ops_per_s(&self) -> f64 {
        self.ops_per_s
    }

    /// One of etcd's counters, per operation.
    pub(crate) fn count(&self, name: &str) -> f64 {
        self.per_op.get(name).copied().unwrap_or(0.0)
    }

    /// A number that only this workload tells.
    pub(crate) fn extra(&self, name: &str) -> f64 {
        self.extra.get(name).and_then(Value::as_f64).unwrap_or(f64::NAN)
    }
}

impl Latency {
    fn of(mut samples: Vec<u64>) -> Option<Self> {
        samples.sort_unstable();
        let last = samples.len().checked_sub(1)?;
        let at = |quantile: f64| round(samples[(quantile * last as f64) as usize] as f64 / 1e3);
        let (p50_us, p90_us, p99_us, max_us) = (at(0.5), at(0.9), at(0.99), at(1.0));
        Some(Self { p50_us, p90_us, p99_us, max_us, samples: samples.len() })
    }
}

/// To three places, and never to a negative zero.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0 + 0.0
}
