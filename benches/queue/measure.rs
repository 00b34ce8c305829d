//! How each figure of the table is measured: next to its baseline, in alternating rounds.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use crate::common::compare::{Figure, Rounds, millis, per_second, run_program};
use crate::common::line::Line;
use crate::common::options::Options;
use crate::load::{Flags, Load, Workload};
use crate::run;

/// Something that gives one or several figures.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Measure {
    Drain { consumers: usize, claims: bool },
    Length,
    Batch,
    Waiting { consumers: usize },
    Memory,
}

/// Measures the table of the queue benchmark.
#[derive(Debug, Parser)]
#[command(
    name = "queue",
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
            Measure::Drain { consumers, claims } => self.drain(consumers, claims).await,
            Measure::Length => self.length().await,
            Measure::Batch => self.batch().await,
            Measure::Waiting { consumers } => self.waiting(consumers).await,
            Measure::Memory => self.memory().await,
        }
    }

    async fn drain(&self, consumers: usize, claims: bool) -> Result<Vec<Option<Figure>>> {
        let mut load = self.load(Workload::QueueDrain, consumers, 10.0);
        load.own.preload = if self.options.quick { 5_000 } else { 20_000 };
        if claims {
            load.mode = "claim".into();
            let line = run(&load).await?;
            return Ok(vec![Some(requests(&line, 0.0)), Some(rate(&line))]);
        }
        let Some(go) = &self.go else {
            let line = run(&load).await?;
            return Ok(vec![Some(requests(&line, 0.0)), Some(rate(&line)), None]);
        };
        let rounds = Rounds::run(
            if self.options.quick { 1 } else { 3 },
            async || run(&load).await,
            async || run_program(go, &load.args()).await,
        );
        let rounds = rounds.await?;
        let line = &rounds.measured[0];
        let to_go = rounds.ratio(Line::ops_per_s, per_second);
        Ok(vec![Some(requests(line, 0.0)), Some(rate(line)), Some(to_go)])
    }

    /// The same number of items out of a long and a short queue.
    async fn length(&self) -> Result<Vec<Option<Figure>>> {
        let of = |preload| {
            let mut load = self.load(Workload::QueueDrain, 1, 10.0);
            (load.own.preload, load.own.items) = (preload, Some(1000));
            load
        };
        let (long, short) = (of(100_000), of(1_000));
        let rounds = Rounds::run(
            if self.options.quick { 1 } else { 3 },
            async || run(&long).await,
            async || run(&short).await,
        );
        let rounds = rounds.await?;
        let server = rounds.ratio(|line| line.server_cpu_us_per_op, |micros| format!("{micros:.0} µs"));
        Ok(vec![Some(rounds.ratio(Line::p50, millis)), Some(server)])
    }

    async fn batch(&self) -> Result<Vec<Option<Figure>>> {
        let ours = Load { mode: "batch".into(), ..self.load(Workload::QueueEnqueue, 1, 2.0) };
        let (one, floor) = (self.load(Workload::QueueEnqueue, 1, 2.0), self.load(Workload::FloorPut, 1, 2.0));
        let batches =
            Rounds::run(self.count(), async || run(&ours).await, async || run(&floor).await).await?;
        let single = Rounds::run(self.count(), async || run(&one).await, async || run(&floor).await).await?;
        Ok(vec![
            Some(batches.ratio(Line::ops_per_s, per_second)),
            Some(single.ratio(Line::ops_per_s, per_second)),
        ])
    }

    async fn waiting(&self, consumers: usize) -> Result<Vec<Option<Figure>>> {
        let taken = self.load(Workload::QueueMixed, consumers, 5.0);
        let claimed = Load { mode: "claim".into(), ..taken.clone() };
        let floor = self.load(Workload::FloorWatch, 1, 5.0);
        let rounds = Rounds::run(self.count(), async || run(&claimed).await, async || run(&floor).await);
        let rounds = rounds.await?;
        // Each item was put by one request, and acked by one.
        let claim = requests(&rounds.measured[0], 1.0);
        let take = requests(&run(&taken).await?, 1.0);
        Ok(vec![Some(take), Some(claim), Some(rounds.ratio(Line::p50, millis))])
    }

    async fn memory(&self) -> Result<Vec<Option<Figure>>> {
        let mut load = Load { size: 100, ..self.load(Workload::QueueMemory, 1, 1.0) };
        load.own.preload = 100_000;
        let line = run_program(&std::env::current_exe()?, &load.args()).await?;
        let origin = format!("{:.0} bytes an item", line.extra("above_idle_mib") * 1024.0 * 1024.0 / 1e5);
        Ok(vec![Some(Figure { value: line.extra("above_idle_mib"), origin })])
    }

    /// A load of `seconds` in each round.
    fn load(&self, workload: Workload, n: usize, seconds: f64) -> Load {
        let share = if self.options.quick { 0.4 } else { 1.0 };
        let dur = Duration::from_secs_f64(seconds * share);
        let flags = Flags { preload: 20_000, items: None, producers: 1, rate: 200.0 };
        // A TTL so long that hardly a keepalive comes between.
        Load { ttl: 60, ..Load::new(&self.options, workload, n, dur, flags) }
    }

    fn count(&self) -> usize {
        if self.options.quick { 1 } else { 3 }
    }
}

/// Unary requests per item, less those of others.
fn requests(line: &Line, others: f64) -> Figure {
    let origin = format!("{} items, {:.2} with the producer's", line.ops, line.rpc_unary_per_op);
    Figure { value: line.rpc_unary_per_op - others, origin }
}

fn rate(line: &Line) -> Figure {
    Figure {
        value: line.ops_per_s,
        origin: format!("p50 {}, p99 {}", millis(line.p50()), millis(line.p99())),
    }
}
