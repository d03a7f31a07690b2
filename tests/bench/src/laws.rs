//! How costs grow: a power law through what was measured, by least squares of the logarithms. An
//! exponent of 1 is a straight line; what is clearly above it becomes too dear for a larger fleet.

use anyhow::Result;
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::fanout::Cost;
use crate::person::Person;
use crate::process::running;
use crate::report::Report;
use crate::rollout::{PHASES, least};
use crate::side::Side;
use crate::{history, plans, rollout};

const AGENTS: usize = 300;

/// Steps in each of the phases.
const STEPS: [usize; 4] = [1, 2, rollout::STEPS, 10];

/// Those of the rollouts that are measured at every size.
const WHOLE: usize = PHASES * rollout::STEPS;

/// Each of those so many times; the least counts, for whatever disturbs it only adds.
const TIMES: usize = 3;

/// The most that an exponent may be.
pub(crate) const MOST: f64 = 1.1;

/// From what the fan-outs cost, what whole rollouts cost by their agents, and a fleet of its own.
pub(crate) fn measure(
    report: &mut Report,
    costs: &[Cost],
    rollouts: &[(f64, f64)],
    quick: bool,
) -> Result<()> {
    let against = |of: fn(&Cost) -> f64| {
        let points: Vec<_> = costs
            .iter()
            .map(|cost| (cost.agents as f64, of(cost)))
            .collect();
        exponent(&points)
    };
    let name = |what: &str| format!("exponent: {what}");
    let agents = [
        ("fan-out, by agents", against(|cost| cost.wall)),
        (
            "its CPU at the controller, by agents",
            against(|cost| cost.cpu),
        ),
        (
            "memory of the controller, by agents",
            against(|cost| cost.memory),
        ),
    ];
    // Without fan-outs in this run there is nothing to say of them.
    for (what, exponent) in agents.into_iter().filter(|_| costs.len() > 1) {
        report.bounded(name(what), exponent, "", Some(MOST));
    }
    if costs.len() > 1 {
        // The machine's caches and its kernel make the bare one's grow, too.
        let bare = against(|cost| cost.bare_cpu);
        report.value(name("CPU of the bare fan-out, by agents"), bare, "");
    }

    let side = Side::real(crate::controller()?, AGENTS)?;
    let costs = by_steps(&side)?;
    let what = format!("rollout's CPU at the controller, by steps ({AGENTS} agents)");
    report.bounded(name(&what), exponent(&costs), "", Some(MOST));
    let whole = STEPS.iter().position(|steps| steps * PHASES == WHOLE);
    let own = whole.map(|at| (AGENTS as f64, costs[at].1));
    let by_agents: Vec<_> = own.into_iter().chain(rollouts.iter().copied()).collect();
    if by_agents.len() > 1 {
        let what = format!("rollout's CPU at the controller, by agents ({WHOLE} steps)");
        report.bounded(name(&what), exponent(&by_agents), "", Some(MOST));
    }
    history::measure(report, AGENTS, quick)
}

/// The least processor time of the controller for a rollout, in seconds, by steps.
fn by_steps(side: &Side<Cluster>) -> Result<Vec<(f64, f64)>> {
    let person = Person::new(&Place::of(&side.controller))?;
    let mut costs = vec![];
    for steps in STEPS {
        let mut took = vec![];
        for time in 0..TIMES {
            let before = running(side.pid)?;
            let name = format!("steps-{steps}-{time}");
            let rollout = plans::submit(&side.controller, &name, PHASES, steps)?;
            person.succeeded(&rollout)?;
            took.push(running(side.pid)? - before);
        }
        costs.push(((PHASES * steps) as f64, least(&took)));
    }
    Ok(costs)
}

/// The exponent of the power law that comes closest to these points; not a number for fewer than
/// two of them. What costs nothing that could be measured says nothing.
pub(crate) fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs = points
        .iter()
        .filter(|(size, cost)| *size > 0.0 && *cost > 0.0);
    let logs: Vec<_> = logs.map(|(size, cost)| (size.ln(), cost.ln())).collect();
    let count = logs.len() as f64;
    let middle = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (size, cost) = (middle(|log| log.0), middle(|log| log.1));
    let both = logs.iter().map(|log| (log.0 - size) * (log.1 - cost));
    let alone = logs.iter().map(|log| (log.0 - size).powi(2));
    both.sum::<f64>() / alone.sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::exponent;

    #[test]
    fn a_power_law_is_found_again() {
        let law = |size: f64| (size, 3.0 * size.powf(1.5));
        let found = exponent(&[law(100.0), law(1000.0), law(10_000.0), (0.0, 7.0)]);
        assert!((found - 1.5).abs() < 1e-9, "{found}");
        assert!(exponent(&[law(100.0)]).is_nan());
    }
}
