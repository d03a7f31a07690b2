//! What must not work says so: who, why, and what to do next; and nothing is half done.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
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

    // An operator of another installation, who would wait for the end of a rollout.
    cluster
        .make_certificate(&[
            "operator", "mallory", "--dir", other_text, "--out", other_text,
        ])
        .unwrap();
    let stranger_profile = format!(
        "controller = \"{}\"\nca = \"{}\"\ncert = \"{}\"\nkey = \"{}\"\n",
        cluster.address(),
        pki.join("ca-controllers.crt").display(),
        other.join("operator-mallory.crt").display(),
        other.join("operator-mallory.key").display(),
    );
    fs::write(&thief.profile, stranger_profile).unwrap();
    let said = thief.run(&["watch", "ro_000000000000"]).unwrap();
    assert_eq!(said.code, 3, "{}", said.text());
    assert!(
        said.stderr.contains("certificate"),
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
    assert_eq!(copies(&cluster), NOTHING, "a copy of nothing");
    let store = cluster.host("db-1").root.join("backups");
    assert_eq!(walk(&store), NOTHING, "a backup of nothing");
}

/// A small file system of its own, gone with the value.
struct SmallDisk(PathBuf);

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
    make_noise(&cluster);
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
    assert_eq!(walk(&disk.0), NOTHING, "half a backup stays behind");
    assert_eq!(copies(&cluster), NOTHING, "a copy of half of it");
    drop(cluster);
}

/// A rollout that changes a file, raises the fence, and takes a backup with a copy.
fn change_and_backup(cluster: &Cluster, settings: &Path, to: &Path) -> String {
    format!(
        "version: 1\nplan: change\nfleet:\n  db: {{labels: {{role: db}}}}\nphases:\n\
         \x20 - name: change\n    on: db\n    steps:\n      \
         - env.render: {{path: \"{}\", set: {{RELEASE: new}}}}\n\
         \x20 - name: backup\n    on: db\n    \
         fence: {{database: {database}, via: connect, roles: [employee_app], until: after}}\n    \
         steps:\n      - postgres.backup: {{database: {database}, copies: [\"{}\"]}}\n\
         \x20 - name: after\n    on: db\n    steps:\n      \
         - check.disk: {{path: \"{}\", free: 1KiB}}\n",
        settings.display(),
        to.display(),
        cluster.root().display(),
        database = example::DATABASE,
    )
}

/// What people would look at after a rollback.
fn looks(cluster: &Cluster, settings: &Path) -> [String; 4] {
    let postgres = cluster.postgres();
    let may_connect = format!(
        "SELECT has_database_privilege('employee_app', '{}', 'connect')",
        example::DATABASE
    );
    let rows = postgres.rows(example::DATABASE, "noise").unwrap();
    [
        fs::read_to_string(settings).unwrap(),
        postgres.query(example::DATABASE, &may_connect).unwrap(),
        postgres.schema(example::DATABASE).unwrap(),
        rows.join("\n"),
    ]
}

/// Runs a backup that has room by its estimate, twice the one before, and none in the end; with
/// the store (`store`) or the directory for copies on the disk that becomes full.
fn full_in_the_middle(store: bool, words: &[&str]) {
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let disk = SmallDisk::mount(&place.path().join("disk"));
    let mut builder = Cluster::builder()
        .hosts(&[("db-1", "db")])
        .policy("db-1", Some("[[allow]]\naction = \"*\"\n"));
    if store {
        builder = builder.backup_dir(&disk.0);
    }
    let cluster = builder.start().unwrap();
    let to = if store {
        cluster.root().join("backups/production")
    } else {
        disk.0.clone()
    };
    let settings = cluster.root().join("settings.env");
    fs::write(&settings, "RELEASE=old\n").unwrap();
    let first = run_plan(&cluster, &change_and_backup(&cluster, &settings, &to));
    assert_eq!(
        text(&first["state"]),
        "succeeded",
        "{}",
        cluster.explain(&first)
    );
    fs::write(&settings, "RELEASE=old\n").unwrap();
    make_noise(&cluster);
    let kept = [walk(&disk.0), copies(&cluster)];
    assert_ne!(kept[0], NOTHING);
    let before = looks(&cluster, &settings);

    let document = run_plan(&cluster, &change_and_backup(&cluster, &settings, &to));
    let story = cluster.explain(&document);
    assert_eq!(text(&document["state"]), "rolled_back", "{story}");
    let failed = failures(&document).join("\n");
    let place = disk.0.display().to_string();
    for words in [
        &["db-1", "postgres.backup", "No space left", "make room"],
        words,
    ]
    .concat()
    {
        assert!(failed.contains(words), "`{words}` is not named: {failed}");
    }
    assert!(story.contains("is shut"), "the fence was not up: {story}");
    assert!(store || failed.contains(&place), "which disk? {failed}");
    assert_eq!(looks(&cluster, &settings), before, "{story}");
    assert_eq!(
        [walk(&disk.0), copies(&cluster)],
        kept,
        "half a backup stays behind, or the one before is gone"
    );
    drop(cluster);
}

#[test]
fn a_disk_that_becomes_full_in_the_middle_of_a_dump_takes_everything_back() {
    if lockstep_tests::is_root() {
        full_in_the_middle(true, &["pg_dump"]);
    }
}

#[test]
fn a_disk_that_becomes_full_in_the_middle_of_a_copy_takes_everything_back() {
    if lockstep_tests::is_root() {
        full_in_the_middle(false, &["cannot copy the backup"]);
    }
}

/// Rows that compression does not make room for.
fn make_noise(cluster: &Cluster) {
    let noise = "CREATE TABLE noise AS SELECT string_agg(md5(random()::text), '') AS n \
                 FROM generate_series(1, 200000) AS g GROUP BY g % 100";
    cluster.postgres().query(example::DATABASE, noise).unwrap();
}

/// No entries of a directory.
const NOTHING: [PathBuf; 0] = [];

/// All that is in the directories for copies, but the one that is there from the start.
fn copies(cluster: &Cluster) -> Vec<PathBuf> {
    let backups = cluster.root().join("backups");
    assert!(backups.join("production").is_dir());
    let mut found = walk(&backups);
    found.retain(|path| *path != backups.join("production"));
    found
}

/// Everything below a directory, directories and what is not complete included, in order.
fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(walk(&entry.path()));
        }
        found.push(entry.path());
    }
    found.sort();
    found
}
