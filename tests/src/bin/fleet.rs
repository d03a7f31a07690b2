//! `make fleet`: the runbook on three systemd hosts and a controller's, as users install them; then
//! faults of such hosts, each in the middle of a running step.
//!
//! `fleet faults [NAME...]` leaves the runbook out, and tries the faults that are named, or all.
#![allow(clippy::print_stdout, reason = "it says what it is at")]

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_tests::fleet::{CONTROL, Fleet, HOSTS, faults};
use lockstep_tests::operator::{Operator, answer_gates, list, steps, text};
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
    faults: Vec<faults::Seen>,
}

fn run() -> Result<()> {
    let begun = Instant::now();
    let reports = target().join("reports");
    let evidence = reports.join("fleet");
    let mut seen = Seen::default();
    let fleet = Fleet::start(say)?;
    let _ = fs::remove_dir_all(&evidence);
    fs::create_dir_all(&evidence)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let shown = match &arguments[..] {
        [] => show(&fleet, &mut seen, &evidence).and_then(|()| strike(&fleet, &mut seen, &[])),
        [word, names @ ..] if word == "faults" => strike(&fleet, &mut seen, names),
        _ => Err(anyhow::anyhow!("usage: fleet [faults [NAME...]]")),
    };
    let collected = fleet.collect(&evidence);
    let stopped = fleet.stop();
    let result = json!({
        "hosts": HOSTS.len(),
        "succeeded": seen.succeeded,
        "rolled_back": seen.rolled_back,
        "equal_after_rollback": seen.equal,
        "faults": seen.faults.iter().map(faults::Seen::to_json).collect::<Vec<_>>(),
        "seconds": begun.elapsed().as_secs(),
    });
    fs::write(reports.join("fleet.json"), format!("{result:#}\n"))?;
    say(&format!("evidence in {}", evidence.display()));
    say(&format!("{result}"));
    shown.and(collected).and(stopped)
}

fn show(fleet: &Fleet, seen: &mut Seen, evidence: &Path) -> Result<()> {
    if let Some(program) = std::env::var_os("LOCKSTEP_AGENT_TESTS") {
        say("the agent's tests of systemd, on app-2");
        let said = fleet.test_systemd("app-2", Path::new(&program))?;
        ensure!(
            said.contains("test result: ok") && !said.contains("running 0"),
            "{said}"
        );
        fs::write(evidence.join("systemd-tests.txt"), said)?;
    }

    let certificates = fleet.certificates()?;
    fs::write(evidence.join("exposure.txt"), fleet.check_exposure()?)?;

    say("installing v0.9.5");
    let installed = deploy(fleet, &example::install_plan(), "v0.9.5", |_| Ok(()))?;
    expect(&installed, "succeeded")?;

    say("deploying v1.0.0, with the controller, steps and an agent killed on the way");
    let good = deploy(fleet, &example::plan(), "v1.0.0", |rollout| {
        kill_step(fleet, rollout, "release.build")?;
        kill_agent(fleet, rollout, "release.build")?;
        kill_controller(fleet, rollout)?;
        kill_step(fleet, rollout, "migration.apply")
    })?;
    report(fleet, &good, evidence, "v1.0.0")?;
    expect(&good, "succeeded")?;
    each_effect_once(fleet, evidence)?;
    let before = fleet.snapshot()?;
    ensure!(
        before.releases.values().all(|release| release == "v1.0.0"),
        "{:?}",
        before.releases
    );
    seen.succeeded = true;

    say("deploying v1.1.0, which comes back");
    let bad = deploy(fleet, &example::plan(), "v1.1.0", |_| Ok(()))?;
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
        for what in ["lockstep-step", "lockstep-look"] {
            let units = fleet.on(name, &["journalctl", "--no-pager", "_PID=1", "-g", what])?;
            ensure!(
                units.lines().count() > 3,
                "no {what} ran as a unit of systemd on {name}: {units}"
            );
        }
    }

    say("waiting until every host has renewed its certificate");
    fleet.wait_renewed(&certificates)
}

/// Tries faults of hosts, those that are named or all of them.
fn strike(fleet: &Fleet, seen: &mut Seen, names: &[String]) -> Result<()> {
    let unknown = names
        .iter()
        .find(|name| !faults::FAULTS.iter().any(|fault| fault.name == **name));
    ensure!(unknown.is_none(), "there is no fault {unknown:?}");
    for fault in &faults::FAULTS {
        if names.is_empty() || names.iter().any(|name| name == fault.name) {
            let tried = fault.try_on(fleet)?;
            say(&format!("fault {}", tried.to_json()));
            seen.faults.push(tried);
        }
    }
    Ok(())
}

/// Runs a plan to its end with people at the gates, while `interfere` does what it does.
fn deploy(
    fleet: &Fleet,
    plan: &Path,
    release: &str,
    interfere: impl FnOnce(&str) -> Result<()>,
) -> Result<Value> {
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
    let (document, interfered) = thread::scope(|scope| {
        let answers = scope.spawn(|| {
            answer_gates(&people, &rollout, wait::ROLLOUT, |person, gate| {
                say(&format!(
                    "  {} decides at gate {} of phase `{}`",
                    person.name, gate.at, gate.phase
                ));
            })
        });
        let interfered = interfere(&rollout);
        let document = answers.join().expect("nobody at the gates panics");
        (document, interfered)
    });
    let document = document?;
    for line in timeline(&document) {
        say(&format!("  {line}"));
    }
    interfered?;
    Ok(document)
}

/// Prints the units of a pattern.
const LIST: &str = "systemctl list-units --plain --no-legend \"$0\"";

/// The same, and stops their processes where they are, a moment after they began: a step may take
/// no longer than the next look at it.
const FREEZE: &str = "units=$(systemctl list-units --plain --no-legend \"$0\")
    [ -z \"$units\" ] || { sleep 0.3; systemctl kill --kill-whom=all --signal=STOP -- \"$0\"; }
    echo \"$units\"";

/// Waits until systemd runs the first attempt at an action; where, and its unit.
fn under_way(
    fleet: &Fleet,
    rollout: &str,
    action: &str,
    look: &str,
) -> Result<(&'static str, String)> {
    let document = fleet.operator(cluster::REQUESTER).rollout(rollout)?;
    let step = steps(&document).find(|(_, step)| text(&step["action"]) == action);
    let (_, step) = step.context("the plan has this action")?;
    let pattern = format!("lockstep-step-{rollout}.{}.do.1*", text(&step["at"]));
    let look = ["sh", "-c", look, &pattern];
    wait::until(&format!("a unit {pattern}"), wait::ROLLOUT, || {
        // All at once: some steps take no longer than a second.
        thread::scope(|scope| {
            let asked = HOSTS.map(|(host, _)| (host, scope.spawn(move || fleet.on(host, &look))));
            for (host, units) in asked {
                let units = units.join().expect("nobody who asks panics");
                let units = units.map_err(|error| format!("{error:#}"))?;
                if let Some(unit) = units.split_whitespace().next() {
                    return Ok((host, unit.to_owned()));
                }
            }
            Err("none on any host".to_owned())
        })
    })
}

/// Kills a step in the middle of it; systemd ends what its main process has started. Its unit shows
/// no secret.
fn kill_step(fleet: &Fleet, rollout: &str, action: &str) -> Result<()> {
    let (host, unit) = under_way(fleet, rollout, action, FREEZE)?;
    for (other, _) in HOSTS.iter().filter(|(other, _)| *other != host) {
        let go_on = [
            "systemctl",
            "kill",
            "--kill-whom=all",
            "--signal=CONT",
            "--",
        ];
        fleet.on(other, &[&go_on[..], &["lockstep-step-*"]].concat())?;
    }
    let properties = fleet.on(host, &["systemctl", "show", "--no-pager", "--", &unit])?;
    ensure!(properties.contains(&unit), "{properties}");
    fleet.holds_no_secret(&unit, &properties)?;
    kill(fleet, host, &unit)
}

/// Kills the controller; systemd starts it again.
fn kill_controller(fleet: &Fleet, rollout: &str) -> Result<()> {
    kill(fleet, CONTROL, "lockstep-controller.service")?;
    wait::until("the controller to answer again", wait::SOON, || {
        let asked = fleet.operator(cluster::REQUESTER).rollout(rollout);
        asked.map(drop).map_err(|error| format!("{error:#}"))
    })
}

/// Kills the daemon of the host that does an action; systemd starts it again.
fn kill_agent(fleet: &Fleet, rollout: &str, action: &str) -> Result<()> {
    let (host, _) = under_way(fleet, rollout, action, LIST)?;
    kill(fleet, host, "lockstep-agent.service")
}

/// Kills the main process of a unit.
fn kill(fleet: &Fleet, host: &str, unit: &str) -> Result<()> {
    fleet.kill(host, unit)?;
    say(&format!("  killed {unit} on {host}"));
    Ok(())
}

/// Holds the application's own record of v0.9.5 and v1.0.0 against the promise (INV-1).
fn each_effect_once(fleet: &Fleet, evidence: &Path) -> Result<()> {
    let mut migrations = vec![];
    for (name, _) in HOSTS.iter().filter(|(_, role)| *role == "app") {
        let ledger = |which: &str| {
            // One host of all migrates; the others have no such file.
            let find = ["find", "/var/log/employee-system", "-name", which];
            let lines = fleet.on(name, &[&find[..], &["-exec", "cat", "{}", "+"]].concat())?;
            let kept = evidence.join(format!("v1.0.0.{name}.{which}"));
            fs::write(&kept, lines)?;
            anyhow::Ok(example::ledger(&kept))
        };
        let effects = ledger("effects")?;
        ensure!(
            effects == ["start 0.9.5", "stop 0.9.5", "start 1.0.0"],
            "the application's record on {name}: {effects:?}"
        );
        migrations.extend(ledger("migrations")?);
    }
    ensure!(
        migrations == ["upgrade 0001_base", "upgrade 0002_extended_fields"],
        "the migrations' record: {migrations:?}"
    );
    Ok(())
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
        fleet.holds_no_secret(&format!("the report as {format}"), &said.stdout)?;
        fs::write(evidence.join(format!("{release}.{format}")), said.stdout)?;
    }
    Ok(())
}

fn say(text: &str) {
    println!("fleet: {text}");
}
