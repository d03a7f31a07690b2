//! Both releases at work together, in the middle of an upgrade.

use anyhow::{Result, ensure};

use super::{Releases, Story, out_and_back};
use crate::cluster::Cluster;
use crate::operator::{Operator, text};
use crate::story::under_way;
use crate::wait;

/// They take some minutes each, with builds and migrations in them.
pub(super) const ALL: [Story; 3] = [
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

/// The process is of that release: a story that forgot to upgrade would show nothing.
fn runs(cluster: &Cluster, what: &str, binary: &std::path::Path) -> Result<()> {
    let pid = cluster
        .controller_pid()
        .map_or(0, |pid| pid.as_raw_nonzero().get());
    let runs = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(
        runs == binary.canonicalize()?,
        "{what} is {}",
        runs.display()
    );
    Ok(())
}
