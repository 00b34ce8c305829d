//! What etcd counted, and what this process used.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use nix::sys::resource::{UsageWho, getrusage};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Counters of etcd under the short names that the peers use: `unary/Txn`, `out/Watch`, `commits`.
pub(crate) type Counters = BTreeMap<String, f64>;

/// The methods that are streams.
const STREAMS: [&str; 4] = ["Watch", "LeaseKeepAlive", "Observe", "Snapshot"];

/// Reads the counters from an etcd's `/metrics`.
pub(crate) async fn read(url: &str) -> Result<Counters> {
    let page = get(url).await.with_context(|| format!("cannot read the metrics of {url}"))?;
    let mut counters = Counters::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((id, value)) = line.rsplit_once(' ') else { continue };
        let (name, labels) = id.split_once('{').unwrap_or((id, ""));
        if let Some(short) = short_name(name, labels)
            && let Ok(value) = value.parse::<f64>()
        {
            *counters.entry(short).or_default() += value;
        }
    }
    Ok(counters)
}

/// What was added between two readings; what did not change is left out.
pub(crate) fn difference(before: &Counters, after: &Counters) -> Counters {
    let added = |(name, value): (&String, &f64)| {
        let added = value - before.get(name).unwrap_or(&0.0);
        (added != 0.0).then(|| (name.clone(), added))
    };
    after.iter().filter_map(added).collect()
}

/// The sum of the counters of one kind: `unary`, `in`, `out` or `stream`.
pub(crate) fn sum(counters: &Counters, kind: &str) -> f64 {
    let of_kind = |name: &String| name.split_once('/').is_some_and(|(of, _)| of == kind);
    counters.iter().filter(|(name, _)| of_kind(name)).map(|(_, value)| value).sum()
}

fn short_name(name: &str, labels: &str) -> Option<String> {
    let plain = match name {
        "etcd_server_proposals_committed_total" => "commits",
        "etcd_disk_wal_fsync_duration_seconds_count" => "wal_fsyncs",
        "etcd_mvcc_range_total" => "mvcc_range",
        "etcd_mvcc_txn_total" => "mvcc_txn",
        "etcd_mvcc_put_total" => "mvcc_put",
        "etcd_mvcc_delete_total" => "mvcc_delete",
        "etcd_debugging_mvcc_range_total" => "mvcc_range_dbg",
        "etcd_debugging_mvcc_txn_total" => "mvcc_txn_dbg",
        "etcd_debugging_mvcc_events_total" => "watch_events",
        "etcd_network_client_grpc_received_bytes_total" => "bytes_in",
        "etcd_network_client_grpc_sent_bytes_total" => "bytes_out",
        "etcd_server_slow_read_indexes_total" => "slow_read_indexes",
        "process_cpu_seconds_total" => "server_cpu_s",
        _ => "",
    };
    if !plain.is_empty() {
        return Some(plain.to_owned());
    }
    let method = labels.split_once("grpc_method=\"")?.1.split_once('"')?.0;
    let kind = match (name, STREAMS.contains(&method)) {
        ("grpc_server_handled_total", false) => "unary",
        ("grpc_server_started_total", true) => "stream",
        ("grpc_server_msg_received_total", true) => "in",
        ("grpc_server_msg_sent_total", true) => "out",
        _ => return None,
    };
    Some(format!("{kind}/{method}"))
}

async fn get(url: &str) -> Result<String> {
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let mut stream = TcpStream::connect(host).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").context("not an answer of HTTP")?;
    Ok(body.to_owned())
}

/// Seconds of CPU this process has used.
pub(crate) fn own_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// A figure of this process from `/proc/self/status`, in KiB: `VmRSS` is its memory now, `VmHWM` the most it ever was.
pub(crate) fn own_memory(field: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("this needs Linux")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()).context("no such field")?;
    Ok(number.parse()?)
}
