//! Dead agents: a process with a tenth of the fleet is stopped in the middle of its life. Its
//! connections stay open, as those of a machine that hangs; nothing answers on them any more.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::dial::Place;
use crate::load::{Load, Said};
use crate::person::Person;
use crate::process::Part;
use crate::report::Report;
use crate::side::connected;

/// Between two looks at the list of hosts. With 10,000 of them it is long.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What is allowed, in seconds, whatever the fleet's size.
const WITHIN: f64 = 15.0;

/// When nobody looks any more.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) fn measure(report: &mut Report, agents: usize) -> Result<()> {
    let cluster = crate::controller()?;
    let place = Place::of(&cluster);
    let dying = agents / 10;
    let most = Load::of(&place, agents - dying, false);
    let few = Load {
        agents: dying,
        first: most.agents,
        ..most.clone()
    };
    let mut fleet: Vec<Part<Said>> = vec![];
    for load in [&most, &few] {
        let mut part = Part::start("load", load)?;
        part.tell("connect")?;
        connected(&mut part)?;
        fleet.push(part);
    }
    let person = Person::new(&place)?;
    let seen = look(&person, &most)?;
    ensure!(
        seen == Gone::default(),
        "{seen:?} before anything has happened"
    );

    let stopped = Pid::from_raw(fleet[1].pid().try_into()?).context("a process has a number")?;
    kill_process(stopped, Signal::STOP)?;
    let begun = Instant::now();
    let (mut first, mut wrongly) = (None, 0);
    let all = loop {
        let seen = look(&person, &most)?;
        let passed = begun.elapsed();
        wrongly = wrongly.max(seen.wrongly);
        if seen.dead > 0 {
            first.get_or_insert(passed);
        }
        if seen.dead == dying {
            break passed;
        }
        ensure!(passed < PATIENCE, "{seen:?} after {passed:?}");
        thread::sleep(LOOK_EVERY);
    };
    kill_process(stopped, Signal::CONT)?;
    let woken = Instant::now();
    while look(&person, &most)?.dead > 0 {
        let passed = woken.elapsed();
        ensure!(
            passed < PATIENCE,
            "not everybody is back {passed:?} after the stop"
        );
        thread::sleep(LOOK_EVERY);
    }

    let name = |what: &str| format!("{agents} agents, {dying} of them stopped: {what}");
    let first = first.unwrap_or(all).as_secs_f64();
    report.value(name("the first is flagged"), first, "s");
    report.bounded(
        name("the last is flagged"),
        all.as_secs_f64(),
        "s",
        Some(WITHIN),
    );
    report.bounded(name("others flagged"), wrongly as f64, "", Some(0.0));
    let back = woken.elapsed().as_secs_f64();
    report.value(name("all are back once it goes on"), back, "s");
    Ok(())
}

/// Hosts that the controller says are not connected.
#[derive(Debug, Default, PartialEq, Eq)]
struct Gone {
    /// Of those that were stopped.
    dead: usize,
    /// Of all others.
    wrongly: usize,
}

fn look(person: &Person, most: &Load) -> Result<Gone> {
    let mut gone = Gone::default();
    for host in person.hosts()? {
        if host.connected {
            continue;
        }
        let lives = (0..most.agents).contains(&number(&host.host)?);
        *(if lives {
            &mut gone.wrongly
        } else {
            &mut gone.dead
        }) += 1;
    }
    Ok(gone)
}

/// An agent's number, from its host's name.
fn number(host: &str) -> Result<usize> {
    let number = host.strip_prefix("sim-").and_then(|n| n.parse().ok());
    number.with_context(|| format!("{host} is none of the fleet"))
}
