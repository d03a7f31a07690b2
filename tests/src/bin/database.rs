//! The last part of `make database`: a database of a gigabyte through backup, proof, rehearsal,
//! migration and a forced rollback, by the real controller and agents; and the sum of all parts. The parts before
//! it are tests of the agent, each of which leaves its figures in `target/reports/database/`. The
//! sum goes to `target/reports/database.json`. `database large` plays the last part alone.
#![allow(clippy::print_stdout, reason = "it says what it is at")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::example::{self, DATABASE};
use lockstep_tests::operator::{Operator, answer_gates, list, steps, text};
use lockstep_tests::snapshot::Snapshot;
use lockstep_tests::target;
use lockstep_tests::timeline::timeline;
use serde_json::{Map, Value, json};

/// How large the database is at least, in bytes.
const LARGE: u64 = 1 << 30;

/// How long a rollout over such a database may take on a busy machine.
const BOUND: Duration = Duration::from_mins(30);

/// What the other parts leave: the file's name, and the figures that the sum must have of it.
const PARTS: [(&str, &[&str]); 4] = [
    ("sabotages", &["sabotages", "stopped"]),
    (
        "kills",
        &["kill_points", "double_runs", "between", "unknown"],
    ),
    ("returns", &["rollbacks", "rollbacks_equal"]),
    ("backup", &["backup_cpu_ratio", "backup_wall_ratio"]),
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("database: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if std::env::args().skip(1).any(|word| word == "large") {
        println!("{:#}", large()?);
        return Ok(());
    }
    let reports = target().join("reports");
    let mut sum = Map::new();
    let mut missing = vec![];
    for (part, figures) in PARTS {
        let found = read(&reports.join("database").join(format!("{part}.json")))?;
        for (name, value) in found {
            println!("  {name}: {value}");
            sum.insert(name, value);
        }
        missing.extend(
            figures
                .iter()
                .copied()
                .filter(|name| !sum.contains_key(*name)),
        );
    }
    ensure!(
        missing.is_empty(),
        "there is no figure {}",
        missing.join(", ")
    );
    sum.insert("large".into(), large()?);
    let path = reports.join("database.json");
    let sum = Value::Object(sum);
    fs::write(&path, format!("{sum:#}\n"))?;
    println!("database: {}", path.display());
    judge(&sum)
}

/// The figures of a part.
fn read(file: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("{} is missing: run `make database`", file.display()))?;
    match serde_json::from_str(&text)? {
        Value::Object(figures) => Ok(figures),
        _ => bail!("{} holds no figures", file.display()),
    }
}

/// Whether every promise has held.
fn judge(sum: &Value) -> Result<()> {
    ensure!(
        sum["sabotages"] == sum["stopped"],
        "a sabotaged backup was taken for a good one"
    );
    ensure!(sum["double_runs"] == 0, "a migration ran twice");
    ensure!(sum["between"] == 0, "a schema was left between");
    ensure!(
        sum["rollbacks"] == sum["rollbacks_equal"],
        "a rollback did not lead back"
    );
    Ok(())
}

/// A large database goes forward with one release, and back from the next.
fn large() -> Result<Value> {
    println!("database: {} MiB, forward and back", LARGE >> 20);
    let mut cluster = Cluster::builder().rehearsing().start()?;
    let played = play(&cluster);
    if played.is_err() {
        println!("{}", cluster.last_words());
    }
    cluster.stop()?;
    played
}

fn play(cluster: &Cluster) -> Result<Value> {
    cluster.install()?;
    let begun = Instant::now();
    let bytes = fill(cluster)?;
    let generated = begun.elapsed().as_secs();
    println!("  {} MiB generated in {generated} s", bytes >> 20);

    let plan = plan(cluster)?;
    let forward = deploy(cluster, &plan, "v1.0.0", "succeeded")?;
    let (new, rows) = (Snapshot::take(cluster)?, bulk(cluster)?);
    let back = deploy(cluster, &plan, "v1.1.0", "rolled_back")?;
    let differences = new.differences(&Snapshot::take(cluster)?);
    ensure!(
        differences.is_empty(),
        "not as before: {}",
        differences.join("; ")
    );
    ensure!(rows == bulk(cluster)?, "the large table has other rows");
    Ok(json!({
        "bytes": bytes,
        "forward_ms": times(&forward),
        "back_ms": times(&back),
    }))
}

/// Makes a table that holds most of the bytes; the database's size then.
fn fill(cluster: &Cluster) -> Result<u64> {
    let postgres = cluster.postgres();
    postgres.query(
        DATABASE,
        "SET ROLE employee_migrator; CREATE SCHEMA bulk; CREATE TABLE bulk.events \
         (id bigint PRIMARY KEY, at timestamptz NOT NULL, kind int NOT NULL, body text NOT NULL)",
    )?;
    let size = || -> Result<u64> {
        let size = postgres.query(DATABASE, &format!("SELECT pg_database_size('{DATABASE}')"))?;
        Ok(size.trim().parse()?)
    };
    for batch in 0_u64.. {
        if size()? >= LARGE {
            break;
        }
        let (from, to) = (batch * 500_000, (batch + 1) * 500_000 - 1);
        postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO bulk.events SELECT n, timestamptz '2026-01-01' + n * interval '1 s', \
                 n % 17, md5(n::text) || md5((n * 7)::text) || repeat('lorem ipsum ', 4) \
                 FROM generate_series({from}, {to}) n"
            ),
        )?;
    }
    postgres.query(DATABASE, "ANALYZE bulk.events")?;
    size()
}

/// Rows and checksum of the large table, by a query that Lockstep does not have.
fn bulk(cluster: &Cluster) -> Result<String> {
    cluster.postgres().query(
        DATABASE,
        "SELECT count(*), sum(hashtextextended(e::text, 7)::numeric) FROM bulk.events e",
    )
}

/// The example's plan with a rehearsal: the database's host builds the release, too.
fn plan(cluster: &Cluster) -> Result<PathBuf> {
    let example = fs::read_to_string(example::plan())?;
    let [build, review] = ["  - name: build\n    on: app\n", "  - name: review\n"];
    for part in [build, review] {
        ensure!(example.contains(part), "the example's plan has no `{part}`");
    }
    let rehearse = "  - name: rehearse\n    on: db\n    steps:\n      - postgres.rehearse:\n          \
                    {database: employee_system, app: employee-system, release: \"${release}\", \
                    dir: backend, rows: same_count}\n\n";
    let text = example
        .replace(build, &build.replace("app", "[app, db]"))
        .replace(review, &format!("{rehearse}{review}"));
    let path = cluster.root().join("plan.yaml");
    fs::write(&path, text)?;
    Ok(path)
}

fn deploy(cluster: &Cluster, plan: &Path, release: &str, state: &str) -> Result<Value> {
    let rollout = cluster.submit(plan, release)?;
    let people = cluster.approvers();
    let people: Vec<&Operator> = people.iter().collect();
    let document = answer_gates(&people, &rollout, BOUND, |_, _| {})?;
    println!("  {release}");
    for line in timeline(&document) {
        println!("    {line}");
    }
    ensure!(
        text(&document["state"]) == state,
        "{release} was to end `{state}`: {}",
        cluster.explain(&document)
    );
    Ok(document)
}

/// How long each step of the database took, in milliseconds, those of a rollback by themselves.
fn times(document: &Value) -> Value {
    let mut times = Map::new();
    for (phase, step) in steps(document) {
        let action = text(&step["action"]);
        if !action.starts_with("postgres.") && !action.starts_with("migration.") {
            continue;
        }
        for attempt in list(&step["attempts"]) {
            let (phase, way) = (text(&phase["name"]), text(&attempt["direction"]));
            times.insert(
                format!("{phase}: {action} ({way})"),
                attempt["took_ms"].clone(),
            );
        }
    }
    Value::Object(times)
}
