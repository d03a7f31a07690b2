//! Directories of SQL files on a real server.

use std::fs;
use std::path::PathBuf;

use lockstep_proto::action::migration::{
    Apply, By, Guards, Hazard, OnLongTx, Plan, RequiredBackup, UndoBy,
};
use lockstep_proto::order::Fact;
use lockstep_proto::values::Period;
use serde_json::{Value, json};

use super::*;
use crate::actions::migration::alike;
use crate::actions::{Act as _, Done, Probe};
use crate::config::App;
use crate::sql::cluster::{Bench, as_owner};

const NULL: Value = Value::Null;

/// A host whose release `v1` holds these files in `db`.
pub(in crate::actions::migration) struct Stage {
    pub(in crate::actions::migration) bench: Bench,
    pub(in crate::actions::migration) tool: Tool,
    pub(in crate::actions::migration) dir: PathBuf,
}

impl Stage {
    pub(in crate::actions::migration) async fn new(tool: Tool, files: &[(&str, &str)]) -> Self {
        Self::on(Bench::new().await, tool, files)
    }

    /// The same with a database that is there.
    pub(in crate::actions::migration) fn on(
        mut bench: Bench,
        tool: Tool,
        files: &[(&str, &str)],
    ) -> Self {
        let root = bench.host.path().join("app");
        let dir = root.join("releases/v1/db");
        let app = App {
            root,
            user: None,
            env: [].into(),
        };
        bench.host.config.apps.insert("staff-app".into(), app);
        let stage = Self { bench, tool, dir };
        for (file, sql) in files {
            stage.write(file, sql);
        }
        stage
    }

    pub(super) fn write(&self, file: &str, sql: &str) {
        let path = self.dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, sql).unwrap();
    }

    pub(in crate::actions::migration) fn cx(&self, step: u16, facts: Vec<Fact>) -> Context {
        as_owner(self.bench.cx(step, facts))
    }

    pub(in crate::actions::migration) fn act(&self, to: &str) -> Apply {
        Apply {
            tool: self.tool,
            database: "staff".into(),
            app: "staff-app".into(),
            release: "v1".into(),
            dir: "db".into(),
            program: "venv/bin/alembic".into(),
            to: to.into(),
            backup: RequiredBackup::None,
            undo_by: UndoBy::Downgrade,
            max_tx_age: Period::seconds(60),
            on_long_tx: OnLongTx::Wait,
            guards: Guards::default(),
            apply: By::Sql,
            lock_timeout: Period::seconds(5),
            statement_timeout: Period::seconds(60),
        }
    }

    async fn up(&self, to: &str) -> Result<Done, Failure> {
        self.act(to).apply(&self.cx(4, vec![]), &NULL).await
    }

    async fn down(&self, to: &str) -> Result<Done, Failure> {
        let before = json!({ "revision": to });
        let cx = as_owner(self.bench.undo(4, vec![]));
        self.act("head").undo(&cx, &before).await
    }

    async fn plan(&self) -> Result<Done, Failure> {
        let plan = self.look(vec![]);
        plan.apply(&self.cx(0, vec![]), &NULL).await
    }

    fn look(&self, fail_on: Vec<Hazard>) -> Plan {
        let plan = alike::plan(self.act("head"), "head");
        Plan { fail_on, ..plan }
    }

    /// One value of the database.
    pub(in crate::actions::migration) async fn ask(&self, sql: &str) -> String {
        let session = self.bench.session("as_owner").await;
        let value = session.value("test", sql).await.unwrap();
        value.unwrap_or_default()
    }

    /// The tables of `public`, by name.
    async fn tables(&self) -> String {
        self.ask(
            "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class \
             WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace",
        )
        .await
    }
}

const PLAIN: &[(&str, &str)] = &[
    (
        "001_rooms.sql",
        "CREATE TABLE rooms (id int PRIMARY KEY, size int);\nINSERT INTO rooms VALUES (1, 2)",
    ),
    ("001_rooms.down.sql", "DROP TABLE rooms;"),
    (
        "002_size.sql",
        "-- lockstep:no-transaction\nCREATE INDEX CONCURRENTLY rooms_size ON rooms (size);\n",
    ),
    ("002_size.down.sql", "DROP INDEX rooms_size"),
    (
        "010_double.sql",
        "UPDATE rooms SET size = size * 2; -- once\n",
    ),
    ("010_double.down.sql", "UPDATE rooms SET size = size / 2;"),
    ("README.md", "no migration"),
];

#[tokio::test]
async fn plain_files_go_up_once_each_and_come_back_to_nothing() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    let cx = stage.cx(4, vec![]);
    let act = stage.act("head");
    assert_eq!(act.before(&cx).await.unwrap(), json!({"revision": ""}));
    let shown = stage.plan().await.unwrap();
    let [Fact::SqlPlan { sql, .. }] = shown.facts.as_slice() else {
        panic!("{:?}", shown.facts)
    };
    for part in [
        "-- 001_rooms.sql\nBEGIN;\nCREATE TABLE IF NOT EXISTS public.lockstep_schema_migrations",
        "'running')",
        "-- once",
        "COMMIT;\n",
    ] {
        assert!(sql.contains(part), "{sql}");
    }
    let done = act.apply(&stage.cx(4, shown.facts), &NULL).await.unwrap();
    assert_eq!(done.summary, "`staff` went from no revision to 010_double");
    assert!(!stage.up("head").await.unwrap().changed);
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert_eq!(stage.ask("SELECT size FROM rooms").await, "4");
    let ledger = "SELECT string_agg(concat_ws(' ', name, state, ms IS NOT NULL, \
                  left(step, 9), length(sha256)), ', ' ORDER BY name) \
                  FROM lockstep_schema_migrations";
    assert_eq!(
        stage.ask(ledger).await,
        "001_rooms done t lockstep: 64, 002_size done t lockstep: 64, 010_double done t lockstep: \
         64"
    );
    stage.down("001_rooms").await.unwrap();
    assert_eq!(stage.ask("SELECT size FROM rooms").await, "2");
    assert_eq!(stage.ask("SELECT to_regclass('rooms_size')").await, "");
    stage.down("").await.unwrap();
    assert_eq!(stage.tables().await, "", "not even the ledger is left");
}

#[tokio::test]
async fn a_file_that_fails_leaves_nothing_of_it_and_names_the_line() {
    let stage = Stage::new(
        Tool::Sql,
        &[
            ("1_a.sql", "CREATE TABLE a (n int);"),
            (
                "2_b.sql",
                "CREATE TABLE b (n int);\n\nSET search_path = '';\nSELECT 1 / 0;",
            ),
        ],
    )
    .await;
    let failed = stage.up("head").await.unwrap_err();
    assert!(failed.changed, "the first one is there");
    for why in ["2_b.sql", "division by zero", "`staff` is now at 1_a"] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    assert_eq!(stage.tables().await, "a lockstep_schema_migrations");
    stage.write("2_b.sql", "CREATE TABLE b (n int);\n\nSELEC 1;");
    let failed = stage.up("head").await.unwrap_err();
    assert!(
        failed.message.contains("2_b.sql, line 3"),
        "{}",
        failed.message
    );
    assert!(!failed.changed);
    // What is mended goes on where it ended.
    stage.write("2_b.sql", "CREATE TABLE b (n int);");
    assert!(stage.up("head").await.unwrap().changed);
    assert_eq!(stage.tables().await, "a b lockstep_schema_migrations");
}

#[tokio::test]
async fn what_was_edited_or_came_in_between_or_is_unknown_is_found_before_anything_starts() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    stage.up("002_size").await.unwrap();
    let refused = async |why: &str| {
        for failed in [
            stage.up("head").await.unwrap_err(),
            stage.plan().await.unwrap_err(),
            stage.down("").await.unwrap_err(),
        ] {
            assert_eq!(failed.cause, Cause::Refused);
            assert!(failed.message.contains(why), "{}", failed.message);
            assert!(!failed.changed && failed.hint.is_some());
        }
    };
    let (file, text) = PLAIN[0];
    stage.write(file, &format!("{text} "));
    refused("001_rooms.sql was changed after it was applied").await;
    stage.write(file, text);
    stage.write("0005_late.sql", "SELECT 1");
    stage
        .bench
        .sql("DELETE FROM public.lockstep_schema_migrations WHERE name = '002_size'")
        .await;
    stage
        .bench
        .sql(
            "INSERT INTO public.lockstep_schema_migrations (name, sha256, state) \
             VALUES ('0005_late', encode(sha256('SELECT 1'), 'hex'), 'done')",
        )
        .await;
    refused("has the migration 0005_late, but not 002_size").await;
    fs::remove_file(stage.dir.join("0005_late.sql")).unwrap();
    refused("0005_late, which the release does not have").await;
    stage
        .bench
        .sql("DELETE FROM public.lockstep_schema_migrations WHERE name = '0005_late'")
        .await;
    stage
        .bench
        .sql("UPDATE public.lockstep_schema_migrations SET state = 'running'")
        .await;
    refused("001_rooms was begun in `staff`, and did not end").await;
    assert_eq!(stage.ask("SELECT size FROM rooms").await, "2");
}

#[tokio::test]
async fn files_that_cannot_be_exactly_once_are_refused() {
    for (files, why) in [
        (
            vec![("1_a.sql", "CREATE TABLE a (n int);\nCOMMIT;")],
            "1_a.sql line 2: it begins or ends a transaction",
        ),
        (
            vec![("1_a.sql", "-- lockstep:no-transaction\nSELECT 1; SELECT 2")],
            "1_a.sql holds 2 statements",
        ),
        (vec![("a.sql", "SELECT 1")], "a.sql is no migration"),
        (
            vec![("1_a.down.sql", "SELECT 1")],
            "1_a.down.sql is no migration",
        ),
        (
            vec![("1_a.sql", "SELECT 1"), ("01_b.sql", "SELECT 1")],
            "have the same number",
        ),
        (vec![("README", "")], "has no migrations"),
    ] {
        let stage = Stage::new(Tool::Sql, &files).await;
        let failed = stage.up("head").await.unwrap_err();
        assert!(failed.message.contains(why), "{}", failed.message);
        assert_eq!(stage.tables().await, "");
    }
    let stage = Stage::new(Tool::Sql, &[("1_a.sql", "CREATE TABLE a (n int)")]).await;
    for to in ["+1", "-1", "1", "1_b", "heads"] {
        let failed = stage.up(to).await.unwrap_err();
        assert!(
            failed.message.contains("names no revision"),
            "{to}: {}",
            failed.message
        );
    }
    stage.up("head").await.unwrap();
    let failed = stage.down("").await.unwrap_err();
    assert!(
        failed.message.contains("1_a.sql has no way back"),
        "{}",
        failed.message
    );
    assert_eq!(failed.cause, Cause::Refused);
}

#[tokio::test]
async fn a_file_changed_after_people_saw_it_does_not_run() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    let shown = stage.plan().await.unwrap().facts;
    stage.write("010_double.sql", "UPDATE rooms SET size = size * 3;");
    let failed = stage
        .act("head")
        .apply(&stage.cx(4, shown.clone()), &NULL)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
    assert!(
        failed.message.contains("is not what was shown"),
        "{}",
        failed.message
    );
    assert_eq!(stage.tables().await, "");
}

#[tokio::test]
async fn a_second_attempt_goes_on_between_two_files_and_a_first_one_does_not() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    let shown = stage.plan().await.unwrap().facts;
    // As an attempt leaves it that was cut off behind the first file.
    stage.up("001_rooms").await.unwrap();
    let act = stage.act("head");
    let mut cx = stage.cx(4, shown);
    cx.key.attempt = 1;
    let refused = act.apply(&cx, &NULL).await.unwrap_err();
    assert!(
        refused.message.contains("would go from 001_rooms"),
        "{}",
        refused.message
    );
    cx.key.attempt = 2;
    stage.write("002_size.down.sql", "SELECT 1");
    let refused = act.apply(&cx, &NULL).await.unwrap_err();
    assert!(
        refused.message.contains("its digest is"),
        "{}",
        refused.message
    );
    stage.write("002_size.down.sql", PLAIN[3].1);
    assert!(act.apply(&cx, &NULL).await.unwrap().changed);
    assert_eq!(stage.ask("SELECT size FROM rooms").await, "4", "once each");
}

#[tokio::test]
async fn hazards_are_shown_with_their_line_or_fail_as_the_plan_says() {
    let files = [(
        "1_a.sql",
        "CREATE TABLE a (n int);\nDROP TABLE IF EXISTS old;\nCREATE INDEX ON b (n);",
    )];
    let stage = Stage::new(Tool::Sql, &files).await;
    let done = stage.plan().await.unwrap();
    assert!(done.summary.ends_with("; hazards: 2"), "{}", done.summary);
    let [Fact::SqlPlan { hazards, .. }] = done.facts.as_slice() else {
        panic!("{:?}", done.facts)
    };
    assert!(
        hazards[0].starts_with("data_loss at 1_a.sql:2: DROP TABLE"),
        "{hazards:?}"
    );
    assert!(
        hazards[1].starts_with("lock at 1_a.sql:3: CREATE INDEX"),
        "{hazards:?}"
    );
    for (fail_on, unmet) in [
        (vec![Hazard::Rewrite, Hazard::Breaks], None),
        (vec![Hazard::Lock], Some("lock at 1_a.sql:3")),
    ] {
        let plan = stage.look(fail_on);
        let done = plan.apply(&stage.cx(0, vec![]), &NULL).await;
        match (done, unmet) {
            (Ok(_), None) => {}
            (Err(failed), Some(why)) => {
                assert_eq!(failed.cause, Cause::CheckUnmet);
                assert!(failed.message.contains(why), "{}", failed.message);
            }
            (done, _) => panic!("{done:?}"),
        }
    }
}

#[tokio::test]
async fn the_tables_of_the_tools_are_read_and_written_as_they_do() {
    let up = "CREATE TABLE rooms (id int);";
    let down = "DROP TABLE rooms;";
    let concurrently = "CREATE INDEX CONCURRENTLY rooms_id ON rooms (id);";
    let no_transaction = format!("-- no-transaction\n{concurrently}");
    for (tool, files, last) in [
        (
            Tool::Sqlx,
            vec![
                ("migrations/1_add_rooms.up.sql", up),
                ("migrations/1_add_rooms.down.sql", down),
                ("migrations/2_index.up.sql", &no_transaction),
                ("migrations/2_index.down.sql", "DROP INDEX rooms_id"),
            ],
            "2",
        ),
        (
            Tool::Diesel,
            vec![
                ("migrations/2026-01-01-000000_rooms/up.sql", up),
                ("migrations/2026-01-01-000000_rooms/down.sql", down),
                ("migrations/2026-01-02-000000_index/up.sql", concurrently),
                (
                    "migrations/2026-01-02-000000_index/down.sql",
                    "DROP INDEX rooms_id",
                ),
                (
                    "migrations/2026-01-02-000000_index/metadata.toml",
                    "run_in_transaction = false",
                ),
            ],
            "20260102000000",
        ),
        (
            Tool::Prisma,
            vec![
                ("migrations/1_rooms/migration.sql", up),
                ("migrations/1_rooms/down.sql", down),
                ("migrations/2_index/migration.sql", concurrently),
                ("migrations/2_index/down.sql", "DROP INDEX rooms_id"),
                (
                    "migrations/migration_lock.toml",
                    "provider = \"postgresql\"",
                ),
            ],
            "2_index",
        ),
    ] {
        let stage = Stage::new(tool, &files).await;
        let done = stage.up("head").await.unwrap();
        assert_eq!(
            done.summary,
            format!("`staff` went from no revision to {last}")
        );
        assert!(!stage.up("head").await.unwrap().changed);
        assert_eq!(stage.ask("SELECT 'rooms_id'::regclass").await, "rooms_id");
        stage.down("").await.unwrap();
        let table = layout(tool).table();
        assert_eq!(stage.tables().await, table);
        assert_eq!(
            stage.ask(&format!("SELECT count(*) FROM {table}")).await,
            "0"
        );
    }
}

#[tokio::test]
async fn looks_and_downgrades_know_the_tools_too() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    stage.up("head").await.unwrap();
    let current = alike::current(stage.act("head"));
    let said = current.apply(&stage.cx(0, vec![]), &NULL).await.unwrap();
    assert_eq!(
        said.summary,
        "`staff` is at 010_double (the release's newest: 010_double)"
    );
    let verify = |to: &str| alike::verify(stage.act("head"), to);
    verify("head")
        .apply(&stage.cx(0, vec![]), &NULL)
        .await
        .unwrap();
    let unmet = verify("002_size").apply(&stage.cx(0, vec![]), &NULL).await;
    assert_eq!(unmet.unwrap_err().cause, Cause::CheckUnmet);
    let downgrade = alike::downgrade(stage.act("head"), "base");
    let cx = stage.cx(5, vec![]);
    assert!(matches!(
        downgrade.probe(&cx).await.unwrap(),
        Probe::Absent(_)
    ));
    let refused = downgrade.apply(&cx, &NULL).await.unwrap_err();
    assert!(refused.message.contains("no backup"), "{}", refused.message);
}

/// A migration that works, for each tool that Lockstep runs itself, and then another.
fn of_each(second: &str, alone: bool) -> [(Tool, Vec<(String, String)>); 4] {
    let first = "CREATE TABLE rooms AS SELECT 1 AS id FROM generate_series(1, 2);";
    [Tool::Sql, Tool::Sqlx, Tool::Diesel, Tool::Prisma].map(|tool| {
        let place = |at: u32| match tool {
            Tool::Sqlx => format!("migrations/{at}_step.sql"),
            Tool::Diesel => format!("migrations/{at}_step/up.sql"),
            Tool::Prisma => format!("migrations/{at}_step/migration.sql"),
            _ => format!("{at}_step.sql"),
        };
        let begin = match tool {
            Tool::Sqlx if alone => "-- no-transaction\n",
            Tool::Sql if alone => "-- lockstep:no-transaction\n",
            _ => "",
        };
        let mut files = vec![
            (place(1), first.to_owned()),
            (place(2), format!("{begin}{second}")),
        ];
        if tool == Tool::Diesel {
            let metadata = format!("run_in_transaction = {}", !alone);
            files.push(("migrations/2_step/metadata.toml".into(), metadata));
        }
        (tool, files)
    })
}

async fn stage_of(tool: Tool, files: &[(String, String)]) -> Stage {
    let files: Vec<(&str, &str)> = files.iter().map(|(file, sql)| (&**file, &**sql)).collect();
    Stage::new(tool, &files).await
}

#[tokio::test]
async fn what_cannot_be_written_down_has_not_happened() {
    for (tool, files) in of_each("CREATE TABLE second (id int);", false) {
        let stage = stage_of(tool, &files).await;
        let version = if tool == Tool::Sqlx || tool == Tool::Diesel {
            "1"
        } else {
            "1_step"
        };
        stage.up(version).await.unwrap();
        let refuse = format!(
            "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql \
             AS 'BEGIN RAISE EXCEPTION ''no row''; END'; \
             CREATE TRIGGER refuse BEFORE INSERT ON public.{} \
             FOR EACH ROW EXECUTE FUNCTION public.refuse()",
            layout(tool).table()
        );
        stage.bench.sql(&refuse).await;
        let failed = stage.up("head").await.unwrap_err();
        assert!(failed.message.contains("no row"), "{}", failed.message);
        let second = stage.ask("SELECT to_regclass('second')").await;
        assert_eq!(second, "", "{tool:?}");
    }
}

#[tokio::test]
async fn one_that_was_begun_and_did_not_end_is_found_by_whatever_comes_next() {
    let index = "CREATE UNIQUE INDEX CONCURRENTLY rooms_id ON rooms (id);";
    for (tool, files) in of_each(index, true) {
        let stage = stage_of(tool, &files).await;
        let failed = stage.up("head").await.unwrap_err();
        let said = &failed.message;
        assert!(failed.changed && said.contains("(id) INVALID"), "{said}");
        // diesel's table has no room for that; the index is in the way.
        let why = match tool {
            Tool::Diesel => "already exists",
            _ => "was begun in `staff`, and did not end",
        };
        let again = stage.up("head").await.unwrap_err();
        assert!(again.message.contains(why), "{tool:?}: {}", again.message);
        if tool != Tool::Diesel {
            for refused in [stage.plan().await, stage.down("").await] {
                let refused = refused.unwrap_err().message;
                assert!(refused.contains(why), "{tool:?}: {refused}");
            }
        }
    }
}

#[tokio::test]
async fn an_edited_migration_is_found_where_the_tool_keeps_checksums() {
    for (tool, files) in of_each("CREATE TABLE second (id int);", false) {
        let stage = stage_of(tool, &files).await;
        stage.up("head").await.unwrap();
        let (file, text) = &files[0];
        stage.write(file, &format!("{text}\n"));
        let found = stage.up("head").await;
        if tool == Tool::Diesel {
            found.unwrap();
            continue;
        }
        let refused = found.unwrap_err().message;
        let why = format!("{file} was changed after it was applied to `staff`");
        assert!(refused.contains(&why), "{refused}");
    }
}

#[tokio::test]
async fn what_prisma_calls_rolled_back_was_not_applied() {
    let [.., (tool, files)] = of_each("CREATE TABLE second (id int);", false);
    let stage = stage_of(tool, &files).await;
    stage.up("1_step").await.unwrap();
    let resolved = "INSERT INTO public._prisma_migrations \
                    (id, checksum, migration_name, rolled_back_at) VALUES ('x', '', '2_step', now())";
    stage.bench.sql(resolved).await;
    let done = stage.up("head").await.unwrap();
    assert_eq!(done.summary, "`staff` went from 1_step to 2_step");
}

#[tokio::test]
async fn diesels_versions_are_in_its_own_order() {
    let stage = Stage::new(
        Tool::Diesel,
        &[
            (
                "migrations/2026-01-01_rooms/up.sql",
                "CREATE TABLE rooms (id int);",
            ),
            (
                "migrations/2026-01-01-1_more/up.sql",
                "INSERT INTO rooms VALUES (1);",
            ),
        ],
    )
    .await;
    let done = stage.up("head").await.unwrap();
    assert_eq!(done.summary, "`staff` went from no revision to 202601011");
    assert!(!stage.up("head").await.unwrap().changed);
}

#[tokio::test]
async fn limits_hold_in_lockstep_own_sessions_too() {
    let slow = &[("1_a.sql", "SELECT pg_sleep(20)")];
    let stage = Stage::new(Tool::Sql, slow).await;
    let act = Apply {
        statement_timeout: Period(200),
        lock_timeout: Period(200),
        ..stage.act("head")
    };
    let failed = act.apply(&stage.cx(4, vec![]), &NULL).await.unwrap_err();
    let why = "due to statement timeout";
    assert!(failed.message.contains(why), "{}", failed.message);
    stage.bench.sql("CREATE TABLE public.rooms (id int)").await;
    let holder = stage.bench.session("as_owner").await;
    holder.run("", "BEGIN; LOCK public.rooms").await.unwrap();
    // Outside of a transaction it is tried once.
    let index = "-- lockstep:no-transaction\nCREATE INDEX ON rooms (id)";
    stage.write("1_a.sql", index);
    let act = Apply {
        statement_timeout: Period::seconds(5),
        ..act
    };
    let failed = act.apply(&stage.cx(4, vec![]), &NULL).await.unwrap_err();
    let why = "due to lock timeout";
    assert!(failed.message.contains(why), "{}", failed.message);
}

#[tokio::test]
async fn the_table_in_public_is_the_tools() {
    let stage = Stage::new(Tool::Sql, PLAIN).await;
    stage.up("head").await.unwrap();
    let other = "CREATE SCHEMA aaa; \
                 CREATE TABLE aaa.lockstep_schema_migrations (LIKE public.lockstep_schema_migrations)";
    stage.bench.sql(other).await;
    assert!(!stage.up("head").await.unwrap().changed);
}
