//! What a step adds to pg_dump: processor and wall time of the whole of it beside bare pg_dump with
//! the same options, in alternating runs. `LOCKSTEP_BENCH_MIB` (256) and `LOCKSTEP_BENCH_RUNS` (15)
//! choose the database's size and how often.
//!
//! Processor time is that of the step process (here the test), of what it has started, and of the
//! server with all its processes. With `measure: []` the step does what pg_dump does, and digest,
//! preflight and manifest; what rows and checksums cost on top is told apart.

#![expect(clippy::print_stdout, reason = "people read the figures")]

use std::process::Command;
use std::time::Instant;

use lockstep_proto::action::postgres::Aspect;

use super::*;
use crate::sql::cluster::bin_dir;

/// The most processor time that a step may take, of pg_dump's.
const MOST_CPU: f64 = 1.05;

/// Bare pg_dump takes at least this part of a step's time.
const LEAST_WALL: f64 = 0.98;

/// Runs with everything measured: only a figure, nothing is held against it.
const MEASURED: usize = 3;

/// Seconds.
#[derive(Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
}

fn setting(name: &str, default: usize) -> usize {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().expect("a number"))
}

/// Processor seconds of a process and of those children of it that have ended, and its parent.
fn cpu(pid: u32) -> Option<(f64, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks: f64 = fields[11..15]
        .iter()
        .map(|field| field.parse::<f64>().unwrap())
        .sum();
    // USER_HZ is 100 wherever Linux runs.
    Some((ticks / 100.0, fields[1].parse().unwrap()))
}

/// Processor seconds of this test, of what it has started and of the server until now.
fn spent(server: u32) -> f64 {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let own = [std::process::id(), server];
    let of = |pid: u32| cpu(pid).filter(|(_, parent)| own.contains(&pid) || *parent == server);
    pids.filter_map(of).map(|(seconds, _)| seconds).sum()
}

async fn timed(server: u32, run: impl AsyncFnOnce()) -> Took {
    let (began, before) = (Instant::now(), spent(server));
    run().await;
    Took {
        wall: began.elapsed().as_secs_f64(),
        cpu: spent(server) - before,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

/// Where the median lies in 95 of 100 cases, by drawing anew from what was seen.
fn interval(seen: &[f64]) -> (f64, f64) {
    let draw = |_| seen[rand::random_range(0..seen.len())];
    let drawn = |_| median((0..seen.len()).map(draw).collect());
    let mut medians: Vec<f64> = (0..4000).map(drawn).collect();
    medians.sort_by(f64::total_cmp);
    (medians[100], medians[3899])
}

async fn fill(bench: &Bench, mib: usize) {
    // A row has about 250 bytes, of which gzip leaves a third.
    let rows = mib * 4200;
    bench
        .sql(&format!(
            "CREATE TABLE public.load (id int PRIMARY KEY, at timestamptz, amount numeric, \
             a text, b text); \
             INSERT INTO public.load SELECT n, timestamptz '2026-01-01' + n * interval '1 s', \
             n * 0.37, md5(n::text) || md5((n * 7)::text), repeat('note ' || n % 1000, 10) \
             FROM generate_series(1, {rows}) n"
        ))
        .await;
    let settle = bench.session("staff").await;
    settle
        .run("", "VACUUM (FREEZE, ANALYZE) public.load")
        .await
        .unwrap();
    settle.run("", "CHECKPOINT").await.unwrap();
}

#[tokio::test]
#[ignore = "takes minutes, and means something only with `--release`: `make database` and `make bench` run it"]
async fn a_step_costs_hardly_more_than_bare_pg_dump() {
    let is_fast = !cfg!(debug_assertions);
    assert!(is_fast, "run it with --release");
    let (mib, runs) = (
        setting("LOCKSTEP_BENCH_MIB", 256),
        setting("LOCKSTEP_BENCH_RUNS", 15),
    );
    let bench = Bench::new().await;
    fill(&bench, mib).await;
    let (server, size) = (
        bench.server(),
        "SELECT pg_database_size(current_database())::text",
    );
    let bytes = bench
        .session("staff")
        .await
        .value("", size)
        .await
        .unwrap()
        .unwrap();
    let store = bench.host.config.state_dir.join("backups");
    let (file, pass) = (
        bench.host.path().join("bare.dump"),
        bench.host.path().join("pass"),
    );
    let config = bench.host.config.postgres["staff"].clone();
    let bare = async || {
        let mut dump = Command::new(bin_dir().join("pg_dump"));
        dump.args([
            "-Fc",
            "-Z1",
            "-h",
            &config.host,
            "-p",
            &config.port.to_string(),
        ]);
        dump.args(["-U", &config.user, "-d", &bench.name, "-f"])
            .arg(&file);
        dump.env("PGPASSWORD", PASSWORD).env("PGPASSFILE", &pass);
        assert!(dump.status().unwrap().success());
    };
    let step = async |measure: Vec<Aspect>| {
        let act = Backup {
            measure,
            ..backup()
        };
        act.apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    };
    let clean = || {
        let _ = fs::remove_file(&file);
        let _ = fs::remove_dir_all(&store);
    };
    let mut pairs: Vec<(Took, Took)> = vec![];
    // The first pair only warms up.
    for run in 0..=runs {
        clean();
        let pair = if run % 2 == 0 {
            let bare = timed(server, &bare).await;
            clean();
            (bare, timed(server, async || step(vec![]).await).await)
        } else {
            let step = timed(server, async || step(vec![]).await).await;
            clean();
            (timed(server, &bare).await, step)
        };
        let (bare, step) = pair;
        println!(
            "bare {:.2} s, cpu {:.2} s; step {:.2} s, cpu {:.2} s",
            bare.wall, bare.cpu, step.wall, step.cpu
        );
        if run > 0 {
            pairs.push(pair);
        }
    }
    let mut measured = vec![];
    for _ in 0..MEASURED {
        clean();
        let all = backup().measure;
        measured.push(timed(server, async || step(all).await).await);
    }
    let of = |pick: fn(&(Took, Took)) -> f64| median(pairs.iter().map(pick).collect());
    let (bare_cpu, bare_wall) = (of(|pair| pair.0.cpu), of(|pair| pair.0.wall));
    let cpu_ratio = of(|pair| pair.1.cpu) / bare_cpu;
    let walls: Vec<f64> = pairs.iter().map(|pair| pair.0.wall / pair.1.wall).collect();
    let (low, high) = interval(&walls);
    let report = serde_json::json!({
        "backup_cpu_ratio": cpu_ratio,
        "backup_wall_ratio": median(walls),
        "interval": [low, high],
        "runs": runs,
        "bytes": bytes.parse::<u64>().unwrap(),
        "bare_seconds": bare_wall,
        "bare_cpu_seconds": bare_cpu,
        "measured_cpu_ratio": median(measured.iter().map(|it| it.cpu).collect()) / bare_cpu,
        "measured_wall_ratio": bare_wall / median(measured.iter().map(|it| it.wall).collect()),
    });
    println!("{report}");
    if let Some(directory) = std::env::var_os("LOCKSTEP_DATABASE_REPORT_DIR") {
        let file = Path::new(&directory).join("backup.json");
        fs::write(file, format!("{report}\n")).unwrap();
    }
    assert!(
        cpu_ratio <= MOST_CPU,
        "the step took {cpu_ratio:.3} of pg_dump's processor time"
    );
    assert!(
        high >= LEAST_WALL,
        "pg_dump takes {low:.3} to {high:.3} of a step's time"
    );
}
