//! `make fleet`: the runbook on three systemd hosts and a controller's, as users install them.
#![allow(clippy::print_stdout, reason = "it says what it is at")]

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use lockstep_tests::fleet::{Fleet, HOSTS};
use lockstep_tests::operator::{Operator, answer_gates, list, text};
use lockstep_tests::timeline::timeline;
use lockstep_tests::{cluster, example, target, wait};
use serde_json::{Value, json};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("fleet: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What `fleet.json` says.
#[derive(Default)]
struct Seen {
    succeeded: bool,
    rolled_back: bool,
    equal: bool,
}

fn run() -> Result<()> {
    let begun = Instant::now();
    let reports = target().join("reports");
    let evidence = reports.join("fleet");
    let _ = fs::remove_dir_all(&evidence);
    fs::create_dir_all(&evidence)?;
    let mut seen = Seen::default();
    let fleet = Fleet::start(say)?;
    let shown = show(&fleet, &mut seen, &evidence);
    let collected = fleet.collect(&evidence);
    let stopped = fleet.stop();
    let result = json!({
        "hosts": HOSTS.len(),
        "succeeded": seen.succeeded,
        "rolled_back": seen.rolled_back,
        "equal_after_rollback": seen.equal,
        "seconds": begun.elapsed().as_secs(),
    });
    fs::write(reports.join("fleet.json"), format!("{result:#}\n"))?;
    say(&format!("evidence in {}", evidence.display()));
    say(&format!("{result}"));
    shown.and(collected).and(stopped)
}

fn show(fleet: &Fleet, seen: &mut Seen, evidence: &Path) -> Result<()> {
    say("installing v0.9.5");
    let installed = deploy(fleet, &example::install_plan(), "v0.9.5")?;
    expect(&installed, "succeeded")?;

    say("deploying v1.0.0");
    let good = deploy(fleet, &example::plan(), "v1.0.0")?;
    report(fleet, &good, evidence, "v1.0.0")?;
    expect(&good, "succeeded")?;
    let before = fleet.snapshot()?;
    ensure!(
        before.releases.values().all(|release| release == "v1.0.0"),
        "{:?}",
        before.releases
    );
    seen.succeeded = true;

    say("deploying v1.1.0, which comes back");
    let bad = deploy(fleet, &example::plan(), "v1.1.0")?;
    report(fleet, &bad, evidence, "v1.1.0")?;
    expect(&bad, "rolled_back")?;
    seen.rolled_back = true;
    let differences = before.differences(&fleet.snapshot()?);
    ensure!(
        differences.is_empty(),
        "not as before: {}",
        differences.join("; ")
    );
    seen.equal = true;

    for (name, _) in HOSTS.iter().filter(|(_, role)| *role == "app") {
        let state = fleet.on(name, &["systemctl", "is-active", "employee-backend"])?;
        ensure!(
            state.trim() == "active",
            "employee-backend on {name} is {state}"
        );
        let started = fleet.on(
            name,
            &["journalctl", "--no-pager", "-u", "employee-backend"],
        )?;
        ensure!(
            started.contains("Started"),
            "no journal line of a start on {name}"
        );
    }
    for (name, _) in HOSTS {
        let steps = [
            "journalctl",
            "--no-pager",
            "_SYSTEMD_SLICE=lockstep-steps.slice",
        ];
        let steps = fleet.on(name, &steps)?;
        fs::create_dir_all(evidence.join(name))?;
        fs::write(evidence.join(name).join("steps.journal"), &steps)?;
        let units = fleet.on(
            name,
            &["journalctl", "--no-pager", "_PID=1", "-g", "lockstep-step"],
        )?;
        ensure!(
            units.lines().count() > 3,
            "no step ran as a unit of systemd on {name}: {units}"
        );
    }
    Ok(())
}

fn deploy(fleet: &Fleet, plan: &Path, release: &str) -> Result<Value> {
    let requester = fleet.operator(cluster::REQUESTER);
    let mut inputs = vec![("release", release)];
    if plan == example::plan() {
        // Three hosts share this machine, and it is not what production has.
        inputs.extend([("watch", "5s"), ("list_ms", "2000"), ("search_ms", "2000")]);
        inputs.push(("write_ms", "2000"));
    }
    let rollout = requester.submit(plan, &inputs)?;
    let people = cluster::PEOPLE.map(|(name, _)| fleet.operator(name));
    let people: Vec<&Operator> = people
        .iter()
        .filter(|person| person.name != cluster::REQUESTER)
        .collect();
    let document = answer_gates(&people, &rollout, wait::ROLLOUT, |person, gate| {
        say(&format!(
            "  {} decides at gate {} of phase `{}`",
            person.name, gate.at, gate.phase
        ));
    })?;
    for line in timeline(&document) {
        say(&format!("  {line}"));
    }
    Ok(document)
}

fn expect(document: &Value, state: &str) -> Result<()> {
    if text(&document["state"]) == state {
        return Ok(());
    }
    let events = list(&document["events"]).map(|event| {
        let details: Vec<&str> = list(&event["detail"]).map(text).collect();
        let host = text(&event["host"]);
        format!(
            "{host} {} {} {}",
            text(&event["action"]),
            text(&event["message"]),
            details.join(" / ")
        )
    });
    let events: Vec<String> = events.collect();
    let last = &events[events.len().saturating_sub(30)..];
    bail!(
        "{}, not {state}: {}\n{}",
        document["state"],
        document["reason"],
        last.join("\n")
    )
}

fn report(fleet: &Fleet, document: &Value, evidence: &Path, release: &str) -> Result<()> {
    let rollout = text(&document["rollout"]);
    for format in ["md", "html", "json"] {
        let requester = fleet.operator(cluster::REQUESTER);
        let said = requester.run(&["report", rollout, "--format", format])?;
        ensure!(said.code == 0, "no report as {format}: {}", said.text());
        fs::write(evidence.join(format!("{release}.{format}")), said.stdout)?;
    }
    Ok(())
}

fn say(text: &str) {
    println!("fleet: {text}");
}
