use std::fs;
use std::sync::Arc;

use lockstep_proto::action::postgres::{Backup, CopyTo, Fence, FenceVia, Restore};
use lockstep_proto::values::Timestamp;

use super::super::super::archive::archive_in;
use super::super::super::backup::tests::{backup, made};
use super::super::super::manifest::{self, Manifest};
use super::super::tests::verify;
use super::super::*;
use crate::sql::cluster::{Bench, Cluster};

const NULL: Value = Value::Null;

/// A database host with a backup, the host that proves it, each with a server of its own, and the
/// volume that both have.
struct Two {
    one: Bench,
    other: Bench,
    servers: [Arc<Cluster>; 2],
    facts: Vec<Fact>,
    made: Manifest,
    volume: tempfile::TempDir,
}

impl Two {
    async fn new() -> Self {
        let servers = [Cluster::alone(), Cluster::alone()];
        let one = Bench::with_rows_on(servers[0].clone()).await;
        let other = Bench::on(servers[1].clone()).await;
        let volume = tempfile::tempdir().unwrap();
        let fence = Fence {
            database: "staff".into(),
            via: FenceVia::Connect,
            roles: vec![one.app()],
        };
        fence.apply(&one.cx(0, vec![]), &NULL).await.unwrap();
        let act = Backup {
            globals: true,
            copies: vec![CopyTo::Directory(volume.path().display().to_string())],
            ..backup()
        };
        let done = act.apply(&one.cx(1, vec![]), &NULL).await.unwrap();
        Self {
            made: made(&one).remove(0),
            one,
            other,
            servers,
            facts: done.facts,
            volume,
        }
    }

    fn verify(&self) -> VerifyBackup {
        VerifyBackup {
            from: Some(self.volume.path().display().to_string()),
            ..verify()
        }
    }

    /// What the other host sees in the same rollout.
    fn cx(&self, facts: Vec<Fact>) -> Context {
        let mut cx = self.other.cx(2, facts);
        cx.key.rollout = self.made.key.rollout.clone();
        cx.key.host = "host-2".parse().unwrap();
        cx
    }

    fn copy(&self) -> std::path::PathBuf {
        self.volume.path().join(&self.made.id)
    }

    async fn refused(&self, facts: Vec<Fact>) -> Failure {
        let act = self.verify();
        act.apply(&self.cx(facts), &NULL).await.unwrap_err()
    }
}

#[tokio::test]
async fn a_backup_is_proven_by_its_copy_on_another_server() {
    let two = Two::new().await;
    // Nothing of it needs the server that was backed up, nor the backup's own files.
    two.servers[0].stop();
    let own = Store::of(
        &two.one.cx(2, vec![]),
        &Database::find(&two.one.cx(2, vec![]), "staff").unwrap(),
    );
    fs::remove_dir_all(own.path(&two.made.id)).unwrap();
    let (act, cx) = (two.verify(), two.cx(two.facts.clone()));
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let done = act.apply(&cx, &NULL).await.unwrap();
    let expected = Fact::BackupVerified {
        database: "staff".into(),
        id: two.made.id.clone(),
        digest: two.made.digest,
        fence: two.made.fence.clone(),
        level: Level::Equal,
        taken_at: Some(two.made.taken_at),
    };
    assert!(two.made.fence.is_some());
    assert_eq!(done.facts, [expected]);
    assert!(done.summary.contains("level 4"), "{}", done.summary);
    assert!(done.summary.contains("by its copy in"), "{}", done.summary);
    let left = "SELECT count(*) FROM pg_database WHERE datname LIKE 'lockstep%'";
    assert_eq!(two.other.ask(left).await, "0");
    // The copy is the other host's.
    let mut names: Vec<_> = fs::read_dir(two.copy())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["archive", "globals.sql", "manifest.json"]);
}

#[tokio::test]
async fn a_copy_that_is_not_the_rollouts_backup_proves_nothing() {
    let two = Two::new().await;
    let facts = || two.facts.clone();
    // Nobody has said which backup it is, whatever lies there.
    let failed = two.refused(vec![]).await;
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("nobody has told"),
        "{}",
        failed.message
    );

    // Facts of another backup: its bytes, its time, its fence.
    let changes: [fn(&mut Fact); 3] = [
        |fact| {
            if let Fact::Backup { digest, .. } = fact {
                *digest = Digest::of(b"another");
            }
        },
        |fact| {
            if let Fact::Backup { taken_at, .. } = fact {
                *taken_at = Timestamp(taken_at.0 + 1);
            }
        },
        |fact| {
            if let Fact::Backup { fence, .. } = fact {
                *fence = Some("held".into());
            }
        },
    ];
    for change in changes {
        let mut facts = facts();
        facts.iter_mut().for_each(change);
        let failed = two.refused(facts).await;
        assert_eq!(failed.cause, Cause::CheckUnmet);
        assert!(
            failed.message.contains("not that of the backup"),
            "{}",
            failed.message
        );
    }

    // Archive and manifest that fit each other, and not the rollout.
    let archive = archive_in(&two.copy());
    let whole = fs::read(&archive).unwrap();
    let mut forged = whole.clone();
    forged.extend(b"more");
    fs::write(&archive, &forged).unwrap();
    let manifest = Manifest {
        digest: Digest::of(&forged),
        size: forged.len() as u64,
        ..two.made.clone()
    };
    manifest::write_manifest(&two.copy(), &manifest).unwrap();
    let failed = two.refused(facts()).await;
    assert!(
        failed.message.contains("not that of the backup"),
        "{}",
        failed.message
    );
    // The manifest alone is genuine.
    manifest::write_manifest(&two.copy(), &two.made).unwrap();
    let failed = two.refused(facts()).await;
    assert!(failed.message.contains("archive of"), "{}", failed.message);
    assert!(failed.message.contains("damaged"), "{}", failed.message);

    // What is restored are the bytes that were looked at before.
    fs::write(&archive, &whole).unwrap();
    let (cx, act) = (two.cx(facts()), two.verify());
    let swapped = prove(&cx, &act, async |_| {
        fs::write(&archive, &forged).unwrap();
        Ok(())
    });
    let failed = swapped.await.unwrap_err();
    assert!(failed.message.contains("damaged"), "{}", failed.message);
    fs::write(&archive, &whole).unwrap();

    // A server that prints schemas differently.
    let older = Manifest {
        server_version: two.made.server_version - 10_000,
        ..two.made.clone()
    };
    manifest::write_manifest(&two.copy(), &older).unwrap();
    let failed = two.refused(facts()).await;
    assert!(
        failed.message.contains("print schemas differently"),
        "{}",
        failed.message
    );
    let restored = VerifyBackup {
        level: Level::Restored,
        ..two.verify()
    };
    restored.apply(&two.cx(facts()), &NULL).await.unwrap();

    // It is not there at all.
    fs::remove_dir_all(two.copy()).unwrap();
    let failed = two.refused(facts()).await;
    assert!(
        failed.message.contains("there is no copy of staff-"),
        "{}",
        failed.message
    );
    let elsewhere = VerifyBackup {
        from: Some("/no/such/volume".into()),
        ..two.verify()
    };
    let failed = elsewhere.apply(&two.cx(facts()), &NULL).await.unwrap_err();
    assert!(
        failed.message.contains("/no/such/volume is not there"),
        "{}",
        failed.message
    );
    let mut dry = two.cx(vec![]);
    dry.dry_run = true;
    assert!(matches!(
        elsewhere.probe(&dry).await.unwrap(),
        Probe::Unmet(_)
    ));
}

#[tokio::test]
async fn a_restore_takes_another_hosts_proof_and_happens_where_the_backup_is() {
    let two = Two::new().await;
    let mut facts = two.facts.clone();
    let cx = two.cx(facts.clone());
    facts.extend(two.verify().apply(&cx, &NULL).await.unwrap().facts);
    two.one
        .sql("DROP TABLE hr.notes; DELETE FROM public.users")
        .await;
    let act = Restore {
        database: "staff".into(),
    };
    let failed = act.apply(&two.cx(facts.clone()), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("there is no verified backup"),
        "{}",
        failed.message
    );
    let done = act.apply(&two.one.cx(3, facts), &NULL).await.unwrap();
    assert!(
        done.summary.contains("2 tables, 300 rows"),
        "{}",
        done.summary
    );
}
