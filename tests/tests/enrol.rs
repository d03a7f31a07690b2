//! A machine becomes a host in two commands, stays one while its certificates come and go, and is
//! put out in one.

#![allow(clippy::print_stdout, reason = "figures")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use lockstep_tests::cluster::Cluster;
use lockstep_tests::hosts::{Host, quote_path};
use lockstep_tests::operator::{list, text};
use lockstep_tests::wait;

const POLICY: &str = "[[allow]]\naction = \"*\"\n";

fn is_connected(cluster: &Cluster, name: &str) -> bool {
    let known = cluster.requester().json(&["hosts"]).unwrap();
    list(&known["hosts"]).any(|host| host["host"] == name && host["connected"] == true)
}

fn wait_connected(cluster: &Cluster, name: &str, wanted: bool) {
    wait::until(&format!("{name}: {wanted}"), wait::SOON, || {
        let is = is_connected(cluster, name);
        if is == wanted {
            Ok(())
        } else {
            Err(is.to_string())
        }
    })
    .unwrap();
}

/// What docs/setup.md shows: a token, then `join`, then the service.
#[test]
fn a_fresh_machine_is_a_host_after_two_commands() {
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[])
        .enrolling("1h")
        .start()
        .unwrap();
    let admin = cluster.admin().unwrap();
    let root = cluster.root().join("hosts/app-1");
    let binary = cluster.binaries().agent.clone();
    let mut host = Host::new(root.clone(), "app-1", "127.0.0.1".to_owned(), binary).unwrap();
    let (config, state) = (host.config().display().to_string(), root.join("state"));
    let state = state.display().to_string();
    let more = [
        "--config",
        &config,
        "--state-dir",
        &state,
        "--label",
        "role=app",
    ];

    // Whoever is no controller of the pinned issuer gets no token.
    let made = admin.json(&["token", "create", "app-1"]).unwrap();
    let token = cluster.root().join("token");
    fs::write(&token, text(&made["secret"])).unwrap();
    let wrong = format!("sha256:{}", "0".repeat(64));
    let said = cluster.join_with(&token, &wrong, &more).unwrap();
    assert_eq!(said.code, 5, "{}", said.text());
    assert!(
        said.stderr.contains("the token was not sent"),
        "{}",
        said.text()
    );
    let listed = admin.json(&["token", "list"]).unwrap();
    assert_eq!(listed["tokens"][0]["state"], "open", "{listed}");

    let pin = text(&made["ca_pin"]).to_owned();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    let key = root.join("state/tls/agent.key");
    let mode = fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Killed after everything was written: it says so again.
    let kept = fs::read(&key).unwrap();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    assert_eq!(fs::read(&key).unwrap(), kept);
    // Killed before the last file: it goes on.
    fs::remove_file(host.config()).unwrap();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    let check = Command::new(&cluster.binaries().agent)
        .args(["check", "--config", &config])
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");

    // Hosts of this test share one machine.
    let written = fs::read_to_string(host.config()).unwrap();
    let own = format!(
        "run_dir = {}\nsteps = \"session\"\n",
        quote_path(&root.join("run"))
    );
    fs::write(host.config(), own + &written).unwrap();
    host.start_agent().unwrap();
    wait_connected(&cluster, "app-1", true);

    // And it is put out in one.
    let said = admin
        .run(&["suspend", "host:app-1", "--reason", "lost on a train"])
        .unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    wait_connected(&cluster, "app-1", false);
    let log = host.agent_log();
    wait::until("the agent to say why", wait::SOON, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        if said.contains("suspended") {
            Ok(())
        } else {
            Err(said)
        }
    })
    .unwrap();
    let suspended = admin.json(&["suspended"]).unwrap();
    assert_eq!(suspended["suspended"][0]["reason"], "lost on a train");
    admin.run(&["unsuspend", "host:app-1"]).unwrap();
    wait_connected(&cluster, "app-1", true);
    // Stolen: its name may be given to another machine while it is still out, and it does not come
    // back, not even if somebody lifts the suspension.
    for command in [
        &["suspend", "host:app-1", "--reason", "stolen"][..],
        &["forget", "app-1"],
        &["token", "create", "app-1"],
        &["unsuspend", "host:app-1"],
    ] {
        if command[0] == "forget" {
            wait_connected(&cluster, "app-1", false);
        }
        let said = admin.run(command).unwrap();
        assert_eq!(said.code, 0, "{command:?}: {}", said.text());
    }
    let before = fs::read_to_string(&log).unwrap_or_default().len();
    wait::until("the agent to be refused again", wait::SOON, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let new = said.get(before..).unwrap_or_default().to_owned();
        new.contains("CertificateRevoked").then_some(()).ok_or(new)
    })
    .unwrap();
    assert!(!is_connected(&cluster, "app-1"));
    // Nobody else may.
    let said = cluster.requester().run(&["suspended"]).unwrap();
    assert_eq!(said.code, 8, "{}", said.text());
    assert!(
        said.stderr.contains("that takes the role admin"),
        "{}",
        said.text()
    );
}

/// The answer was lost with the process: the same key, the same certificate.
#[test]
fn a_join_that_was_killed_goes_on() {
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[])
        .enrolling("1h")
        .start()
        .unwrap();
    let admin = cluster.admin().unwrap();
    let root = cluster.root().join("hosts/app-1");
    let config = root.join("agent.toml").display().to_string();
    let state = root.join("state").display().to_string();
    let more = ["--config", &config, "--state-dir", &state];
    let made = admin.json(&["token", "create", "app-1"]).unwrap();
    let token = cluster.root().join("token");
    fs::write(&token, text(&made["secret"])).unwrap();
    let pin = text(&made["ca_pin"]).to_owned();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    let tls = root.join("state/tls");
    let certificate = fs::read(tls.join("agent.crt")).unwrap();
    // As it was before the answer came.
    fs::rename(tls.join("agent.key"), tls.join("agent.key.next")).unwrap();
    fs::remove_file(tls.join("agent.crt")).unwrap();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    let serial = |pem: &[u8]| {
        use std::io::Write as _;
        let mut child = Command::new("openssl")
            .args(["x509", "-noout", "-serial"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(pem).unwrap();
        child.wait_with_output().unwrap().stdout
    };
    let again = fs::read(tls.join("agent.crt")).unwrap();
    assert_eq!(serial(&again), serial(&certificate));
    // Without the key it is another machine.
    fs::remove_file(tls.join("agent.key")).unwrap();
    let said = cluster.join_with(&token, &pin, &more).unwrap();
    assert_eq!(said.code, 5, "{}", said.text());
    assert!(said.stderr.contains("used already"), "{}", said.text());
}

/// Adds one line to the host's effects, and takes a moment.
const WORK: &str = "import sys, time; path, name = sys.argv[1:]; \
                    open(path, 'a').write(name + '\\\\n'); time.sleep(0.2)";

/// Steps without end on hosts whose certificates live for seconds.
fn rotate(hosts: usize, rotations: usize) {
    const STEPS: usize = 8;
    let mut cluster = Cluster::builder()
        .without_database()
        .hosts(&[])
        .enrolling("8s")
        .start()
        .unwrap();
    let admin = cluster.admin().unwrap();
    let names: Vec<String> = (1..=hosts).map(|number| format!("app-{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        // An address has five tries a minute; and a host that has joined must not wait.
        if number > 0 && number % 5 == 0 {
            std::thread::sleep(Duration::from_secs(61));
        }
        cluster.add_host(&admin, name, POLICY).unwrap();
    }
    cluster.wait_connected(&names).unwrap();
    let renewed = |cluster: &Cluster| {
        let log = fs::read_to_string(cluster.controller_log()).unwrap_or_default();
        log.matches("a certificate was renewed").count()
    };
    let begun = Instant::now();
    let before = renewed(&cluster);
    let (mut rollouts, mut steps) = (0, 0);
    while renewed(&cluster) - before < rotations {
        let mut plan = String::from(
            "version: 1\nplan: rotate\nfleet:\n  app: {labels: {role: app}}\nphases:\n",
        );
        for step in 0..STEPS {
            let name = format!("r{rollouts}-s{step}");
            let _ = write!(
                plan,
                "  - name: p{step}\n    on: app\n    steps:\n      - exec.run: {{name: {name}, \
                 argv: [python3, -c, \"{WORK}\", \"${{host.effects_file}}\", {name}]}}\n"
            );
        }
        let file = cluster.root().join("rotate.yaml");
        fs::write(&file, plan).unwrap();
        let rollout = cluster.requester().submit(&file, &[]).unwrap();
        let document = cluster.finish(&rollout).unwrap();
        assert_eq!(
            document["state"],
            "succeeded",
            "{}",
            cluster.explain(&document)
        );
        rollouts += 1;
        steps += STEPS * hosts;
    }
    let done = renewed(&cluster) - before;
    for name in &names {
        let effects = fs::read_to_string(cluster.host(name).effects()).unwrap();
        let mut counts = BTreeMap::new();
        for line in effects.lines() {
            *counts.entry(line).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), rollouts * STEPS, "{name}: a step was dropped");
        assert!(
            counts.values().all(|count| *count == 1),
            "{name}: {counts:?}"
        );
    }
    println!(
        "{done} rotations on {hosts} hosts in {:?}, during {rollouts} rollouts with {steps} steps: \
         none dropped, none done twice",
        begun.elapsed()
    );
}

#[test]
fn certificates_rotate_during_a_rollout_and_no_step_is_dropped() {
    rotate(4, 12);
}

#[test]
#[ignore = "takes some minutes: make rotate"]
fn three_hundred_rotations_drop_no_step() {
    rotate(5, 300);
}
