//! The controller's journal: what an order takes in it, what a compaction leaves of it, and what it
//! makes of the controller's start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use lockstep_tests::cluster::Cluster;

use crate::process::used;
use crate::report::Report;
use crate::side::{Side, controller_pid};

/// What is known of a journal that is measured.
pub(crate) struct Before {
    /// Its length before the first order, in bytes.
    pub(crate) empty: u64,
    /// The orders in it, each with its reports.
    pub(crate) orders: usize,
}

/// The length of a journal's files.
pub(crate) fn bytes(cluster: &Cluster) -> Result<u64> {
    length(&state(cluster).join("journal"))
}

/// The archives of a controller that compacts its journal.
pub(crate) fn archives(cluster: &Cluster) -> usize {
    let archives = fs::read_dir(state(cluster).join("archive"));
    let archives = archives.into_iter().flatten().flatten();
    let whole = |path: &Path| path.extension().is_some_and(|it| it == "jsonl");
    archives.filter(|entry| whole(&entry.path())).count()
}

fn state(cluster: &Cluster) -> PathBuf {
    cluster.root().join("controller/state")
}

fn length(directory: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() {
            length(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(sum)
}

/// Starts the controller; how long it takes until it is ready.
pub(crate) fn start(cluster: &mut Cluster) -> Result<Duration> {
    let began = SystemTime::now();
    cluster.start_controller()?;
    // The harness looks every 50 ms; the file says when it was written.
    let ready = fs::metadata(cluster.root().join("controller/ready"))?.modified()?;
    Ok(ready.duration_since(began).unwrap_or_default())
}

/// Stops, compacts and starts the controller of a fleet whose rollouts have all ended.
pub(crate) fn measure(report: &mut Report, mut side: Side<Cluster>, before: &Before) -> Result<()> {
    let agents = side.agents;
    let name = |what: &str| format!("{agents} agents: journal: {what}");
    let full = bytes(&side.controller)?;
    let each = full.saturating_sub(before.empty) as f64 / before.orders as f64;
    report.value(name("for each order"), each, "B");

    side.leave()?;
    let Side {
        controller: mut cluster,
        load,
        ..
    } = side;
    drop(load);
    stop(&mut cluster)?;
    let slow = start(&mut cluster)?;
    let folded = used(controller_pid(&cluster)?)?.memory;
    stop(&mut cluster)?;
    let directory = state(&cluster);
    let directory = directory.to_str().context("the path is UTF-8")?;
    let begun = Instant::now();
    let compacted = cluster
        .requester()
        .json(&["journal", "compact", "--dir", directory, "--keep", "0"])?;
    let took = begun.elapsed();
    let rollouts = compacted["rollouts"].as_array().map_or(0, Vec::len);
    ensure!(rollouts > 0, "nothing was compacted: {compacted}");
    let left = bytes(&cluster)?;
    let quick = start(&mut cluster)?;
    let rest = used(controller_pid(&cluster)?)?.memory;

    let mb = |bytes: u64| bytes as f64 / 1e6;
    let ms = |took: Duration| took.as_secs_f64() * 1000.0;
    report.value(name("before its compaction"), mb(full), "MB");
    report.value(name("after it"), mb(left), "MB");
    report.value(name("the compaction"), took.as_secs_f64(), "s");
    report.value(name("start of the controller before it"), ms(slow), "ms");
    report.value(name("start of the controller after it"), ms(quick), "ms");
    report.value(name("memory at the start before it"), mb(folded), "MB");
    report.value(name("memory at the start after it"), mb(rest), "MB");
    Ok(())
}

fn stop(cluster: &mut Cluster) -> Result<()> {
    let code = cluster.stop_controller();
    ensure!(code == Some(0), "the controller ended with {code:?}");
    Ok(())
}
