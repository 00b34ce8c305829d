//! The first list: how long it takes, and how much memory.

use std::time::Instant;

use anyhow::{Context as _, Result};
use etcd_client::{Client, DeleteOptions, GetOptions, Txn, TxnOp};
use etcd_recipes::{ConfigCache, Session};

use super::{Bench, KEYS, VALUE};
use crate::common::compare::{Figure, Rounds, millis, run_program};
use crate::common::counters::own_memory;
use crate::common::fresh;
use crate::common::line::Line;

/// Keys in one transaction.
const BATCH: usize = 100;
/// Keys in one page of the bare range: about what the cache comes to.
const PAGE: i64 = 10_000;

pub(crate) fn key(number: usize) -> String {
    format!("service/{number:06}")
}

/// A number in quotes, so that it is JSON as well.
pub(crate) fn value(number: usize) -> String {
    format!("\"{number:0width$}\"", width = VALUE - 2)
}

/// A large prefix at etcd.
pub(crate) struct Large {
    client: Client,
    pub(crate) name: String,
}

impl Large {
    pub(crate) async fn fill(bench: &Bench) -> Result<Self> {
        let (client, name) = (Client::connect([&bench.options.endpoint], None).await?, fresh("config"));
        for start in (0..KEYS).step_by(BATCH) {
            let put = |number| TxnOp::put(format!("{name}/{}", key(number)), value(number), None);
            let puts: Vec<_> = (start..start + BATCH).map(put).collect();
            client.kv_client().txn(Txn::new().and_then(puts)).await?;
        }
        Ok(Self { client, name })
    }

    pub(crate) async fn remove(self) -> Result<()> {
        let prefix = format!("{}/", self.name);
        self.client.kv_client().delete(prefix, Some(DeleteOptions::new().with_prefix())).await?;
        Ok(())
    }

    /// Reads all of it in pages, and throws it away.
    async fn range(&self) -> Result<()> {
        let mut kv = self.client.kv_client().max_decoding_message_size(64 * 1024 * 1024);
        let (mut from, end) = (format!("{}/", self.name).into_bytes(), format!("{}0", self.name));
        let mut revision = 0;
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(revision);
            let page = kv.get(from, Some(options)).await?;
            if revision == 0 {
                revision = page.header().context("no header")?.revision();
            }
            let Some(last) = page.kvs().last().filter(|_| page.more()) else { return Ok(()) };
            from = [last.key(), b"\0"].concat();
        }
    }
}

pub(crate) async fn time(bench: &Bench) -> Result<Vec<Figure>> {
    let large = Large::fill(bench).await?;
    let session = Session::connect([&bench.options.endpoint]).await?;
    let timed = |start: Instant| Line { secs: start.elapsed().as_secs_f64(), ..Line::default() };
    let rounds = Rounds::run(
        if bench.options.quick { 2 } else { 10 },
        async || {
            let start = Instant::now();
            let cache = ConfigCache::open(&session, &large.name).await?;
            let line = timed(start);
            drop(cache);
            Ok(line)
        },
        async || {
            let start = Instant::now();
            large.range().await?;
            Ok(timed(start))
        },
    )
    .await?;
    session.close().await?;
    large.remove().await?;
    Ok(vec![rounds.ratio(|line| line.secs, |secs| millis(secs * 1e6))])
}

pub(crate) async fn memory(bench: &Bench) -> Result<Vec<Figure>> {
    let large = Large::fill(bench).await?;
    let args = ["memory".to_owned(), bench.options.endpoint.clone(), large.name.clone()];
    let line = run_program(&std::env::current_exe()?, &args).await?;
    let content = KEYS * (large.name.len() + 1 + key(0).len() + VALUE);
    large.remove().await?;
    let (idle, peak) = (line.extra("idle_kib") * 1024.0, line.extra("peak_kib") * 1024.0);
    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    let origin = format!("{:.1} - {:.1} MiB / {:.1} MiB", mib(peak), mib(idle), mib(content as f64));
    Ok(vec![Figure { value: (peak - idle) / content as f64, origin }])
}

/// What one cache adds to this process at most.
pub(crate) async fn peak(endpoint: &str, name: &str) -> Result<Line> {
    let session = Session::connect([endpoint]).await?;
    // A small one first: what is allocated once is no part of it.
    drop(ConfigCache::open(&session, fresh("config")).await?);
    let idle = own_memory("VmRSS")?;
    let cache = ConfigCache::open(&session, name).await?;
    let mut line = Line { ops: cache.snapshot().len() as u64, ..Line::default() };
    line.extra.insert("idle_kib".into(), idle.into());
    line.extra.insert("peak_kib".into(), own_memory("VmHWM")?.into());
    drop(cache);
    session.close().await?;
    Ok(line)
}
