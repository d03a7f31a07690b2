//! What a migration asks of its backup.

use lockstep_proto::action::migration::RequiredBackup;
use lockstep_proto::action::postgres::{Backup, Level, Restore, VerifyBackup};
use lockstep_proto::values::{Period, Timestamp};

use super::stage::Stage;
use super::stage::{NEW, apply};
use super::*;
use crate::sql::cluster::{Bench, Cluster};

const NULL: Value = Value::Null;

fn asking(level: Level, age: Option<Period>) -> Apply {
    Apply {
        backup: RequiredBackup::Proven(ProvenBackup { level, age }),
        ..apply()
    }
}

/// The facts, with another proof of the same backup.
fn proven(facts: &[Fact], to: Level, at: Option<Timestamp>) -> Vec<Fact> {
    let mut facts = facts.to_vec();
    for fact in &mut facts {
        if let Fact::BackupVerified {
            level, taken_at, ..
        } = fact
        {
            (*level, *taken_at) = (to, at);
        }
    }
    facts
}

#[tokio::test]
async fn a_migration_waits_for_no_less_than_the_level_and_age_it_asks_for() {
    let stage = Stage::new().await;
    let was = stage.revision().await;
    let facts = stage.backed_up().await;
    let at = facts.iter().find_map(|fact| match fact {
        Fact::BackupVerified { taken_at, .. } => *taken_at,
        _ => None,
    });
    let at = at.expect("the proof says when the backup was taken");
    let minute = Some(Period::seconds(60));
    let old = Some(Timestamp(at.0 - 61_000));
    let ahead = Some(Timestamp(at.0 + 3_600_000));
    let refused = [
        (
            apply(),
            proven(&facts, Level::Read, Some(at)),
            "proven to level 2",
        ),
        (
            asking(Level::Equal, None),
            proven(&facts, Level::Restored, Some(at)),
            "needs level 4",
        ),
        (
            asking(Level::Read, minute),
            proven(&facts, Level::Equal, old),
            "s old, and at most 60 s",
        ),
        (
            asking(Level::Read, minute),
            proven(&facts, Level::Equal, None),
            "unknown age",
        ),
        (
            asking(Level::Read, minute),
            proven(&facts, Level::Equal, ahead),
            "unknown age",
        ),
    ];
    for (act, facts, why) in refused {
        let failed = act.apply(&stage.cx(4, facts), &NULL).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused);
        assert!(failed.message.contains(why), "{why}: {}", failed.message);
        assert!(failed.hint.is_some(), "{why}");
        assert_eq!(stage.revision().await, was, "{why}");
        assert_eq!(stage.ledger(), Vec::<String>::new(), "{why}");
    }
    let facts = proven(&facts, Level::Read, Some(at));
    let act = asking(Level::Read, minute);
    act.apply(&stage.cx(4, facts), &NULL).await.unwrap();
    assert_ne!(stage.revision().await, was);
}

#[tokio::test]
async fn a_proof_by_a_copy_on_another_host_counts_as_one_of_the_hosts_own() {
    let stage = Stage::new().await;
    let volume = tempfile::tempdir().unwrap();
    let from = volume.path().display().to_string();
    let cx = stage.bench.cx(2, vec![]);
    let rollout = cx.key.rollout.clone();
    let args = json!({"database": "staff", "copies": [&from]});
    let backup: Backup = serde_json::from_value(args).unwrap();
    let mut facts = backup.apply(&cx, &NULL).await.unwrap().facts;
    // On a host with a server of its own.
    let other = Bench::on(Cluster::alone()).await;
    let mut cx = other.cx(3, facts.clone());
    cx.key.rollout = rollout;
    cx.key.host = "host-2".parse().unwrap();
    let args = json!({"database": "staff", "from": &from});
    let verify: VerifyBackup = serde_json::from_value(args).unwrap();
    let asked = asking(Level::Equal, Some(Period::seconds(600)));
    let without = asked.apply(&stage.cx(4, facts.clone()), &NULL).await;
    assert_eq!(without.unwrap_err().cause, Cause::Refused);
    facts.extend(verify.apply(&cx, &NULL).await.unwrap().facts);
    let low = proven(&facts, Level::Read, None);
    let low = asked.apply(&stage.cx(4, low), &NULL).await.unwrap_err();
    assert!(low.message.contains("proven to level 2"), "{}", low.message);
    let cx = stage.cx(4, facts.clone());
    let before = asked.before(&cx).await.unwrap();
    asked.apply(&cx, &before).await.unwrap();
    assert_eq!(stage.revision().await, NEW);
}

#[tokio::test]
async fn a_proof_of_another_backup_than_the_rollouts_own_is_none() {
    let stage = Stage::new().await;
    let mut facts = stage.backed_up().await;
    let other = Digest::of(b"another database of the same name");
    for fact in &mut facts {
        if let Fact::BackupVerified { digest, .. } = fact {
            *digest = other;
        }
    }
    let refused = apply().apply(&stage.cx(4, facts), &NULL).await.unwrap_err();
    assert_eq!(refused.cause, Cause::Refused, "INV-7");
    let why = "no backup of `staff` was verified";
    assert!(refused.message.contains(why), "{}", refused.message);
}

#[tokio::test]
async fn a_backup_of_another_rollout_is_neither_proven_nor_restored() {
    let stage = Stage::new().await;
    let volume = tempfile::tempdir().unwrap();
    let from = volume.path().display().to_string();
    let args = json!({"database": "staff", "copies": [&from]});
    let backup: Backup = serde_json::from_value(args).unwrap();
    let cx = stage.bench.cx(2, vec![]);
    let mut facts = backup.apply(&cx, &NULL).await.unwrap().facts;
    let rollout: lockstep_proto::ids::RolloutId = "ro_0102030405ff".parse().unwrap();
    for args in [
        json!({"database": "staff"}),
        json!({"database": "staff", "from": &from}),
    ] {
        let verify: VerifyBackup = serde_json::from_value(args).unwrap();
        let mut cx = stage.bench.cx(3, facts.clone());
        cx.key.rollout = rollout.clone();
        let refused = verify.apply(&cx, &NULL).await.unwrap_err();
        assert!(refused.hint.is_some(), "{refused:?}");
        facts.extend(
            verify
                .apply(&stage.bench.cx(3, facts.clone()), &NULL)
                .await
                .unwrap()
                .facts,
        );
    }
    let restore: Restore = serde_json::from_value(json!({"database": "staff"})).unwrap();
    let mut cx = stage.bench.cx(5, facts);
    cx.key.rollout = rollout;
    let refused = restore.apply(&cx, &NULL).await.unwrap_err();
    let why = "no verified backup of `staff` of this rollout";
    assert!(refused.message.contains(why), "{}", refused.message);
}
