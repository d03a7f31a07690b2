//! Both releases at work together, in the middle of an upgrade.

use std::fs;

use anyhow::{Result, ensure};

use super::{Releases, Story, out_and_back};
use crate::cluster::Cluster;
use crate::example::ledger;
use crate::operator::{Operator, text};
use crate::story::under_way;
use crate::wait;

/// The last three take minutes each, with builds and migrations in them.
pub(super) const ALL: [Story; 4] = [
    Story {
        name: "quick: an agent killed and upgraded in the middle of a step that is never repeated",
        run: blind_step,
    },
    Story {
        name: "old agents, new controller: upgraded in good order in the middle of a build",
        run: controller_first,
    },
    Story {
        name: "new agents, old controller: each one upgraded in the middle of its step",
        run: agents_first,
    },
    Story {
        name: "mixed agents: the controller killed and upgraded in the middle of a migration, an \
               agent in the middle of the rollback",
        run: mixed,
    },
];

fn controller_first(releases: &Releases) -> Result<Vec<String>> {
    let mut cluster = Cluster::builder()
        .binaries(&releases.old.binaries)
        .start()?;
    // People at the gates keep the old command line meanwhile, and get the new one after.
    let upgrade =
        |cluster: &mut Cluster, releases: &Releases, watcher: &Operator, rollout: &str| {
            under_way(watcher, rollout, "release.build", None);
            let code = cluster.stop_controller();
            ensure!(code == Some(0), "the old controller ended with {code:?}");
            cluster.install_controller(&releases.new.lockstep);
            cluster.start_controller()
        };
    let people = |cluster: &mut Cluster, releases: &Releases| {
        cluster.install_cli(&releases.new.lockstep);
        Ok(())
    };
    out_and_back(&mut cluster, releases, upgrade, people, None)?;
    runs(&cluster, "the controller", &releases.new.lockstep)?;
    super::refusals::controller_goes_back(&mut cluster, releases)
}

fn agents_first(releases: &Releases) -> Result<Vec<String>> {
    let mut cluster = Cluster::builder()
        .binaries(&releases.old.binaries)
        .start()?;
    let upgrade =
        |cluster: &mut Cluster, releases: &Releases, watcher: &Operator, rollout: &str| {
            let agent = &releases.new.agent;
            under_way(watcher, rollout, "release.build", Some("app-1"));
            let host = cluster.host_mut("app-1");
            host.kill_agent();
            host.install(agent);
            host.start_agent()?;
            under_way(watcher, rollout, "release.build", Some("app-2"));
            let host = cluster.host_mut("app-2");
            host.stop_agent();
            host.install(agent);
            host.start_agent()?;
            under_way(watcher, rollout, "postgres.verify_backup", Some("db-1"));
            let host = cluster.host_mut("db-1");
            host.kill_agent();
            host.install(agent);
            host.start_agent()
        };
    let people = |cluster: &mut Cluster, releases: &Releases| {
        cluster.install_cli(&releases.new.lockstep);
        Ok(())
    };
    out_and_back(&mut cluster, releases, upgrade, people, None)?;
    runs(&cluster, "the controller", &releases.old.binaries.lockstep)?;
    super::refusals::agent_goes_back(&mut cluster, releases)
}

fn mixed(releases: &Releases) -> Result<Vec<String>> {
    let mut cluster = Cluster::builder()
        .binaries(&releases.old.binaries)
        .start()?;
    let host = cluster.host_mut("app-1");
    host.stop_agent();
    host.install(&releases.new.agent);
    host.start_agent()?;
    cluster.wait_connected(&["app-1".to_owned()])?;
    let upgrade =
        |cluster: &mut Cluster, releases: &Releases, watcher: &Operator, rollout: &str| {
            under_way(watcher, rollout, "migration.apply", None);
            cluster.kill_controller();
            cluster.install_controller(&releases.new.lockstep);
            cluster.start_controller()
        };
    let back = |cluster: &mut Cluster, releases: &Releases, watcher: &Operator, rollout: &str| {
        wait::until("the rollback to begin", wait::ROLLOUT, || {
            let document = watcher.rollout(rollout);
            let document = document.map_err(|error| format!("{error:#}"))?;
            let begun = document["rollback"]["started"].is_u64();
            let state = text(&document["state"]).to_owned();
            begun.then_some(()).ok_or(state)
        })?;
        let host = cluster.host_mut("app-2");
        host.kill_agent();
        host.install(&releases.new.agent);
        host.start_agent()
    };
    out_and_back(&mut cluster, releases, upgrade, |_, _| Ok(()), Some(back))?;
    runs(&cluster, "the controller", &releases.new.lockstep)?;
    Ok(vec![])
}

/// The new agent finds the old one's step, waits for it, and reads what it left.
fn blind_step(releases: &Releases) -> Result<Vec<String>> {
    const WORK: &str = "import sys, time\nnote = open(sys.argv[1], 'a')\n\
        print('begin', 1, file=note, flush=True)\ntime.sleep(4)\n\
        print('done', 1, file=note, flush=True)\n";
    let policy = "[[allow]]\naction = \"exec.run\"\nwhere = { argv = [[\"python3\", \"**\"]] }\n";
    let mut cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some(policy))
        .binaries(&releases.old.binaries)
        .start()?;
    let effects = cluster.host("app-1").effects();
    let (work, plan) = (
        cluster.root().join("work.py"),
        cluster.root().join("plan.yaml"),
    );
    fs::write(&work, WORK)?;
    let argv = format!("[python3, {}, {}]", work.display(), effects.display());
    let text_of_plan = format!(
        "version: 1\nplan: blind\nfleet: {{app: {{labels: {{role: app}}}}}}\nphases:\n  \
         - name: work\n    on: app\n    steps:\n      - exec.run: {{name: work, argv: {argv}}}\n"
    );
    fs::write(&plan, text_of_plan)?;
    let watcher = cluster.requester();
    let rollout = watcher.submit(&plan, &[])?;
    wait::until_true("the work to begin", wait::SOON, || {
        !ledger(&effects).is_empty()
    })?;
    let host = cluster.host_mut("app-1");
    host.kill_agent();
    host.install(&releases.new.agent);
    host.start_agent()?;
    let noted = ledger(&effects);
    ensure!(
        noted == ["begin 1"],
        "the step was over too soon: {noted:?}"
    );
    let document = watcher.wait(&rollout, wait::SOON)?;
    let state = text(&document["state"]);
    ensure!(state == "succeeded", "{}", cluster.explain(&document));
    let noted = ledger(&effects);
    ensure!(
        noted == ["begin 1", "done 1"],
        "the host's record: {noted:?}"
    );
    Ok(vec![])
}

/// The process is of that release: a story that forgot to upgrade would show nothing.
fn runs(cluster: &Cluster, what: &str, binary: &std::path::Path) -> Result<()> {
    let pid = cluster
        .controller_pid()
        .map_or(0, |pid| pid.as_raw_nonzero().get());
    let runs = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        runs == binary.canonicalize()?,
        "{what} is {}",
        runs.display()
    );
    Ok(())
}
