//! The workloads: putting, draining, and consumers that wait; and the raw RPCs next to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::{Queue, Session};
use tokio::task::JoinSet;

use crate::common::counters;
use crate::common::crew::Crew;
use crate::common::line::{Line, Measured};
use crate::common::{fresh, open};
use crate::load::Load;

pub(crate) const PEER: &str = "etcd-recipes";
/// What is put in one transaction.
const BATCH: usize = 100;

pub(crate) async fn close(sessions: &[Session]) -> Result<()> {
    open(sessions.len(), async |i| Ok(sessions[i].close().await?)).await.map(|_| ())
}

/// Puts so many items.
pub(crate) async fn preload(session: &Session, name: &str, load: &Load) -> Result<()> {
    let (queue, value) = (Queue::new(session, name)?, "x".repeat(load.size));
    let mut left = load.own.preload;
    while left > 0 {
        let batch = left.min(BATCH);
        queue.enqueue_all(vec![value.as_str(); batch]).await?;
        left -= batch;
    }
    Ok(())
}

/// `n` producers put items, alone or 100 at once. An operation is an item.
pub(crate) async fn enqueue(load: &Load) -> Result<Line> {
    let sessions = load.sessions().await?;
    let (name, value) = (fresh("queue"), "x".repeat(load.size));
    let mut crew = Crew::default();
    for session in &sessions {
        let (queue, value) = (Queue::new(session, &name)?, value.clone());
        let batch = if load.mode == "batch" { BATCH } else { 1 };
        crew.spawn(async move |mut recorder| {
            while recorder.working() {
                let start = Instant::now();
                queue.enqueue_all(vec![value.as_str(); batch]).await?;
                for _ in 0..batch {
                    recorder.done(Some(start.elapsed()));
                }
            }
            Ok(recorder)
        });
    }
    let line = crew.measure(PEER, load.run()).await?;
    close(&sessions).await?;
    Ok(line)
}

/// `n` consumers empty a queue. They have listed it before the clock starts.
pub(crate) async fn drain(load: &Load) -> Result<Line> {
    let (sessions, name) = (load.sessions().await?, fresh("queue"));
    preload(&sessions[0], &name, load).await?;
    let queues = sessions.iter().map(|session| Queue::new(session, &name)).collect::<Result<Vec<_>, _>>()?;
    for queue in &queues {
        queue.peek().await?.context("the queue is empty")?;
    }
    let goal = load.own.items.unwrap_or(load.own.preload);
    let (taken, claims) = (Arc::new(AtomicUsize::new(0)), load.mode == "claim");
    let before = counters::read(load.metrics_url()).await?;
    let (cpu, start) = (counters::own_cpu()?, Instant::now());
    let mut consumers = JoinSet::new();
    for queue in queues {
        let (taken, end) = (taken.clone(), start + load.dur);
        consumers.spawn(async move {
            let mut samples = Vec::new();
            while Instant::now() < end && taken.fetch_add(1, Ordering::Relaxed) < goal {
                let asked = Instant::now();
                if claims {
                    queue.claim().await?.ack().await?;
                } else {
                    queue.dequeue().await?;
                }
                samples.push(asked.elapsed().as_nanos() as u64);
            }
            anyhow::Ok(samples)
        });
    }
    let mut samples = Vec::new();
    while let Some(consumer) = consumers.join_next().await {
        samples.extend(consumer??);
    }
    let secs = start.elapsed().as_secs_f64();
    let counted = counters::difference(&before, &counters::read(load.metrics_url()).await?);
    ensure!(!samples.is_empty(), "nothing was taken");
    let measured = Measured {
        secs,
        ops: samples.len() as u64,
        samples,
        counted,
        own_cpu_s: counters::own_cpu()? - cpu,
        peak_rss_kib: counters::own_memory("VmHWM")?,
    };
    close(&sessions).await?;
    let run = load.run();
    Ok(Line::new(PEER, run.workload, run.params, measured))
}

/// Producers put items at a steady rate for `n` consumers that wait. A sample runs from "enqueue called" to "claim
/// returned".
pub(crate) async fn mixed(load: &Load) -> Result<Line> {
    let (sessions, producer, name) = (load.sessions().await?, load.session().await?, fresh("queue"));
    let (clock, mut crew) = (Instant::now(), Crew::default());
    for session in &sessions {
        let (queue, claims) = (Queue::new(session, &name)?, load.mode == "claim");
        crew.spawn(async move |mut recorder| {
            let since = |value: &[u8]| {
                let called = String::from_utf8_lossy(value).parse().map(Duration::from_nanos);
                called.map(|called| clock.elapsed().saturating_sub(called))
            };
            loop {
                if claims {
                    let Some(claim) = recorder.before_the_end(queue.claim()).await else { break };
                    let claim = claim?;
                    recorder.done(Some(since(claim.value())?));
                    claim.ack().await?;
                } else {
                    let Some(item) = recorder.before_the_end(queue.dequeue()).await else { break };
                    recorder.done(Some(since(&item?.value)?));
                }
            }
            Ok(recorder)
        });
    }
    let queue = Queue::new(&producer, &name)?;
    let pause = Duration::from_secs_f64(1.0 / load.own.rate);
    let feed = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(pause);
        loop {
            ticks.tick().await;
            let now = clock.elapsed().as_nanos().to_string();
            if queue.enqueue(now).await.is_err() {
                return;
            }
        }
    });
    let line = crew.measure(PEER, load.run()).await;
    feed.abort();
    close(&sessions).await?;
    producer.close().await?;
    line
}

/// `n` tasks on one connection put keys, each a new one: what a queue's producer does at least.
pub(crate) async fn put(load: &Load) -> Result<Line> {
    let (client, value, prefix) = (load.connect().await?, "x".repeat(load.size), fresh("put"));
    let mut crew = Crew::default();
    for task in 0..load.n {
        let (mut kv, value, prefix) = (client.kv_client(), value.clone(), prefix.clone());
        crew.spawn(async move |mut recorder| {
            let mut number = 0;
            while recorder.working() {
                let start = Instant::now();
                number += 1;
                kv.put(format!("{prefix}/{task}-{number}"), value.as_str(), None).await?;
                recorder.done(Some(start.elapsed()));
            }
            Ok(recorder)
        });
    }
    crew.measure("rust-etcd-client", load.run()).await
}

/// A put every now and then, and a watch on another connection: from "put called" to the event.
pub(crate) async fn watch(load: &Load) -> Result<Line> {
    let (client, writer, key) = (load.connect().await?, load.connect().await?, fresh("watch"));
    let mut crew = Crew::default();
    let pause = Duration::from_secs_f64(1.0 / load.own.rate);
    crew.spawn(async move |mut recorder| {
        let mut events = client.watch_client().watch(key.as_str(), None).await?;
        events.message().await?.context("the watch is not created")?;
        let (mut kv, mut ticks) = (writer.kv_client(), tokio::time::interval(pause));
        while recorder.working() {
            ticks.tick().await;
            let start = Instant::now();
            let (put, event) = tokio::join!(kv.put(key.as_str(), "x", None), events.message());
            recorder.done(Some(start.elapsed()));
            put?;
            event?.context("the watch ended")?;
        }
        Ok(recorder)
    });
    crew.measure("rust-etcd-client", load.run()).await
}
