//! One real agent among the simulated: the same orders, and what the load leaves out. A step process
//! runs, and everything is written and synced on its host's side too.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::{list, steps};

use crate::dial::Place;
use crate::load::Said;
use crate::person::Person;
use crate::real::binaries;
use crate::report::{Report, median};
use crate::side::Side;

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
    for _ in 0..PHASES {
        let Said::Round { .. } = side.load.next()? else {
            bail!("the load does not tell of a round");
        };
    }
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
