//! What a long queue costs its consumer in memory. Run in a process of its own, so that nothing else has used any before.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use etcd_recipes::Queue;
use serde_json::json;

use crate::common::counters::own_memory;
use crate::common::fresh;
use crate::common::line::{Line, Measured};
use crate::load::Load;
use crate::work::{PEER, preload};

/// Until what is in flight has settled.
const SETTLE: Duration = Duration::from_secs(2);

/// A consumer of a queue with `preload` items: the most it ever used above idle.
pub(crate) async fn consumer(load: &Load) -> Result<Line> {
    let (producer, session, name) = (load.session().await?, load.session().await?, fresh("queue"));
    preload(&producer, &name, load).await?;
    producer.close().await?;
    tokio::time::sleep(SETTLE).await;
    let (before, start) = (own_memory("VmRSS")?, Instant::now());
    let queue = Queue::new(&session, &name)?;
    queue.peek().await?.context("the queue is empty")?;
    let secs = start.elapsed().as_secs_f64();
    tokio::time::sleep(SETTLE).await;
    let (after, peak) = (own_memory("VmRSS")?, own_memory("VmHWM")?);
    let ops = load.own.preload as u64;
    let measured = Measured { secs, ops, peak_rss_kib: peak, ..Measured::default() };
    let run = load.run();
    let mut line = Line::new(PEER, run.workload, run.params, measured);
    line.extra.insert("rss_before_kib".into(), json!(before));
    line.extra.insert("rss_after_kib".into(), json!(after));
    line.extra.insert("above_idle_mib".into(), json!(peak.max(after).saturating_sub(before) as f64 / 1024.0));
    session.close().await?;
    Ok(line)
}
