//! Workers that repeat one operation, and the interval in which that is measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::counters;
use super::line::{Line, Measured};

/// How long the workers may take to end. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a crew is to do, and how long.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// Its name, for the result line.
    pub(crate) workload: String,
    /// What else tells it from others, for the result line.
    pub(crate) params: Value,
    /// The URL whose /metrics is read.
    pub(crate) metrics: String,
    /// Warm-up before the measured time.
    pub(crate) warm: Duration,
    /// Measured time.
    pub(crate) dur: Duration,
}

/// Tasks that work until they are told to stop. Only what they finish inside the measured interval counts.
#[derive(Default)]
pub(crate) struct Crew {
    phase: Arc<Phase>,
    workers: JoinSet<Result<Recorder>>,
}

#[derive(Debug, Default)]
struct Phase {
    recording: AtomicBool,
    stop: CancellationToken,
}

/// What one worker has done.
#[derive(Debug)]
pub(crate) struct Recorder {
    phase: Arc<Phase>,
    ops: u64,
    samples: Vec<u64>,
}

impl Recorder {
    /// Whether to go on.
    pub(crate) fn working(&self) -> bool {
        !self.phase.stop.is_cancelled()
    }

    /// Waits for `event`; `None` when it is time to stop.
    pub(crate) async fn before_the_end<T>(&self, event: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.phase.stop.cancelled() => None,
            event = event => Some(event),
        }
    }

    /// Notes an operation that just ended, and how long it took if that is known.
    pub(crate) fn done(&mut self, sample: Option<Duration>) {
        if self.phase.recording.load(Ordering::Relaxed) {
            self.ops += 1;
            self.samples.extend(sample.map(|sample| sample.as_nanos() as u64));
        }
    }
}

impl Crew {
    pub(crate) fn spawn<F>(&mut self, work: impl FnOnce(Recorder) -> F)
    where
        F: Future<Output = Result<Recorder>> + Send + 'static,
    {
        let recorder = Recorder { phase: self.phase.clone(), ops: 0, samples: Vec::new() };
        self.workers.spawn(work(recorder));
    }

    /// Lets the workers warm up, measures them, and stops them.
    pub(crate) async fn measure(mut self, peer: &str, run: Run) -> Result<Line> {
        self.work_for(run.warm).await?;
        let before = counters::read(&run.metrics).await?;
        let (cpu, start) = (counters::own_cpu()?, Instant::now());
        self.phase.recording.store(true, Ordering::Relaxed);
        self.work_for(run.dur).await?;
        self.phase.recording.store(false, Ordering::Relaxed);
        let mut measured = Measured {
            secs: start.elapsed().as_secs_f64(),
            own_cpu_s: counters::own_cpu()? - cpu,
            peak_rss_kib: counters::own_memory("VmHWM")?,
            ..Measured::default()
        };
        let after = counters::read(&run.metrics).await?;
        measured.counted = counters::difference(&before, &after);

        self.phase.stop.cancel();
        let end = tokio::time::timeout(PATIENCE, async {
            while let Some(worker) = self.workers.join_next().await {
                let recorder = worker??;
                measured.ops += recorder.ops;
                measured.samples.extend(recorder.samples);
            }
            anyhow::Ok(())
        });
        end.await.with_context(|| format!("workers hang: they do not end within {PATIENCE:?}"))??;
        ensure!(measured.ops > 0, "nothing was done in {:?}", run.dur);
        Ok(Line::new(peer, run.workload, run.params, measured))
    }

    /// Lets time pass; fails with the first worker that does.
    async fn work_for(&mut self, time: Duration) -> Result<()> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            Some(worker) = self.workers.join_next() => {
                worker??;
                bail!("a worker ended before its time")
            }
        }
    }
}

/// One of those who take turns with an exclusive thing.
pub(crate) trait Contender: Send + 'static {
    /// Stands for having it.
    type Hold: Send;

    fn acquire(&mut self) -> impl Future<Output = Result<Self::Hold>> + Send;

    fn release(&mut self, hold: Self::Hold) -> impl Future<Output = Result<()>> + Send;
}

/// Lets contenders take turns, each holding the thing for a while. An operation is a turn; its sample runs from
/// "release called" by the one before to "acquire returned".
pub(crate) async fn take_turns<C: Contender>(
    peer: &str,
    run: Run,
    hold: Duration,
    contenders: Vec<C>,
) -> Result<Line> {
    let turns = Arc::new(Turns::default());
    let mut crew = Crew::default();
    for mut contender in contenders {
        let turns = turns.clone();
        crew.spawn(|mut recorder| async move {
            while let Some(held) = recorder.before_the_end(contender.acquire()).await {
                let held = held?;
                recorder.done(turns.begin()?);
                if !hold.is_zero() {
                    tokio::time::sleep(hold).await;
                }
                turns.end();
                contender.release(held).await?;
            }
            Ok(recorder)
        });
    }
    crew.measure(peer, run).await
}

/// The turns, seen from outside: they must not overlap.
struct Turns {
    start: Instant,
    taken: AtomicBool,
    /// When the last release was called, in nanoseconds after the start; 0 before the first.
    released: AtomicU64,
}

impl Default for Turns {
    fn default() -> Self {
        Self { start: Instant::now(), taken: AtomicBool::new(false), released: AtomicU64::new(0) }
    }
}

impl Turns {
    /// Begins a turn; gives the time since the release of the one before.
    fn begin(&self) -> Result<Option<Duration>> {
        let now = self.start.elapsed();
        ensure!(!self.taken.swap(true, Ordering::SeqCst), "mutual exclusion is broken");
        let released = self.released.load(Ordering::SeqCst);
        Ok((released > 0).then(|| now.saturating_sub(Duration::from_nanos(released))))
    }

    fn end(&self) {
        self.taken.store(false, Ordering::SeqCst);
        self.released.store(self.start.elapsed().as_nanos() as u64, Ordering::SeqCst);
    }
}
