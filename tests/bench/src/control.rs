//! One real agent among the simulated: the same orders, and what the load leaves out. A step process
//! runs, and everything is written and synced on its host's side too.

use std::fmt::Write as _;
use std::fs;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::{list, steps};

use crate::dial::Place;
use crate::load::Said;
use crate::person::Person;
use crate::real::binaries;
use crate::report::{Report, median};
use crate::side::{Side, ms};

/// Its name and its role: plans for the simulated alone leave it out.
const REAL: &str = "real";

const PHASES: usize = 5;

/// A controller with the real agent.
pub(crate) fn cluster() -> Result<Cluster> {
    Cluster::builder()
        .without_database()
        .binaries(&binaries()?)
        .hosts(&[(REAL, REAL)])
        .policy(REAL, Some(""))
        .start()
}

pub(crate) fn measure(report: &mut Report, side: &mut Side<&mut Cluster>) -> Result<()> {
    let rollout = submit(side.controller)?;
    orders(side)?;
    Person::new(&Place::of(side.controller))?.succeeded(&rollout)?;
    let document = side.controller.requester().rollout(&rollout)?;
    let mut took = vec![];
    // The first phase begins with consent and the plan's way to every agent.
    for (_, step) in steps(&document).skip(1) {
        let own = list(&step["attempts"]).find(|attempt| attempt["host"] == REAL);
        let own = own.context("the real agent took no part")?;
        ensure!(own["outcome"] == "ok", "the real agent: {own}");
        let at = |name: &str| own[name].as_u64().context("a time");
        took.push((at("finished")? - at("ordered")?) as f64);
    }
    let name = format!(
        "{} agents: the real one among them: its result durable after",
        side.agents
    );
    report.value(name, median(&took), "ms");
    Ok(())
}

/// From the first order of a phase until a person is told of its first result, which is durable then.
/// Apart from what else is measured: whoever watches is told of everything.
pub(crate) fn first_result(report: &mut Report, side: &mut Side<&mut Cluster>) -> Result<()> {
    let person = Person::new(&Place::of(side.controller))?;
    let rollout = submit(side.controller)?;
    let watching = thread::spawn(move || person.first_results(&rollout));
    let orders = orders(side)?;
    let told = watching.join();
    let told = told.map_err(|_| anyhow!("whoever watched has panicked"))??;
    ensure!(told.len() == PHASES, "{} first results", told.len());
    // The first phase begins with the plan's way to every agent.
    let took = orders.iter().zip(&told).skip(1);
    let took: Vec<f64> = took
        .map(|(from, told)| ms(told.saturating_sub(*from)))
        .collect();
    let name = format!(
        "{} agents: first order until a person knows its first result",
        side.agents
    );
    report.value(name, median(&took), "ms");
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

/// One step in each phase, for all of them.
fn submit(cluster: &Cluster) -> Result<String> {
    let mut plan = format!(
        "version: 1\nplan: control\nfleet:\n  app: {{labels: {{role: app}}}}\n  \
         real: {{labels: {{role: {REAL}}}}}\ndeadline: 1h\nphases:\n"
    );
    for phase in 0..PHASES {
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
