//! What must not work says so: who, why, and what to do next; and nothing is half done.

use std::fs;
use std::path::Path;
use std::process::Command;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::example;
use lockstep_tests::hosts::{Host, Settings};
use lockstep_tests::operator::{attempts, list, text};
use lockstep_tests::story::{failures, files_with, run_plan};
use lockstep_tests::wait;
use serde_json::Value;

/// Waits until a host's agent has said all of these words, or has ended.
fn wait_said(host: &mut Host, words: &[&str]) -> String {
    let log = host.agent_log();
    wait::until(
        &format!("{} to say {words:?}", host.name),
        wait::SOON,
        || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let all = words.iter().all(|word| said.contains(word));
            if all { Ok(said) } else { Err(said) }
        },
    )
    .unwrap()
}

fn connected(cluster: &Cluster) -> Vec<String> {
    let known = cluster.requester().json(&["hosts"]).unwrap();
    let connected = list(&known["hosts"]).filter(|host| host["connected"] == true);
    connected
        .map(|host| text(&host["host"]).to_owned())
        .collect()
}

/// A host beside those of the cluster, with files of its own.
fn stranger(cluster: &Cluster, directory: &str, name: &str, pki: &Path, file: &str) -> Host {
    let root = cluster.root().join("hosts").join(directory);
    let binary = cluster.binaries().agent.clone();
    let host = Host::new(root, name, "127.0.0.1".to_owned(), binary).unwrap();
    let settings = Settings {
        controller: cluster.address().to_owned(),
        tls: [
            cluster.pki().join("ca-controllers.crt"),
            pki.join(format!("{file}.crt")),
            pki.join(format!("{file}.key")),
        ],
        labels: [("role".to_owned(), "app".to_owned())].into(),
        ..Settings::default()
    };
    host.configure(&settings).unwrap();
    host
}

#[test]
fn a_certificate_of_another_issuer_or_another_kind_is_no_way_in() {
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .start()
        .unwrap();

    // An agent with a certificate of another installation.
    let other = cluster.root().join("other-pki");
    let other_text = other.to_str().unwrap();
    let domain = ["--domain", lockstep_tests::cluster::DOMAIN];
    cluster
        .make_certificate(&[&["init", "--dir", other_text], &domain[..]].concat())
        .unwrap();
    cluster
        .make_certificate(&["agent", "app-9", "--dir", other_text, "--out", other_text])
        .unwrap();
    let mut host = stranger(&cluster, "app-9", "app-9", &other, "agent-app-9");
    host.start_agent().unwrap();
    let said = wait_said(&mut host, &["certificate"]);
    assert!(
        said.to_lowercase().contains("hint"),
        "no next step:\n{said}"
    );
    assert_eq!(connected(&cluster), ["app-1"]);

    // An agent's certificate in an operator's hand.
    let mut thief = cluster.requester();
    let pki = cluster.pki();
    let profile = format!(
        "controller = \"{}\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
        cluster.address(),
        pki.join("ca-controllers.crt").display(),
        pki.join("agent-app-1.crt").display(),
        pki.join("agent-app-1.key").display(),
    );
    thief.profile = cluster.root().join("thief.toml");
    fs::write(&thief.profile, profile).unwrap();
    let said = thief.run(&["hosts"]).unwrap();
    assert_ne!(said.code, 0, "{}", said.text());
    assert!(
        said.stderr.contains("hint"),
        "no next step: {}",
        said.text()
    );

    // A host name that is not the certificate's.
    let mut host = stranger(&cluster, "app-8", "app-8", &pki, "agent-app-1");
    host.start_agent().unwrap();
    wait_said(&mut host, &["app-8", "app-1"]);
    assert_eq!(connected(&cluster), ["app-1"]);
}

#[test]
fn a_second_agent_under_the_same_name_is_refused_and_the_first_one_stays() {
    let mut cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .start()
        .unwrap();
    let mut second = stranger(&cluster, "second", "app-1", &cluster.pki(), "agent-app-1");
    second.start_agent().unwrap();
    let said = wait_said(&mut second, &["app-1", "another"]);
    assert!(
        said.to_lowercase().contains("hint"),
        "no next step:\n{said}"
    );
    assert!(cluster.host_mut("app-1").check().is_ok());
    assert_eq!(connected(&cluster), ["app-1"]);
    let controller = fs::read_to_string(cluster.controller_log()).unwrap();
    assert!(
        controller.contains("app-1"),
        "the controller says nothing:\n{controller}"
    );
}

const ONE_STEP: &str = "version: 1
plan: one-step
fleet:
  app: {labels: {role: app}}
phases:
  - name: only
    on: app
    steps:
";

#[test]
fn a_plan_that_the_policy_does_not_list_is_refused_before_anything_happens() {
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app"), ("app-2", "app")])
        .policy("app-1", Some("[[allow]]\naction = \"exec.run\"\n"))
        .policy("app-2", None)
        .start()
        .unwrap();
    let mark = cluster.root().join("mark");
    let plan = format!(
        "{ONE_STEP}      - exec.run: {{name: mark, argv: [/usr/bin/touch, \"{}\"]}}\n",
        mark.display()
    );
    let document = run_plan(&cluster, &plan);
    assert_ne!(text(&document["state"]), "succeeded");
    let story = cluster.explain(&document);
    for words in ["app-2", "exec.run", "policy.toml", "[[allow]]"] {
        assert!(story.contains(words), "`{words}` is not named: {story}");
    }
    assert_eq!(
        attempts(&document, "exec.run"),
        Vec::<&Value>::new(),
        "an order was given"
    );
    assert!(
        !mark.exists(),
        "the host that consented did it all the same"
    );
}

#[test]
fn a_missing_tool_is_named_with_what_brings_it() {
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some("[[allow]]\naction = \"*\"\n"))
        .start()
        .unwrap();
    let plan = format!(
        "{ONE_STEP}      - exec.run: {{name: sync, argv: [rclone-that-is-not-here, copy]}}\n"
    );
    let document = run_plan(&cluster, &plan);
    assert_ne!(text(&document["state"]), "succeeded");
    let failed = failures(&document).join("\n");
    for words in [
        "app-1",
        "exec.run",
        "rclone-that-is-not-here",
        "not installed",
        "install",
    ] {
        assert!(failed.contains(words), "`{words}` is not named: {failed}");
    }
}

fn backup_plan(cluster: &Cluster) -> String {
    format!(
        "version: 1\nplan: backup\nfleet:\n  db: {{labels: {{role: db}}}}\nphases:\n  - name: only\n    on: db\n    \
         steps:\n      - postgres.backup: {{database: {}, copies: [\"{}/backups\"]}}\n",
        example::DATABASE,
        cluster.root().display(),
    )
}

#[test]
fn a_wrong_password_is_said_and_never_shown() {
    let wrong = "canary-wrong-password-4711";
    let cluster = Cluster::builder()
        .hosts(&[("db-1", "db")])
        .wrong_secret("superuser_password", wrong)
        .start()
        .unwrap();
    let document = run_plan(&cluster, &backup_plan(&cluster));
    assert_ne!(text(&document["state"]), "succeeded");
    let failed = failures(&document).join("\n");
    for words in ["db-1", "postgres.backup", "password", "superuser_password"] {
        assert!(failed.contains(words), "`{words}` is not named: {failed}");
    }
    assert!(!cluster.explain(&document).contains(wrong));
    let secrets = |path: &Path| path.components().any(|part| part.as_os_str() == "secrets");
    assert_eq!(
        files_with(cluster.root(), wrong, &secrets),
        Vec::<String>::new()
    );
    let copies = fs::read_dir(cluster.root().join("backups"))
        .unwrap()
        .flatten();
    assert_eq!(
        copies.filter(|entry| entry.path().is_file()).count(),
        0,
        "a copy of nothing"
    );
}

/// A small file system of its own, gone with the value.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "small"])
            .arg(at)
            .status();
        assert!(
            mounted.unwrap().success(),
            "a small file system can be mounted"
        );
        Self(at.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_no_half_backup() {
    if !lockstep_tests::is_root() {
        // Nobody else may mount a small file system; continuous integration runs as root.
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&place.path().join("disk"));
    let cluster = Cluster::builder()
        .hosts(&[("db-1", "db")])
        .backup_dir(&disk.0)
        .start()
        .unwrap();
    // Noise, so that compression does not make room for it.
    let noise = "CREATE TABLE noise AS SELECT string_agg(md5(random()::text), '') AS n \
                 FROM generate_series(1, 200000) AS g GROUP BY g % 100";
    cluster.postgres().query(example::DATABASE, noise).unwrap();
    let document = run_plan(&cluster, &backup_plan(&cluster));
    assert_ne!(text(&document["state"]), "succeeded");
    let failed = failures(&document).join("\n");
    for words in ["db-1", "postgres.backup", "free", "make room"] {
        assert!(failed.contains(words), "`{words}` is not named: {failed}");
    }
    assert!(
        failed.contains(&disk.0.display().to_string()),
        "which disk? {failed}"
    );
    let left: Vec<_> = walk(&disk.0)
        .into_iter()
        .filter(|path| path.is_file())
        .collect();
    assert_eq!(
        left,
        Vec::<std::path::PathBuf>::new(),
        "half a backup stays behind"
    );
    let copies = fs::read_dir(cluster.root().join("backups"))
        .unwrap()
        .flatten();
    assert_eq!(
        copies.filter(|entry| entry.path().is_file()).count(),
        0,
        "a copy of half of it"
    );
    drop(cluster);
}

fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(walk(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}
