//! With the real tool on a real server: a migrating phase that fails after each of its steps goes
//! back to counts, checksums and a fingerprint that equal the start (INV-6).

use std::fs;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::postgres::Compare;

use super::stage::{OLD, apply};
use super::stage::{Stage, placed};
use super::*;
use crate::sql::cluster::as_owner;

const NULL: Value = Value::Null;

/// The steps of the phase, as far as a rollback counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Until {
    Fence,
    Backup,
    Verify,
    /// The migration itself fails, after its first statements.
    Broken,
    Apply,
    Compare,
}

/// Rollbacks, and how many of them ended where they began.
#[derive(Default, serde::Serialize)]
struct Rollbacks {
    rollbacks: u32,
    rollbacks_equal: u32,
}

fn state(done: &Done) -> Fact {
    let state = done
        .facts
        .iter()
        .find(|fact| matches!(fact, Fact::State { .. }));
    state.expect("the fence measures the database").clone()
}

/// Where a migration runs: by its owner, or where its backup is.
fn place(by: UndoBy, cx: Context) -> Context {
    placed(match by {
        UndoBy::Restore | UndoBy::Recover => cx,
        UndoBy::Downgrade | UndoBy::Keep => as_owner(cx),
    })
}

/// Goes forward until a step, then back. Returns the states before and after.
async fn there_and_back(stage: &Stage, step: u16, until: Until, undo_by: UndoBy) -> (Fact, Fact) {
    let bench = &stage.bench;
    let fence = stage.fence();
    let raised = fence.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let mut facts = vec![];
    if until >= Until::Backup {
        facts = stage.backed_up().await;
    }
    if until == Until::Backup {
        facts.retain(|fact| !matches!(fact, Fact::BackupVerified { .. }));
    }
    let act = Apply { undo_by, ..apply() };
    if until >= Until::Broken {
        let broken = until == Until::Broken;
        if broken {
            bench
                .sql("CREATE VIEW public.employee_fields AS SELECT 1 AS x")
                .await;
        }
        let cx = place(undo_by, bench.cx(step, facts.clone()));
        let gone = act.apply(&cx, &NULL).await;
        assert_eq!(gone.is_ok(), !broken, "{gone:?}");
        if broken {
            bench.sql("DROP VIEW public.employee_fields").await;
        }
    }
    if until == Until::Compare {
        let compare = Compare {
            tables: vec!["employees".into(), "departments".into()],
            ..compare()
        };
        let cx = bench.cx(5, facts.clone());
        compare.apply(&cx, &NULL).await.unwrap();
    }
    if until >= Until::Broken {
        let cx = place(undo_by, bench.undo(step, facts.clone()));
        act.undo(&cx, &json!({"revision": OLD})).await.unwrap();
    }
    let lowered = fence.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    (state(&raised), state(&lowered))
}

fn compare() -> Compare {
    serde_json::from_value(json!({"database": "staff", "rows": "unchanged"})).unwrap()
}

/// Writes the figures where `make database` collects them.
fn report(found: &Rollbacks) {
    if let Some(directory) = std::env::var_os("LOCKSTEP_DATABASE_REPORT_DIR") {
        let path = std::path::Path::new(&directory).join("returns.json");
        fs::write(path, serde_json::to_vec_pretty(found).unwrap()).unwrap();
    }
}

#[tokio::test]
async fn a_phase_that_fails_after_any_step_goes_back_to_where_it_began() {
    let stage = Stage::new().await;
    let mut found = Rollbacks::default();
    let rollbacks = [
        (Until::Fence, UndoBy::Downgrade),
        (Until::Backup, UndoBy::Downgrade),
        (Until::Verify, UndoBy::Downgrade),
        (Until::Broken, UndoBy::Downgrade),
        (Until::Apply, UndoBy::Downgrade),
        (Until::Compare, UndoBy::Downgrade),
        (Until::Broken, UndoBy::Restore),
        (Until::Compare, UndoBy::Restore),
    ];
    for (step, (until, by)) in (10..).zip(rollbacks) {
        let (was, is) = there_and_back(&stage, step, until, by).await;
        found.rollbacks += 1;
        found.rollbacks_equal += u32::from(was == is);
        assert_eq!(was, is, "INV-6: after {until:?}, undone by {by:?}");
        // Applications are let in again.
        stage.bench.session("as_app").await;
    }
    report(&found);
}
