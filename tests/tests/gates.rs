//! What a gate does to others while it waits, and how two people pass it in an emergency: over real
//! processes.

use std::fs;
use std::path::Path;
use std::process::Command;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::{Operator, Said, attempts, text};
use lockstep_tests::story::{effect, run_plan};
use lockstep_tests::wait;
use serde_json::Value;

/// A plan that looks, perhaps asks a DBA, and leaves an effect.
fn plan(name: &str, gate: &str) -> String {
    format!(
        "version: 1\nplan: {name}\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
         - name: look\n    on: app\n    steps:\n      - check.disk: {{path: /, free: 1B}}\n{gate}  \
         - name: work\n    on: app\n    steps:\n{}",
        effect(name, 0)
    )
}

fn gate(lock: &str) -> String {
    format!(
        "  - name: approve\n    steps:\n      - gate.approval: {{from: {{dba: 1}}, timeout: 5m, \
         lock: {lock}}}\n"
    )
}

fn submit(cluster: &Cluster, name: &str, plan: &str) -> String {
    let file = cluster.root().join(format!("{name}.yaml"));
    fs::write(&file, plan).unwrap();
    cluster.requester().submit(&file, &[]).unwrap()
}

/// The open gate of a rollout.
fn at_the_gate(cluster: &Cluster, rollout: &str) -> String {
    let gate = wait::until("the gate to be open", wait::SOON, || {
        let gates = cluster.requester().open_gates(rollout);
        let gates = gates.map_err(|error| format!("{error:#}"))?;
        gates.into_iter().next().ok_or_else(|| "no gate".to_owned())
    });
    gate.unwrap().at
}

fn run_well(operator: &Operator, arguments: &[&str]) -> Said {
    let said = operator.run(arguments).unwrap();
    assert_eq!(said.code, 0, "{arguments:?}: {}", said.text());
    said
}

fn effects(cluster: &Cluster, host: &str) -> String {
    fs::read_to_string(cluster.host(host).effects()).unwrap_or_default()
}

/// A journal's records, as auditors read them.
fn exported(binary: &Path, arguments: &[&str]) -> Vec<Value> {
    let output = Command::new(binary)
        .args(["audit", "export"])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(serde_json::from_str);
    let lines: Vec<Value> = lines.collect::<Result<_, _>>().unwrap();
    lines
        .into_iter()
        .map(|mut line| line["record"].take())
        .collect()
}

#[test]
fn hosts_are_free_for_others_while_people_decide() {
    let mut cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some("[[allow]]\naction = \"*\"\n"))
        .start()
        .unwrap();
    let rollout = submit(&cluster, "first", &plan("first", &gate("release")));
    let gate = at_the_gate(&cluster, &rollout);
    // Another rollout has the host meanwhile, from its beginning to its end.
    let other = run_plan(&cluster, &plan("second", ""));
    assert_eq!(
        text(&other["state"]),
        "succeeded",
        "{}",
        cluster.explain(&other)
    );
    run_well(
        &cluster.operator("bob"),
        &["approve", &rollout, "--gate", &gate, "--yes"],
    );
    let ended = cluster.requester().wait(&rollout, wait::ROLLOUT).unwrap();
    assert_eq!(
        text(&ended["state"]),
        "succeeded",
        "{}",
        cluster.explain(&ended)
    );
    assert_eq!(effects(&cluster, "app-1"), "second\nfirst\n");
    let looked = attempts(&ended, "check.disk");
    assert_eq!(looked.len(), 2, "it looked again: {ended}");
    assert_eq!(looked[0]["stale"], true);
    cluster.host_mut("app-1").stop_agent();
    let config = cluster.host("app-1").config();
    let records = exported(
        &cluster.binaries().agent,
        &["--config", config.to_str().unwrap()],
    );
    let freed = records.iter().map(|record| &record["released"]);
    let freed = freed.filter(|it| it["comes_back"] == true);
    assert_eq!(freed.count(), 1, "{records:#?}");
}

/// Makes somebody's key; its public half.
fn make_key(path: &Path, name: &str) -> String {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
        .arg(path)
        .status()
        .unwrap();
    assert!(made.success());
    let line = fs::read_to_string(path.with_extension("pub")).unwrap();
    line.trim().to_owned()
}

#[test]
fn two_people_break_the_glass_where_controller_and_host_name_them() {
    let keys = tempfile::tempdir().unwrap();
    let key = |name: &str| keys.path().join(name);
    let people = ["ira", "joe"].map(|name| {
        let line = make_key(&key(name), name);
        format!("[[break_glass]]\nname = \"{name}\"\nkey = \"{line}\"\n")
    });
    let policy = format!(
        "approvals = \"signed\"\n{}[[allow]]\naction = \"*\"\n",
        people.concat()
    );
    let mut cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some(&policy))
        .start()
        .unwrap();
    let group = ["--role", "approver", "--group", "incident"];
    let [ira, joe] = ["ira", "joe"].map(|name| cluster.person(name, &group).unwrap());
    let asked = |cluster: &Cluster, name: &str| submit(cluster, name, &plan(name, &gate("hold")));
    let broken = ["--reason", "the shop is down", "--yes"];

    // Nobody has said who may.
    let rollout = asked(&cluster, "nobody");
    at_the_gate(&cluster, &rollout);
    let said = ira
        .run(&[&["break-glass", &rollout], &broken[..]].concat())
        .unwrap();
    assert_ne!(said.code, 0);
    assert!(said.stderr.contains("[break_glass]"), "{}", said.text());
    run_well(&cluster.requester(), &["cancel", &rollout, "--reason", "x"]);

    assert_eq!(cluster.stop_controller(), Some(0));
    let config = cluster.root().join("controller/controller.toml");
    let written = fs::read_to_string(&config).unwrap();
    fs::write(&config, written + "\n[break_glass]\ngroup = \"incident\"\n").unwrap();
    cluster.start_controller().unwrap();
    cluster.wait_connected(&["app-1".to_owned()]).unwrap();
    // By the controller's word alone the host goes on with nothing.
    let rollout = asked(&cluster, "told");
    at_the_gate(&cluster, &rollout);
    for person in [&ira, &joe] {
        run_well(person, &[&["break-glass", &rollout], &broken[..]].concat());
    }
    let ended = cluster.requester().wait(&rollout, wait::ROLLOUT).unwrap();
    assert_ne!(text(&ended["state"]), "succeeded");
    assert!(ended.to_string().contains("too few"), "{ended}");
    assert_eq!(effects(&cluster, "app-1"), "");

    let rollout = asked(&cluster, "signed");
    let gate = at_the_gate(&cluster, &rollout);
    let document = cluster.requester().rollout(&rollout).unwrap();
    let evidence = text(&document["phases"][1]["steps"][0]["gate"]["evidence"]);
    for (person, name) in [(&ira, "ira"), (&joe, "joe")] {
        let key = key(name);
        let sign = ["--sign", key.to_str().unwrap()];
        let word = [&["break-glass", &rollout], &broken[..], &sign].concat();
        let said = person.run(&word).unwrap();
        assert_eq!(said.code, 2, "{}", said.text());
        let meant = ["--gate", &gate, "--evidence", evidence];
        let said = run_well(person, &[&word[..], &meant].concat());
        assert!(said.stderr.contains("BREAK-GLASS"), "{}", said.text());
    }
    let ended = cluster.requester().wait(&rollout, wait::ROLLOUT).unwrap();
    assert_eq!(
        text(&ended["state"]),
        "succeeded",
        "{}",
        cluster.explain(&ended)
    );
    assert_eq!(effects(&cluster, "app-1"), "signed\n");
    for command in ["status", "report"] {
        let said = run_well(&cluster.requester(), &[command, &rollout]);
        let loud = said.stdout.matches("BREAK-GLASS").count();
        assert!(loud >= 2, "{command}: {}", said.text());
    }
    assert_eq!(cluster.stop_controller(), Some(0));
    let state = cluster.root().join("controller/state");
    let records = exported(
        &cluster.binaries().lockstep,
        &["--dir", state.to_str().unwrap()],
    );
    let broken = records.iter().map(|record| &record["glass_broken"]);
    let broken: Vec<&Value> = broken.filter(|it| it["rollout"] == *rollout).collect();
    assert_eq!(broken.len(), 2, "{records:#?}");
    for word in broken {
        let holds = word["until"].as_u64().unwrap();
        assert!(holds > 0 && word["reason"] == "the shop is down", "{word}");
    }
}
