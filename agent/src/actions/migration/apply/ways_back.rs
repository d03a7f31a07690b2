//! With the real tool on a real server: what a rollback may do to a schema once applications could
//! write again.

use std::fs;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::postgres::Unfence;
use lockstep_proto::ids::LossId;

use super::stage::{NEW, OLD, apply};
use super::stage::{Stage, placed};
use super::*;
use crate::sql::cluster::as_owner;

const NULL: Value = Value::Null;

/// A stage that was migrated behind a fence, with what the migration's undo gets to know.
struct Migrated {
    stage: Stage,
    act: Apply,
    /// Of the fence that was raised first.
    fenced: Vec<Fact>,
    facts: Vec<Fact>,
    unfence: Unfence,
}

impl Migrated {
    async fn by(act: Apply, change: impl Fn(&str) -> String) -> Self {
        let migrated = Self::about_to(act, change).await;
        migrated.apply().await.unwrap();
        assert_eq!(migrated.stage.revision().await, NEW);
        migrated
    }

    /// Before the migration itself.
    async fn about_to(act: Apply, change: impl Fn(&str) -> String) -> Self {
        let stage = Stage::new().await;
        let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
        let file = stage.bench.host.path().join(file);
        let script = fs::read_to_string(&file).unwrap();
        fs::write(&file, change(&script)).unwrap();
        let fence = stage.fence();
        let cx = stage.bench.cx(1, vec![]);
        let fenced = fence.apply(&cx, &NULL).await.unwrap().facts;
        let facts = stage.backed_up().await;
        let unfence = Unfence {
            database: fence.database,
            via: fence.via,
            roles: fence.roles,
            left_by: None,
        };
        Self {
            stage,
            act,
            fenced,
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

    /// Where the migration runs: a restore needs the database's host, and its superuser.
    fn place(&self, cx: Context) -> Context {
        match self.act.undo_by {
            UndoBy::Restore | UndoBy::Recover => placed(cx),
            UndoBy::Downgrade | UndoBy::Keep => placed(as_owner(cx)),
        }
    }

    async fn apply(&self) -> Result<Done, Failure> {
        let cx = self.place(self.stage.bench.cx(4, self.facts.clone()));
        self.act.apply(&cx, &NULL).await
    }

    /// Changes a file that the attempts have kept; `None` takes it away.
    fn kept(&self, name: &str, text: Option<&str>) {
        for dir in crate::actions::files::attempts(&self.stage.cx(4, vec![])) {
            let path = dir.join(name);
            match text.filter(|_| path.exists()) {
                Some(text) => fs::write(path, text).unwrap(),
                None => drop(fs::remove_file(path)),
            }
        }
    }

    /// Changes one field of the backup's manifest. Returns what it was.
    fn manifest(&self, field: &str, value: Value) -> Value {
        let config = &self.stage.bench.cx(4, vec![]).config;
        let directory = config.postgres["staff"].backup_dir.clone();
        let directory = directory.unwrap_or_else(|| config.state_dir.join("backups"));
        let backup = fs::read_dir(directory).unwrap().next().unwrap().unwrap();
        let path = backup.path().join("manifest.json");
        let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let was = std::mem::replace(&mut manifest[field], value);
        fs::write(&path, manifest.to_string()).unwrap();
        was
    }

    async fn undo(&self) -> Result<Done, Failure> {
        self.undo_accepting(None).await
    }

    /// The same with a person's word on what it would lose.
    async fn undo_accepting(&self, loss: Option<LossId>) -> Result<Done, Failure> {
        let before = json!({"revision": OLD});
        let mut facts = self.facts.clone();
        let by = || "olga".to_owned();
        facts.extend(loss.map(|loss| Fact::LossAccepted { loss, by: by() }));
        let cx = self.place(self.stage.bench.undo(4, facts));
        self.act.undo(&cx, &before).await
    }

    /// What an undo refuses to lose.
    async fn loss(&self) -> LossId {
        let failed = self.undo().await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
        LossId::in_message(&failed.message).expect("it is shown")
    }

    /// The databases beside the live one.
    async fn beside(&self) -> Vec<String> {
        let name = &self.stage.bench.name;
        let sql = format!(
            "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database \
             WHERE starts_with(datname, '{name}__')"
        );
        let names = self.stage.bench.ask(&sql).await;
        names.split_whitespace().map(str::to_owned).collect()
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
        failed
            .message
            .ends_with(" employee_fields: 3 rows written since; employees: 1 row written since"),
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
        failed
            .message
            .ends_with("what is still written until it is back: no fence is up"),
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
            .ends_with(") departments: 1 row written since"),
        "INV-6: {}",
        failed.message
    );
    // As if the process had died between the tool's end and its own: the migration's rows count.
    migrated.kept("migration-through.json", None);
    let failed = migrated.undo().await.unwrap_err();
    assert!(
        failed
            .message
            .ends_with(") departments: 1 row written since; employees: 200 rows written since"),
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
        matches!(&undone.facts[..], [Fact::Note { value, .. }] if value.contains("no table with fewer rows")),
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
    // Nobody knows any more what there was.
    for (text, why) in [(Some("{"), "cannot be read"), (None, "was not recorded")] {
        migrated.kept("migration-began.json", text);
        let failed = migrated.undo().await.unwrap_err();
        assert!(failed.message.contains(why), "INV-6: {}", failed.message);
    }
}

/// Lets the release's migration begin a way with these lines.
fn beginning(way: &str, lines: &str) -> impl Fn(&str) -> String {
    let head = format!("def {way}():\n");
    let with = format!("{head}    {}\n", lines.replace('\n', "\n    "));
    move |script| script.replacen(&head, &with, 1)
}

#[tokio::test]
async fn a_schema_does_not_stay_if_the_migration_took_rows_or_came_half_way() {
    let keep = Apply {
        undo_by: UndoBy::Keep,
        ..apply()
    };
    let delete = "with op.get_context().autocommit_block():\n    \
                  op.execute('DELETE FROM employees WHERE id <= 3')";
    let migrated = Migrated::by(keep, beginning("upgrade", delete)).await;
    let why = "employees has 197 rows, and had 200";
    let refused = async || {
        let failed = migrated.undo().await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused);
        assert!(failed.message.contains(why), "INV-6: {}", failed.message);
        failed.message
    };
    refused().await;
    // As if it had died before it could write the revision, or say that it was through.
    migrated.kept("migration-through.json", None);
    let sql = format!("UPDATE public.alembic_version SET version_num = '{OLD}'");
    migrated.stage.bench.sql(&sql).await;
    let message = refused().await;
    for part in [
        "employee_fields is new",
        "employees has other columns (hired_on)",
    ] {
        assert!(message.contains(part), "INV-6: {message}");
    }
}

#[tokio::test]
async fn a_way_back_that_its_sql_does_not_show_is_held_against_all_rows() {
    let hidden = "from alembic import context\nif not context.is_offline_mode():\n    \
                  op.execute('DELETE FROM departments WHERE id > 100')";
    let migrated = Migrated::by(apply(), beginning("downgrade", hidden)).await;
    migrated
        .bake("INSERT INTO public.departments (id, name) VALUES (101, 'new')")
        .await;
    let failed = migrated.undo().await.unwrap_err();
    let why = "departments: 1 row written since";
    assert!(failed.message.ends_with(why), "INV-6: {}", failed.message);
    assert_eq!(migrated.stage.revision().await, NEW);
}

#[tokio::test]
async fn a_fence_that_falls_while_the_schema_goes_down_is_told_loudly() {
    let open = "op.execute(\"DO $$ BEGIN EXECUTE 'GRANT CONNECT ON DATABASE ' || \
                quote_ident(current_database()) || ' TO PUBLIC'; END $$\")";
    let migrated = Migrated::by(apply(), beginning("downgrade", open)).await;
    migrated.bake("SELECT 1").await;
    let failed = migrated.undo().await.unwrap_err();
    assert!(failed.changed);
    let why = "did not hold until then";
    assert!(failed.message.contains(why), "INV-6: {}", failed.message);
    assert_eq!(migrated.stage.revision().await, OLD);
}

fn by_restore() -> Apply {
    Apply {
        undo_by: UndoBy::Restore,
        ..apply()
    }
}

#[tokio::test]
async fn a_backup_takes_the_place_of_a_migrated_database_which_is_kept() {
    let migrated = Migrated::by(by_restore(), str::to_owned).await;
    let bench = &migrated.stage.bench;
    // As an undo leaves it that died in the middle of the swap.
    let cx = bench.undo(4, vec![]);
    let rollout = cx.key.rollout.as_str().trim_start_matches("ro_");
    let left = format!("{}__restore_{rollout}_0_4_{}", bench.name, cx.key.attempt);
    let session = bench.session("maintenance").await;
    session
        .run("", &format!("CREATE DATABASE {left}"))
        .await
        .unwrap();
    let close = format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", bench.name);
    session.run("", &close).await.unwrap();
    let undone = migrated.undo().await.unwrap();
    assert!(undone.changed);
    assert_eq!(migrated.stage.revision().await, OLD);
    let kept = migrated.beside().await;
    let [old] = kept.as_slice() else {
        panic!("{kept:?}")
    };
    assert!(old.contains("__failed_"), "{old}");
    let note = |done: &Done| {
        done.facts
            .iter()
            .any(|fact| matches!(fact, Fact::Note { value, .. } if value == old))
    };
    assert!(note(&undone), "{undone:?}");
    // Again, after a crash that left no outcome.
    let again = migrated.undo().await.unwrap();
    assert!(!again.changed && note(&again), "{again:?}");
    assert_eq!(migrated.beside().await.len(), 1);
    // Counts, checksums and fingerprint equal the start; applications are let in as before.
    let open = migrated.stage.fence();
    let open = open.undo(&bench.undo(1, vec![]), &NULL).await.unwrap();
    assert!(migrated.fenced.contains(&open.facts[0]), "INV-6: {open:?}");
    bench.session("as_app").await;
}

#[tokio::test]
async fn a_backup_that_nobody_can_compare_or_of_another_revision_takes_no_place() {
    let migrated = Migrated::by(by_restore(), str::to_owned).await;
    let some = json!(["row_counts", "schema"]);
    for (field, value, why) in [
        (
            "revisions",
            json!(["0000"]),
            "is at 0000, and the database was at",
        ),
        ("measured", some, "was not measured as a whole"),
        ("measured", json!([]), "was not measured as a whole"),
    ] {
        let was = migrated.manifest(field, value);
        let failed = migrated.undo().await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
        assert!(
            !failed.changed && failed.message.contains(why),
            "{failed:?}"
        );
        assert_eq!(migrated.beside().await, Vec::<String>::new());
        migrated.manifest(field, was);
    }
    assert_eq!(migrated.stage.revision().await, NEW);
    assert!(migrated.undo().await.unwrap().changed);
}

#[tokio::test]
async fn values_that_a_failed_migration_left_are_restored_too() {
    let halfway = "with op.get_context().autocommit_block():\n    \
                   op.execute(\"UPDATE departments SET name = name || 'x'\")\n\
                   op.execute('SELECT 1/0')";
    let migrated = Migrated::about_to(by_restore(), beginning("upgrade", halfway)).await;
    migrated.apply().await.unwrap_err();
    let names = async || {
        let session = migrated.stage.bench.session("as_owner").await;
        let sql = "SELECT string_agg(name, ' ' ORDER BY id) FROM public.departments";
        session.value("", sql).await.unwrap().unwrap()
    };
    assert_eq!(names().await, "d1x d2x d3x d4x d5x");
    assert_eq!(migrated.stage.revision().await, OLD);
    assert!(migrated.undo().await.unwrap().changed, "INV-6");
    assert_eq!(names().await, "d1 d2 d3 d4 d5");
    assert!(!migrated.undo().await.unwrap().changed);
}

#[tokio::test]
async fn a_restore_that_would_lose_rows_names_them_without_the_migrations_own() {
    let migrated = Migrated::by(by_restore(), str::to_owned).await;
    migrated
        .bake(
            "INSERT INTO public.departments (name) VALUES ('new'); \
             DELETE FROM public.employees WHERE id IN (7, 8)",
        )
        .await;
    let failed = migrated.undo().await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    assert!(
        failed.message.ends_with(
            "departments: 1 row written since; employees: 2 rows of the 200 of before changed or \
             deleted"
        ),
        "{}",
        failed.message
    );
    assert!(!failed.changed);
    assert_eq!(migrated.stage.revision().await, NEW);
    assert_eq!(migrated.beside().await, Vec::<String>::new());
    // Nothing was begun where the backup is not at hand.
    let elsewhere = migrated.stage.bench.host.path().join("elsewhere");
    let mut cx = migrated.place(migrated.stage.bench.cx(5, migrated.facts.clone()));
    let config = std::sync::Arc::make_mut(&mut cx.config);
    config.postgres.get_mut("staff").unwrap().backup_dir = Some(elsewhere);
    let refused = restore::is_at_hand(&cx, "staff").unwrap_err();
    assert_eq!(refused.cause, Cause::Refused);
}

fn has_accepted(done: &Done, loss: &LossId) -> bool {
    let begins = format!("olga has accepted {loss}: ");
    let mut facts = done.facts.iter();
    facts.any(|fact| matches!(fact, Fact::Note { value, .. } if value.starts_with(&begins)))
}

#[tokio::test]
async fn what_a_person_has_accepted_goes_and_not_a_row_more() {
    let migrated = Migrated::by(apply(), str::to_owned).await;
    let insert = "INSERT INTO public.employee_fields VALUES";
    migrated.bake(&format!("{insert} (1, 'a', 'b')")).await;
    let one = migrated.loss().await;
    assert_eq!(migrated.loss().await, one, "the same loss");
    migrated.bake(&format!("{insert} (2, 'a', 'b')")).await;
    let failed = migrated.undo_accepting(Some(one.clone())).await;
    let failed = failed.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    let two = LossId::in_message(&failed.message).unwrap();
    assert_ne!(two, one);
    assert_eq!(migrated.stage.revision().await, NEW);
    // Nobody keeps others out: that is another loss.
    let cx = migrated.stage.bench.cx(6, vec![]);
    let before = migrated.unfence.before(&cx).await.unwrap();
    migrated.unfence.apply(&cx, &before).await.unwrap();
    let failed = migrated.undo_accepting(Some(two)).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused, "INV-6: {failed:?}");
    let open = LossId::in_message(&failed.message).unwrap();
    let hint = failed.hint.unwrap();
    assert!(
        hint.contains(&format!("0.4 {open} --reason TEXT`")),
        "{hint}"
    );
    let undone = migrated.undo_accepting(Some(open.clone())).await.unwrap();
    assert!(undone.changed && has_accepted(&undone, &open), "{undone:?}");
    assert_eq!(migrated.stage.revision().await, OLD);
}

#[tokio::test]
async fn a_restore_loses_what_a_person_has_accepted() {
    let migrated = Migrated::by(by_restore(), str::to_owned).await;
    let insert = "INSERT INTO public.departments (name) VALUES";
    migrated.bake(&format!("{insert} ('new')")).await;
    let one = migrated.loss().await;
    migrated.bake(&format!("{insert} ('newer')")).await;
    let failed = migrated.undo_accepting(Some(one)).await.unwrap_err();
    assert!(!failed.changed, "INV-6: {failed:?}");
    let two = LossId::in_message(&failed.message).unwrap();
    assert_eq!(migrated.beside().await, Vec::<String>::new());
    let undone = migrated.undo_accepting(Some(two.clone())).await.unwrap();
    assert!(undone.changed && has_accepted(&undone, &two), "{undone:?}");
    assert_eq!(migrated.stage.revision().await, OLD);
    assert_eq!(migrated.beside().await.len(), 1, "the old one is kept");
}
