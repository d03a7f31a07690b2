//! One no-op order to every agent, every result durable: phase after phase, each a barrier.

use anyhow::{Result, bail};
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::load::{Load, Said};
use crate::person::Person;
use crate::process::running;
use crate::report::{Report, median, part};
use crate::side::{Side, controller_pid, ms};
use crate::{clock, control, journal, plans};

/// Orders are given so many times in a row on each side, and that in turn.
const ROUNDS: usize = 5;

/// What orders to so many agents cost, for what follows from it.
pub(crate) struct Cost {
    pub(crate) agents: usize,
    /// From the first order of a phase until its last result is durable, in milliseconds.
    pub(crate) wall: f64,
    /// Of the controller, for one order to all of them, in milliseconds.
    pub(crate) cpu: f64,
    /// The same of the bare one.
    pub(crate) bare_cpu: f64,
    /// All sessions together, in bytes.
    pub(crate) memory: f64,
}

pub(crate) fn measure(report: &mut Report, agents: usize, quick: bool) -> Result<Cost> {
    let turns = if quick { 2 } else { 5 };
    let mut cluster = control::cluster()?;
    let place = Place::of(&cluster);
    let pid = controller_pid(&cluster)?;
    let person = Person::new(&place)?;

    let mut bare = Side::bare(&place, agents)?;
    let mut real = Side::connect(&mut cluster, pid, &Load::of(&place, agents, false))?;

    let (mut bares, mut bare_cpu) = (vec![], vec![]);
    let (mut reals, mut real_cpu, mut told, mut orders) = (vec![], vec![], vec![], vec![]);
    for turn in 0..turns {
        let before = running(bare.pid)?;
        bares.extend(bare.rounds(ROUNDS)?);
        bare_cpu.push(per_round(before, running(bare.pid)?, ROUNDS));

        let rollout = submit(real.controller, turn)?;
        let mut last = 0;
        let mut before = running(pid)?;
        for phase in 0..=ROUNDS {
            let Said::Round {
                orders: [from, to],
                durable: [_, acknowledged],
                twice,
                ..
            } = real.load.next()?
            else {
                bail!("the load does not tell of a round");
            };
            anyhow::ensure!(twice == 0, "{twice} agents were ordered a step twice");
            // The first order of a phase says that every result of the one before it is durable:
            // agents are told so later, with their next order.
            if phase == 0 {
                before = running(pid)?;
            } else {
                reals.push(ms(from - last));
                orders.push(ms(to - from));
                told.push(ms(acknowledged - from));
            }
            last = from;
        }
        real_cpu.push(per_round(before, running(pid)?, ROUNDS));
        person.succeeded(&rollout)?;
    }

    let restart = restart(&mut real)?;
    control::measure(report, &mut real)?;
    let name = |what: &str| format!("{agents} agents: {what}");
    let target = (agents == 10_000).then_some(1.5);
    report.beside(
        name("first order until every result is durable"),
        median(&reals),
        "ms",
        median(&bares),
        target,
    );
    report.value(name("first to last order"), median(&orders), "ms");
    let what = "first order until every agent knows it";
    report.value(name(what), median(&told), "ms");
    let cpu = (median(&real_cpu), median(&bare_cpu));
    report.beside(
        name("CPU of the controller for it"),
        cpu.0,
        "ms",
        cpu.1,
        None,
    );
    restart.tell(report, agents);
    if agents >= 1000 {
        let target = (agents == 10_000).then_some(1.2);
        let kb = |bytes: f64| bytes / 1000.0;
        report.beside(
            name("memory of an idle one"),
            kb(real.memory),
            "kB",
            kb(bare.memory),
            target,
        );
    }
    Ok(Cost {
        agents,
        wall: median(&reals),
        cpu: cpu.0,
        bare_cpu: cpu.1,
        memory: real.memory * agents as f64,
    })
}

/// Every order a phase of its own.
fn submit(cluster: &Cluster, number: usize) -> Result<String> {
    plans::submit(cluster, &format!("rounds-{number}"), ROUNDS + 1, 1)
}

/// What a kill of the controller in the middle of a phase costs.
struct Restart {
    /// Until it listens again, in milliseconds.
    ready: f64,
    /// From then until each session is up, in milliseconds.
    back: Vec<f64>,
    /// Handshakes and sessions that failed although somebody listened.
    refused: usize,
    /// Until the phase that it was killed in has ended, in milliseconds; none if it was killed after
    /// the last one, which a small fleet is through with at once.
    through: Option<f64>,
    /// Steps that a host was to do again.
    repeated: u64,
}

fn restart(side: &mut Side<&mut Cluster>) -> Result<Restart> {
    let rollout = submit(side.controller, 100)?;
    let mut rounds = 0;
    while rounds < 2 {
        if let Said::Round { .. } = side.load.next()? {
            rounds += 1;
        }
    }
    side.controller.kill_controller();
    let killed = clock::now();
    let ready = journal::start(side.controller)?;
    let listens = killed + u64::try_from(ready.as_nanos())?;
    let (mut back, mut refused, mut through, mut repeated) = (vec![], 0, None, 0);
    while rounds <= ROUNDS || back.is_empty() {
        match side.load.next()? {
            Said::Connected {
                at,
                refused: failed,
                ..
            } => {
                // A dial may have met the one that was killed.
                refused = failed.iter().filter(|at| **at > listens).count();
                back = at.iter().map(|at| ms(at.saturating_sub(listens))).collect();
            }
            Said::Round {
                durable: [_, last],
                repeated: again,
                ..
            } => {
                rounds += 1;
                repeated = again;
                if last > killed {
                    through.get_or_insert(last);
                }
            }
            Said::Dropped => bail!("the load has ended"),
        }
    }
    Person::new(&Place::of(side.controller))?.succeeded(&rollout)?;
    Ok(Restart {
        ready: ready.as_secs_f64() * 1000.0,
        back,
        refused,
        through: through.map(|through| ms(through - killed)),
        repeated,
    })
}

impl Restart {
    fn tell(&self, report: &mut Report, agents: usize) {
        let name = |what: &str| format!("{agents} agents: kill -9 of the controller: {what}");
        let most = |target: f64| (agents == 10_000).then_some(target);
        report.bounded(
            name("until it listens again"),
            self.ready,
            "ms",
            most(5000.0),
        );
        report.bounded(
            name("p99 until back"),
            part(&self.back, 99),
            "ms",
            most(30_000.0),
        );
        report.value(name("the last is back"), part(&self.back, 100), "ms");
        report.bounded(name("sessions refused"), self.refused as f64, "", Some(0.0));
        let repeated = self.repeated as f64;
        report.bounded(name("steps repeated"), repeated, "", Some(0.0));
        if let Some(through) = self.through {
            report.value(name("until the phase has ended"), through, "ms");
        }
    }
}

/// Milliseconds of processor time.
fn per_round(before: f64, after: f64, rounds: usize) -> f64 {
    (after - before) * 1000.0 / rounds as f64
}
