//! Kill anything in the middle of a rollout: it ends as if nothing had happened, and the
//! application's own record shows each effect once (INV-1, INV-2).

use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::example::ledger;
use lockstep_tests::operator::{Operator, answer_gates, text};
use lockstep_tests::story::{submit, under_way};
use lockstep_tests::wait;

/// A moment in which the one that was killed is missed.
const AWAY: Duration = Duration::from_millis(1500);

/// Deploys v1.0.0 while `interfere` does what it does, and holds the end against the promise.
fn deploy_while(interfere: impl FnOnce(&mut Cluster, &Operator, &str)) {
    let mut cluster = Cluster::builder().start().unwrap();
    cluster.install().unwrap();
    let rollout = submit(&cluster, "v1.0.0");
    let people = cluster.approvers();
    let watcher = cluster.requester();
    let document = std::thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let people: Vec<&Operator> = people.iter().collect();
            answer_gates(&people, &rollout, wait::ROLLOUT, |_, _| {})
        });
        interfere(&mut cluster, &watcher, &rollout);
        answers.join().expect("nobody at the gates panics")
    });
    let document = document.unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.last_words()));
    assert_eq!(
        text(&document["state"]),
        "succeeded",
        "{}",
        cluster.explain(&document)
    );

    let mut migrations = vec![];
    for host in cluster.app_hosts() {
        assert_eq!(host.release(), "v1.0.0");
        assert_eq!(
            ledger(&host.effects()),
            ["start 0.9.5", "stop 0.9.5", "start 1.0.0"]
        );
        migrations.extend(ledger(&host.migrations()));
    }
    assert_eq!(
        migrations,
        ["upgrade 0001_base", "upgrade 0002_extended_fields"]
    );
}

#[test]
fn a_controller_that_is_killed_goes_on_where_it_was() {
    deploy_while(|cluster, watcher, rollout| {
        for action in ["release.build", "migration.apply"] {
            under_way(watcher, rollout, action, None);
            cluster.kill_controller();
            std::thread::sleep(AWAY);
            cluster.start_controller().unwrap();
        }
    });
}

#[test]
fn an_agent_that_is_killed_finds_what_its_steps_did() {
    deploy_while(|cluster, watcher, rollout| {
        for action in ["postgres.verify_backup", "release.build", "migration.apply"] {
            let host = under_way(watcher, rollout, action, None);
            cluster.host_mut(&host).kill_agent();
            std::thread::sleep(AWAY);
            cluster.host_mut(&host).start_agent().unwrap();
        }
    });
}

#[test]
fn a_step_process_that_is_killed_is_settled_by_what_the_host_shows() {
    deploy_while(|cluster, watcher, rollout| {
        for action in ["release.build", "migration.apply"] {
            let host = under_way(watcher, rollout, action, None);
            wait::until("a step process to kill", wait::SOON, || {
                cluster
                    .host(&host)
                    .kill_step_process()
                    .map_err(|error| error.to_string())
            })
            .unwrap();
        }
    });
}
