//! What has been costs a start no more than what goes on: a controller that compacts its journal while
//! it runs, killed after ever more rollouts.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::laws::exponent;
use crate::person::Person;
use crate::report::Report;
use crate::rollout::{PHASES, least};
use crate::side::Side;
use crate::{journal, plans};

/// Rollouts that have ended before a start.
const ROLLOUTS: [usize; 3] = [5, 20, 60];

/// The same where time is short.
const FEW_ROLLOUTS: [usize; 2] = [5, 60];

/// So often it is killed after them; the least start counts, for whatever disturbs it only adds.
const STARTS: usize = 3;

/// What the first of them leave in the journal, and the others would leave several times.
const COMPACT_ABOVE: u64 = 25_000;

/// The most that the exponent of a start may be, by rollouts that have ended.
const MOST: f64 = 0.2;

/// A compaction waits for fifteen calm seconds.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) fn measure(report: &mut Report, agents: usize, quick: bool) -> Result<()> {
    let all: &[usize] = if quick { &FEW_ROLLOUTS } else { &ROLLOUTS };
    let cluster = crate::without_hosts().compact_above(COMPACT_ABOVE);
    let mut side = Side::real(cluster.start()?, agents)?;
    let (mut starts, mut longest, mut ended) = (vec![], Duration::ZERO, 0);
    for (before, rollouts) in all.iter().copied().enumerate() {
        let person = Person::new(&Place::of(&side.controller))?;
        for number in ended..rollouts {
            let name = format!("history-{number}");
            let rollout = plans::submit(&side.controller, &name, PHASES, 1)?;
            person.succeeded(&rollout)?;
        }
        ended = rollouts;
        if before > 0 {
            longest = longest.max(compaction(&side.controller, &person, before)?);
        }
        let mut took = vec![];
        for _ in 0..STARTS {
            side.controller.kill_controller();
            took.push(journal::start(&mut side.controller)?.as_secs_f64() * 1000.0);
            side.connected()?;
        }
        let took = least(&took);
        let what = format!("kill -9 after {rollouts} rollouts ({agents} agents): until it listens");
        report.bounded(what, took, "ms", Some(5000.0));
        starts.push((rollouts as f64, took));
    }
    let what = "exponent: a start, by rollouts that have ended";
    report.bounded(what.to_owned(), exponent(&starts), "", Some(MOST));
    let longest = longest.as_secs_f64() * 1000.0;
    let what = format!("longest answer while the journal is compacted ({agents} agents)");
    report.value(what, longest, "ms");
    Ok(())
}

/// Asks the controller all the time until there are more archives than that; how long its longest
/// answer took.
fn compaction(cluster: &Cluster, person: &Person, archives: usize) -> Result<Duration> {
    let (begun, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        // An archive that is there before the question has been exchanged before the answer.
        let there = journal::archives(cluster) >= archives;
        let asked = Instant::now();
        person.hosts()?;
        longest = longest.max(asked.elapsed());
        if there {
            return Ok(longest);
        }
        ensure!(begun.elapsed() < PATIENCE, "the journal is not compacted");
        thread::sleep(Duration::from_millis(10));
    }
}
