//! From a publication to the handlers, next to a raw put and its notification.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use etcd_client::{Client, WatchOptions};
use etcd_recipes::{ConfigCache, Session};
use tokio::sync::mpsc;

use super::Bench;
use crate::common::compare::{Figure, Rounds, millis};
use crate::common::counters::{self, Counters};
use crate::common::fresh;
use crate::common::line::{Line, Measured};

/// Longer than any notification takes.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn measure(bench: &Bench, handlers: usize) -> Result<Vec<Figure>> {
    let times = if bench.options.quick { 100 } else { 1000 };
    let session = Session::connect([&bench.options.endpoint]).await?;
    let cache = ConfigCache::open(&session, fresh("config")).await?;
    let client = Client::connect([&bench.options.endpoint], None).await?;
    let rounds = Rounds::run(
        if bench.options.quick { 2 } else { 6 },
        async || published(bench, &cache, handlers, times).await,
        async || raw(bench, &client, times).await,
    )
    .await?;
    cache.delete("key").await?;
    session.close().await?;
    let messages = rounds.measured.iter().map(|line| line.count("out/Watch")).fold(0.0, f64::max);
    let origin = "the most of the rounds, from etcd's metrics".to_owned();
    Ok(vec![rounds.ratio(Line::p50, millis), Figure { value: messages, origin }])
}

/// A sample runs from the call of `publish` to that of the last handler.
async fn published(bench: &Bench, cache: &ConfigCache, handlers: usize, times: usize) -> Result<Line> {
    let (called, mut calls) = mpsc::unbounded_channel();
    let handler = |_| {
        let called = called.clone();
        cache.on_key("key", move |_| {
            let _ = called.send(Instant::now());
            Ok::<_, Infallible>(())
        })
    };
    cache.wait_for(cache.publish("key", "first").await?).await?;
    let held: Vec<_> = (0..handlers).map(handler).collect();
    for _ in 0..handlers {
        calls.recv().await;
    }
    let before = counters::read(bench.options.metrics()).await?;
    let mut samples = Vec::new();
    for number in 0..times {
        let start = Instant::now();
        let (published, last) = tokio::join!(cache.publish("key", number.to_string()), async {
            let mut last = None;
            for _ in 0..handlers {
                last = tokio::time::timeout(PATIENCE, calls.recv()).await.ok().flatten();
            }
            last
        });
        published?;
        samples.push((last.context("a handler was not called")? - start).as_nanos() as u64);
    }
    let counted = counters::difference(&before, &counters::read(bench.options.metrics()).await?);
    drop(held);
    Ok(line("publish", samples, counted))
}

async fn raw(bench: &Bench, client: &Client, times: usize) -> Result<Line> {
    let key = fresh("raw");
    let (mut watch, mut kv) = (client.watch_client(), client.kv_client());
    let mut events = watch.watch(key.clone(), Some(WatchOptions::new())).await?;
    events.message().await?.context("no watch")?;
    let before = counters::read(bench.options.metrics()).await?;
    let mut samples = Vec::new();
    for number in 0..times {
        let start = Instant::now();
        let (put, event) = tokio::join!(kv.put(key.clone(), number.to_string(), None), async {
            let event = events.message().await;
            (event, Instant::now())
        });
        put?;
        event.0?.context("the watch ended")?;
        samples.push((event.1 - start).as_nanos() as u64);
    }
    let counted = counters::difference(&before, &counters::read(bench.options.metrics()).await?);
    kv.delete(key, None).await?;
    Ok(line("raw", samples, counted))
}

fn line(workload: &str, samples: Vec<u64>, counted: Counters) -> Line {
    let (ops, nanos) = (samples.len() as u64, samples.iter().sum::<u64>());
    let measured = Measured { secs: nanos as f64 / 1e9, ops, samples, counted, ..Measured::default() };
    Line::new("etcd-recipes", workload.into(), serde_json::json!({}), measured)
}
