//! Figures, and how they are compared: next to their baseline, in alternating rounds.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::process::Command;

use super::line::Line;

/// How long another program may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// One figure and where it comes from.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) value: f64,
    pub(crate) origin: String,
}

/// The lines of alternating rounds.
pub(crate) struct Rounds {
    pub(crate) measured: Vec<Line>,
    pub(crate) baseline: Vec<Line>,
}

impl Rounds {
    /// Runs two things in turn; each goes first as often as the other.
    pub(crate) async fn run(
        count: usize,
        ours: impl AsyncFn() -> Result<Line>,
        baseline: impl AsyncFn() -> Result<Line>,
    ) -> Result<Self> {
        let mut rounds = Self { measured: Vec::new(), baseline: Vec::new() };
        for round in 0..count {
            if round % 2 == 0 {
                rounds.measured.push(ours().await?);
                rounds.baseline.push(baseline().await?);
            } else {
                rounds.baseline.push(baseline().await?);
                rounds.measured.push(ours().await?);
            }
        }
        Ok(rounds)
    }

    /// The median of the rounds' ratios; the two medians are its origin.
    pub(crate) fn ratio(&self, of: impl Fn(&Line) -> f64, show: impl Fn(f64) -> String) -> Figure {
        let ratios = self.measured.iter().zip(&self.baseline).map(|(ours, base)| of(ours) / of(base));
        let (ours, base) = (median(&self.measured, &of), median(&self.baseline, &of));
        Figure { value: middle(ratios.collect()), origin: format!("{} / {}", show(ours), show(base)) }
    }
}

pub(crate) fn median(lines: &[Line], of: impl Fn(&Line) -> f64) -> f64 {
    middle(lines.iter().map(of).collect())
}

pub(crate) fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

pub(crate) fn millis(micros: f64) -> String {
    format!("{:.2} ms", micros / 1e3)
}

pub(crate) fn per_second(rate: f64) -> String {
    format!("{rate:.0}/s")
}

pub(crate) fn memory(line: &Line) -> Figure {
    let (before, after) = (line.extra("rss_before_kib") / 1024.0, line.extra("rss_after_kib") / 1024.0);
    Figure { value: line.extra("bytes_each"), origin: format!("{before:.1} to {after:.1} MiB") }
}

/// Runs a workload in a process of its own: of this program or of a peer's.
pub(crate) async fn run_program(program: &Path, args: &[String]) -> Result<Line> {
    let mut command = Command::new(program);
    command.args(args).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.with_context(|| format!("no result within {PATIENCE:?}"))?;
    let output = output.with_context(|| format!("{} does not start", program.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{} failed: {errors}", program.display());
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.starts_with('{')).context("no result line")?;
    Ok(serde_json::from_str(line)?)
}
