//! One real agent: its size, what it takes while nothing happens, while a step floods its output,
//! and over many orders.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::ids::{Direction, RolloutId, StepKey, StepRef};
use lockstep_proto::report::{ReportBody, StepOutcome};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1::down;
use lockstep_tests::cluster::Cluster;
use lockstep_tests::memory::Memory;
use lockstep_tests::played::{CLOCK, Controller, Keys, Session, compiled};
use rustix::process::Pid;
use serde_json::json;

use crate::process::{peak, running, used};
use crate::real::{binaries, number};
use crate::report::Report;

const HOST: &str = "real-1";

/// The first of the lines that are printed, each of so many bytes.
const FIRST_LINE: u64 = 100_000_000_000;
const LINE: u64 = 13;

/// Steps of a rollout: enough that its consent is a small part of it.
const STEPS: u16 = 100;

/// Between two looks at a step that runs: whoever looks takes processor time from it.
const PACE: Duration = Duration::from_millis(500);

/// The most that it may have: bytes, kB, percent of a core, and kB over so many orders.
const SIZE: f64 = 10e6;
const IDLE_MEMORY: f64 = 12e3;
const IDLE_CPU: f64 = 0.1;
const GROWTH: f64 = 2e3;
const ORDERS: u32 = 100_000;

const POLICY: &str =
    "[[allow]]\naction = \"exec.run\"\nwhere = { argv = [[\"/usr/bin/seq\", \"**\"]] }\n";

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let binaries = binaries()?;
    let size = fs::metadata(&binaries.agent)?.len() as f64;
    report.bounded("agent: its binary", size, "bytes", Some(SIZE));
    let mut cluster = Cluster::builder()
        .without_database()
        .binaries(&binaries)
        .hosts(&[(HOST, "app")])
        .policy(HOST, Some(POLICY))
        .start()?;
    let pid = cluster.host(HOST).agent_pid().context("the agent runs")?;
    let pid = number(pid);
    idle(report, pid, quick)?;
    flood(report, &cluster, pid, quick)?;
    cluster.kill_controller();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(orders(report, &cluster, pid, quick))
}

fn idle(report: &mut Report, pid: u32, quick: bool) -> Result<()> {
    let span = Duration::from_secs(if quick { 5 } else { 60 });
    // What it did to connect is over.
    thread::sleep(Duration::from_secs(2));
    let before = running(pid)?;
    let begun = Instant::now();
    thread::sleep(span);
    let share = 100.0 * (running(pid)? - before) / begun.elapsed().as_secs_f64();
    let memory = used(pid)?.memory as f64 / 1000.0;
    report.bounded("agent: memory, idle", memory, "kB", Some(IDLE_MEMORY));
    let name = format!("agent: CPU, idle for {} s, of a core", span.as_secs());
    report.bounded(name, share, "%", Some(IDLE_CPU));
    Ok(())
}

/// A step prints as fast as it can.
fn flood(report: &mut Report, cluster: &Cluster, pid: u32, quick: bool) -> Result<()> {
    let mebibytes = if quick { 128 } else { 1024 };
    let plan = cluster.root().join("flood.yaml");
    let last = FIRST_LINE + (mebibytes << 20) / LINE;
    fs::write(
        &plan,
        format!(
            "version: 1\nplan: flood\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
             - name: flood\n    on: app\n    steps:\n      \
             - exec.run: {{name: flood, argv: [/usr/bin/seq, \"{FIRST_LINE}\", \"{last}\"]}}\n"
        ),
    )?;
    let before = used(pid)?;
    let begun = Instant::now();
    let operator = cluster.requester();
    let rollout = operator.submit(&plan, &[])?;
    let mut of_step = 0;
    let document = loop {
        for step in cluster.host(HOST).step_processes() {
            // It may have ended since.
            of_step = of_step.max(peak(number(step.pid)).unwrap_or(0));
        }
        if let Ok(document) = operator.ended(&rollout)? {
            break document;
        }
        thread::sleep(PACE);
    };
    let took = begun.elapsed().as_secs_f64();
    ensure!(
        document["state"] == "succeeded",
        "{}",
        cluster.explain(&document)
    );
    let name = |what: &str| format!("agent: a step prints {mebibytes} MiB: {what}");
    report.value(name("until it has succeeded"), took, "s");
    report.value(name("most memory"), peak(pid)? as f64 / 1000.0, "kB");
    let after = used(pid)?;
    report.value(name("CPU"), after.cpu - before.cpu, "s");
    let children = after.children - before.children;
    report.value(
        name("CPU of its step process and what it ran"),
        children,
        "s",
    );
    let of_step = of_step as f64 / 1000.0;
    report.value(name("most memory of its step process"), of_step, "kB");
    Ok(())
}

/// Orders one after the other, each once the one before is done: each has its intent and its outcome
/// in the agent's journal, and its own step process in between.
async fn orders(report: &mut Report, cluster: &Cluster, pid: u32, quick: bool) -> Result<()> {
    let (wanted, longest) = if quick {
        (2000, Duration::from_secs(8))
    } else {
        (ORDERS, Duration::from_secs(150))
    };
    let mut orderer = Orderer::begin(cluster).await?;
    // Its program's pages and its journal's tables are there afterwards.
    orderer.rollout().await?;
    let before = used(pid)?;
    let of_agent = Pid::from_raw(pid.cast_signed()).context("a process")?;
    let memory = Memory::begin(&[of_agent]);
    let begun = Instant::now();
    let mut given = 0;
    while given < wanted && begun.elapsed() < longest {
        orderer.rollout().await?;
        given += u32::from(STEPS);
    }
    let took = begun.elapsed().as_secs_f64();
    let after = used(pid)?;
    let name = |what: &str| format!("agent: {given} orders: {what}");
    let grown = memory.end().first().copied().unwrap_or(f64::NAN);
    let grown = grown * 1_048_576.0 / 1000.0;
    // So few say little of growth: of what a heap takes before it has settled, all may be theirs.
    let share = if quick {
        1.0
    } else {
        f64::from(given) / f64::from(ORDERS)
    };
    report.bounded(name("memory grows by"), grown, "kB", Some(GROWTH * share));
    let each = |seconds: f64| 1000.0 * seconds / f64::from(given);
    report.value(name("each"), each(took), "ms");
    report.value(name("CPU of each"), each(after.cpu - before.cpu), "ms");
    let steps = each(after.children - before.children);
    report.value(name("CPU of its step process"), steps, "ms");
    let journal = size_of(&cluster.host(HOST).root.join("state"))? as f64 / 1e6;
    report.value(name("state directory after it"), journal, "MB");
    Ok(())
}

/// A played controller with one agent.
struct Orderer {
    /// It listens for as long as it lives.
    controller: Controller,
    session: Session,
    plan: SealedPlan,
    rollouts: u64,
}

impl Orderer {
    async fn begin(cluster: &Cluster) -> Result<Self> {
        let read = |name: &str| fs::read_to_string(cluster.pki().join(name));
        let keys = Keys {
            certificate: read("controller-main.crt")?,
            key: read("controller-main.key")?,
            agents: read("ca-agents.crt")?,
        };
        let mut controller = Controller::start(&keys, cluster.address().parse()?).await;
        let mut session = controller.met().await;
        let (epoch, last) = (session.hello.highest_epoch, session.hello.last_report);
        session.welcome(epoch, last, 0).await;
        // What it takes does not depend on what else runs here.
        let look = ("check.disk", json!({"path": "/", "free": "1B"}));
        let plan = compiled(&vec![look; usize::from(STEPS)]);
        Ok(Self {
            controller,
            session,
            plan: seal::seal(plan)?,
            rollouts: 0,
        })
    }

    /// A rollout of its own: consent, every step, its end.
    async fn rollout(&mut self) -> Result<()> {
        self.rollouts += 1;
        let [_, _, id @ ..] = self.rollouts.to_be_bytes();
        let rollout = RolloutId::from_random(id);
        self.session
            .consented(&self.controller, &rollout, &self.plan)
            .await;
        for step in 0..STEPS {
            let key = StepKey {
                rollout: rollout.clone(),
                host: HOST.parse()?,
                at: StepRef { phase: 0, step },
                direction: Direction::Do,
                attempt: 1,
            };
            let mut order = self.session.ordered(&self.plan, &key, vec![]);
            // Longer after the welcome than any of this takes.
            order.not_after = Timestamp(CLOCK + 3_600_000);
            self.session.send(down::Message::Order(order.into())).await;
            self.done(&key).await?;
        }
        self.session.release(&rollout).await;
        Ok(())
    }

    async fn done(&mut self, key: &StepKey) -> Result<()> {
        loop {
            let report = self.session.heard().await.context("the agent has left")?;
            match report.body {
                ReportBody::Finished {
                    key: of,
                    outcome: StepOutcome::Ok { .. },
                    ..
                } if of == *key => return Ok(()),
                ReportBody::Started { .. } => {}
                other => bail!("{other:?} instead of the end of {key}"),
            }
        }
    }
}

/// The bytes of all files below a directory.
fn size_of(directory: &Path) -> Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        size += if metadata.is_dir() {
            size_of(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(size)
}
