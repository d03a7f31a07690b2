//! With the real tool on a real server: migrations that are cut off, or wait too long, when a part
//! of them is there already.

use std::fs;
use std::time::Duration;

use lockstep_proto::action::migration::RequiredBackup;
use lockstep_proto::values::Period;

use super::stage::Stage;
use super::stage::{NEW, OLD, apply};
use super::*;
use crate::sql::Session;

const NULL: Value = Value::Null;

/// Doubles the balance, commits that, and then builds an index outside of a transaction.
const IN_PARTS: &str = "    op.execute('UPDATE acc SET bal = bal * 2')\n    with \
     op.get_context().autocommit_block():\n        op.execute('CREATE INDEX CONCURRENTLY i ON acc \
     (bal)')\n";

fn act() -> Apply {
    Apply {
        backup: RequiredBackup::None,
        lock_timeout: Period(60_000),
        ..apply()
    }
}

/// A stage with a balance of 100, where the migration begins with these lines on its way.
async fn stage(way: &str, lines: &str) -> Stage {
    let stage = Stage::new().await;
    stage
        .bench
        .sql("CREATE TABLE public.acc (bal int); INSERT INTO public.acc VALUES (100)")
        .await;
    let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
    let file = stage.bench.host.path().join(file);
    let script = fs::read_to_string(&file).unwrap();
    let head = format!("def {way}():\n");
    fs::write(&file, script.replacen(&head, &format!("{head}{lines}"), 1)).unwrap();
    stage
}

async fn balance(stage: &Stage) -> String {
    let session = stage.bench.session("as_owner").await;
    let sql = "SELECT bal FROM public.acc";
    session.value("", sql).await.unwrap().unwrap()
}

/// Lets rows of `acc` change, but no index be built on it.
async fn hold(stage: &Stage) -> Session {
    let holder = stage.bench.session("as_owner").await;
    let hold = "BEGIN; LOCK public.acc IN SHARE UPDATE EXCLUSIVE MODE";
    holder.run("", hold).await.unwrap();
    holder
}

/// Ends an attempt, with its tool, once the tool waits for a lock.
async fn cut_off(stage: &Stage, attempt: impl Future<Output = Result<Done, Failure>>) {
    let waits = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
         AND datname = '{}' AND starts_with(application_name, 'lockstep:')",
        stage.bench.name
    );
    let waiting = async {
        while stage.bench.ask(&waits).await == "0" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        done = attempt => panic!("it ended by itself: {done:?}"),
        () = waiting => {}
    }
}

#[tokio::test]
async fn a_migration_in_parts_that_waits_too_long_is_not_tried_again() {
    let stage = stage("upgrade", IN_PARTS).await;
    let holder = hold(&stage).await;
    let act = Apply {
        lock_timeout: Period(150),
        ..act()
    };
    let failed = stage.free(&act).await.unwrap_err();
    assert_eq!(
        balance(&stage).await,
        "200",
        "INV-7: its first half ran once"
    );
    assert_eq!(stage.revision().await, OLD);
    assert!(
        failed.message.contains("lock timeout"),
        "{}",
        failed.message
    );
    assert!(failed.changed);
    let hint = failed.hint.unwrap();
    for why in ["a part of it is there", "pg_blocking_pids"] {
        assert!(hint.contains(why), "{hint}");
    }
    holder.run("", "ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn a_migration_in_parts_that_is_cut_off_is_left_to_people() {
    let stage = stage("upgrade", IN_PARTS).await;
    let cx = stage.cx(4, vec![]);
    // Nothing has begun.
    assert!(matches!(act().probe(&cx).await.unwrap(), Probe::Absent(_)));
    let _holder = hold(&stage).await;
    cut_off(&stage, act().apply(&cx, &NULL)).await;
    assert_eq!(balance(&stage).await, "200");
    let Probe::NoProof(why) = act().probe(&cx).await.unwrap() else {
        panic!("INV-1: half of it is there")
    };
    for part in [
        OLD,
        NEW,
        "look whether a part of it is there",
        // It waits before the index is there; its rows were changed.
        "the schema is as it was before; whether data is, it does not say",
    ] {
        assert!(why.contains(part), "{why}");
    }
    // Somebody brings the rest by hand.
    stage
        .bench
        .sql(&format!(
            "UPDATE public.alembic_version SET version_num = '{NEW}'"
        ))
        .await;
    assert!(matches!(act().probe(&cx).await.unwrap(), Probe::Present(_)));
}

#[tokio::test]
async fn a_migration_in_one_transaction_that_is_cut_off_is_repeated() {
    let stage = stage(
        "upgrade",
        "    op.execute('UPDATE acc SET bal = bal * 2')\n",
    )
    .await;
    let cx = stage.cx(4, vec![]);
    let holder = stage.bench.session("as_owner").await;
    let lock = "BEGIN; LOCK public.employees IN ACCESS SHARE MODE";
    holder.run("", lock).await.unwrap();
    cut_off(&stage, act().apply(&cx, &NULL)).await;
    assert!(matches!(act().probe(&cx).await.unwrap(), Probe::Absent(_)));
    assert_eq!(balance(&stage).await, "100");
    holder.run("", "ROLLBACK").await.unwrap();
    let again = act().apply(&stage.cx(4, vec![]), &NULL).await.unwrap();
    assert!(again.changed);
    assert_eq!(balance(&stage).await, "200");
}

#[tokio::test]
async fn a_way_back_in_parts_that_is_cut_off_is_left_to_people() {
    let stage = stage("downgrade", IN_PARTS).await;
    stage.free(&apply()).await.unwrap();
    let before = json!({"revision": OLD});
    let cx = stage.undo(4, vec![]);
    let holder = hold(&stage).await;
    Box::pin(cut_off(&stage, act().undo(&cx, &before))).await;
    assert_eq!(
        (balance(&stage).await, stage.revision().await),
        ("200".into(), NEW.into())
    );
    assert!(matches!(act().probe(&cx).await.unwrap(), Probe::NoProof(_)));
    holder.run("", "ROLLBACK").await.unwrap();
    stage.bench.sql("DROP INDEX IF EXISTS public.i").await;
    // One that came to its end before it could say so.
    let cx = stage.undo(4, vec![]);
    act().undo(&cx, &before).await.unwrap();
    assert!(matches!(act().probe(&cx).await.unwrap(), Probe::Absent(_)));
}
