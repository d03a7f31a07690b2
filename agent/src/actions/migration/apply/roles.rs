//! Migrations as a role of their own (`migrate_as`), on a real server.

use std::sync::Arc;

use lockstep_proto::action::migration::{Apply, Rehearse, RequiredBackup, Tool, UndoBy};
use lockstep_proto::order::Fact;
use lockstep_proto::report::Cause;
use serde_json::{Value, json};

use super::stage::{self as example, NEW, OLD, apply, placed};
use crate::actions::migration::alike;
use crate::actions::migration::tools::files::Stage;
use crate::actions::{Act as _, Probe};
use crate::sql::cluster::Bench;
use crate::sql::{application_name, literal};
use crate::step::Context;

const NULL: Value = Value::Null;

/// The password of the role of migrations: another than everybody else's.
const PASSWORD: &str = "of-migrations";

/// A role of migrations, which is a member of the database's owner.
pub(super) async fn migrator(bench: &mut Bench) -> String {
    bench.host.secret("migrator", PASSWORD);
    let role = format!("{}_migrator", bench.name);
    let sql = format!(
        "CREATE ROLE {role} LOGIN PASSWORD {} IN ROLE {}_owner",
        literal(PASSWORD),
        bench.name
    );
    bench
        .session("maintenance")
        .await
        .run("", &sql)
        .await
        .unwrap();
    role
}

/// What a host sees whose section of the database names this `user`, and who migrates.
pub(super) fn section(mut cx: Context, user: &str, migrates: &str) -> Context {
    let config = Arc::make_mut(&mut cx.config);
    let section = config.postgres.get_mut("staff").unwrap();
    section.user = user.to_owned();
    section.migrate_as = Some(migrates.to_owned());
    section.migrate_password = Some("migrator".to_owned());
    cx
}

/// Writes down who runs it, there and back.
const FILES: &[(&str, &str)] = &[
    (
        "1_who.sql",
        "CREATE TABLE who AS SELECT session_user::text AS role;",
    ),
    ("1_who.down.sql", "DROP TABLE who;"),
];

#[tokio::test]
async fn files_are_run_by_the_role_of_migrations_and_what_they_make_is_its_own() {
    let mut stage = Stage::new(Tool::Sql, FILES).await;
    let role = migrator(&mut stage.bench).await;
    // Whoever else the section names: here one that may change nothing.
    let app = stage.bench.app();
    let cx = |step| section(stage.bench.cx(step, vec![]), &app, &role);
    let act = stage.act("head");
    let plan = alike::plan(stage.act("head"), "head");
    plan.apply(&cx(1), &NULL).await.unwrap();
    let done = act.apply(&cx(4), &NULL).await.unwrap();
    assert!(done.changed);
    let verify = alike::verify(stage.act("head"), "head");
    verify.apply(&cx(5), &NULL).await.unwrap();
    let owners = "SELECT string_agg(DISTINCT tableowner::text, ' ') FROM pg_tables \
                  WHERE schemaname = 'public'";
    // It is a member of the owner, and not the other way round.
    let admin = stage.bench.session("staff").await;
    let ask = async |sql: &str| admin.value("", sql).await.unwrap();
    let own = Some(role.clone());
    assert_eq!(ask("SELECT role FROM public.who").await, own);
    assert_eq!(ask(owners).await, own, "the ledger, too");
    let undo = section(stage.bench.undo(4, vec![]), &app, &role);
    let undone = act.undo(&undo, &json!({"revision": ""})).await.unwrap();
    assert!(undone.changed);
    assert_eq!(ask(owners).await, None);
}

#[tokio::test]
async fn the_tools_program_logs_in_as_the_role_of_migrations() {
    let mut stage = example::Stage::new().await;
    let role = migrator(&mut stage.bench).await;
    let app = stage.bench.app();
    let act = Apply {
        backup: RequiredBackup::None,
        ..apply()
    };
    let cx = placed(section(stage.bench.cx(4, vec![]), &app, &role));
    assert!(act.apply(&cx, &NULL).await.unwrap().changed);
    assert_eq!(stage.revision().await, NEW);
    let undo = placed(section(stage.bench.undo(4, vec![]), &app, &role));
    let undone = act.undo(&undo, &json!({"revision": OLD})).await.unwrap();
    assert!(undone.changed);
    assert_eq!(stage.revision().await, OLD);
}

fn rehearsal() -> Value {
    json!({"database": "staff", "app": "employees", "release": "v1.0.0", "dir": "backend"})
}

#[tokio::test]
async fn backups_fences_and_restores_keep_their_role_around_it() {
    let mut stage = example::Stage::new().await;
    let role = migrator(&mut stage.bench).await;
    let here = |cx| placed(section(cx, "postgres", &role));
    let fence = stage.fence();
    let raised = fence
        .apply(&here(stage.bench.cx(1, vec![])), &NULL)
        .await
        .unwrap();
    let mut facts = raised.facts;
    facts.extend(stage.backed_up().await);
    let rehearse: Rehearse = serde_json::from_value(rehearsal()).unwrap();
    let mut unproven = facts.clone();
    unproven.retain(|fact| !matches!(fact, Fact::BackupVerified { .. }));
    let cx = here(stage.bench.cx(2, unproven));
    rehearse.apply(&cx, &NULL).await.unwrap();
    let act = Apply {
        undo_by: UndoBy::Restore,
        ..apply()
    };
    let cx = here(stage.bench.cx(4, facts.clone()));
    assert!(act.apply(&cx, &NULL).await.unwrap().changed);
    assert_eq!(stage.revision().await, NEW);
    let undo = here(stage.bench.undo(4, facts));
    let undone = act.undo(&undo, &json!({"revision": OLD})).await.unwrap();
    assert!(undone.summary.contains("is restored from its backup"));
    assert_eq!(stage.revision().await, OLD);
}

/// A copy that its owner has restored is the owner's: nobody else can be let in.
#[tokio::test]
async fn whoever_restored_a_copy_rehearses_where_the_role_of_migrations_may_not_enter() {
    let mut stage = example::Stage::new().await;
    let role = migrator(&mut stage.bench).await;
    let owner = format!("{}_owner", stage.bench.name);
    let apart = format!(
        "REVOKE {owner} FROM {role}; ALTER ROLE {owner} CREATEDB; \
         GRANT CONNECT ON DATABASE {} TO {role}",
        stage.bench.name
    );
    let admin = stage.bench.session("staff").await;
    admin.run("", &apart).await.unwrap();
    let mut facts = stage.backed_up().await;
    facts.retain(|fact| !matches!(fact, Fact::BackupVerified { .. }));
    let mut cx = section(stage.cx(2, facts), &owner, &role);
    let log = cx.dir.join("log");
    cx.log = crate::step::StepLog::to_file(log.clone());
    let rehearse: Rehearse = serde_json::from_value(rehearsal()).unwrap();
    rehearse.apply(&cx, &NULL).await.unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    let said = format!("{role} may not enter the copy, which belongs to {owner}");
    assert!(log.contains(&said), "{log}");
}

#[tokio::test]
async fn a_superuser_is_no_role_of_migrations() {
    let stage = Stage::new(Tool::Sql, FILES).await;
    stage
        .bench
        .host
        .secret("migrator", crate::sql::cluster::PASSWORD);
    let app = stage.bench.app();
    let cx = section(stage.bench.cx(4, vec![]), &app, "postgres");
    let refused = stage.act("head").apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(refused.cause, Cause::Refused);
    let why = "postgres, as whom `staff` is migrated, is a superuser";
    assert_eq!(refused.message, why);
    assert!(refused.hint.unwrap().contains("leave `migrate_as` out"));
}

/// diesel has no row that says `running`: of an index outside of a transaction it would only show
/// when the index is there.
#[tokio::test]
async fn whoever_cannot_write_down_what_was_applied_begins_nothing() {
    let index = "migrations/2_index/up.sql";
    let mut stage = Stage::new(
        Tool::Diesel,
        &[
            ("migrations/1_rooms/up.sql", "CREATE TABLE rooms (id int);"),
            (index, "CREATE INDEX CONCURRENTLY rooms_id ON rooms (id);"),
            (
                "migrations/2_index/metadata.toml",
                "run_in_transaction = false",
            ),
        ],
    )
    .await;
    let act = stage.act("head");
    let first = stage.act("1");
    first.apply(&stage.cx(4, vec![]), &NULL).await.unwrap();
    let role = migrator(&mut stage.bench).await;
    let others = "ALTER TABLE public.__diesel_schema_migrations OWNER TO postgres; \
                  GRANT SELECT, INSERT ON public.__diesel_schema_migrations TO PUBLIC";
    let admin = stage.bench.session("staff").await;
    admin.run("", others).await.unwrap();
    let cx = section(stage.bench.cx(5, vec![]), "postgres", &role);
    let refused = act.apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(refused.cause, Cause::Host);
    assert!(!refused.changed);
    let why = format!(
        "{role} may not write to public.__diesel_schema_migrations, where postgres has kept what \
         was applied"
    );
    assert_eq!(refused.message, why);
    assert!(refused.hint.unwrap().contains("OWNER TO"));
    assert_eq!(stage.ask("SELECT to_regclass('rooms_id')").await, "");
}

#[tokio::test]
async fn nothing_is_known_while_a_session_of_another_role_carries_the_steps_name() {
    let mut stage = Stage::new(Tool::Sql, FILES).await;
    let role = migrator(&mut stage.bench).await;
    let app = stage.bench.app();
    let cx = section(stage.bench.cx(4, vec![]), &app, &role);
    let act = stage.act("head");
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    // A tool that logs in as it likes, and may still commit.
    let other = stage.bench.session("staff").await;
    let name = format!(
        "SET application_name = {}",
        literal(&application_name(&cx.key))
    );
    other.run("", &name).await.unwrap();
    let Probe::NoProof(why) = act.probe(&cx).await.unwrap() else {
        panic!("INV-1")
    };
    assert!(why.contains("carry this step's name"), "{why}");
}
