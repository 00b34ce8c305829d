//! What waiting costs in memory. Run in a process of its own, so that nothing else has used any before.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use etcd_client::{GetOptions, KvClient};
use etcd_recipes::{Mutex, MutexGuard, Session};
use serde_json::json;
use tokio::task::JoinSet;

use crate::common::counters::own_memory;
use crate::common::line::{Line, Measured};
use crate::common::{fresh, open};
use crate::load::Load;
use crate::recipes::{PEER, begin, close};

/// How many waiters are sent off before their keys are awaited.
const BATCH: usize = 50;
/// Until what is in flight has settled.
const SETTLE: Duration = Duration::from_secs(2);

/// `n` sessions, all waiting for one lock that is held: on shared connections, or each on its own (mode `own`). They
/// come one after the other: what many answers at once need for a moment is not what waiting costs.
pub(crate) async fn sessions(load: &Load) -> Result<Line> {
    let name = fresh("lock");
    let holder = begin(Session::builder([&load.endpoint]), load).await?;
    let one = async || match load.mode.as_str() {
        "own" => begin(Session::builder([&load.endpoint]), load).await,
        _ => Ok(holder.beside().await?),
    };
    let held = Mutex::new(&holder, &name)?.lock().await?;
    let mut waiting = Waiting::start(load, name.clone(), 1).await?;
    let mut sessions = Vec::with_capacity(load.n);
    for _ in 0..load.n {
        let session = one().await?;
        waiting.send(Mutex::new(&session, &name)?);
        sessions.push(session);
    }
    waiting.all_stand().await?;
    let line = waiting.line(load).await?;
    held.unlock().await?;
    close(&sessions).await?;
    Ok(line)
}

/// `n` waiters on one session, spread over `names` locks that another session holds.
pub(crate) async fn waiters(load: &Load) -> Result<Line> {
    let (holder, session) = (
        begin(Session::builder([&load.endpoint]), load).await?,
        begin(Session::builder([&load.endpoint]), load).await?,
    );
    let prefix = fresh("lock");
    let names: Vec<String> = (0..load.own.names).map(|i| format!("{prefix}/{i}")).collect();
    let held = open(load.own.names, async |i| Ok(Mutex::new(&holder, &names[i])?.lock().await?)).await?;
    let mut waiting = Waiting::start(load, prefix, held.len()).await?;
    for start in (0..load.n).step_by(BATCH) {
        for i in start..load.n.min(start + BATCH) {
            waiting.send(Mutex::new(&session, &names[i % names.len()])?);
        }
        waiting.all_stand().await?;
    }
    let line = waiting.line(load).await?;
    // The session first: nobody is to have a turn.
    session.close().await?;
    drop(held);
    holder.close().await?;
    Ok(line)
}

/// Tasks that wait for locks, and what they added to this process.
struct Waiting {
    kv: KvClient,
    /// Of all keys in the lines.
    prefix: String,
    keys: usize,
    tasks: JoinSet<etcd_recipes::Result<MutexGuard>>,
    start: Instant,
    rss_before: u64,
}

impl Waiting {
    async fn start(load: &Load, prefix: String, keys: usize) -> Result<Self> {
        // A connection of its own: what the waiters do to theirs is their affair.
        let kv = load.connect().await?.kv_client();
        tokio::time::sleep(SETTLE).await;
        let (tasks, start, rss_before) = (JoinSet::new(), Instant::now(), own_memory("VmRSS")?);
        Ok(Self { kv, prefix, keys, tasks, start, rss_before })
    }

    /// Sends a waiter off.
    fn send(&mut self, mutex: Mutex) {
        self.keys += 1;
        self.tasks.spawn(async move { mutex.lock().await });
    }

    /// Waits until all who were sent off stand in their lines.
    async fn all_stand(&mut self) -> Result<()> {
        loop {
            let options = GetOptions::new().with_prefix().with_count_only();
            let there = self.kv.get(format!("{}/", self.prefix), Some(options)).await?.count();
            if usize::try_from(there)? == self.keys {
                return Ok(());
            }
            ensure!(self.tasks.try_join_next().is_none(), "a waiter did not wait");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn line(mut self, load: &Load) -> Result<Line> {
        let (secs, ops) = (self.start.elapsed().as_secs_f64(), self.tasks.len() as u64);
        tokio::time::sleep(SETTLE).await;
        ensure!(self.tasks.try_join_next().is_none(), "a waiter did not wait");
        let (before, after) = (self.rss_before, own_memory("VmRSS")?);
        let measured = Measured { secs, ops, peak_rss_kib: own_memory("VmHWM")?, ..Measured::default() };
        let run = load.run();
        let mut line = Line::new(PEER, run.workload, run.params, measured);
        let each = after.saturating_sub(before) as f64 * 1024.0 / ops as f64;
        line.extra.insert("rss_before_kib".into(), json!(before));
        line.extra.insert("rss_after_kib".into(), json!(after));
        line.extra.insert("bytes_each".into(), json!(each.round()));
        Ok(line)
    }
}
