//! Agents whose network side is a process of its own: either half may be killed in the middle of a
//! step, and every effect is there once (INV-1).

use std::fs;
use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::text;
use lockstep_tests::story::{effect, under_way};

const HOSTS: [&str; 2] = ["app-1", "app-2"];

fn plan() -> String {
    format!(
        "version: 1\nplan: halves\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
         - name: one\n    on: app\n    steps:\n{}{}{}",
        effect("first", 6),
        effect("second", 6),
        effect("third", 0),
    )
}

#[test]
fn either_half_of_an_agent_may_be_killed_in_the_middle_of_a_step() {
    let mut builder = Cluster::builder()
        .without_database()
        .hosts(&HOSTS.map(|name| (name, "app")));
    for name in HOSTS {
        builder = builder.policy(name, Some("[[allow]]\naction = \"*\"\n"));
    }
    let mut cluster = builder.start().unwrap();
    for name in HOSTS {
        let host = cluster.host_mut(name);
        host.stop_agent();
        host.split();
        host.start_agent().unwrap();
    }
    cluster.wait_connected(&HOSTS.map(str::to_owned)).unwrap();

    let file = cluster.root().join("halves.yaml");
    fs::write(&file, plan()).unwrap();
    let rollout = cluster.requester().submit(&file, &[]).unwrap();
    under_way(&cluster.requester(), &rollout, "exec.run", Some("app-1"));
    cluster.host_mut("app-1").kill_link();
    cluster.host_mut("app-2").kill_agent();
    std::thread::sleep(Duration::from_secs(1));
    cluster.host_mut("app-1").start_link().unwrap();
    // Its link is still there, and finds it.
    cluster.host_mut("app-2").start_agent().unwrap();

    let document = cluster.finish(&rollout).unwrap();
    assert_eq!(
        text(&document["state"]),
        "succeeded",
        "{}",
        cluster.explain(&document)
    );
    for host in cluster.hosts() {
        let effects = fs::read_to_string(host.effects()).unwrap();
        assert_eq!(effects, "first\nsecond\nthird\n", "{}", host.name);
    }
}
