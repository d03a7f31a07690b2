//! Plans whose steps do nothing, on every agent of a load.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;
use lockstep_tests::cluster::Cluster;

/// Submits a plan of so many phases with so many steps each; the rollout's id. A phase is a
/// barrier; within one, each host goes on by itself.
pub(crate) fn submit(cluster: &Cluster, name: &str, phases: usize, steps: usize) -> Result<String> {
    let mut plan = format!(
        "version: 1\nplan: {name}\nfleet:\n  app: {{labels: {{role: app}}}}\n\
         deadline: 1h\nphases:\n"
    );
    for phase in 0..phases {
        writeln!(plan, "  - name: round-{phase}\n    on: app\n    steps:")?;
        for _ in 0..steps {
            writeln!(plan, "      - check.port: {{port: 1}}")?;
        }
    }
    let path = cluster.root().join(format!("{name}.yaml"));
    fs::write(&path, plan)?;
    cluster.requester().submit(&path, &[])
}
