//! With the real tool on a real server: the migrations of the example application.

use std::fs;
use std::time::Duration;

use lockstep_proto::action::migration::{Guards, Plan, RequiredBackup, Verify};
use lockstep_proto::values::Period;

use super::stage::{NEW, OLD, Stage, apply};
use super::*;
use crate::actions::migration::alike;

const NULL: Value = Value::Null;

fn plan(to: &str) -> Plan {
    alike::plan(apply(), to)
}

fn downgrade(to: &str) -> Downgrade {
    alike::downgrade(apply(), to)
}

fn state(done: &Done) -> &Fact {
    done.facts
        .iter()
        .find(|fact| matches!(fact, Fact::State { .. }))
        .unwrap()
}

#[tokio::test]
async fn a_migration_goes_up_behind_a_proven_backup_and_comes_back_to_the_same_state() {
    let stage = Stage::new().await;
    let fence = stage.fence();
    let fenced = fence
        .apply(&stage.bench.cx(1, vec![]), &NULL)
        .await
        .unwrap();
    let mut facts = plan("head")
        .apply(&stage.cx(0, vec![]), &NULL)
        .await
        .unwrap()
        .facts;
    facts.extend(stage.backed_up().await);
    let act = apply();
    let cx = stage.cx(4, facts.clone());
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let before = act.before(&cx).await.unwrap();
    assert_eq!(before, json!({"revision": OLD}));
    let done = act.apply(&cx, &before).await.unwrap();
    assert!(done.changed);
    let fact = Fact::Revision {
        database: "staff".into(),
        before: OLD.into(),
        after: NEW.into(),
    };
    assert_eq!(done.facts, [fact]);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    // Once is enough.
    let again = act
        .apply(&stage.cx(4, facts.clone()), &before)
        .await
        .unwrap();
    assert!(!again.changed);
    let back = act
        .undo(&stage.undo(4, facts.clone()), &before)
        .await
        .unwrap();
    assert!(back.changed);
    assert!(
        !act.undo(&stage.undo(4, facts), &before)
            .await
            .unwrap()
            .changed
    );
    let undone = fence
        .undo(&stage.bench.undo(1, vec![]), &NULL)
        .await
        .unwrap();
    assert_eq!(state(&fenced), state(&undone));
    let Fact::State { text, .. } = state(&undone) else {
        unreachable!("it is a state")
    };
    assert_eq!(text, "4 tables, 206 rows, revision 0001_base");
    let ledger = [format!("upgrade {NEW}"), format!("downgrade {NEW}")];
    assert_eq!(stage.ledger(), ledger);
}

#[tokio::test]
async fn a_migration_is_refused_without_proof_or_behind_another_fence() {
    let stage = Stage::new().await;
    let failed = apply()
        .apply(&stage.cx(4, vec![]), &NULL)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("no backup of `staff` was verified"),
        "{}",
        failed.message
    );
    let fence = stage.fence();
    fence
        .apply(&stage.bench.cx(1, vec![]), &NULL)
        .await
        .unwrap();
    let mut facts = stage.backed_up().await;
    fence
        .undo(&stage.bench.undo(1, vec![]), &NULL)
        .await
        .unwrap();
    let failed = apply()
        .apply(&stage.cx(4, facts.clone()), &NULL)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("the fence has been lowered"),
        "{}",
        failed.message
    );
    // Only the backup, without its proof.
    facts.retain(|fact| !matches!(fact, Fact::BackupVerified { .. }));
    assert!(apply().apply(&stage.cx(4, facts), &NULL).await.is_err());
    assert_eq!(stage.revision().await, OLD);
    assert_eq!(stage.ledger(), Vec::<String>::new());
}

#[tokio::test]
async fn without_the_fence_a_schema_does_not_go_back_by_itself() {
    let stage = Stage::new().await;
    let fence = stage.fence();
    fence
        .apply(&stage.bench.cx(1, vec![]), &NULL)
        .await
        .unwrap();
    let facts = stage.backed_up().await;
    let act = apply();
    let before = json!({"revision": OLD});
    act.apply(&stage.cx(4, facts.clone()), &before)
        .await
        .unwrap();
    fence
        .undo(&stage.bench.undo(1, vec![]), &NULL)
        .await
        .unwrap();
    stage
        .bench
        .sql(
            "INSERT INTO public.employees (first_name, last_name, hired_on) \
             VALUES ('n', 'n', now())",
        )
        .await;
    let failed = act
        .undo(&stage.undo(4, facts.clone()), &before)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    for why in [
        "the fence has been lowered",
        "employees: 1 row written since",
    ] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    assert!(
        !failed.message.contains("departments"),
        "{}",
        failed.message
    );
    assert_eq!(stage.revision().await, NEW);
    // A plan that says so may go down; its backup must then be behind the fence that is up.
    let failed = downgrade(OLD)
        .apply(&stage.cx(5, facts), &NULL)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    fence
        .apply(&stage.bench.cx(1, vec![]), &NULL)
        .await
        .unwrap();
    let facts = stage.backed_up().await;
    let done = downgrade(OLD)
        .apply(&stage.cx(5, facts.clone()), &NULL)
        .await
        .unwrap();
    assert!(done.changed);
    let before = json!({"revision": NEW});
    let back = downgrade(OLD)
        .undo(&stage.undo(5, facts), &before)
        .await
        .unwrap();
    assert!(
        back.changed && matches!(&back.facts[..], [_, Fact::Note { .. }]),
        "{back:?}"
    );
    assert_eq!(stage.revision().await, NEW);
}

#[tokio::test]
async fn lock_timeouts_are_tried_again_and_named_when_they_last() {
    let stage = Stage::new().await;
    let act = Apply {
        lock_timeout: Period(150),
        ..apply()
    };
    let holder = stage.bench.session("as_owner").await;
    let hold = "BEGIN; LOCK public.employees IN ACCESS SHARE MODE";
    holder.run("", hold).await.unwrap();
    let release = async {
        // Longer than one try takes.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        holder.run("", "ROLLBACK").await.unwrap();
    };
    let (done, ()) = tokio::join!(stage.free(&act), release);
    assert!(done.unwrap().changed);
    assert!(
        stage
            .ledger()
            .iter()
            .all(|line| *line == format!("upgrade {NEW}"))
    );
    let free = Apply {
        backup: RequiredBackup::None,
        ..act
    };
    free.undo(&stage.undo(4, vec![]), &json!({"revision": OLD}))
        .await
        .unwrap();
    holder.run("", hold).await.unwrap();
    let failed = stage.free(&free).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Step);
    assert!(
        failed.message.contains("lock timeout"),
        "{}",
        failed.message
    );
    assert!(
        failed.message.contains("still at 0001_base"),
        "{}",
        failed.message
    );
    assert!(failed.hint.unwrap().contains("pg_blocking_pids"));
    assert!(!failed.changed);
}

#[tokio::test]
async fn a_migration_that_holds_others_up_is_ended_and_leaves_nothing() {
    let stage = Stage::new().await;
    let act = Apply {
        guards: Guards {
            longest_wait: Some(Period(100)),
            ..Guards::default()
        },
        lock_timeout: Period::seconds(60),
        ..apply()
    };
    // The migration waits for somebody who reads, and others wait for the migration.
    let holder = stage.bench.session("as_owner").await;
    let hold = "BEGIN; LOCK public.employees IN ACCESS SHARE MODE";
    holder.run("", hold).await.unwrap();
    let others = async {
        let waits = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
             AND datname = '{}' AND starts_with(application_name, 'lockstep:')",
            stage.bench.name
        );
        while stage.bench.ask(&waits).await == "0" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let reader = stage.bench.session("as_owner").await;
        let sql = "SELECT count(*) FROM public.employees";
        reader.query("", sql, &[]).await.unwrap();
    };
    let (failed, ()) = tokio::join!(stage.free(&act), others);
    let failed = failed.unwrap_err();
    for why in [
        "the migration was ended: a session has waited",
        "`staff` is at 0001_base",
    ] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    assert!(!failed.changed);
    assert_eq!(stage.revision().await, OLD);
    holder.run("", "ROLLBACK").await.unwrap();
    assert!(stage.free(&act).await.unwrap().changed);
}

#[tokio::test]
async fn a_failed_migration_says_where_the_database_is() {
    let stage = Stage::new().await;
    stage
        .bench
        .sql("CREATE TABLE public.employee_fields (a int)")
        .await;
    let failed = stage.free(&apply()).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Step);
    assert!(
        failed.message.contains("already exists"),
        "{}",
        failed.message
    );
    assert!(
        failed.message.contains("`staff` is still at 0001_base"),
        "{}",
        failed.message
    );
    assert!(!failed.changed && !failed.last_lines.is_empty());
    stage.bench.sql("DROP TABLE public.employee_fields").await;
    // The same, but a part of it was committed before.
    let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
    let file = stage.bench.host.path().join(file);
    let script = fs::read_to_string(&file).unwrap();
    let script = script.replacen(
        "def upgrade():\n",
        "def upgrade():\n    op.execute('CREATE TABLE early (a int)')\n    with \
         op.get_context().autocommit_block():\n        op.execute('CREATE INDEX CONCURRENTLY x ON \
         users (id)')\n    op.execute('SELECT 1/0')\n",
        1,
    );
    fs::write(&file, script).unwrap();
    let failed = stage.free(&apply()).await.unwrap_err();
    assert!(
        failed.message.contains("division by zero"),
        "{}",
        failed.message
    );
    assert!(failed.changed);
    assert!(failed.hint.unwrap().contains("outside of a transaction"));
}

#[tokio::test]
async fn what_a_killed_attempt_left_is_ended_before_the_next_begins() {
    let stage = Stage::new().await;
    let old = stage.cx(4, vec![]);
    // As a killed step process leaves it: a session with the lock, and the tool's backend at work.
    let database = Database::find(&old, "staff").unwrap();
    let left = guard::lock(&old, &database).await.unwrap();
    let backend = database.connect(&old).await.unwrap();
    backend
        .run("", "BEGIN; LOCK public.employees IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let act = Apply {
        backup: RequiredBackup::None,
        ..apply()
    };
    // Another step must wait.
    let other = act.apply(&stage.cx(6, vec![]), &NULL).await.unwrap_err();
    assert!(
        other.message.contains("being migrated by lockstep:"),
        "{}",
        other.message
    );
    let cx = stage.cx(4, vec![]);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    assert!(left.run("", "SELECT 1").await.is_err());
    assert!(backend.run("", "SELECT 1").await.is_err());
    assert!(act.apply(&cx, &NULL).await.unwrap().changed);
}

#[tokio::test]
async fn the_revision_is_told_and_held_against_what_is_expected() {
    let stage = Stage::new().await;
    let current = alike::current(apply());
    let done = current.apply(&stage.cx(0, vec![]), &NULL).await.unwrap();
    assert_eq!(
        done.summary,
        "`staff` is at 0001_base (behind: 0002_extended_fields)"
    );
    let verify = alike::verify(apply(), "head");
    let failed = verify.apply(&stage.cx(0, vec![]), &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    let old = Verify {
        to: OLD.into(),
        ..verify.clone()
    };
    old.apply(&stage.cx(0, vec![]), &NULL).await.unwrap();
    for (act, why) in [
        (
            Verify {
                to: "-1".into(),
                ..verify.clone()
            },
            "names no revision",
        ),
        (
            Verify {
                to: "+1".into(),
                ..verify.clone()
            },
            "names no revision",
        ),
        (
            Verify {
                to: "nothing".into(),
                ..verify.clone()
            },
            "Can't locate revision",
        ),
        (
            Verify {
                release: "v9".into(),
                ..verify.clone()
            },
            "release v9 of `employees` is not on",
        ),
        (
            Verify {
                release: "../v9".into(),
                ..verify.clone()
            },
            "leaves the release",
        ),
        (
            Verify {
                program: "venv/bin/none".into(),
                ..verify.clone()
            },
            "venv/bin/none is not there",
        ),
        (
            Verify {
                app: "other".into(),
                ..verify.clone()
            },
            "no application `other`",
        ),
    ] {
        let failed = act.apply(&stage.cx(0, vec![]), &NULL).await.unwrap_err();
        assert!(failed.message.contains(why), "{why}: {}", failed.message);
    }
    let mut dry = stage.cx(0, vec![]);
    dry.dry_run = true;
    let later = Verify {
        release: "v9".into(),
        ..verify
    };
    assert!(matches!(later.probe(&dry).await.unwrap(), Probe::Unmet(_)));
    let later = Apply {
        release: "v9".into(),
        ..apply()
    };
    assert!(matches!(later.probe(&dry).await.unwrap(), Probe::Unmet(_)));
}

#[tokio::test]
async fn no_password_is_in_the_tools_arguments_or_environment_or_left_behind() {
    let stage = Stage::new().await;
    let holder = stage.bench.session("as_owner").await;
    holder
        .run("", "BEGIN; LOCK public.employees IN ACCESS SHARE MODE")
        .await
        .unwrap();
    let cx = stage.cx(4, vec![]);
    let act = Apply {
        backup: RequiredBackup::None,
        lock_timeout: Period(30_000),
        ..apply()
    };
    let look = async {
        let mut seen = 0;
        for _ in 0..400 {
            for entry in fs::read_dir("/proc").unwrap().flatten() {
                let read = |name| fs::read(entry.path().join(name)).unwrap_or_default();
                let (argv, env) = (read("cmdline"), read("environ"));
                let (argv, env) = (
                    String::from_utf8_lossy(&argv),
                    String::from_utf8_lossy(&env),
                );
                assert!(!argv.contains("canary-pa55"), "{argv}");
                if env.contains(&format!("postgresql://{}_owner@", stage.bench.name)) {
                    assert!(!env.contains("canary-pa55"));
                    seen += 1;
                }
            }
            // Until the tool waits for the lock.
            let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND \
                         starts_with(application_name, 'lockstep:')";
            if seen > 0 && stage.bench.ask(waits).await != "0" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        holder.run("", "ROLLBACK").await.unwrap();
        seen
    };
    let (done, seen) = tokio::join!(act.apply(&cx, &NULL), look);
    assert!(seen > 0, "the tool was seen");
    assert!(done.unwrap().changed);
    for kept in fs::read_dir(&cx.dir).unwrap().flatten() {
        let text = fs::read_to_string(kept.path()).unwrap();
        assert!(!text.contains("canary-pa55"), "{kept:?}");
    }
}
