//! How each figure of the table is measured: next to its baseline, in alternating rounds.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use etcd_recipes::{Mutex, Session};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::common::compare::{Figure, Rounds, median, memory, millis, per_second, run_program};
use crate::common::counters::{self, Counters};
use crate::common::fresh;
use crate::common::line::Line;
use crate::common::options::Options;
use crate::common::proxy::DelayProxy;
use crate::load::{Flags, Load, Workload};
use crate::run;

/// The section that hand-offs are measured with.
const SECTION: Duration = Duration::from_millis(5);
/// The section on the slow link.
const LONG_SECTION: Duration = Duration::from_millis(50);
/// What the slow link adds, each way.
const LINK: Duration = Duration::from_millis(5);
/// The section while it is counted who hears of a release.
const SHORT_SECTION: Duration = Duration::from_millis(2);

/// Something that gives one or several figures.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Measure {
    LockPair,
    DistinctLocks { locks: usize, one_session: bool },
    Handoff { waiters: usize, busy: bool },
    SlowLink { waiters: usize },
    Throughput { waiters: usize },
    OneSession { tasks: usize },
    Requests,
    Audience { waiters: usize },
    SessionMemory { sessions: usize },
    WaiterMemory { waiters: usize, names: usize },
}

/// Measures the table of the lock benchmark.
#[derive(Debug, Parser)]
#[command(
    name = "locks",
    after_help = "With a workload as its first argument it takes other flags: see WORKLOAD --help."
)]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) options: Options,
    /// The peers' Go program, to compare with
    #[arg(long, env = "PEER_GO")]
    go: Option<PathBuf>,
}

impl Bench {
    /// Gives the figures in the order in which the plan names them; `None` for one that cannot be had here.
    pub(crate) async fn measure(&self, measure: Measure) -> Result<Vec<Option<Figure>>> {
        match measure {
            Measure::LockPair => self.lock_pair().await,
            Measure::DistinctLocks { locks, one_session } => self.distinct_locks(locks, one_session).await,
            Measure::Handoff { waiters, busy } => self.handoff(waiters, busy).await,
            Measure::SlowLink { waiters } => self.slow_link(waiters).await,
            Measure::Throughput { waiters } => self.throughput(waiters).await,
            Measure::OneSession { tasks } => self.one_session(tasks).await,
            Measure::Requests => self.requests().await,
            Measure::Audience { waiters } => self.audience(waiters).await,
            Measure::SessionMemory { sessions } => self.session_memory(sessions).await,
            Measure::WaiterMemory { waiters, names } => self.waiter_memory(waiters, names).await,
        }
    }

    async fn lock_pair(&self) -> Result<Vec<Option<Figure>>> {
        let ours = self.load(Workload::MutexUncontended, 1, 2.0);
        let floor = self.load(Workload::FloorLockpair, 1, 2.0);
        Ok(vec![Some(self.alternate(&ours, &floor).await?.ratio(Line::p50, millis))])
    }

    async fn distinct_locks(&self, locks: usize, one_session: bool) -> Result<Vec<Option<Figure>>> {
        // Many short rounds, one close after the other: with all processors at work it shows most who else uses the
        // machine.
        let short = |workload| Load { warm: Duration::from_millis(200), ..self.load(workload, locks, 0.8) };
        let (ours, floor) = (short(Workload::MutexUncontended), short(Workload::FloorLockpair));
        let ours = if one_session { Load { mode: "one".into(), ..ours } } else { ours };
        let rounds = Rounds::run(6 * self.count(), async || run(&ours).await, async || run(&floor).await);
        Ok(vec![Some(rounds.await?.ratio(Line::ops_per_s, per_second))])
    }

    async fn handoff(&self, waiters: usize, busy: bool) -> Result<Vec<Option<Figure>>> {
        let ours = held(SECTION, self.load(Workload::MutexContended, waiters, 3.0));
        let floor = held(SECTION, self.load(Workload::FloorHandoff, waiters, 3.0));
        let _others = if busy { Some(self.write_unrelated_keys().await?) } else { None };
        let rounds = self.alternate(&ours, &floor).await?;
        let tail = |line: &Line| line.p99() / line.p50();
        let origin = format!(
            "{} / {}; floor {:.1}",
            millis(median(&rounds.measured, Line::p99)),
            millis(median(&rounds.measured, Line::p50)),
            median(&rounds.baseline, tail)
        );
        let tail = Figure { value: median(&rounds.measured, tail), origin };
        Ok(vec![Some(rounds.ratio(Line::p50, millis)), Some(tail)])
    }

    async fn slow_link(&self, waiters: usize) -> Result<Vec<Option<Figure>>> {
        let link = DelayProxy::start(&self.options.endpoint, LINK).await?;
        let over_link = |load: Load| Load { endpoint: link.url.clone(), ..load };
        let ours = over_link(self.load(Workload::MutexContended, waiters, 6.0));
        let ours = held(LONG_SECTION, ours);
        let floor = over_link(self.load(Workload::FloorWatch, 1, 2.0));
        let floor = Load { mode: "delete".into(), ..floor };
        Ok(vec![Some(self.alternate(&ours, &floor).await?.ratio(Line::p50, millis))])
    }

    async fn throughput(&self, waiters: usize) -> Result<Vec<Option<Figure>>> {
        let ours = self.load(Workload::MutexContended, waiters, 3.0);
        let (rate, ratio, lines) = self.against_go(&ours, &ours).await?;
        let commits = median(&lines, |line| line.count("commits"));
        let unary = Figure {
            value: median(&lines, |line| line.rpc_unary_per_op),
            origin: format!("{commits:.2} commits"),
        };
        Ok(vec![Some(rate), ratio, Some(unary)])
    }

    async fn one_session(&self, tasks: usize) -> Result<Vec<Option<Figure>>> {
        let load = self.load(Workload::MutexContended, tasks, 3.0);
        let ours = Load { mode: "one".into(), ..load.clone() };
        let theirs = Load { mode: "shared".into(), ..load };
        let (rate, ratio, _) = self.against_go(&ours, &theirs).await?;
        Ok(vec![Some(rate), ratio])
    }

    /// Operations per second, the ratio to Go's if it is there, and our lines.
    async fn against_go(&self, ours: &Load, theirs: &Load) -> Result<(Figure, Option<Figure>, Vec<Line>)> {
        let (ratio, lines) = match &self.go {
            Some(go) => {
                let rounds = Rounds::run(
                    self.count(),
                    async || run(ours).await,
                    async || run_program(go, &theirs.args()).await,
                );
                let rounds = rounds.await?;
                (Some(rounds.ratio(Line::ops_per_s, per_second)), rounds.measured)
            }
            None => {
                let mut lines = Vec::new();
                for _ in 0..self.count() {
                    lines.push(run(ours).await?);
                }
                (None, lines)
            }
        };
        let rate = Figure {
            value: median(&lines, Line::ops_per_s),
            origin: format!("p50 {}", millis(median(&lines, Line::p50))),
        };
        Ok((rate, ratio, lines))
    }

    /// Unary requests of one lock, one unlock and one try_lock.
    async fn requests(&self) -> Result<Vec<Option<Figure>>> {
        const LOCKS: usize = 200;
        // A TTL so long that no keepalive comes between.
        let session =
            Session::builder([&self.options.endpoint]).ttl(Duration::from_secs(90)).connect().await?;
        let mutexes =
            (0..LOCKS).map(|_| Mutex::new(&session, fresh("lock"))).collect::<Result<Vec<_>, _>>()?;
        let mut counted = vec![counters::read(self.options.metrics()).await?];
        let mut guards = Vec::new();
        for mutex in &mutexes {
            guards.push(mutex.lock().await?);
        }
        counted.push(counters::read(self.options.metrics()).await?);
        for guard in guards {
            guard.unlock().await?;
        }
        counted.push(counters::read(self.options.metrics()).await?);
        let mut guards = Vec::new();
        for mutex in &mutexes {
            guards.push(mutex.try_lock().await?.context("a lock is taken that nobody has")?);
        }
        counted.push(counters::read(self.options.metrics()).await?);
        drop(guards);
        session.close().await?;
        let each = |pair: &[Counters]| {
            let added = counters::difference(&pair[0], &pair[1]);
            let count = |name| added.get(name).unwrap_or(&0.0) / LOCKS as f64;
            let origin = format!("{:.2} commits, {:.2} fsyncs", count("commits"), count("wal_fsyncs"));
            Some(Figure { value: counters::sum(&added, "unary") / LOCKS as f64, origin })
        };
        Ok(counted.windows(2).map(each).collect())
    }

    /// Messages of watches for one hand-off, and how many of them tell of an event.
    async fn audience(&self, waiters: usize) -> Result<Vec<Option<Figure>>> {
        let load = self.load(Workload::MutexContended, waiters, 5.0);
        // All come at once, and it takes seconds until a thousand have found their places. Their keepalives come at
        // once as well and hold up the line, so a short look may see no hand-off at all.
        let (warm, dur) = (Duration::from_millis(1000 + 5 * waiters as u64), Duration::from_secs(5));
        let line = run(&held(SHORT_SECTION, Load { mode: "few".into(), warm, dur, ..load })).await?;
        let (out, asked) = (line.count("out/Watch"), line.count("in/Watch"));
        let origin = format!("{} hand-offs; {asked:.2} watches made or cancelled for each", line.ops);
        // Each request for a watch, or for its end, is answered by one message.
        Ok(vec![
            Some(Figure { value: out, origin }),
            Some(Figure { value: out - asked, origin: "without those answers".into() }),
        ])
    }

    async fn session_memory(&self, sessions: usize) -> Result<Vec<Option<Figure>>> {
        let load = Load { mode: "shared".into(), ..self.load(Workload::MemorySessions, sessions, 1.0) };
        let ours = run_program(&std::env::current_exe()?, &load.args()).await?;
        let ratio = match &self.go {
            // The peers have no such workload; a build of theirs with one may be at hand.
            Some(go) => run_program(go, &load.args()).await.ok().map(|theirs| {
                let (ours, theirs) = (ours.extra("bytes_each"), theirs.extra("bytes_each"));
                Figure { value: ours / theirs, origin: format!("{ours:.0} / {theirs:.0} bytes") }
            }),
            None => None,
        };
        Ok(vec![Some(memory(&ours)), ratio])
    }

    async fn waiter_memory(&self, waiters: usize, names: usize) -> Result<Vec<Option<Figure>>> {
        let mut load = self.load(Workload::MemoryWaiters, waiters, 1.0);
        load.own.names = names;
        Ok(vec![Some(memory(&run_program(&std::env::current_exe()?, &load.args()).await?))])
    }

    /// A load of `seconds` in each round.
    fn load(&self, workload: Workload, n: usize, seconds: f64) -> Load {
        let share = if self.options.quick { 0.25 } else { 1.0 };
        let dur = Duration::from_secs_f64(seconds * share);
        let warm = Duration::from_millis(if n > 32 { 1000 } else { 500 });
        let flags = Flags { hold: Duration::ZERO, names: 1 };
        Load { warm, ..Load::new(&self.options, workload, n, dur, flags) }
    }

    pub(crate) fn count(&self) -> usize {
        if self.options.quick { 2 } else { 5 }
    }

    async fn alternate(&self, ours: &Load, floor: &Load) -> Result<Rounds> {
        Rounds::run(self.count(), async || run(ours).await, async || run(floor).await).await
    }

    /// Others write 1,000 keys a second, until the tasks are dropped.
    async fn write_unrelated_keys(&self) -> Result<JoinSet<Result<()>>> {
        let client = self.load(Workload::FloorPut, 1, 1.0).connect().await?;
        let mut others = JoinSet::new();
        for _ in 0..5 {
            let (mut kv, key) = (client.kv_client(), fresh("other"));
            others.spawn(async move {
                let mut ticks = tokio::time::interval(Duration::from_millis(5));
                ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
                loop {
                    ticks.tick().await;
                    kv.put(key.as_str(), "", None).await?;
                }
            });
        }
        Ok(others)
    }
}

/// The same with time spent inside the critical section.
fn held(section: Duration, mut load: Load) -> Load {
    load.own.hold = section;
    load
}
