//! The table: what is measured, its targets, and how the results are shown.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::measure::{Bench, Figure, Measure};

/// Where the results go, for programs. Cargo runs benches in the directory of their package.
const RESULTS: &str = "target/bench/locks.json";

/// Rows that are measured together.
struct Case {
    measure: Measure,
    rows: Vec<Row>,
}

/// One row: a figure and what is wanted of it.
struct Row {
    name: String,
    unit: &'static str,
    limit: Option<Limit>,
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

/// Everything that is measured.
fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(
            Measure::LockPair,
            [ratio("lock + unlock: p50 over the same two raw transactions").at_most(1.2)],
        ),
        case(
            Measure::DistinctLocks { locks: 64 },
            [ratio("64 distinct locks at once: ops/s over the same raw transactions").at_least(0.85)],
        ),
    ];
    for (busy, others) in [(false, ""), (true, " among 1,000 other writes/s")] {
        for (waiters, limit) in [(2, 1.8), (8, 1.8), (64, 2.5)] {
            let what = format!("hand-off, {waiters} waiters{others}");
            let p50 = ratio(format!("{what}: p50 over the floor")).at_most(limit);
            let p99 = ratio(format!("{what}: p99 over its p50")).at_most(10.0);
            cases.push(case(Measure::Handoff { waiters, busy }, [p50, p99]));
        }
    }
    for waiters in [4, 64] {
        let what =
            format!("hand-off, {waiters} waiters, 5 ms away: p50 over a raw delete and its notification");
        cases.push(case(Measure::SlowLink { waiters }, [ratio(what).at_most(1.15)]));
    }
    for (waiters, faster, requests) in [(2, 30.0, 2.2), (8, 8.0, 2.2), (64, 1.0, 4.0), (256, 1.0, 4.0)] {
        let rate = row(format!("hand-offs/s, {waiters} waiters"), "1/s");
        let to_go = ratio(format!("hand-offs/s, {waiters} waiters: over Go's")).at_least(faster);
        let unary = row(format!("unary RPCs per contended acquire + release, {waiters} waiters"), "RPCs");
        cases.push(case(Measure::Throughput { waiters }, [rate, to_go, unary.at_most(requests)]));
    }
    let one_session = [
        row("hand-offs/s, 8 tasks on one session", "1/s"),
        ratio("hand-offs/s, 8 tasks on one session: over Go's 8 sessions on one connection").at_least(20.0),
    ];
    cases.push(case(Measure::OneSession { tasks: 8 }, one_session));
    let requests = ["lock", "unlock", "try_lock"];
    let requests =
        requests.map(|call| row(format!("unary RPCs per uncontended {call}"), "RPCs").at_most(1.0));
    cases.push(case(Measure::Requests, requests));
    for waiters in [256, 1000] {
        let messages =
            row(format!("watch messages out per hand-off, {waiters} waiting sessions"), "messages");
        let told =
            row(format!("watch messages out per hand-off, {waiters} waiting sessions: events"), "messages");
        cases.push(case(Measure::Audience { waiters }, [messages.at_most(16.0), told]));
    }
    let session_memory = [
        row("memory per waiting session, 1,000 on one connection", "bytes"),
        ratio("memory per waiting session: over Go's").at_most(1.0 / 3.0),
    ];
    cases.push(case(Measure::SessionMemory { sessions: 1000 }, session_memory));
    for (names, what) in [(100, "100 locks"), (1, "one lock")] {
        let each = row(format!("memory per waiter, 10,000 on one session, {what}"), "bytes").at_most(4096.0);
        cases.push(case(Measure::WaiterMemory { waiters: 10_000, names }, [each]));
    }
    cases
}

fn case<const N: usize>(measure: Measure, rows: [Row; N]) -> Case {
    Case { measure, rows: rows.into() }
}

fn row(name: impl Into<String>, unit: &'static str) -> Row {
    Row { name: name.into(), unit, limit: None }
}

fn ratio(name: impl Into<String>) -> Row {
    row(name, "ratio")
}

impl Row {
    fn at_most(self, limit: f64) -> Self {
        Self { limit: Some(Limit::AtMost(limit)), ..self }
    }

    fn at_least(self, limit: f64) -> Self {
        Self { limit: Some(Limit::AtLeast(limit)), ..self }
    }

    fn json(&self, figure: &Figure) -> Value {
        let mut line = json!({ "name": self.name, "value": figure.value, "unit": self.unit });
        if let Some(limit) = self.limit {
            (line["limit"], line["better"]) = match limit {
                Limit::AtMost(limit) => (json!(limit), json!("lower")),
                Limit::AtLeast(limit) => (json!(limit), json!("higher")),
            };
        }
        line
    }

    fn cells(&self, figure: &Figure) -> [String; 6] {
        let (limit, verdict) = match self.limit {
            None => (String::new(), ""),
            Some(limit) => (limit.to_string(), if limit.is_met(figure.value) { "ok" } else { "MISSED" }),
        };
        let (value, unit) = (number(figure.value), if self.unit == "ratio" { "" } else { self.unit });
        [self.name.clone(), value, unit.into(), limit, verdict.into(), figure.origin.clone()]
    }
}

impl Limit {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "<= {}", number(*limit)),
            Self::AtLeast(limit) => write!(f, ">= {}", number(*limit)),
        }
    }
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// Measures the rows whose name contains `only`, shows and keeps them; `false` when some could not be measured.
pub(crate) async fn run(bench: &Bench, only: &str) -> Result<bool> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["", "value", "unit", "target", "", "from"]);
    for number in [1, 3] {
        if let Some(column) = table.column_mut(number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let (mut lines, mut complete) = (Vec::new(), true);
    for case in cases() {
        let Some(first) = case.rows.iter().find(|row| row.name.contains(only)) else { continue };
        eprintln!("measuring: {}", first.name);
        let figures = match bench.measure(case.measure).await {
            Ok(figures) => figures,
            Err(error) => {
                eprintln!("FAILED: {}: {error:#}", first.name);
                complete = false;
                continue;
            }
        };
        for (row, figure) in case.rows.iter().zip(figures) {
            if let Some(figure) = figure
                && row.name.contains(only)
            {
                table.add_row(row.cells(&figure));
                lines.push(row.json(&figure));
            }
        }
    }
    println!("{table}");
    save(&lines)?;
    Ok(complete)
}

fn save(lines: &[Value]) -> Result<()> {
    let path = Path::new(RESULTS);
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    let mut file = fs::File::create(path)?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    println!("{} rows are in {RESULTS}", lines.len());
    Ok(())
}
