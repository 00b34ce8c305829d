//! The table of a bench: its rows, their targets, and how the results are shown.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::compare::Figure;

/// Rows that are measured together, by something that says how.
pub(crate) struct Case<M> {
    measure: M,
    rows: Vec<Row>,
}

/// One row: a figure and what is wanted of it.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    limit: Option<Limit>,
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

pub(crate) fn case<M, const N: usize>(measure: M, rows: [Row; N]) -> Case<M> {
    Case { measure, rows: rows.into() }
}

pub(crate) fn row(name: impl Into<String>, unit: &'static str) -> Row {
    Row { name: name.into(), unit, limit: None }
}

pub(crate) fn ratio(name: impl Into<String>) -> Row {
    row(name, "ratio")
}

impl Row {
    pub(crate) fn at_most(self, limit: f64) -> Self {
        Self { limit: Some(Limit::AtMost(limit)), ..self }
    }

    pub(crate) fn at_least(self, limit: f64) -> Self {
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

    /// `None`: it cannot be had here.
    fn cells(&self, figure: Option<&Figure>) -> [String; 6] {
        let (limit, unit) = (self.limit, if self.unit == "ratio" { "" } else { self.unit });
        let verdict = match (figure, limit) {
            (None, _) => "not measured",
            (Some(_), None) => "",
            (Some(figure), Some(limit)) if limit.is_met(figure.value) => "ok",
            (Some(_), Some(_)) => "MISSED",
        };
        let limit = limit.map_or_else(String::new, |limit| limit.to_string());
        let (value, origin) =
            figure.map_or_else(Default::default, |figure| (number(figure.value), figure.origin.clone()));
        [self.name.clone(), value, unit.into(), limit, verdict.into(), origin]
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

/// Measures the rows whose name contains `only`, shows them and keeps them in `target/bench/{name}.json`; fails
/// when some could not be measured. A measure gives the figures of its rows in their order, `None` for one that cannot be had
/// here.
pub(crate) async fn run<M>(
    name: &str,
    cases: Vec<Case<M>>,
    only: &str,
    measure: impl AsyncFn(M) -> Result<Vec<Option<Figure>>>,
) -> Result<ExitCode> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["", "value", "unit", "target", "", "from"]);
    for number in [1, 3] {
        if let Some(column) = table.column_mut(number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let (mut lines, mut complete) = (Vec::new(), true);
    for case in cases {
        let Some(first) = case.rows.iter().find(|row| row.name.contains(only)) else { continue };
        eprintln!("measuring: {}", first.name);
        let figures = match measure(case.measure).await {
            Ok(figures) => figures,
            Err(error) => {
                eprintln!("FAILED: {}: {error:#}", first.name);
                complete = false;
                continue;
            }
        };
        for (row, figure) in case.rows.iter().zip(figures) {
            if row.name.contains(only) {
                table.add_row(row.cells(figure.as_ref()));
                lines.extend(figure.map(|figure| row.json(&figure)));
            }
        }
    }
    println!("{table}");
    save(name, &lines)?;
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn save(name: &str, lines: &[Value]) -> Result<()> {
    // Cargo runs benches in the directory of their package.
    let folder = Path::new("target/bench");
    fs::create_dir_all(folder)?;
    let path = folder.join(name).with_extension("json");
    let mut file = fs::File::create(&path)?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    println!("{} rows are in {}", lines.len(), path.display());
    Ok(())
}
