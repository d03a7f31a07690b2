//! With the real pgBackRest and the real Barman, on servers of the tests' own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::action::postgres::{Kind, RestorePoint};
use lockstep_proto::values::Period;

use super::*;
use crate::sql::cluster::{Archive, Bench, Cluster, as_server};

const NULL: Value = Value::Null;

fn backup(kind: Kind) -> ExternalBackup {
    ExternalBackup {
        database: "staff".into(),
        system: System::Pgbackrest,
        kind,
        verify: false,
    }
}

fn point(within: u64) -> RestorePoint {
    RestorePoint {
        database: "staff".into(),
        archived_within: Period::seconds(within),
        recoverable: false,
    }
}

const BEFORE: &str = "INSERT INTO public.users VALUES (901, 'before')";

const AFTER: &str = "DROP TABLE hr.notes; DELETE FROM public.users; \
     INSERT INTO public.users VALUES (902, 'after')";

/// The whole way: a backup, a named moment, what is lost after it, and back by the command that
/// the step has printed.
#[tokio::test]
async fn a_server_comes_back_to_its_restore_point() {
    let cluster = Cluster::archiving(Archive::Pgbackrest);
    let bench = Bench::with_rows_on(cluster.clone()).await;
    // Without a backup there is nothing to come back from.
    let refused = point(30).apply(&bench.cx(1, vec![]), &NULL).await;
    assert_eq!(refused.unwrap_err().cause, Cause::Refused);

    let cx = bench.cx(0, vec![]);
    let probe = backup(Kind::Full).probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Absent(_)), "{probe:?}");
    // The first one is full, whatever was asked for.
    let done = backup(Kind::Incremental).apply(&cx, &NULL).await.unwrap();
    let [
        Fact::ExternalBackup {
            label,
            holds,
            from,
            to,
            ..
        },
        _,
    ] = done.facts.as_slice()
    else {
        panic!("{:?}", done.facts);
    };
    assert_eq!(holds, "full");
    assert!(label.ends_with('F') && from < to, "{label} {from} {to}");
    let probe = backup(Kind::Full).probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Present(_)), "{probe:?}");
    let probe = backup(Kind::Full)
        .probe(&bench.cx(5, vec![]))
        .await
        .unwrap();
    assert!(
        matches!(probe, Probe::Absent(_)),
        "another step's: {probe:?}"
    );
    let second = backup(Kind::Incremental)
        .apply(&bench.cx(2, vec![]), &NULL)
        .await;
    let second = second.unwrap().summary;
    assert!(second.contains("(incr, "), "{second}");

    bench.sql(BEFORE).await;
    let done = point(30).apply(&bench.cx(3, vec![]), &NULL).await.unwrap();
    let [Fact::RestorePoint { name, .. }, Fact::Note { value, .. }] = done.facts.as_slice() else {
        panic!("{:?}", done.facts);
    };
    assert!(name.len() <= 63, "{name}");
    bench.sql(AFTER).await;

    let command = value.split('`').nth(1).expect("a command");
    assert!(
        command.ends_with(&format!("--target={name} restore")),
        "{command}"
    );
    cluster.stop();
    run_commands(value);
    cluster.start_again();
    is_back(&bench).await;
}

/// What was there at the point is there, and what came after it is not.
async fn is_back(bench: &Bench) {
    let session = bench.session("staff").await;
    let sql = "SELECT count(*) FILTER (WHERE id = 901) || ' ' || count(*) FILTER (WHERE id = 902) \
               || ' ' || count(*) || ' ' || (SELECT count(*) FROM hr.notes) FROM users";
    let rows = session.value("", sql).await.unwrap().unwrap();
    assert_eq!(rows, "1 0 201 100");
}

/// Runs the commands that a text has between backquotes.
fn run_commands(text: &str) {
    for command in text.split('`').skip(1).step_by(2) {
        let mut words = command.split(' ');
        let ran = as_server(words.next().unwrap())
            .args(words)
            .output()
            .unwrap();
        assert!(ran.status.success(), "{command}: {ran:?}");
    }
}

/// It exits with 0 whatever it finds.
#[tokio::test]
async fn a_damaged_repository_is_found() {
    let cluster = Cluster::archiving(Archive::Pgbackrest);
    let bench = Bench::with_rows_on(cluster.clone()).await;
    let verified = ExternalBackup {
        verify: true,
        ..backup(Kind::Full)
    };
    let done = verified.apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
    assert!(done.summary.ends_with(", read again"), "{}", done.summary);
    let file = largest(&cluster.repository().join("backup"));
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let failed = verified.apply(&bench.cx(1, vec![]), &NULL).await;
    let failed = failed.unwrap_err().message;
    assert!(failed.contains("finds damage: "), "{failed}");
}

fn largest(directory: &Path) -> PathBuf {
    let mut files = vec![];
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() {
                files.push((entry.metadata().unwrap().len(), entry.path()));
            }
        }
    }
    files.into_iter().max().expect("some file").1
}

#[tokio::test]
async fn a_killed_attempt_leaves_no_backup_that_counts_and_the_next_one_makes_its_own() {
    let cluster = Cluster::archiving(Archive::Pgbackrest);
    let bench = Bench::with_rows_on(cluster.clone()).await;
    for wait in [50, 400, 900] {
        let cx = bench.cx(0, vec![]);
        let act = backup(Kind::Full);
        let cut = tokio::time::timeout(Duration::from_millis(wait), act.apply(&cx, &NULL));
        assert!(cut.await.is_err(), "it was faster than {wait} ms");
        let probe = act.probe(&cx).await.unwrap();
        assert!(matches!(probe, Probe::Absent(_)), "{probe:?}");
    }
    let cx = bench.cx(0, vec![]);
    backup(Kind::Full).apply(&cx, &NULL).await.unwrap();
    let conf = format!("--config={}", cluster.conf().display());
    let listed = as_server("/usr/bin/pgbackrest")
        .args([conf.as_str(), "--stanza=main", "info"])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.matches("full backup: ").count(), 1, "{listed}");
}

#[tokio::test]
async fn an_archive_that_does_not_come_fails_with_what_was_archived_last() {
    let bench = Bench::with_rows_on(Cluster::archiving(Archive::Pgbackrest)).await;
    backup(Kind::Full)
        .apply(&bench.cx(0, vec![]), &NULL)
        .await
        .unwrap();
    let server = bench.session("maintenance").await;
    for sql in [
        "ALTER SYSTEM SET archive_command = '/bin/false'",
        "SELECT pg_reload_conf()",
    ] {
        server.query("", sql, &[]).await.unwrap();
    }
    let failed = point(3)
        .apply(&bench.cx(1, vec![]), &NULL)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("was not archived within 3s: 0000"),
        "{failed:?}"
    );
    assert!(failed.changed, "the point is there");
    for sql in [
        "ALTER SYSTEM SET archive_command = ''",
        "SELECT pg_reload_conf()",
    ] {
        server.query("", sql, &[]).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let failed = point(3)
        .apply(&bench.cx(2, vec![]), &NULL)
        .await
        .unwrap_err();
    assert!(failed.message.contains("archives nothing"), "{failed:?}");
}

#[tokio::test]
async fn a_host_without_archive_or_backup_system_says_so() {
    let bench = Bench::with_rows().await;
    let cx = bench.cx(0, vec![]);
    let failed = point(3).apply(&cx, &NULL).await.unwrap_err();
    assert!(failed.hint.unwrap().contains("archive_mode"));
    let failed = backup(Kind::Full).apply(&cx, &NULL).await.unwrap_err();
    assert!(failed.hint.unwrap().contains("[postgres.staff.pgbackrest]"));
}

#[tokio::test]
async fn a_stanza_that_is_not_there_is_named() {
    let mut bench = Bench::with_rows_on(Cluster::archiving(Archive::Pgbackrest)).await;
    let staff = bench.host.config.postgres.get_mut("staff").unwrap();
    staff.pgbackrest.as_mut().unwrap().stanza = "other".into();
    let failed = backup(Kind::Full).apply(&bench.cx(0, vec![]), &NULL).await;
    let failed = failed.unwrap_err().message;
    assert!(failed.starts_with("pgBackRest, stanza other: "), "{failed}");
    let failed = backup(Kind::Full)
        .probe(&bench.cx(0, vec![]))
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("stanza other"),
        "{}",
        failed.message
    );
}

fn barman(verify: bool) -> ExternalBackup {
    ExternalBackup {
        system: System::Barman,
        verify,
        ..backup(Kind::Incremental)
    }
}

#[tokio::test]
async fn a_server_comes_back_to_its_restore_point_with_barman_too() {
    let cluster = Cluster::archiving(Archive::Barman);
    let bench = Bench::with_rows_on(cluster.clone()).await;
    let refused = point(30).apply(&bench.cx(1, vec![]), &NULL).await;
    assert_eq!(refused.unwrap_err().cause, Cause::Refused);
    let cx = bench.cx(0, vec![]);
    let done = barman(true).apply(&cx, &NULL).await.unwrap();
    let [
        Fact::ExternalBackup {
            label,
            holds,
            from,
            to,
            ..
        },
        _,
    ] = done.facts.as_slice()
    else {
        panic!("{:?}", done.facts);
    };
    assert!(holds == "full" && from < to, "{label} {holds} {from} {to}");
    // Nothing tells whose it is.
    let probe = barman(false).probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Absent(_)), "{probe:?}");

    bench.sql(BEFORE).await;
    let done = point(30).apply(&bench.cx(3, vec![]), &NULL).await.unwrap();
    let [_, Fact::Note { value, .. }] = done.facts.as_slice() else {
        panic!("{:?}", done.facts);
    };
    assert!(value.contains(label.as_str()), "{value}");
    bench.sql(AFTER).await;
    cluster.stop();
    cluster.put_data_aside();
    run_commands(value);
    cluster.start_again();
    is_back(&bench).await;
}

#[tokio::test]
async fn what_barman_finds_wrong_is_said() {
    let cluster = Cluster::archiving(Archive::Barman);
    let mut bench = Bench::with_rows_on(cluster.clone()).await;
    barman(true)
        .apply(&bench.cx(0, vec![]), &NULL)
        .await
        .unwrap();
    let cx = bench.cx(1, vec![]);
    let taken = barman(false).apply(&cx, &NULL).await.unwrap();
    let Fact::ExternalBackup { label, .. } = &taken.facts[0] else {
        panic!("{taken:?}");
    };
    let file = largest(
        &cluster
            .repository()
            .join(format!("main/base/{label}/data/base")),
    );
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let database = Database::find(&cx, "staff").unwrap();
    let tool = super::barman(&cx, &database).unwrap();
    let failed = tool.verify(label).await.unwrap_err().message;
    assert!(failed.starts_with("Barman, server main: "), "{failed}");
    let staff = bench.host.config.postgres.get_mut("staff").unwrap();
    staff.barman.as_mut().unwrap().server = "other".into();
    let failed = barman(false).apply(&bench.cx(2, vec![]), &NULL).await;
    let failed = failed.unwrap_err().message;
    assert!(failed.contains("Unknown server 'other'"), "{failed}");
}
