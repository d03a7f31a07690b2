//! One real agent among the simulated: the same orders, and what the load leaves out. A step process
//! runs, and everything is written and synced on its host's side too.

use std::fmt::Write as _;
use std::fs;
use std::thread;

use anyhow::{Result, anyhow, bail, ensure};
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::load::Said;
use crate::person::Person;
use crate::real::binaries;
use crate::report::{Report, median};
use crate::side::{Side, ms};

/// Its name and its role: plans for the simulated alone leave it out.
const REAL: &str = "real";

/// The first one begins with consent and the plan's way to every agent, and does not count.
const PHASES: usize = 21;

/// After each phase, in microseconds for each agent.
const REST_US: usize = 100;

/// A controller with the real agent.
pub(crate) fn cluster() -> Result<Cluster> {
    Cluster::builder()
        .without_database()
        .binaries(&binaries()?)
        .hosts(&[(REAL, REAL)])
        .policy(REAL, Some(""))
        .start()
}

/// How long its orders take, and from the first order of a phase until a person is told of the phase's
/// first result, which is durable then.
pub(crate) fn measure(report: &mut Report, side: &mut Side<&mut Cluster>) -> Result<()> {
    let person = Person::new(&Place::of(side.controller))?;
    let rollout = submit(side.controller, REST_US * side.agents / 1000)?;
    let watched = rollout.clone();
    let watching = thread::spawn(move || person.watches(&watched, REAL));
    let orders = orders(side)?;
    let told = watching.join();
    let told = told.map_err(|_| anyhow!("whoever watched has panicked"))??;
    let seen = [told.first.len(), told.own.len()];
    ensure!(seen == [PHASES; 2], "{seen:?} of {PHASES} results");
    Person::new(&Place::of(side.controller))?.succeeded(&rollout)?;
    let first = orders.iter().zip(&told.first).skip(1);
    let first: Vec<f64> = first
        .map(|(from, told)| ms(told.saturating_sub(*from)))
        .collect();
    let name = |what: &str| format!("{} agents: {what}", side.agents);
    let what = "first order until a person knows its first result";
    report.value(name(what), median(&first), "ms");
    let what = "the real one among them: its result durable after";
    report.value(name(what), median(&told.own[1..]), "ms");
    Ok(())
}

/// When the first order of each phase came.
fn orders(side: &mut Side<&mut Cluster>) -> Result<Vec<u64>> {
    let mut first = vec![];
    while first.len() < PHASES {
        let Said::Round { orders, .. } = side.load.next()? else {
            bail!("the load does not tell of a round");
        };
        first.push(orders[0]);
    }
    Ok(first)
}

/// One step in each phase, for all of them, and a rest of so many milliseconds after it.
fn submit(cluster: &Cluster, rest: usize) -> Result<String> {
    let mut plan = format!(
        "version: 1\nplan: control\nfleet:\n  app: {{labels: {{role: app}}}}\n  \
         real: {{labels: {{role: {REAL}}}}}\ndeadline: 1h\nphases:\n"
    );
    for phase in 0..PHASES {
        // Whoever watches is told of everything, and has seen it by then.
        if phase > 0 {
            writeln!(
                plan,
                "  - name: rest-{phase}\n    steps:\n      - gate.wait: {{for: {rest}ms}}"
            )?;
        }
        writeln!(
            plan,
            "  - name: round-{phase}\n    on: [app, real]\n    steps:\n      \
             - check.disk: {{path: /, free: 1B}}"
        )?;
    }
    let path = cluster.root().join("control.yaml");
    fs::write(&path, plan)?;
    cluster.requester().submit(&path, &[])
}
