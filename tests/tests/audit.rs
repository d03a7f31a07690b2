//! Each side keeps heads of the other's journal, so that a journal which is whole by itself and yet
//! another one is found (INV-11).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lockstep_tests::cluster::Cluster;
use lockstep_tests::hosts::Host;
use lockstep_tests::operator::text;
use lockstep_tests::story::run_plan;
use serde_json::Value;

const HOSTS: [&str; 2] = ["app-1", "app-2"];

fn plan(name: &str) -> String {
    format!(
        "version: 1\nplan: {name}\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
         - name: one\n    on: app\n    steps:\n      \
         - exec.run: {{name: work, argv: [\"true\"]}}\n"
    )
}

fn output(binary: &Path, arguments: &[&str]) -> Output {
    Command::new(binary).args(arguments).output().unwrap()
}

fn words(output: &Output) -> String {
    let words = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    words.concat()
}

fn agent(cluster: &Cluster, config: &Path, arguments: &[&str]) -> Output {
    let mut all = vec!["audit"];
    all.extend(arguments);
    all.extend(["--config", config.to_str().unwrap()]);
    output(&cluster.binaries().agent, &all)
}

/// The configuration of a host with another state directory.
fn config_with_state(host: &Host, state: &Path) -> PathBuf {
    let text = fs::read_to_string(host.config()).unwrap();
    let lines = text.lines().map(|line| match line.split_once(" = ") {
        Some(("state_dir", _)) => format!("state_dir = \"{}\"", state.display()),
        _ => line.to_owned(),
    });
    let text = lines.collect::<Vec<_>>().join("\n");
    let file = host.config().with_file_name("elsewhere.toml");
    fs::write(&file, text).unwrap();
    file
}

#[test]
fn a_journal_that_was_put_back_is_found_by_what_the_other_side_has() {
    let mut builder = Cluster::builder()
        .without_database()
        .hosts(&HOSTS.map(|name| (name, "app")));
    for name in HOSTS {
        builder = builder.policy(name, Some("[[allow]]\naction = \"*\"\n"));
    }
    let mut cluster = builder.start().unwrap();
    let ended = run_plan(&cluster, &plan("first"));
    assert_eq!(text(&ended["state"]), "succeeded");
    let older = cluster.root().join("older");
    fs::create_dir(&older).unwrap();
    let state = cluster.host("app-1").config().with_file_name("state");
    for file in ["journal", "head"] {
        fs::copy(state.join(file), older.join(file)).unwrap();
    }
    let ended = run_plan(&cluster, &plan("second"));
    assert_eq!(text(&ended["state"]), "succeeded");
    assert_eq!(cluster.stop_controller(), Some(0));
    for name in HOSTS {
        cluster.host_mut(name).stop_agent();
    }

    // What agents were told of the controller's journal.
    let mut heads = Vec::new();
    for host in cluster.hosts() {
        let said = agent(&cluster, &host.config(), &["heads"]);
        assert!(said.status.success(), "{}", words(&said));
        heads.extend(said.stdout);
    }
    let (of_controller, of_agents) = (
        cluster.root().join("c.heads"),
        cluster.root().join("a.heads"),
    );
    fs::write(&of_controller, &heads).unwrap();
    let lockstep = &cluster.binaries().lockstep;
    let controller_state = cluster.root().join("controller/state");
    let controller_state = controller_state.to_str().unwrap();
    let verify = [
        "--output",
        "json",
        "audit",
        "verify",
        "--dir",
        controller_state,
    ];
    let verify = [&verify[..], &["--witness", of_controller.to_str().unwrap()]].concat();
    let said = output(lockstep, &verify);
    assert!(said.status.success(), "{}", words(&said));
    let found: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(found["witnesses"], serde_json::json!(HOSTS));
    let [last, through] =
        ["records", "witnessed_through"].map(|name| found[name].as_u64().unwrap());
    assert!(through > 0 && last - through <= 5, "{found}");
    // One that was told of another record.
    let mut other: Value =
        serde_json::from_slice(heads.split(|b| *b == b'\n').next().unwrap()).unwrap();
    other["hash"] = format!("sha256:{}", "0".repeat(64)).into();
    fs::write(&of_controller, other.to_string()).unwrap();
    let said = output(lockstep, &verify);
    assert_eq!(said.status.code(), Some(10), "{}", words(&said));
    assert!(
        words(&said).contains("is not the one that app-"),
        "{}",
        words(&said)
    );

    // What the controller was told of the agents' journals.
    let said = output(lockstep, &["audit", "heads", "--dir", controller_state]);
    assert!(said.status.success(), "{}", words(&said));
    fs::write(&of_agents, &said.stdout).unwrap();
    let witness = ["verify", "--witness", of_agents.to_str().unwrap()];
    let host = cluster.host("app-1");
    let said = agent(&cluster, &host.config(), &witness);
    assert!(said.status.success(), "{}", words(&said));
    assert!(
        words(&said).contains("witnessed     up to record"),
        "{}",
        words(&said)
    );

    let config = config_with_state(host, &older);
    let said = agent(&cluster, &config, &["verify"]);
    assert!(said.status.success(), "whole by itself: {}", words(&said));
    assert!(words(&said).contains("unwitnessed"), "{}", words(&said));
    let said = agent(&cluster, &config, &witness);
    assert_eq!(said.status.code(), Some(10), "{}", words(&said));
    assert!(
        words(&said).contains("its end was cut off"),
        "{}",
        words(&said)
    );
}
