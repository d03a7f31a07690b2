//! One no-op order to every agent, every result durable: phase after phase, each a barrier.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result, bail};
use lockstep_tests::cluster::Cluster;

use crate::dial::Place;
use crate::load::{Load, Said};
use crate::process::{Part, Used, used};
use crate::report::{Report, median, part};
use crate::{bare, clock};

/// Orders are given so many times in a row on each side, and that in turn.
const ROUNDS: usize = 5;

/// A controller with its agents.
struct Side<C> {
    controller: C,
    load: Part<Said>,
    /// Memory that each agent's session takes at the controller, in bytes.
    memory: f64,
}

pub(crate) fn measure(report: &mut Report, agents: usize, quick: bool) -> Result<()> {
    let turns = if quick { 2 } else { 5 };
    let mut cluster = crate::controller()?;
    let place = Place {
        address: cluster.address().to_owned(),
        pki: cluster.pki(),
    };
    let pid = cluster.controller_pid().context("the controller runs")?;
    let pid = pid.as_raw_nonzero().get().unsigned_abs();
    let load = |place: &Place, bare| Load {
        place: place.clone(),
        agents,
        first: 0,
        seed: 7,
        bare,
    };

    let mut bare: Part<bare::Said> = Part::start("bare", &place)?;
    let bare::Said::Listens(address) = bare.next()? else {
        bail!("the baseline does not listen");
    };
    let bare_place = Place {
        address,
        ..place.clone()
    };
    let bare_pid = bare.pid();
    let mut bare = Side::connect(bare, bare_pid, &load(&bare_place, true))?;
    let mut real = Side::connect(&mut cluster, pid, &load(&place, false))?;

    let (mut bares, mut bare_cpu) = (vec![], vec![]);
    let (mut reals, mut real_cpu, mut first, mut orders) = (vec![], vec![], vec![], vec![]);
    for turn in 0..turns {
        let before = used(bare_pid)?;
        bare.controller.tell(&format!("rounds {ROUNDS}"))?;
        for _ in 0..ROUNDS {
            let bare::Said::Round { took, .. } = bare.controller.next()? else {
                bail!("the baseline does not tell of a round");
            };
            bares.push(ms(took));
        }
        bare_cpu.push(per_round(before, used(bare_pid)?, ROUNDS));

        let rollout = submit(real.controller, turn)?;
        let mut last = 0;
        let mut before = used(pid)?;
        // The first phase begins with consent and the plan's way to every agent.
        for phase in 0..=ROUNDS {
            let Said::Round {
                orders: [from, to],
                durable: [begin, end],
                twice,
                ..
            } = real.load.next()?
            else {
                bail!("the load does not tell of a round");
            };
            anyhow::ensure!(twice == 0, "{twice} agents were ordered a step twice");
            if phase == 0 {
                before = used(pid)?;
            } else {
                reals.push(ms(end - last));
                orders.push(ms(to - from));
                first.push(ms(begin - last));
            }
            last = end;
        }
        real_cpu.push(per_round(before, used(pid)?, ROUNDS));
        finished(real.controller, &rollout)?;
    }

    let restart = restart(&mut real)?;
    let name = |what: &str| format!("{agents} agents: {what}");
    let target = (agents == 10_000).then_some(1.5);
    report.beside(
        name("order to last durable result"),
        median(&reals),
        "ms",
        median(&bares),
        target,
    );
    report.value(name("to the first durable result"), median(&first), "ms");
    report.value(name("first to last order"), median(&orders), "ms");
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
    Ok(())
}

/// What a kill of the controller in the middle of a phase costs.
struct Restart {
    /// Until it listens again, in milliseconds.
    ready: f64,
    /// From then until each session is up, in milliseconds.
    back: Vec<f64>,
    /// Handshakes and sessions that failed although somebody listened.
    refused: u64,
    /// Until the phase that it was killed in has ended, in milliseconds.
    through: f64,
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
    side.controller.start_controller()?;
    let listens = clock::now();
    let (mut back, mut refused, mut through) = (vec![], 0, 0);
    while rounds <= ROUNDS {
        match side.load.next()? {
            Said::Connected {
                at,
                refused: failed,
                ..
            } => {
                refused = failed;
                back = at.iter().map(|at| ms(at.saturating_sub(listens))).collect();
            }
            Said::Round { durable, .. } => {
                rounds += 1;
                if through == 0 {
                    through = durable[1];
                }
            }
            Said::Dropped => bail!("the load has ended"),
        }
    }
    finished(side.controller, &rollout)?;
    anyhow::ensure!(!back.is_empty(), "not every agent came back");
    Ok(Restart {
        ready: ms(listens - killed),
        back,
        refused,
        through: ms(through - killed),
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
        report.bounded(name("sessions refused"), self.refused as f64, "", Some(0.0));
        report.value(name("until the phase has ended"), self.through, "ms");
    }
}

fn finished(cluster: &Cluster, rollout: &str) -> Result<()> {
    let document = cluster
        .requester()
        .wait(rollout, lockstep_tests::wait::ROLLOUT)?;
    let state = &document["state"];
    anyhow::ensure!(
        state == "succeeded",
        "the rollout is {state}: {}",
        document["reason"]
    );
    Ok(())
}

impl<C> Side<C> {
    fn connect(controller: C, pid: u32, load: &Load) -> Result<Self> {
        let before = used(pid)?.memory;
        let agents = load.agents;
        let mut load: Part<Said> = Part::start("load", load)?;
        load.tell("connect")?;
        let Said::Connected { .. } = load.next()? else {
            bail!("the load does not connect");
        };
        std::thread::sleep(std::time::Duration::from_secs(1));
        let memory = used(pid)?.memory.saturating_sub(before);
        Ok(Self {
            controller,
            load,
            memory: memory as f64 / agents as f64,
        })
    }
}

/// A rollout of so many phases with one step each.
fn submit(cluster: &Cluster, number: usize) -> Result<String> {
    let mut plan = format!(
        "version: 1\nplan: rounds-{number}\nfleet:\n  app: {{labels: {{role: app}}}}\n\
         deadline: 1h\nphases:\n"
    );
    for phase in 0..=ROUNDS {
        writeln!(
            plan,
            "  - name: round-{phase}\n    on: app\n    steps:\n      - check.port: {{port: 1}}"
        )?;
    }
    let path = cluster.root().join(format!("rounds-{number}.yaml"));
    fs::write(&path, plan)?;
    cluster.requester().submit(&path, &[])
}

fn ms(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// Milliseconds of processor time.
fn per_round(before: Used, after: Used, rounds: usize) -> f64 {
    (after.cpu - before.cpu) * 1000.0 / rounds as f64
}
