//! Benchmarks: the real controller with everything on, beside a bare gRPC fan-out of the same run.
//!
//! `bench [quick] [PART ..]` measures, everything or only some of `fanout`, `rollout`, `cycles`,
//! `dead`, `events`, `laws`, `real`, `agent` and `fair`; `bench load WHAT`, `bench bare WHERE` and `bench watch WHAT` are parts
//! of it, started by itself.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it prints what it found"
)]
#![expect(clippy::cast_precision_loss, reason = "figures are for people")]

mod agent;
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
mod rollout;
mod side;
mod watch;

use std::process::ExitCode;

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
const PARTS: [&str; 9] = [
    "fanout", "rollout", "cycles", "dead", "events", "laws", "real", "agent", "fair",
];

fn measure(quick: bool, parts: &[&str]) -> Result<bool> {
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(part)) {
        bail!("`{unknown}` is none of {PARTS:?}: bench [quick] [PART ..]");
    }
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    raise_limit()?;
    let mut report = Report::default();
    println!(
        "{:<64} {:>10} {:<6} {:>10} {:>8} {:>8}",
        "what", "value", "unit", "baseline", "ratio", "target"
    );
    let (sizes, large): (&[usize], &[usize]) = if quick {
        (&[100, 300, 1000], &[1000])
    } else {
        (&[100, 300, 1000, 3000, 10_000], &[1000, 10_000])
    };
    let mut costs = vec![];
    for agents in sizes.iter().filter(|_| wanted("fanout")) {
        costs.push(fanout::measure(&mut report, *agents, quick).context("the fan-out")?);
    }
    let mut rollouts = vec![];
    for agents in large {
        if wanted("rollout") {
            rollouts.push(rollout::measure(&mut report, *agents).context("the rollout")?);
        }
        if wanted("cycles") {
            cycles::measure(&mut report, *agents).context("connections that come and go")?;
        }
        if wanted("dead") {
            dead::measure(&mut report, *agents).context("dead agents")?;
        }
    }
    if wanted("events") {
        events::measure(&mut report, quick).context("the events")?;
    }
    if wanted("laws") {
        laws::measure(&mut report, &costs, &rollouts).context("the laws of growth")?;
    }
    if wanted("real") {
        real::measure(&mut report, quick).context("real agents")?;
    }
    if wanted("agent") {
        agent::measure(&mut report, quick).context("a real agent")?;
    }
    if wanted("fair") {
        fair::measure(&mut report, quick).context("fairness")?;
    }
    report.write(&lockstep_tests::target().join("reports/bench.json"))
}

/// Sessions are files: everything that is allowed is wanted, here and in the processes started from
/// here.
fn raise_limit() -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit of open files")
}

/// A controller without hosts.
fn controller() -> Result<Cluster> {
    without_hosts().start()
}

fn without_hosts() -> Builder {
    Cluster::builder().without_database().hosts(&[])
}
