//! kill -9 at many instants of each kind of migration (INV-7): afterwards the database is before a
//! migration or after it, never between; or nobody can say, and then the difference is told. What
//! ran once never runs again.
//!
//! `LOCKSTEP_KILLS=200` runs that many points instead of a sample; the figures go to `kills.json` in
//! `LOCKSTEP_DATABASE_REPORT_DIR`. The agent itself is killed by `make chaos`, at each of its writes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_proto::action::migration::{Apply, By, Tool};
use lockstep_proto::report::Failure;
use serde::Serialize;
use serde_json::Value;

use super::tools::files::Stage;
use crate::actions::{Act as _, Done, Probe};
use crate::sql::application_name;
use crate::sql::cluster::{Bench, Cluster, as_owner};
use crate::testing::{environment, program};

mod attempt;
mod kind;

use attempt::{Victim, start, strike};
use kind::{KINDS, Kind, files};

const NULL: Value = Value::Null;

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

async fn stage(kind: Kind, cluster: &Arc<Cluster>) -> Option<Stage> {
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
    let bench = Bench::on(Arc::clone(cluster)).await;
    let stage = Stage::on(bench, kind.tool, &files);
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

#[derive(Debug, Default, Serialize)]
struct Tally {
    kill_points: u32,
    /// Those where something was running that could be killed.
    struck: u32,
    /// Those by what was killed.
    victims: BTreeMap<Victim, u32>,
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
    async fn point(&mut self, cluster: &Arc<Cluster>, kind: Kind, victim: Victim, after: Duration) {
        let Some(stage) = stage(kind, cluster).await else {
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
        if strike(&stage, &cx, &mut child, victim).await {
            self.struck += 1;
            *self.victims.entry(victim).or_default() += 1;
        }
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
    let cluster = Cluster::alone();
    for point in 0..points {
        let (tool, by, takes) = KINDS[point % KINDS.len()];
        // Every kind meets every victim.
        let turn = point % KINDS.len() + point / KINDS.len();
        let victim = match (turn % 4, by) {
            (0, _) => Victim::Step,
            (1, By::Tool) => Victim::Tool,
            (2, _) => Victim::Server,
            _ => Victim::Session,
        };
        let kind = Kind {
            tool,
            by,
            index: turn / 4 % 2 == 1,
        };
        let after = Duration::from_millis(dice.below(takes));
        tally.point(&cluster, kind, victim, after).await;
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
    let stage = stage(kind, &Cluster::alone()).await.unwrap();
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
    let stage = stage(kind, &Cluster::alone()).await.unwrap();
    let mut cx = as_owner(stage.bench.cx(4, vec![]));
    let log = cx.dir.join("log");
    cx.log = crate::step::StepLog::to_file(log.clone());
    let act = Apply {
        lock_timeout: lockstep_proto::values::Period::seconds(20),
        ..stage.act("head")
    };
    let holder = stage.bench.session("as_owner").await;
    let pid = "SELECT pg_backend_pid()";
    let pid = holder.value("", pid).await.unwrap().unwrap();
    holder.run("", "BEGIN; LOCK public.witness").await.unwrap();
    // Longer than the migration will have waited when it is first told.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let release = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        holder.run("", "ROLLBACK").await.unwrap();
    };
    let (done, ()) = tokio::join!(act.apply(&cx, &NULL), release);
    assert!(done.unwrap().changed);
    let log = std::fs::read_to_string(log).unwrap();
    let told = log.lines().find(|line| line.contains("is in the way"));
    let told = told.unwrap_or_else(|| panic!("{log}"));
    let who =
        format!("witness; process {pid} (test, idle in transaction, its transaction open for ");
    assert!(told.contains("waits for RowExclusiveLock on "), "{told}");
    let (_, since) = told.split_once(&who).unwrap_or_else(|| panic!("{told}"));
    let since: u64 = since.split(' ').next().unwrap().parse().unwrap();
    assert!(since > 4, "{told}");
}
