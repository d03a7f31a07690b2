//! kill -9 at many instants of each kind of migration (INV-7): afterwards the database is before a
//! migration or after it, never between; or nobody can say, and then the difference is told. What
//! ran once never runs again.
//!
//! The attempt is a process of its own, this test program once more, so that it can be killed as the
//! step process can be. `LOCKSTEP_KILLS=200` runs that many points instead of a sample; the figures
//! go to `kills.json` in `LOCKSTEP_DATABASE_REPORT_DIR`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lockstep_proto::action::migration::{Apply, By, Tool};
use lockstep_proto::ids::StepKey;
use lockstep_proto::report::Failure;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::apply::stage::environment;
use super::tools::files::{Stage, program};
use crate::actions::{Act as _, Done, Probe};
use crate::config::App;
use crate::sql::application_name;
use crate::sql::cluster::{PASSWORD, as_owner};
use crate::step::Context;
use crate::testing::Host;

const NULL: Value = Value::Null;

/// The test that is the attempt's process.
const ATTEMPT: &str = "actions::migration::kills::an_attempt";

/// Under this name the attempt's process finds what it is to do.
const JOB: &str = "LOCKSTEP_KILL_JOB";

/// What an attempt's process has to know.
#[derive(Serialize, Deserialize)]
struct Job {
    act: Apply,
    key: StepKey,
    dir: PathBuf,
    root: PathBuf,
    socket: String,
    port: u16,
    dbname: String,
    user: String,
}

/// What is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    /// The attempt's process; what it has started goes a moment later, as systemd does it.
    Step,
    /// The tool's program.
    Tool,
    /// One of the attempt's sessions in the server: with it the server itself falls, and recovers.
    Server,
}

/// A kind of migration: how it is run, and whether it makes an index outside of a transaction.
#[derive(Debug, Clone, Copy)]
struct Kind {
    tool: Tool,
    by: By,
    index: bool,
}

/// Three steps: a table with rows, an index that takes its time, and a change of all rows. Each
/// leaves a witness of having run, the index by being there.
fn files(kind: Kind) -> Vec<(String, String)> {
    let table = "CREATE TABLE rooms AS SELECT n, n AS size FROM generate_series(1, 300) n; \
                 CREATE FUNCTION slow(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
                 'BEGIN PERFORM pg_sleep(0.0003); RETURN n; END'; \
                 INSERT INTO witness VALUES ('table'); SELECT pg_sleep(0.1);";
    let index = if kind.index {
        "CREATE INDEX CONCURRENTLY rooms_slow ON rooms (public.slow(n));"
    } else {
        "CREATE INDEX rooms_slow ON rooms (public.slow(n));"
    };
    let rows = "UPDATE rooms SET size = -size; INSERT INTO witness VALUES ('rows'); \
                SELECT pg_sleep(0.1);";
    let texts = [table, index, rows];
    let name = |at: usize| match kind.tool {
        Tool::Sqlx => format!("migrations/{at}_step.sql"),
        Tool::Diesel => format!("migrations/{at}_step/up.sql"),
        Tool::Prisma => format!("migrations/{at}_step/migration.sql"),
        Tool::Sql | Tool::Alembic => format!("{at}_step.sql"),
    };
    let mut files: Vec<(String, String)> = (1..).map(name).zip(texts.map(str::to_owned)).collect();
    if kind.tool == Tool::Alembic {
        let texts = files.iter().zip(1..);
        let mut files: Vec<(String, String)> = texts
            .map(|((_, sql), at)| revision(at, sql, kind.index && at == 2))
            .collect();
        files.push((
            "alembic.ini".into(),
            "[alembic]\nscript_location = %(here)s/scripts\n".into(),
        ));
        files.push(("scripts/env.py".into(), ENV.into()));
        return files;
    }
    if kind.index {
        let alone = match kind.tool {
            Tool::Sqlx => "-- no-transaction\n",
            Tool::Sql => "-- lockstep:no-transaction\n",
            _ => "",
        };
        files[1].1.insert_str(0, alone);
    }
    if kind.tool == Tool::Diesel {
        let metadata = format!("run_in_transaction = {}", !kind.index);
        files.push(("migrations/2_step/metadata.toml".into(), metadata));
        files.push(("diesel.toml".into(), String::new()));
    }
    files
}

/// A revision of alembic's that runs some SQL, outside of a transaction if need be.
fn revision(at: usize, sql: &str, alone: bool) -> (String, String) {
    let down = match at {
        1 => "None".to_owned(),
        _ => format!("'{}_step'", at - 1),
    };
    let run = format!("op.execute(\"\"\"{sql}\"\"\")");
    let run = if alone {
        format!("with op.get_context().autocommit_block():\n        {run}")
    } else {
        run
    };
    let script = format!(
        "from alembic import op\nrevision = '{at}_step'\ndown_revision = {down}\n\n\n\
         def upgrade():\n    {run}\n\n\ndef downgrade():\n    pass\n"
    );
    (format!("scripts/versions/{at}_step.py"), script)
}

/// All pending revisions in one transaction, as alembic's own template has it.
const ENV: &str = r#"import os

from alembic import context
from sqlalchemy import create_engine

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
    with create_engine(url).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"#;

/// What is there: the table, the index and whether it is valid, the rows, and the witnesses.
async fn there(stage: &Stage) -> String {
    if stage.ask("SELECT to_regclass('rooms')").await.is_empty() {
        return format!("0 {}", stage.ask("SELECT count(*) FROM witness").await);
    }
    stage
        .ask(
            "SELECT concat_ws(' ', 1, \
             (SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('rooms_slow')), \
             (SELECT sign(sum(size)) || '/' || count(*) FROM rooms), \
             (SELECT string_agg(what || count, ' ' ORDER BY what) FROM \
              (SELECT what, count(*) FROM witness GROUP BY what) AS all_of_them))",
        )
        .await
}

/// What must be there behind so many steps.
const STATES: [&str; 4] = [
    "0 0",
    "1 1/300 table1",
    "1 t 1/300 table1",
    "1 t -1/300 rows1 table1",
];

fn steps(revision: &str) -> usize {
    // `2`, `2_step`: each tool's name of it.
    revision.get(..1).map_or(0, |digit| digit.parse().unwrap())
}

async fn stage(kind: Kind) -> Option<Stage> {
    let name = match kind.tool {
        Tool::Sqlx => "sqlx",
        Tool::Diesel => "diesel",
        _ => "",
    };
    let found = if kind.by == By::Tool && !name.is_empty() {
        Some(program(name)?)
    } else {
        None
    };
    let files = files(kind);
    let files: Vec<(&str, &str)> = files.iter().map(|(file, sql)| (&**file, &**sql)).collect();
    let stage = Stage::new(kind.tool, &files).await;
    if kind.tool == Tool::Alembic {
        let example = "../deploy/examples/employee-system/app/base/backend/requirements.txt";
        let venv = environment(&Path::new(env!("CARGO_MANIFEST_DIR")).join(example));
        std::os::unix::fs::symlink(venv, stage.dir.join("venv")).unwrap();
    }
    if let Some(found) = found {
        std::fs::create_dir(stage.dir.join("bin")).unwrap();
        std::os::unix::fs::symlink(found, stage.dir.join("bin").join(name)).unwrap();
    }
    stage
        .bench
        .sql("CREATE TABLE public.witness (what text)")
        .await;
    Some(stage)
}

/// Starts an attempt as a process of its own.
fn start(stage: &Stage, act: &Apply, cx: &Context) -> Child {
    let config = &cx.config.postgres["staff"];
    let job = Job {
        act: act.clone(),
        key: cx.key.clone(),
        dir: cx.dir.clone(),
        root: cx.config.apps["staff-app"].root.clone(),
        socket: config.host.clone(),
        port: config.port,
        dbname: config.dbname.clone().unwrap(),
        user: config.user.clone(),
    };
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", ATTEMPT])
        .env(JOB, serde_json::to_string(&job).unwrap())
        // What it leaves when it is killed goes with the stage.
        .env("TMPDIR", stage.bench.host.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
#[ignore = "a program that the kills start"]
async fn an_attempt() {
    let Ok(job) = std::env::var(JOB) else { return };
    let job: Job = serde_json::from_str(&job).unwrap();
    let mut host = Host::new();
    host.secret("db", PASSWORD);
    let app = App {
        root: job.root,
        user: None,
        env: [].into(),
    };
    host.config.apps.insert("staff-app".into(), app);
    let section = format!(
        "host = '{}'\nport = {}\ndbname = '{}'\nuser = '{}'\npassword = 'db'",
        job.socket, job.port, job.dbname, job.user
    );
    let database = toml::from_str(&section).unwrap();
    host.config.postgres.insert("staff".into(), database);
    let mut cx = host.context();
    cx.key = job.key;
    cx.dir = job.dir;
    job.act.apply(&cx, &NULL).await.unwrap();
}

/// The processes whose environment names the attempt: the tools that it has started.
fn tools_of(cx: &Context) -> Vec<Pid> {
    let mark = format!("PGAPPNAME={}", application_name(&cx.key));
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let found = processes.filter_map(|entry| {
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let named = environment
            .split(|byte| *byte == 0)
            .any(|it| it == mark.as_bytes());
        let pid = entry.file_name().to_str()?.parse().ok()?;
        named.then(|| Pid::from_raw(pid)).flatten()
    });
    found.collect()
}

fn kill(pid: Pid) {
    // It may have gone by itself.
    let _ = kill_process(pid, Signal::KILL);
}

/// Kills, and waits until the attempt is over. Says whether there was something to kill.
async fn strike(stage: &Stage, cx: &Context, child: &mut Child, victim: Victim) -> bool {
    let struck = match victim {
        Victim::Step => {
            let running = child.try_wait().unwrap().is_none();
            kill(Pid::from_child(child));
            tokio::time::sleep(Duration::from_millis(50)).await;
            tools_of(cx).into_iter().for_each(kill);
            running
        }
        Victim::Tool => {
            let tools = tools_of(cx);
            tools.iter().copied().for_each(kill);
            !tools.is_empty()
        }
        Victim::Server => {
            let sql = format!(
                "SELECT (SELECT pid FROM pg_stat_activity WHERE application_name = '{}' \
                 ORDER BY state = 'active' DESC, backend_start DESC LIMIT 1)",
                application_name(&cx.key)
            );
            let pid = stage.bench.ask(&sql).await.parse().ok();
            pid.and_then(Pid::from_raw).map(kill).is_some()
        }
    };
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the attempt does not end"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A server that has fallen lets nobody in for a moment.
    while stage.bench.try_session("maintenance").await.is_err() {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the server does not come back"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    struck
}

#[derive(Debug, Default, Serialize)]
struct Tally {
    kill_points: u32,
    /// Those where something was running that could be killed.
    struck: u32,
    before: u32,
    after: u32,
    double_runs: u32,
    between: u32,
    unknown: u32,
    /// Of those, the ones whose probe did not tell the difference.
    untold: u32,
    /// How many ended whole by another attempt.
    finished: u32,
}

impl Tally {
    /// One point: kills after a while, settles by the probe, and tries again where that is safe.
    async fn point(&mut self, kind: Kind, victim: Victim, after: Duration) {
        let Some(stage) = stage(kind).await else {
            return;
        };
        let act = Apply {
            apply: kind.by,
            ..stage.act("head")
        };
        let cx = stage.cx(4, vec![]);
        let mut child = start(&stage, &act, &cx);
        // From when it is in the database.
        let began = Instant::now();
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}'",
            application_name(&cx.key)
        );
        while stage.bench.ask(&sql).await == "0" && child.try_wait().unwrap().is_none() {
            assert!(
                began.elapsed() < Duration::from_mins(1),
                "the attempt does not begin"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(after).await;
        self.kill_points += 1;
        self.struck += u32::from(strike(&stage, &cx, &mut child, victim).await);
        let probe = act.probe(&cx).await.unwrap();
        let is = there(&stage).await;
        let place = format!("{kind:?}, {victim:?} after {after:?}: {probe:?}, {is}");
        self.double_runs += u32::from(is.contains('2'));
        match probe {
            Probe::Present(_) => {
                self.after += 1;
                self.between += u32::from(is != STATES[3]);
                assert_eq!(is, STATES[3], "{place}");
            }
            Probe::Absent(_) => {
                let session = stage.bench.session("staff").await;
                let revision = super::tools::revision(&session, kind.tool).await.unwrap();
                drop(session);
                self.before += 1;
                self.between += u32::from(is != STATES[steps(&revision)]);
                assert_eq!(is, STATES[steps(&revision)], "at {revision}; {place}");
                let again = self.again(&stage, &act).await;
                assert!(again.is_ok(), "{again:?}; {place}");
            }
            Probe::NoProof(why) => {
                self.unknown += 1;
                let told = why.contains("the schema differs from before: ")
                    || why.contains("the schema is as it was before");
                self.untold += u32::from(!told);
                assert!(told && kind.index, "{place}");
            }
            other => panic!("{other:?}; {place}"),
        }
    }

    /// Another attempt, and what it must have made of it.
    async fn again(&mut self, stage: &Stage, act: &Apply) -> Result<Done, Failure> {
        let done = act.apply(&stage.cx(4, vec![]), &NULL).await?;
        let is = there(stage).await;
        self.double_runs += u32::from(is.contains('2'));
        assert_eq!(is, STATES[3], "after another attempt");
        self.finished += 1;
        Ok(done)
    }
}

/// Each tool and who runs it; and how long that takes about, in milliseconds.
const KINDS: [(Tool, By, u64); 8] = [
    (Tool::Sql, By::Sql, 900),
    (Tool::Alembic, By::Tool, 6000),
    (Tool::Prisma, By::Sql, 900),
    (Tool::Sqlx, By::Tool, 900),
    (Tool::Diesel, By::Tool, 900),
    (Tool::Alembic, By::Sql, 5000),
    (Tool::Sqlx, By::Sql, 900),
    (Tool::Diesel, By::Sql, 900),
];

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[tokio::test]
#[expect(clippy::print_stdout, reason = "figures for people")]
async fn whatever_is_killed_a_migration_is_there_or_not_or_nobody_can_say() {
    let points = std::env::var("LOCKSTEP_KILLS").map_or(12, |text| text.parse().unwrap());
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut tally = Tally::default();
    for point in 0..points {
        let (tool, by, takes) = KINDS[point % KINDS.len()];
        // Every kind meets every victim.
        let turn = point % KINDS.len() + point / KINDS.len();
        let victim = match (turn % 3, by) {
            (0, _) => Victim::Step,
            (1, By::Tool) => Victim::Tool,
            _ => Victim::Server,
        };
        let kind = Kind {
            tool,
            by,
            index: turn % 2 == 1,
        };
        let after = Duration::from_millis(dice.below(takes));
        tally.point(kind, victim, after).await;
    }
    let figures = serde_json::to_string_pretty(&tally).unwrap();
    println!("{figures}");
    if let Some(directory) = std::env::var_os("LOCKSTEP_DATABASE_REPORT_DIR") {
        std::fs::write(Path::new(&directory).join("kills.json"), figures).unwrap();
    }
    assert_eq!((tally.double_runs, tally.between, tally.untold), (0, 0, 0));
    assert!(tally.struck > 0, "nothing was running when it was killed");
}

#[tokio::test]
async fn of_two_attempts_at_once_one_is_refused_by_the_lock() {
    let kind = Kind {
        tool: Tool::Sql,
        by: By::Sql,
        index: false,
    };
    let stage = stage(kind).await.unwrap();
    let act = stage.act("head");
    let (one, other) = (stage.cx(4, vec![]), stage.cx(5, vec![]));
    let (one, other) = tokio::join!(act.apply(&one, &NULL), act.apply(&other, &NULL));
    let refused = [one, other].into_iter().filter_map(Result::err);
    let refused: Vec<Failure> = refused.collect();
    let [refused] = refused.as_slice() else {
        panic!("{refused:?}")
    };
    assert!(
        refused.message.contains("is being migrated by lockstep:"),
        "{}",
        refused.message
    );
    assert_eq!(there(&stage).await, STATES[3]);
}

#[tokio::test]
async fn who_is_in_the_way_is_told_while_a_migration_waits() {
    let kind = Kind {
        tool: Tool::Sql,
        by: By::Sql,
        index: false,
    };
    let stage = stage(kind).await.unwrap();
    let mut cx = as_owner(stage.bench.cx(4, vec![]));
    let log = cx.dir.join("log");
    cx.log = crate::step::StepLog::to_file(&log).unwrap();
    let act = Apply {
        lock_timeout: lockstep_proto::values::Period::seconds(20),
        ..stage.act("head")
    };
    let holder = stage.bench.session("as_owner").await;
    holder.run("", "BEGIN; LOCK public.witness").await.unwrap();
    let release = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        holder.run("", "ROLLBACK").await.unwrap();
    };
    let (done, ()) = tokio::join!(act.apply(&cx, &NULL), release);
    assert!(done.unwrap().changed);
    let log = std::fs::read_to_string(log).unwrap();
    for word in [
        "waits for RowExclusiveLock on ",
        "witness; process ",
        "(test, idle in transaction",
    ] {
        assert!(log.contains(word), "{log}");
    }
}
