//! A whole rollout: 6 phases of 5 steps, each phase a barrier, each host going on by itself within
//! one; beside it, as many rounds of the bare fan-out.

use std::time::Instant;

use anyhow::Result;

use crate::dial::Place;
use crate::journal::{self, Before};
use crate::person::Person;
use crate::plans;
use crate::process::running;
use crate::report::{Report, median};
use crate::side::Side;

pub(crate) const PHASES: usize = 6;
pub(crate) const STEPS: usize = 5;

/// Returns the agents, and the least processor time of the controller in seconds: of a large fleet
/// there is only one.
pub(crate) fn measure(report: &mut Report, agents: usize) -> Result<(f64, f64)> {
    let turns = if agents > 1000 { 1 } else { 3 };
    let cluster = crate::controller()?;
    let place = Place::of(&cluster);
    let mut bare = Side::bare(&place, agents)?;
    let real = Side::real(cluster, agents)?;
    let person = Person::new(&place)?;

    let (empty, idle) = (journal::bytes(&real.controller)?, real.used()?);
    let orders = PHASES * STEPS * agents * turns;
    let (mut reals, mut real_cpu, mut bares, mut bare_cpu) = (vec![], vec![], vec![], vec![]);
    for turn in 0..turns {
        let before = running(bare.pid)?;
        let rounds = bare.rounds(PHASES * STEPS)?;
        bares.push(rounds.iter().sum::<f64>() / 1000.0);
        bare_cpu.push(running(bare.pid)? - before);

        let before = running(real.pid)?;
        let begun = Instant::now();
        let rollout = plans::submit(&real.controller, &format!("whole-{turn}"), PHASES, STEPS)?;
        person.succeeded(&rollout)?;
        reals.push(begun.elapsed().as_secs_f64());
        real_cpu.push(running(real.pid)? - before);
    }
    drop(bare);
    let grown = real.used()?.memory.saturating_sub(idle.memory);

    let name = |what: &str| format!("{agents} agents: {PHASES} phases, 30 steps: {what}");
    report.beside(
        name("submit to success"),
        median(&reals),
        "s",
        median(&bares),
        None,
    );
    report.beside(
        name("CPU of the controller"),
        median(&real_cpu),
        "s",
        median(&bare_cpu),
        None,
    );
    report.value(
        name("memory of the controller for each order"),
        grown as f64 / orders as f64,
        "B",
    );
    let before = Before { empty, orders };
    journal::measure(report, real, &before)?;
    Ok((agents as f64, least(&real_cpu)))
}

/// The least of some values; infinite if there is none.
pub(crate) fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}
