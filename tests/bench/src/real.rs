//! Fifty real agents on this machine: what a person waits for a whole rollout.
//!
//! Real are controller, agents, step processes, files and commands; they share this machine's
//! processors and disk, and no network lies between them.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lockstep_tests::binaries::Binaries;
use lockstep_tests::cluster::{Builder, Cluster};

use crate::process::used;
use crate::report::{Report, median};
use crate::rivals::BEST;

/// As many as the rivals had.
const HOSTS: usize = 50;

/// How many times faster than the best of them it is to be, as a ratio.
const TARGET: f64 = 0.2;

/// What the hosts allow: the file of the plan, and its two commands.
pub(crate) const POLICY: &str = r#"
[[allow]]
action = "env.render"
where = { path = ["*/srv/site.env"], set = [{ CONTENT = "*" }] }

[[allow]]
action = "exec.run"
where = { argv = [["/usr/bin/true"]] }

[[allow]]
action = "check.command"
where = { argv = [["/usr/bin/grep", "-qx", "CONTENT=*", "*/srv/site.env"]] }
"#;

const NOTHING: &str = r#"      - check.tcp: {address: "127.0.0.1:@PORT@"}
"#;

/// The same by asking the kernel and every process of the machine, who listens: what it costs grows
/// with the connections and the open files of all of them.
const LISTENER: &str = "      - check.port: {port: @PORT@}\n";

const FOUR_STEPS: &str = r#"      - check.tcp: {address: "127.0.0.1:@PORT@"}
      - env.render: {path: "${host.data}/srv/site.env", set: {CONTENT: "${content}"}}
      - exec.run: {name: run, argv: [/usr/bin/true]}
      - check.command: {argv: [/usr/bin/grep, -qx, "CONTENT=${content}", "${host.data}/srv/site.env"]}
"#;

/// The agent as hosts get it, beside the controller of this build.
pub(crate) fn binaries() -> Result<Binaries> {
    let agent = lockstep_tests::target().join("agent/lockstep-agent");
    let agent = agent
        .canonicalize()
        .with_context(|| format!("{}: `make agent` builds it", agent.display()))?;
    Ok(Binaries {
        agent,
        ..Binaries::find()?
    })
}

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let runs = if quick { 3 } else { 7 };
    let fleet = Fleet::start()?;
    let row = |what: &str| format!("{HOSTS} real agents: {what} (best rival: not of this run)");
    for (what, strategy, steps, best) in [
        ("a no-op", "all", NOTHING, BEST.nothing),
        ("four steps", "all", FOUR_STEPS, BEST.four_steps),
        (
            "four steps in waves of ten",
            "{rolling: {batch: 10}}",
            FOUR_STEPS,
            BEST.waves,
        ),
    ] {
        let plan = fleet.plan(what, strategy, steps)?;
        // The first one opens files and fills caches.
        fleet.run(&plan, steps)?;
        let before = fleet.cpu()?;
        let mut took = vec![];
        for _ in 0..runs {
            took.push(fleet.run(&plan, steps)?);
        }
        let after = fleet.cpu()?;
        report.beside(row(what), median(&took), "s", best, Some(TARGET));
        let name = |of: &str| format!("{HOSTS} real agents: {what}: CPU of {of}");
        let each = |index: usize| (after[index] - before[index]) / f64::from(runs);
        report.value(name("the controller"), each(0), "s");
        report.value(name("the agents, without step processes"), each(1), "s");
        report.value(name("the step processes"), each(2), "s");
    }
    let plan = fleet.plan("who listens", "all", LISTENER)?;
    let mut took = vec![];
    for _ in 0..runs {
        took.push(fleet.run(&plan, LISTENER)?);
    }
    let name = format!("{HOSTS} real agents: check.port in the place of check.tcp");
    report.value(name, median(&took), "s");
    Ok(())
}

/// So many real agents of the role `app`, each with this policy and these tables.
pub(crate) fn agents(count: usize, policy: &str, tables: &str) -> Result<Builder> {
    let names: Vec<String> = (0..count).map(|host| format!("real-{host:02}")).collect();
    let hosts: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "app")).collect();
    let mut builder = Cluster::builder()
        .without_database()
        .binaries(&binaries()?)
        .hosts(&hosts);
    for name in &names {
        builder = builder.policy(name, Some(policy)).tables(name, tables);
    }
    Ok(builder)
}

struct Fleet {
    cluster: Cluster,
    /// The services' stand-in.
    port: u16,
}

impl Fleet {
    fn start() -> Result<Self> {
        let cluster = agents(HOSTS, POLICY, "")?.start()?;
        let service = TcpListener::bind("127.0.0.1:0")?;
        let port = service.local_addr()?.port();
        // It takes whoever comes, and ends with this program.
        thread::spawn(move || for _ in service.incoming() {});
        Ok(Self { cluster, port })
    }

    /// A plan with these steps, in which `@PORT@` is a port that somebody listens on.
    fn plan(&self, what: &str, strategy: &str, steps: &str) -> Result<PathBuf> {
        let plan = what.replace(' ', "-");
        let path = self.cluster.root().join(format!("{plan}.yaml"));
        let text = format!(
            "version: 1\nplan: {plan}\ninputs: {{content: {{pattern: '\\d+'}}}}\n\
             fleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  - name: all\n    on: app\n    \
             strategy: {strategy}\n    steps:\n{}",
            steps.replace("@PORT@", &self.port.to_string())
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Runs it with a content that no file has yet. From the command to its end, in seconds.
    fn run(&self, plan: &Path, steps: &str) -> Result<f64> {
        let content = crate::clock::now().to_string();
        let operator = self.cluster.requester();
        let plan = plan.to_string_lossy();
        let input = format!("content={content}");
        let begun = Instant::now();
        let said = operator.run(&["apply", &plan, "--input", &input])?;
        let took = begun.elapsed().as_secs_f64();
        ensure!(said.code == 0, "the rollout: {}", said.text());
        if steps.contains("site.env") {
            for host in self.cluster.hosts() {
                let written = fs::read_to_string(host.root.join("srv/site.env"))?;
                let right = written.contains(&content);
                ensure!(right, "{} has another file: {written}", host.name);
            }
        }
        Ok(took)
    }

    /// Processor time so far of the controller, of the agents, and of what the agents started and
    /// has ended, in seconds. The kernel tells whole hundredths for each agent: what all of them
    /// together took is about right, and too low where each took less than one.
    fn cpu(&self) -> Result<[f64; 3]> {
        let controller = self.cluster.controller_pid();
        let controller = controller.context("the controller runs")?;
        let (mut own, mut steps) = (0.0, 0.0);
        for host in self.cluster.hosts() {
            let agent = host.agent_pid().context("the agent runs")?;
            let used = used(number(agent))?;
            own += used.cpu;
            steps += used.children;
        }
        Ok([used(number(controller))?.cpu, own, steps])
    }
}

/// A process id as a number.
pub(crate) fn number(pid: rustix::process::Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}
