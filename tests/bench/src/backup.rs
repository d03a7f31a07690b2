//! A backup step beside bare pg_dump with the same options: the agent's own test of it, in a program
//! that `make bench` builds, tells what both took.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::report::Report;

/// Names that program.
const TESTS: &str = "LOCKSTEP_AGENT_TESTS";

const TEST: &str = "a_step_costs_hardly_more_than_bare_pg_dump";

/// The most processor time, and the most wall time, that a step may take, of pg_dump's.
const CPU: f64 = 1.05;
const WALL: f64 = 1.0 / 0.98;

/// What it tells.
#[derive(Debug, Deserialize)]
struct Told {
    /// The step's by pg_dump's.
    backup_cpu_ratio: f64,
    /// pg_dump's by the step's: the median over the pairs.
    backup_wall_ratio: f64,
    bare_seconds: f64,
    bare_cpu_seconds: f64,
    bytes: f64,
}

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let tests = env::var_os(TESTS);
    let tests = tests.with_context(|| format!("{TESTS} is not set: `make bench` sets it"))?;
    let (mib, runs) = if quick { ("64", "3") } else { ("1024", "9") };
    let directory = tempfile::tempdir()?;
    let said = Command::new(tests)
        .args(["--include-ignored", TEST])
        .env("LOCKSTEP_DATABASE_REPORT_DIR", directory.path())
        .env("LOCKSTEP_BENCH_MIB", mib)
        .env("LOCKSTEP_BENCH_RUNS", runs)
        .output()?;
    // It fails if that is too much, too, which is said here.
    let told = fs::read(directory.path().join("backup.json"));
    let told = told.with_context(|| String::from_utf8_lossy(&said.stdout).into_owned())?;
    let told: Told = serde_json::from_slice(&told)?;
    let name = |what: &str| {
        let mb = told.bytes / 1e6;
        format!("backup of {mb:.0} MB beside pg_dump: {what}")
    };
    let (cpu, wall) = (told.bare_cpu_seconds, told.bare_seconds);
    let target = |most: f64| (!quick).then_some(most);
    report.beside(
        name("CPU, the server's with it"),
        cpu * told.backup_cpu_ratio,
        "s",
        cpu,
        target(CPU),
    );
    report.beside(
        name("until it has ended"),
        wall / told.backup_wall_ratio,
        "s",
        wall,
        target(WALL),
    );
    Ok(())
}
