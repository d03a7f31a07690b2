//! The tools' own programs beside Lockstep: what the one wrote, the other must know.

use std::os::unix::fs::symlink;
use std::path::Path;

use lockstep_proto::action::migration::{Apply, By};
use serde_json::{Value, json};

use super::tests::Stage;
use super::*;
use crate::actions::Act as _;
use crate::sql::cluster::as_owner;
use crate::testing::program;

const SQLX: &[(&str, &str)] = &[
    (
        "migrations/1_add_rooms.up.sql",
        "CREATE TABLE rooms (id int);\nINSERT INTO rooms VALUES (1);\n",
    ),
    ("migrations/1_add_rooms.down.sql", "DROP TABLE rooms;"),
    (
        "migrations/2_index.up.sql",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY rooms_id ON rooms (id);",
    ),
    ("migrations/2_index.down.sql", "DROP INDEX rooms_id;"),
    ("migrations/3_more.up.sql", "INSERT INTO rooms VALUES (3);"),
    (
        "migrations/3_more.down.sql",
        "DELETE FROM rooms WHERE id = 3;",
    ),
];

const DIESEL: &[(&str, &str)] = &[
    ("diesel.toml", ""),
    (
        "migrations/2026-01-01-000000_rooms/up.sql",
        "CREATE TABLE rooms (id int PRIMARY KEY);\nINSERT INTO rooms VALUES (1);\n",
    ),
    (
        "migrations/2026-01-01-000000_rooms/down.sql",
        "DROP TABLE rooms;",
    ),
    (
        "migrations/2026-01-02-000000_index/up.sql",
        "CREATE INDEX CONCURRENTLY rooms_id ON rooms (id);",
    ),
    (
        "migrations/2026-01-02-000000_index/down.sql",
        "DROP INDEX rooms_id;",
    ),
    (
        "migrations/2026-01-02-000000_index/metadata.toml",
        "run_in_transaction = false",
    ),
    (
        "migrations/2026-01-03-000000_more/up.sql",
        "INSERT INTO rooms VALUES (3);",
    ),
    (
        "migrations/2026-01-03-000000_more/down.sql",
        "DELETE FROM rooms WHERE id = 3;",
    ),
];

async fn stage(tool: Tool, program: &Path) -> Stage {
    let (files, name) = match tool {
        Tool::Sqlx => (SQLX, "bin/sqlx"),
        _ => (DIESEL, "bin/diesel"),
    };
    let stage = Stage::new(tool, files).await;
    let link = stage.dir.join(name);
    std::fs::create_dir_all(link.parent().unwrap()).unwrap();
    symlink(program, link).unwrap();
    stage
}

/// Goes up or down, run by the tool or by Lockstep, and says whether that changed anything.
async fn go(stage: &Stage, by: By, way: Way, to: &str) -> Result<bool, Failure> {
    let act = Apply {
        apply: by,
        ..stage.act(to)
    };
    let done = match way {
        Way::Up => act.apply(&stage.cx(4, vec![]), &Value::Null).await,
        Way::Down => {
            let cx = as_owner(stage.bench.undo(4, vec![]));
            act.undo(&cx, &json!({ "revision": to })).await
        }
    };
    done.map(|done| done.changed)
}

/// What the tool's table holds, but for times.
async fn written(stage: &Stage) -> String {
    let (columns, table) = match stage.tool {
        Tool::Sqlx => (
            "version, description, success, encode(checksum, 'hex')",
            "_sqlx_migrations",
        ),
        _ => ("version", "__diesel_schema_migrations"),
    };
    let rows =
        format!("SELECT string_agg(concat_ws(' ', {columns}), ', ' ORDER BY version) FROM {table}");
    let kind = format!(
        "SELECT string_agg(concat_ws(' ', attname, atttypid::regtype, atttypmod, attnotnull), ', ' \
         ORDER BY attnum) FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0"
    );
    format!("{} | {}", stage.ask(&rows).await, stage.ask(&kind).await)
}

async fn each_knows_what_the_other_wrote(tool: Tool, name: &str, versions: [&str; 3]) {
    let Some(program) = program(name) else { return };
    let [first, _, last] = versions;
    let (ours, theirs) = (stage(tool, &program).await, stage(tool, &program).await);
    assert!(go(&ours, By::Sql, Way::Up, "head").await.unwrap());
    assert!(go(&theirs, By::Tool, Way::Up, "head").await.unwrap());
    assert_eq!(written(&ours).await, written(&theirs).await);
    for stage in [&ours, &theirs] {
        for by in [By::Sql, By::Tool] {
            assert!(!go(stage, by, Way::Up, "head").await.unwrap());
        }
        assert_eq!(
            stage.ask("SELECT sum(id) FROM rooms").await,
            "4",
            "once each"
        );
    }
    // Each goes back what the other did, and up again.
    assert!(go(&ours, By::Tool, Way::Down, first).await.unwrap());
    assert!(go(&theirs, By::Sql, Way::Down, first).await.unwrap());
    assert_eq!(written(&ours).await, written(&theirs).await);
    assert!(go(&ours, By::Tool, Way::Up, last).await.unwrap());
    assert!(go(&theirs, By::Sql, Way::Up, last).await.unwrap());
    assert_eq!(written(&ours).await, written(&theirs).await);
    assert!(go(&ours, By::Tool, Way::Down, "").await.unwrap());
    assert_eq!(ours.ask("SELECT to_regclass('rooms')").await, "");
}

#[tokio::test]
async fn sqlx_and_lockstep_know_what_the_other_wrote() {
    each_knows_what_the_other_wrote(Tool::Sqlx, "sqlx", ["1", "2", "3"]).await;
}

#[tokio::test]
async fn diesel_and_lockstep_know_what_the_other_wrote() {
    let versions = ["20260101000000", "20260102000000", "20260103000000"];
    each_knows_what_the_other_wrote(Tool::Diesel, "diesel", versions).await;
}

#[tokio::test]
async fn the_programs_log_in_without_a_password_in_sight_and_tell_why_they_failed() {
    for (tool, name, file) in [
        (Tool::Sqlx, "sqlx", "migrations/3_more.up.sql"),
        (
            Tool::Diesel,
            "diesel",
            "migrations/2026-01-03-000000_more/up.sql",
        ),
    ] {
        let Some(program) = program(name) else {
            continue;
        };
        let stage = stage(tool, &program).await;
        stage.write(
            file,
            "INSERT INTO rooms VALUES (3); \
             INSERT INTO seen SELECT application_name FROM pg_stat_activity WHERE pid = \
             pg_backend_pid(); SELECT 1 / 0",
        );
        stage
            .bench
            .sql("CREATE TABLE public.seen (name text)")
            .await;
        let failed = go(&stage, By::Tool, Way::Up, "head").await.unwrap_err();
        assert!(
            failed.message.contains("division by zero"),
            "{}",
            failed.message
        );
        assert!(failed.changed && !failed.message.contains("canary"));
        assert_eq!(stage.ask("SELECT sum(id) FROM rooms").await, "1");
        stage.write(
            file,
            "INSERT INTO seen SELECT current_setting('application_name') || ' ' || \
                           current_setting('lock_timeout')",
        );
        assert!(go(&stage, By::Tool, Way::Up, "head").await.unwrap());
        let seen = stage.ask("SELECT name FROM seen").await;
        assert!(
            seen.starts_with("lockstep:") && seen.ends_with(" 5s"),
            "{name}: {seen}"
        );
    }
}
