//! With the real tool on a real server: what a rollback may do to a schema once applications could
//! write again.

use std::fs;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::postgres::Unfence;

use super::stage::Stage;
use super::tests::{NEW, OLD, apply};
use super::*;

const NULL: Value = Value::Null;

/// A stage that was migrated behind a fence, with what the migration's undo gets to know.
struct Migrated {
    stage: Stage,
    act: Apply,
    facts: Vec<Fact>,
    unfence: Unfence,
}

impl Migrated {
    async fn by(act: Apply, change: impl Fn(&str) -> String) -> Self {
        let stage = Stage::new().await;
        let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
        let file = stage.bench.host.path().join(file);
        let script = fs::read_to_string(&file).unwrap();
        fs::write(&file, change(&script)).unwrap();
        let fence = stage.fence();
        let cx = stage.bench.cx(1, vec![]);
        fence.apply(&cx, &NULL).await.unwrap();
        let facts = stage.backed_up().await;
        let unfence = Unfence {
            database: fence.database,
            via: fence.via,
            roles: fence.roles,
            left_by: None,
        };
        act.apply(&stage.cx(4, facts.clone()), &NULL).await.unwrap();
        assert_eq!(stage.revision().await, NEW);
        Self {
            stage,
            act,
            facts,
            unfence,
        }
    }

    /// Lowers the fence, lets something be written, and raises the fence again, as a rollback does.
    async fn bake(&self, sql: &str) {
        let cx = self.stage.bench.cx(6, vec![]);
        let before = self.unfence.before(&cx).await.unwrap();
        self.unfence.apply(&cx, &before).await.unwrap();
        self.stage.bench.sql(sql).await;
        let cx = self.stage.bench.undo(6, vec![]);
        self.unfence.undo(&cx, &before).await.unwrap();
    }

    async fn undo(&self) -> Result<Done, Failure> {
        let before = json!({"revision": OLD});
        let cx = self.stage.undo(4, self.facts.clone());
        self.act.undo(&cx, &before).await
    }
}

#[tokio::test]
async fn a_schema_goes_back_only_if_no_row_is_lost() {
    let migrated = Migrated::by(apply(), str::to_owned).await;
    let stage = &migrated.stage;
    migrated
        .bake(
            "INSERT INTO public.employees (first_name, last_name, hired_on) VALUES \
             ('n', 'n', now()), ('o', 'o', NULL); \
             INSERT INTO public.employee_fields VALUES (1, 'a', 'b'), (2, 'a', 'b'), (3, 'a', 'b')",
        )
        .await;
    let failed = migrated.undo().await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    assert!(
        failed.message.ends_with(
            "the fence was lowered and raised again in between. employee_fields: 3 rows written \
             since; employees: 1 row written since"
        ),
        "{}",
        failed.message
    );
    assert!(!failed.changed);
    assert_eq!(stage.revision().await, NEW);
    // Somebody takes these rows away, and writes beside what goes.
    let cx = stage.bench.cx(6, vec![]);
    let before = migrated.unfence.before(&cx).await.unwrap();
    migrated.unfence.apply(&cx, &before).await.unwrap();
    stage
        .bench
        .sql(
            "DELETE FROM public.employee_fields; DELETE FROM public.employees WHERE last_name = 'n'; \
             UPDATE public.departments SET name = 'other' WHERE id = 1",
        )
        .await;
    let failed = migrated.undo().await.unwrap_err();
    assert!(
        failed.message.contains("but no fence keeps it so"),
        "{}",
        failed.message
    );
    assert_eq!(stage.revision().await, NEW);
    migrated
        .unfence
        .undo(&stage.bench.undo(6, vec![]), &before)
        .await
        .unwrap();
    assert!(migrated.undo().await.unwrap().changed);
    assert_eq!(stage.revision().await, OLD);
    let sql = "SELECT count(*)::text FROM public.employees";
    let session = stage.bench.session("as_owner").await;
    let rows = session.value("", sql).await.unwrap().unwrap();
    assert_eq!(rows, "201", "nothing was lost");
}

#[tokio::test]
async fn a_way_back_that_works_on_rows_is_held_against_all_of_them() {
    let change = |script: &str| {
        let delete = "def downgrade():\n    op.execute('DELETE FROM departments WHERE id > 100')\n";
        script.replacen("def downgrade():\n", delete, 1)
    };
    let migrated = Migrated::by(apply(), change).await;
    migrated
        .bake("INSERT INTO public.departments (id, name) VALUES (101, 'new')")
        .await;
    let failed = migrated.undo().await.unwrap_err();
    assert!(
        failed
            .message
            .ends_with("in between. departments: 1 row written since"),
        "INV-6: {}",
        failed.message
    );
    // As if the process had died between the tool's end and its own: the migration's rows count.
    for dir in crate::actions::files::attempts(&migrated.stage.cx(4, vec![])) {
        let _ = fs::remove_file(dir.join("migration-through.json"));
    }
    let failed = migrated.undo().await.unwrap_err();
    assert!(
        failed.message.ends_with(
            "in between. departments: 1 row written since; employees: 200 rows written since"
        ),
        "INV-6: {}",
        failed.message
    );
    assert_eq!(migrated.stage.revision().await, NEW);
}

#[tokio::test]
async fn a_schema_that_only_grew_stays_if_the_plan_says_so() {
    let keep = Apply {
        undo_by: UndoBy::Keep,
        ..apply()
    };
    let migrated = Migrated::by(keep, str::to_owned).await;
    let undone = migrated.undo().await.unwrap();
    assert!(!undone.changed);
    assert!(
        matches!(&undone.facts[..], [Fact::Note { value, .. }] if value.contains("all that was")),
        "{undone:?}"
    );
    // One that had taken something away could not be lived with.
    let sql = "ALTER TABLE public.departments DROP COLUMN name; \
               ALTER TABLE public.employees ADD must int; UPDATE public.employees SET must = 1; \
               ALTER TABLE public.employees ALTER must SET NOT NULL";
    migrated.stage.bench.sql(sql).await;
    let failed = migrated.undo().await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    for why in ["departments.name is gone", "employees.must must be given"] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    assert_eq!(migrated.stage.revision().await, NEW);
}
