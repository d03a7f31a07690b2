//! What a benchmark found: a table for people, JSON for machines.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The bare figure of the same run.
    pub(crate) baseline: Option<f64>,
    /// `value` by `baseline`.
    pub(crate) ratio: Option<f64>,
    /// The most that the ratio, or the value where there is no baseline, may be.
    pub(crate) target: Option<f64>,
    pub(crate) pass: Option<bool>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// A figure by itself.
    pub(crate) fn value(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.row(name.into(), value, unit, None, None);
    }

    /// A figure that may be no more than this, if there is a bound.
    pub(crate) fn bounded(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        target: Option<f64>,
    ) {
        self.row(name.into(), value, unit, None, target);
    }

    /// A figure that may be no more than this many times the bare one.
    pub(crate) fn beside(
        &mut self,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        baseline: f64,
        target: Option<f64>,
    ) {
        self.row(name.into(), value, unit, Some(baseline), target);
    }

    /// A part that could not be measured: it stands among the others, and is not met.
    pub(crate) fn failed(&mut self, what: &str, error: &anyhow::Error) {
        self.row(format!("{what}: {error:#}"), f64::NAN, "", None, Some(0.0));
    }

    fn row(
        &mut self,
        name: String,
        value: f64,
        unit: &'static str,
        baseline: Option<f64>,
        target: Option<f64>,
    ) {
        let ratio = baseline.map(|baseline| value / baseline);
        let pass = target.map(|target| ratio.unwrap_or(value) <= target);
        let row = Row {
            name,
            value,
            unit,
            baseline,
            ratio,
            target,
            pass,
        };
        println!("{}", row.line());
        self.rows.push(row);
    }

    /// Writes them, and returns whether every target was met.
    pub(crate) fn write(&self, path: &Path) -> Result<bool> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, serde_json::to_string_pretty(&self.rows)? + "\n")?;
        Ok(self.rows.iter().all(|row| row.pass != Some(false)))
    }
}

impl Row {
    fn line(&self) -> String {
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), short);
        let word = match self.pass {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        };
        format!(
            "{:<64} {:>10} {:<6} {:>10} {:>8} {:>8} {word}",
            self.name,
            short(self.value),
            self.unit,
            number(self.baseline),
            number(self.ratio),
            number(self.target)
        )
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        big if big >= 1000.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle of some figures; of none, not a number.
pub(crate) fn median(of: &[f64]) -> f64 {
    part(of, 50)
}

/// The figure that so many of a hundred do not exceed.
pub(crate) fn part(of: &[f64], percent: usize) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted
        .get(last * percent / 100)
        .copied()
        .unwrap_or(f64::NAN)
}
