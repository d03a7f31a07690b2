//! Bounds: what the loud, the stuck and the late cost the others.
//!
//! ```text
//! healthy agents --lifecycle--> controller --events--> 100 people
//! 50 agents that print at their cap, 10 % that take orders and never answer, one that reads its
//! messages a minute late; one real agent whose step prints as fast as it can
//! ```
//!
//! The loud and the real agent run at a lower priority: they play other machines, and what they take
//! of this one's processors is not the controller's.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::memory::Memory;
use rustix::process::setpriority_process;

use crate::dial::Place;
use crate::load::{Load, Said};
use crate::manner::Manner;
use crate::process::Part;
use crate::real::binaries;
use crate::report::Report;
use crate::watch::{self, Heard, Watch};

const REAL: &str = "real-1";

/// People who watch.
const PEOPLE: usize = 100;

/// Agents that print, and those that read late.
const LOUD: usize = 50;
const LATE: usize = 1;

/// Phases of a rollout, and the wait between two of them: a fleet does not run as fast as it can.
const PHASES: usize = 8;

/// For the controller beside all this, in milliseconds and MiB.
const LONGEST: f64 = 1000.0;
const GROWTH: f64 = 256.0;

const POLICY: &str = "[[allow]]\naction = \"exec.run\"\nwhere = { argv = [[\"/usr/bin/yes\"]] }\n";

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let (agents, rollouts) = if quick { (100, 1) } else { (500, 3) };
    let stuck = agents / 10;
    let healthy = agents - stuck - LATE - if quick { LOUD / 5 } else { LOUD };
    let loud = agents - healthy - stuck - LATE;
    let cluster = Cluster::builder()
        .without_database()
        .binaries(&binaries()?)
        .hosts(&[(REAL, "real")])
        .policy(REAL, Some(POLICY))
        .start()?;
    let controller = cluster.controller_pid().context("the controller runs")?;
    let real = cluster.host(REAL).agent_pid();
    setpriority_process(real, 10)?;
    let mut first = 0;
    let mut loads = vec![];
    for (manner, agents) in [
        (Manner::Prompt, healthy),
        (Manner::Stuck, stuck),
        (Manner::Loud, loud),
        (Manner::Late, LATE),
    ] {
        loads.push(connect(&cluster, manner, agents, first)?);
        first += agents;
    }
    let place = Place::of(&cluster);
    // One of them reads what it gets, and is timed.
    let mut people = [
        watchers(&place, 1, true)?,
        watchers(&place, PEOPLE - 1, false)?,
    ];
    let memory = Memory::begin(&[controller]);
    for manner in [Manner::Stuck, Manner::Loud, Manner::Late] {
        submit(&cluster, manner.role(), LOOK, 1)?;
    }
    submit(&cluster, "real", PRINT, 1)?;
    let (mut delays, mut lost) = (vec![], 0);
    for _ in 0..rollouts {
        let rollout = submit(&cluster, Manner::Prompt.role(), LOOK, PHASES)?;
        for part in &mut people {
            part.tell(&format!("watch {rollout}"))?;
        }
        let mut heard = vec![];
        for part in &mut people {
            heard.push(heard_by(part)?);
        }
        let last = heard.iter().map(|one| one.last).max().unwrap_or(0);
        // Ordered, started, done.
        let least = 3 * healthy * PHASES;
        ensure!(last >= least as u64, "{last} events, and not {least}");
        let fewest = heard.iter().map(|one| one.events).min();
        lost += last.saturating_sub(fewest.unwrap_or(0));
        delays.extend(heard[0].of_all);
    }
    let grown = memory.end();
    printed(&cluster, loud)?;
    let name = |what: &str| {
        format!("{healthy} healthy agents beside {loud} loud, {stuck} stuck, 1 late: {what}")
    };
    // The worst rollout's.
    let p99 = delays.into_iter().fold(0.0, f64::max);
    report.bounded(name("p99 to one of 100 people"), p99, "ms", Some(LONGEST));
    report.bounded(name("events lost"), lost as f64, "", Some(0.0));
    let grown = grown.first().copied().unwrap_or(f64::NAN);
    report.bounded(name("controller grows by"), grown, "MiB", Some(GROWTH));
    Ok(())
}

const LOOK: &str = "check.port: {port: 1}";
const PRINT: &str = "exec.run: {name: print, argv: [/usr/bin/yes]}";

fn connect(cluster: &Cluster, manner: Manner, agents: usize, first: usize) -> Result<Part<Said>> {
    let place = Place::of(cluster);
    let load = Load {
        place,
        agents,
        first,
        seed: 7,
        bare: false,
        manner,
    };
    let mut load: Part<Said> = Part::start("load", &load)?;
    load.tell("connect")?;
    let Said::Connected { .. } = load.next()? else {
        bail!("the load does not connect");
    };
    Ok(load)
}

fn watchers(place: &Place, subscribers: usize, reads: bool) -> Result<Part<watch::Said>> {
    let watch = Watch {
        place: place.clone(),
        subscribers,
        reads,
    };
    let mut part: Part<watch::Said> = Part::start("watch", &watch)?;
    let watch::Said::Connected = part.next()? else {
        bail!("the people do not connect");
    };
    Ok(part)
}

/// What came to them until the rollout had ended.
fn heard_by(part: &mut Part<watch::Said>) -> Result<Heard> {
    loop {
        match part.next()? {
            watch::Said::Heard(heard) => return Ok(heard),
            watch::Said::Watching | watch::Said::Connected => {}
        }
    }
}

/// A rollout over the agents of a role, a second between its phases.
fn submit(cluster: &Cluster, role: &str, step: &str, phases: usize) -> Result<String> {
    let mut plan = format!(
        "version: 1\nplan: {role}\nfleet:\n  app: {{labels: {{role: {role}}}}}\ndeadline: 1h\nphases:\n"
    );
    for phase in 0..phases {
        if phase > 0 {
            writeln!(
                plan,
                "  - name: wait-{phase}\n    steps:\n      - gate.wait: {{for: 1s}}"
            )?;
        }
        writeln!(
            plan,
            "  - name: phase-{phase}\n    on: app\n    steps:\n      - {step}"
        )?;
    }
    let path = cluster.root().join(format!("{role}.yaml"));
    fs::write(&path, plan)?;
    cluster.requester().submit(&path, &[])
}

/// The loud were heard: each has left what the controller keeps of a step's output, and so has the
/// real one.
fn printed(cluster: &Cluster, loud: usize) -> Result<()> {
    let mut hosts = 0;
    for rollout in fs::read_dir(cluster.root().join("controller/state/logs"))? {
        for host in fs::read_dir(rollout?.path())? {
            hosts += usize::from(fs::read_dir(host?.path())?.next().is_some());
        }
    }
    ensure!(
        hosts == loud + 1,
        "{hosts} hosts of {loud} and 1 have printed"
    );
    Ok(())
}
