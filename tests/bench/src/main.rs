//! Benchmarks: the real controller with everything on, beside a bare gRPC fan-out of the same run.
//!
//! `bench [quick] [PART ..]` measures, everything or only some of `fanout`, `rollout`, `cycles`,
//! `dead`, `events`, `laws`, `real`, `rollback`, `agent`, `fair` and `backup`. `bench load WHAT`,
//! `bench bare WHERE` and `bench watch WHAT` are parts of it, started by itself.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it prints what it found"
)]
#![expect(clippy::cast_precision_loss, reason = "figures are for people")]

mod agent;
mod backup;
mod bare;
mod clock;
mod control;
mod cycles;
mod dead;
mod dial;
mod events;
mod fair;
mod fanout;
mod history;
mod journal;
mod laws;
mod load;
mod manner;
mod person;
mod plans;
mod process;
mod real;
mod report;
mod rivals;
mod rollback;
mod rollout;
mod side;
mod watch;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use lockstep_tests::cluster::{Builder, Cluster};
use report::Report;
use rustix::process::{Resource, getrlimit, setrlimit};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("bench: a target was not met");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["load", what] => load::run(serde_json::from_str(what)?).map(|()| true),
        ["watch", what] => watch::run(&serde_json::from_str(what)?).map(|()| true),
        ["bare", place] => bare::run(&serde_json::from_str(place)?).map(|()| true),
        ["quick", parts @ ..] => measure(true, parts),
        parts => measure(false, parts),
    }
}

/// What can be measured by itself.
const PARTS: [&str; 11] = [
    "fanout", "rollout", "cycles", "dead", "events", "laws", "real", "rollback", "agent", "fair",
    "backup",
];

/// How long everything may take, in minutes, and the short form of it.
const MOST: [f64; 2] = [20.0, 3.0];

/// Files that a process has open beside its sessions, at most.
const OTHER_FILES: u64 = 500;

fn measure(quick: bool, parts: &[&str]) -> Result<bool> {
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(part)) {
        bail!("`{unknown}` is none of {PARTS:?}: bench [quick] [PART ..]");
    }
    let (sizes, large): (&[usize], &[usize]) = if quick {
        (&[100, 300, 1000], &[1000])
    } else {
        (&[100, 300, 1000, 3000, 10_000], &[1000, 10_000])
    };
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    let fleets = ["fanout", "rollout", "cycles", "dead"]
        .into_iter()
        .any(wanted);
    let largest = if fleets { large[large.len() - 1] } else { 1000 };
    raise_limit(largest as u64 + OTHER_FILES)?;
    // Of parts there is a file of their own: it is not everything.
    let file = if parts.is_empty() {
        "bench.json"
    } else {
        "bench-parts.json"
    };
    let file = lockstep_tests::target().join("reports").join(file);
    let _ = fs::remove_file(&file);
    let begun = Instant::now();
    let mut report = Report::default();
    println!(
        "{:<64} {:>10} {:<6} {:>10} {:>8} {:>8}",
        "what", "value", "unit", "baseline", "ratio", "target"
    );
    let (mut costs, mut rollouts) = (vec![], vec![]);
    // What fails is told beside the others, and does not keep them from being measured.
    let mut part = |name: &str, measure: &mut dyn FnMut(&mut Report) -> Result<()>| {
        if wanted(name)
            && let Err(error) = measure(&mut report)
        {
            report.failed(name, &error);
        }
    };
    for agents in sizes.iter().copied() {
        part("fanout", &mut |report| {
            costs.push(fanout::measure(report, agents, quick)?);
            Ok(())
        });
    }
    for agents in large.iter().copied() {
        part("rollout", &mut |report| {
            rollouts.push(rollout::measure(report, agents)?);
            Ok(())
        });
        part("cycles", &mut |report| {
            cycles::measure(report, agents, quick)
        });
        part("dead", &mut |report| dead::measure(report, agents));
    }
    part("events", &mut |report| events::measure(report, quick));
    part("laws", &mut |report| {
        laws::measure(report, &costs, &rollouts, quick)
    });
    part("real", &mut |report| real::measure(report, quick));
    part("rollback", &mut |report| rollback::measure(report, quick));
    part("agent", &mut |report| agent::measure(report, quick));
    part("fair", &mut |report| fair::measure(report, quick));
    // A small one says little, so that it is left out where time is short.
    if !quick || !parts.is_empty() {
        part("backup", &mut |report| backup::measure(report, quick));
    }
    if parts.is_empty() {
        let took = begun.elapsed().as_secs_f64() / 60.0;
        report.bounded("all of it", took, "min", Some(MOST[usize::from(quick)]));
    }
    report.write(&file)
}

/// Sessions are files: everything that is allowed is wanted, here and in the processes started from
/// here, and so many at least.
fn raise_limit(least: u64) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit of open files")?;
    match limit.maximum {
        Some(maximum) if maximum < least => bail!(
            "this process may open {maximum} files, and the largest fleet takes {least}: raise the \
             hard limit (`ulimit -Hn`), or measure smaller ones: make bench-quick"
        ),
        _ => Ok(()),
    }
}

/// A controller without hosts.
fn controller() -> Result<Cluster> {
    without_hosts().start()
}

fn without_hosts() -> Builder {
    Cluster::builder().without_database().hosts(&[])
}
