//! People's levers over real agents: what they do to each host, and what they say of it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::{attempts, list, text};
use lockstep_tests::story::under_way;
use lockstep_tests::wait;
use serde_json::Value;

const NAMES: [&str; 3] = ["app-1", "app-2", "app-3"];

/// How long a cancelled rollout may take to be terminal (INV-8).
const TERMINAL: Duration = Duration::from_secs(10);

/// Adds its name to the host's effects, takes as long as the host is told to, and fails if the host
/// is told to.
const WORK: &str = "import os, sys, time; path, name = sys.argv[1:]; \
                    open(path, 'a').write(name + '\\\\n'); \
                    told = lambda what: open(path + what).read() if os.path.exists(path + what) else 0; \
                    time.sleep(float(told('.takes'))); sys.exit(int(told('.fails')))";

fn start() -> Cluster {
    let mut builder = Cluster::builder()
        .without_database()
        .hosts(&NAMES.map(|name| (name, "app")));
    for name in NAMES {
        builder = builder.policy(name, Some("[[allow]]\naction = \"*\"\n"));
    }
    builder.start().unwrap()
}

/// Submits two phases of one command each, on all hosts.
fn submit(cluster: &Cluster) -> String {
    let phase = |name: &str| {
        format!(
            "  - name: {name}\n    on: app\n    steps:\n      - exec.run: {{name: {name}, argv: [python3, -c, \
             \"{WORK}\", \"${{host.effects_file}}\", {name}]}}\n"
        )
    };
    let plan = format!(
        "version: 1\nplan: levers\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n{}{}",
        phase("first"),
        phase("second"),
    );
    let file = cluster.root().join("levers.yaml");
    fs::write(&file, plan).unwrap();
    cluster.requester().submit(&file, &[]).unwrap()
}

/// Tells a host's command what to do.
fn tell(cluster: &Cluster, host: &str, what: &str, value: &str) -> PathBuf {
    let mut path = cluster.host(host).effects().into_os_string();
    path.push(what);
    fs::write(&path, value).unwrap();
    path.into()
}

fn effects(cluster: &Cluster, host: &str) -> String {
    fs::read_to_string(cluster.host(host).effects()).unwrap_or_default()
}

/// Waits until the rollout's document is as wanted.
fn wait_for(cluster: &Cluster, rollout: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let watcher = cluster.requester();
    wait::until(what, wait::SOON, || {
        let document = watcher
            .rollout(rollout)
            .map_err(|error| format!("{error:#}"))?;
        if is(&document) {
            Ok(document)
        } else {
            Err(document.to_string())
        }
    })
    .unwrap()
}

/// What the document says is left on a host.
fn left<'a>(document: &'a Value, host: &str) -> &'a str {
    let row = list(&document["left"]).find(|row| row["host"] == host);
    text(&row.unwrap_or_else(|| panic!("nothing is said of {host}: {document}"))["state"])
}

#[test]
fn only_the_hosts_that_failed_are_asked_again() {
    let cluster = start();
    let requester = cluster.requester();
    for name in NAMES {
        tell(&cluster, name, ".takes", "2");
    }
    let broken = tell(&cluster, "app-2", ".fails", "1");
    let rollout = submit(&cluster);
    under_way(&requester, &rollout, "exec.run", Some("app-2"));
    let said = requester.run(&["pause", &rollout]).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    wait_for(
        &cluster,
        &rollout,
        "all to have ended their first step",
        |document| {
            let all = attempts(document, "exec.run");
            all.len() == NAMES.len() && all.iter().all(|attempt| attempt["outcome"] != "running")
        },
    );

    fs::remove_file(broken).unwrap();
    let said = requester.run(&["resume", &rollout, "--failed"]).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(said.stdout.contains("app-2"), "{}", said.text());
    assert!(!said.stdout.contains("app-1"), "{}", said.text());

    let document = cluster.finish(&rollout).unwrap();
    assert_eq!(
        text(&document["state"]),
        "succeeded",
        "{}",
        cluster.explain(&document)
    );
    assert_eq!(effects(&cluster, "app-1"), "first\nsecond\n");
    assert_eq!(effects(&cluster, "app-2"), "first\nfirst\nsecond\n");
    assert_eq!(effects(&cluster, "app-3"), "first\nsecond\n");
}

#[test]
fn a_cancelled_rollout_says_what_it_left_and_hears_of_it_later() {
    let mut cluster = start();
    let requester = cluster.requester();
    for name in ["app-2", "app-3"] {
        tell(&cluster, name, ".takes", "600");
    }
    let rollout = submit(&cluster);
    wait_for(
        &cluster,
        &rollout,
        "one to be done, two to run",
        |document| {
            let is = |host: &str, outcome: &str| {
                attempts(document, "exec.run")
                    .iter()
                    .any(|attempt| attempt["host"] == host && attempt["outcome"] == outcome)
            };
            is("app-1", "ok") && is("app-2", "running") && is("app-3", "running")
        },
    );
    cluster.host_mut("app-3").kill_agent();

    let said = requester
        .run(&["cancel", &rollout, "--reason", "a test"])
        .unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    let document = requester.wait(&rollout, TERMINAL).unwrap();
    assert_eq!(text(&document["state"]), "cancelled");
    assert_eq!(left(&document, "app-1"), "stopped");
    assert_eq!(left(&document, "app-3"), "unknown");
    wait_for(
        &cluster,
        &rollout,
        "the connected host to stop",
        |document| left(document, "app-2") == "stopped",
    );
    let said = requester.run(&["status", &rollout]).unwrap();
    assert!(
        said.stdout.contains("stopped on 2 of 3 hosts"),
        "{}",
        said.text()
    );
    assert!(said.stdout.contains("  app-3: "), "{}", said.text());
    assert_eq!(cluster.host("app-2").step_processes().len(), 0);
    assert_eq!(
        cluster.host("app-3").step_processes().len(),
        1,
        "nobody told it"
    );

    cluster.host_mut("app-3").start_agent().unwrap();
    wait_for(&cluster, &rollout, "the late host to stop", |document| {
        left(document, "app-3") == "stopped"
    });
    assert_eq!(cluster.host("app-3").step_processes().len(), 0);
    let said = requester.run(&["status", &rollout]).unwrap();
    assert!(
        said.stdout.contains("stopped on 3 of 3 hosts"),
        "{}",
        said.text()
    );
    for name in NAMES {
        assert_eq!(effects(&cluster, name), "first\n", "{name}");
    }
}
