//! Events of a real rollout on their way to 100 subscribers. Agents take their time for each step,
//! by their seeds, so that what happens is spread over time as in a fleet that works.

use std::time::Instant;

use anyhow::{Result, bail};
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::person::Person;
use crate::process::Part;
use crate::report::Report;
use crate::side::Side;
use crate::watch::{Heard, Said, Watch};
use crate::{laws, plans};

const AGENTS: usize = 1000;

/// One of them reads what it gets, and is timed.
const SUBSCRIBERS: usize = 100;

/// Events of one step on one host: ordered, started, done.
const EVENTS: f64 = 3.0;

/// How long the first step takes.
const FIRST: &str = "think 2000 4000";

/// From an agent's result to its next order, in milliseconds, about: part of each step's time.
const WAY_MS: f64 = 20.0;

/// An event is with its subscriber within so many milliseconds, 99 times of a hundred.
const WITHIN: f64 = 200.0;

/// The most that the rate that was wanted may be, by the one that was reached.
const SLOWEST: f64 = 1.1;

/// How fast things happen.
struct Pace {
    /// Events in each second that the agents are to bring about.
    rate: f64,
    /// So many steps, for about as many seconds each time.
    steps: usize,
    target: Option<f64>,
}

const PACES: [Pace; 2] = [
    Pace {
        rate: 10_000.0,
        steps: 25,
        target: Some(WITHIN),
    },
    Pace {
        rate: 2_000.0,
        steps: 5,
        target: None,
    },
];

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let cluster = crate::controller()?;
    let place = Place::of(&cluster);
    let mut side = Side::real(cluster, AGENTS)?;
    let person = Person::new(&place)?;
    let paces = if quick { &PACES[..1] } else { &PACES };
    let mut readers = subscribers(&place, 1, true)?;
    let mut others = subscribers(&place, SUBSCRIBERS - 1, false)?;
    let mut costs = vec![];
    for (number, pace) in paces.iter().enumerate() {
        // Evenly from 0 to twice as much as it should be in the middle.
        let most = 2.0 * (1000.0 * AGENTS as f64 * EVENTS / pace.rate - WAY_MS);
        // The first step gives everybody time to open a stream.
        side.load.tell(FIRST)?;
        let rollout = plans::submit(&side.controller, &format!("paced-{number}"), 1, pace.steps)?;
        let mut all = [&mut others, &mut readers];
        for part in &mut all {
            part.tell(&format!("watch {rollout}"))?;
            let Said::Watching = part.next()? else {
                bail!("the subscribers do not watch");
            };
        }
        side.load.tell(&format!("think 0 {most:.0}"))?;
        let watched = watched(&side, all)?;
        person.succeeded(&rollout)?;
        watched.tell(report, pace);
        costs.push((watched.reader.rate, watched.cpu));
    }
    if costs.len() > 1 {
        let exponent = laws::exponent(&costs);
        report.bounded(
            "exponent: CPU of the controller, by events",
            exponent,
            "",
            Some(laws::MOST),
        );
    }
    Ok(())
}

fn subscribers(place: &Place, subscribers: usize, reads: bool) -> Result<Part<Said>> {
    let watch = Watch {
        place: place.clone(),
        subscribers,
        reads,
    };
    let mut part = Part::start("watch", &watch)?;
    let Said::Connected = part.next()? else {
        bail!("the subscribers do not connect");
    };
    Ok(part)
}

/// What became of a rollout's events.
struct Watched {
    reader: Heard,
    /// Events that somebody did not get.
    missed: u64,
    /// Processor time of the controller for each second.
    cpu: f64,
}

/// Until the rollout has ended; the last of the subscribers are those who read.
fn watched(side: &Side<Cluster>, mut all: [&mut Part<Said>; 2]) -> Result<Watched> {
    let (begun, before) = (Instant::now(), side.used()?);
    let mut heard = vec![];
    for part in all.iter_mut().rev() {
        let Said::Heard(least) = part.next()? else {
            bail!("the subscribers do not tell what they heard");
        };
        heard.push(least);
    }
    let cpu = (side.used()?.cpu - before.cpu) / begun.elapsed().as_secs_f64();
    let [reader, others] = &heard[..] else {
        bail!("there are two kinds of subscribers");
    };
    let fewest = reader.events.min(others.events);
    Ok(Watched {
        missed: reader.last.max(others.last).saturating_sub(fewest),
        reader: reader.clone(),
        cpu,
    })
}

impl Watched {
    fn tell(&self, report: &mut Report, pace: &Pace) {
        let wanted = pace.rate;
        let name = |what: &str| format!("{wanted} events/s to {SUBSCRIBERS}: {what}");
        let Heard {
            rate,
            from_event,
            from_report,
            ..
        } = self.reader;
        report.value(name("reached"), rate, "/s");
        let short = pace.target.map(|_| SLOWEST);
        report.bounded(
            name("the rate that was wanted by it"),
            wanted / rate,
            "",
            short,
        );
        report.value(name("p50 to a subscriber"), from_event[0], "ms");
        report.bounded(
            name("p99 to a subscriber"),
            from_event[1],
            "ms",
            pace.target,
        );
        report.value(name("p99 from the agent's report"), from_report[1], "ms");
        report.bounded(name("events missed"), self.missed as f64, "", Some(0.0));
        report.value(name("CPU of the controller"), self.cpu, "cores");
    }
}
