//! Faults of real hosts, each in the middle of a running step of a small rollout (INV-1, INV-8).
//!
//! ```text
//! before   service.start, at once                on both application hosts
//! work     the step that the fault falls into    several seconds
//! after    exec.run                              only if `work` is done on both (INV-3)
//! ```
//!
//! The fault strikes one host; the other one is a witness, on which nothing may show. What counts
//! is the hosts' own record ([`super::effects`]), not what Lockstep says.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::effects::{Effect, PROGRAM, Service};
use super::{Fleet, HOSTS};
use crate::cluster::REQUESTER;
use crate::operator::{list, steps, text};
use crate::wait;

/// The host that is struck.
const STRUCK: &str = "app-1";

/// The other one that the plans select.
const WITNESS: &str = "app-2";

/// How long `work` takes, in seconds: long enough to be struck in the middle, and to end while the
/// host is off the network.
const WORK: u32 = 7;

/// A host that is gone is flagged within this (section 10 of the design), and a moment for asking.
const FLAGGED_WITHIN: Duration = Duration::from_secs(16);

/// How long a rollout may take until it has ended, with a boot and a reconnect in it.
const ENDS_WITHIN: Duration = Duration::from_mins(2);

/// What stands still is killed and started again within this: its watchdog's time, and a restart.
const THAWED_WITHIN: Duration = Duration::from_secs(45);

/// What the step that is struck can prove afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// `service.start`: the host is asked, and it is tried again where that is safe.
    Convergent,
    /// `exec.run`: nobody can say what a process that vanished has done.
    Blind,
    /// The undo of a `service.start`, after `after` has failed on both hosts.
    Undo,
}

/// What must become of the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The step goes on, and its outcome is taken: `succeeded`, at the first attempt.
    Untouched,
    /// The step has left no outcome, the host is asked, and another attempt is made: `succeeded`.
    Repeated,
    /// A host that is shut down ends its steps, which say so: a failed step, `rolled_back`.
    RolledBack,
    /// Nobody can say what the step did: `halted`, until a person has looked.
    Unknown,
}

/// A fault, and what must become of the rollout.
#[derive(Debug)]
pub struct Fault {
    /// Its name in reports and in the hosts' records.
    pub name: &'static str,
    work: Work,
    strike: Strike,
    end: End,
}

/// Strikes the host in the middle of the work of a rollout.
type Strike = fn(&Fleet, &str, &Fault) -> Result<()>;

/// All of them, in the order in which they are tried.
#[rustfmt::skip]
pub const FAULTS: [Fault; 13] = [
    fault("agent-killed", Work::Blind, kill_agent, End::Untouched),
    fault("agent-restarted", Work::Blind, restart_agent, End::Untouched),
    fault("agent-frozen", Work::Blind, freeze_agent, End::Untouched),
    fault("link-frozen", Work::Blind, freeze_link, End::Untouched),
    fault("network-cut", Work::Blind, cut_network, End::Untouched),
    fault("host-restarted", Work::Convergent, restart_host, End::RolledBack),
    fault("host-restarted-blind", Work::Blind, restart_host, End::RolledBack),
    fault("host-reset", Work::Convergent, reset_host, End::Repeated),
    fault("host-reset-blind", Work::Blind, reset_host, End::Unknown),
    fault("power-lost", Work::Convergent, lose_power, End::Repeated),
    fault("power-lost-blind", Work::Blind, lose_power, End::Unknown),
    fault("agent-killed-undo", Work::Undo, kill_agent, End::Untouched),
    fault("host-reset-undo", Work::Undo, reset_host, End::Repeated),
];

const fn fault(name: &'static str, work: Work, strike: Strike, end: End) -> Fault {
    Fault {
        name,
        work,
        strike,
        end,
    }
}

/// The services whose starts, or stops, are effects.
pub(super) fn services() -> Vec<Service> {
    let service = |fault: &Fault, part, start, stop| Service {
        name: fault.name,
        part,
        start,
        stop,
    };
    let services = FAULTS.iter().flat_map(|fault| {
        let work = match fault.work {
            Work::Undo => service(fault, "work", 0, Some(WORK)),
            Work::Convergent | Work::Blind => service(fault, "work", WORK, None),
        };
        [service(fault, "before", 0, None), work]
    });
    services.collect()
}

/// What became of a fault, for the report.
#[derive(Debug)]
pub struct Seen {
    /// The fault.
    pub name: &'static str,
    /// How the rollout ended without a person, and, after `, then`, with one.
    pub outcome: String,
    /// For each host, how often what was struck began and was done, by the host's own record.
    pub effects: Vec<(&'static str, usize, usize)>,
    /// From the submission to the last end.
    pub seconds: u64,
}

impl Seen {
    /// As it stands in the report.
    pub fn to_json(&self) -> Value {
        let effects = self.effects.iter().map(|(host, begun, done)| {
            let counts = json!({"begun": begun, "done": done});
            ((*host).to_owned(), counts)
        });
        json!({
            "name": self.name,
            "outcome": self.outcome,
            "effects": effects.collect::<serde_json::Map<_, _>>(),
            "seconds": self.seconds,
        })
    }
}

impl Fault {
    /// Runs the rollout, strikes, and holds what became of it against the promises.
    pub fn try_on(&self, fleet: &Fleet) -> Result<Seen> {
        let tried = self.run(fleet);
        tried.with_context(|| {
            let mut said = format!("fault {}", self.name);
            for host in [STRUCK, WITNESS] {
                let journal = ["journalctl", "--no-pager", "-n", "15", "-u", "lockstep-*"];
                let journal = fleet.on(host, &journal).unwrap_or_default();
                let effects = fleet.effects(host, self.name);
                let _ = write!(said, "\n{host}: {effects:?}\n{journal}");
            }
            said
        })
    }

    fn run(&self, fleet: &Fleet) -> Result<Seen> {
        let begun = Instant::now();
        let requester = fleet.operator(REQUESTER);
        let plan = fleet.work.path().join(format!("{}.yaml", self.name));
        fs::write(&plan, self.plan())?;
        let rollout = requester.submit(&plan, &[])?;
        wait::until("the work to begin", wait::SOON, || {
            let noted = self.noted(fleet, STRUCK, self.struck());
            let noted = noted.map_err(|error| format!("{error:#}"))?;
            (!noted.is_empty())
                .then_some(())
                .ok_or_else(|| "not yet".into())
        })?;
        (self.strike)(fleet, &rollout, self)?;
        let document = requester.wait(&rollout, ENDS_WITHIN)?;
        let mut outcome = text(&document["state"]).to_owned();
        match self.end {
            End::Untouched | End::Repeated if self.work == Work::Undo => {
                self.check_undone(fleet, &document)?;
            }
            End::Untouched | End::Repeated => self.check_success(fleet, &document)?,
            End::RolledBack => self.check_rolled_back(fleet, &document)?,
            End::Unknown => {
                self.check_unknown(fleet, &document)?;
                let then = self.resolve(fleet, &rollout)?;
                outcome = format!("{outcome}, then {then}");
            }
        }
        nothing_runs(fleet)?;
        let mut effects = vec![];
        for host in [STRUCK, WITNESS] {
            let noted = self.noted(fleet, host, self.struck())?;
            let count = |what: &str| noted.iter().filter(|effect| effect.what == what).count();
            effects.push((host, count("begin"), count("done")));
        }
        Ok(Seen {
            name: self.name,
            outcome,
            effects,
            seconds: begun.elapsed().as_secs(),
        })
    }

    fn plan(&self) -> String {
        let name = self.name;
        let run = |part: &str, seconds: u32| {
            let argv = format!("[{PROGRAM}, {name}, {part}, \"{seconds}\"]");
            // It exits with 0: where the rollout is to come back, that is not what is expected.
            let exit = u8::from(part == "after" && self.work == Work::Undo);
            format!("exec.run: {{name: {part}, argv: {argv}, exit: {exit}}}")
        };
        let start = |part: &str| format!("service.start: {{service: effect-{name}-{part}}}");
        let work = match self.work {
            Work::Convergent | Work::Undo => start("work"),
            Work::Blind => run("work", WORK),
        };
        let phases = [
            ("before", start("before")),
            ("work", work),
            ("after", run("after", 0)),
        ];
        let mut plan = format!(
            "version: 1\nplan: {name}\nfleet: {{app: {{labels: {{role: app, env: prod}}}}}}\n\
             deadline: 5m\nphases:\n"
        );
        for (phase, step) in phases {
            let _ = write!(
                plan,
                "  - name: {phase}\n    on: app\n    steps:\n      - {step}\n"
            );
        }
        plan
    }

    /// The part in the middle of which the host is struck.
    fn struck(&self) -> &'static str {
        match self.work {
            Work::Convergent | Work::Blind => "work",
            Work::Undo => "undo",
        }
    }

    /// What a host noted of a part.
    fn noted(&self, fleet: &Fleet, host: &str, part: &str) -> Result<Vec<Effect>> {
        let mut effects = fleet.effects(host, self.name)?;
        effects.retain(|effect| effect.part == part);
        Ok(effects)
    }

    /// Fails unless a host's record of a part is this.
    fn expect_noted(&self, fleet: &Fleet, host: &str, part: &str, expected: &[&str]) -> Result<()> {
        let noted = self.noted(fleet, host, part)?;
        let noted: Vec<&str> = noted.iter().map(|effect| effect.what.as_str()).collect();
        ensure!(
            noted == expected,
            "{host} noted of `{part}` {noted:?}, not {expected:?}"
        );
        Ok(())
    }

    /// It went on as if nothing had happened.
    fn check_success(&self, fleet: &Fleet, document: &Value) -> Result<()> {
        let state = text(&document["state"]);
        ensure!(state == "succeeded", "{state}: {}", document["reason"]);
        for host in [STRUCK, WITNESS] {
            let cut_off = self.end == End::Repeated && host == STRUCK;
            let work: &[&str] = if cut_off {
                // What the first attempt began died with the host; the second one was made only
                // after the host had been asked.
                &["begin", "begin", "done"]
            } else {
                &["begin", "done"]
            };
            self.expect_noted(fleet, host, "before", &["begin", "done"])?;
            self.expect_noted(fleet, host, "work", work)?;
            self.expect_noted(fleet, host, "after", &["begin", "done"])?;
            let outcomes = outcomes(document, host);
            let expected: &[&str] = if cut_off {
                &["failed interrupted", "ok "]
            } else {
                &["ok "]
            };
            ensure!(outcomes == expected, "{host}: attempts {outcomes:?}");
        }
        self.check_barrier(fleet)
    }

    /// It came back, and the undo that was struck was taken up where the host was.
    fn check_undone(&self, fleet: &Fleet, document: &Value) -> Result<()> {
        let (state, reason) = (text(&document["state"]), text(&document["reason"]));
        ensure!(state == "rolled_back", "{state}: {reason}");
        for host in [STRUCK, WITNESS] {
            let cut_off = self.end == End::Repeated && host == STRUCK;
            // A host that was off has no service left to stop.
            let undo: &[&str] = if cut_off {
                &["begin"]
            } else {
                &["begin", "done"]
            };
            self.expect_noted(fleet, host, "work", &["begin", "done"])?;
            self.expect_noted(fleet, host, "after", &["begin", "done"])?;
            self.expect_noted(fleet, host, "undo", undo)?;
            let outcomes = outcomes(document, host);
            let expected: &[&str] = if cut_off {
                &["ok ", "failed interrupted", "ok "]
            } else {
                &["ok ", "ok "]
            };
            ensure!(outcomes == expected, "{host}: attempts {outcomes:?}");
        }
        self.expect_stopped(fleet)
    }

    /// INV-3, by the hosts' own clocks, which are one.
    fn check_barrier(&self, fleet: &Fleet) -> Result<()> {
        let mut work = vec![];
        let mut after = vec![];
        for host in [STRUCK, WITNESS] {
            work.extend(self.noted(fleet, host, "work")?);
            after.extend(self.noted(fleet, host, "after")?);
        }
        let last = work.iter().map(|effect| effect.at).max();
        let first = after.iter().map(|effect| effect.at).min();
        ensure!(
            first > last,
            "`after` began before `work` was done everywhere: {work:?} {after:?}"
        );
        Ok(())
    }

    /// Nobody can say what the step did: the rollout halted with host and step by name, and
    /// nothing was done that rests on it.
    fn check_unknown(&self, fleet: &Fleet, document: &Value) -> Result<()> {
        let (state, reason) = (text(&document["state"]), text(&document["reason"]));
        ensure!(state == "halted", "{state}: {reason}");
        let rollout = text(&document["rollout"]);
        let at = struck_attempt(document)?;
        let next = format!("lockstep resolve {rollout} {STRUCK} {at}");
        for words in [STRUCK, "exec.run", "unknown", &next] {
            ensure!(reason.contains(words), "`{words}` is not in: {reason}");
        }
        self.expect_cut_off(fleet)
    }

    fn expect_cut_off(&self, fleet: &Fleet) -> Result<()> {
        self.expect_noted(fleet, STRUCK, "work", &["begin"])?;
        self.expect_noted(fleet, WITNESS, "work", &["begin", "done"])?;
        for host in [STRUCK, WITNESS] {
            self.expect_noted(fleet, host, "after", &[])?;
        }
        Ok(())
    }

    /// Without a person's word it stays halted, and nothing is repeated; with it, the fleet goes
    /// back. How it ended then.
    fn resolve(&self, fleet: &Fleet, rollout: &str) -> Result<String> {
        let requester = fleet.operator(REQUESTER);
        let say = |arguments: &[&str]| {
            let said = requester.run(arguments)?;
            ensure!(said.code == 0, "lockstep {arguments:?}: {}", said.text());
            Ok(())
        };
        say(&["resume", rollout])?;
        let document = requester.wait(rollout, ENDS_WITHIN)?;
        self.check_unknown(fleet, &document)?;
        let at = struck_attempt(&document)?;
        let reason = ["--not-done", "--reason", "the record on the host says so"];
        say(&[&["resolve", rollout, STRUCK, &at][..], &reason].concat())?;
        say(&["resume", rollout])?;
        let document = requester.wait(rollout, ENDS_WITHIN)?;
        self.check_rolled_back(fleet, &document)?;
        Ok(text(&document["state"]).to_owned())
    }

    /// It went back: the work was not done again, and what was done before it is undone.
    fn check_rolled_back(&self, fleet: &Fleet, document: &Value) -> Result<()> {
        let (state, reason) = (text(&document["state"]), text(&document["reason"]));
        ensure!(state == "rolled_back", "{state}: {reason}");
        ensure!(reason.contains(STRUCK), "{STRUCK} is not in: {reason}");
        self.expect_cut_off(fleet)?;
        self.expect_stopped(fleet)
    }

    /// The services are as they were before the rollout.
    fn expect_stopped(&self, fleet: &Fleet) -> Result<()> {
        for host in [STRUCK, WITNESS] {
            for part in ["before", "work"] {
                let unit = format!("effect-{}-{part}", self.name);
                let show = ["systemctl", "show", "-p", "ActiveState", "--value", &unit];
                let is = fleet.on(host, &show)?;
                ensure!(is.trim() == "inactive", "{unit} on {host} is {is}");
            }
        }
        Ok(())
    }
}

/// How the attempts at `work` on a host ended, with their causes.
fn outcomes(document: &Value, host: &str) -> Vec<String> {
    steps(document)
        .filter(|(phase, _)| phase["name"] == "work")
        .flat_map(|(_, step)| list(&step["attempts"]))
        .filter(|attempt| attempt["host"] == host)
        .map(|attempt| format!("{} {}", text(&attempt["outcome"]), text(&attempt["cause"])))
        .collect()
}

/// The step of the attempt whose outcome is unknown.
fn struck_attempt(document: &Value) -> Result<String> {
    let mut steps = steps(document).filter(|(_, step)| {
        list(&step["attempts"])
            .any(|attempt| attempt["host"] == STRUCK && attempt["outcome"] == "unknown")
    });
    let (_, step) = steps.next().context("no attempt has an unknown outcome")?;
    Ok(text(&step["at"]).to_owned())
}

/// No step and no effect goes on behind a rollout that has ended.
fn nothing_runs(fleet: &Fleet) -> Result<()> {
    for (host, _) in HOSTS {
        let units = ["systemctl", "list-units", "--plain", "--no-legend"];
        let units = fleet.on(host, &[&units[..], &["lockstep-step-*"]].concat())?;
        ensure!(units.trim().is_empty(), "on {host} still runs {units}");
        let processes = fleet.on(host, &["ps", "-eo", "args"])?;
        let left = processes
            .lines()
            .find(|line| line.contains(PROGRAM) || line.contains("lockstep-agent step"));
        ensure!(left.is_none(), "on {host} still runs {left:?}");
    }
    Ok(())
}

/// The main process of a unit; 0 if it has none.
fn main_process(fleet: &Fleet, host: &str, unit: &str) -> Result<u32> {
    let show = ["systemctl", "show", "-p", "MainPID", "--value", "--", unit];
    let said = fleet.on(host, &show)?;
    let pid = said.trim().parse();
    pid.with_context(|| format!("the main process of {unit} is `{said}`"))
}

const AGENT: &str = "lockstep-agent.service";

/// Does something to the agent, after which another process must be the agent and the same one
/// the step.
fn another_agent(fleet: &Fleet, strike: impl FnOnce() -> Result<()>) -> Result<()> {
    let list = ["systemctl", "list-units", "--plain", "--no-legend"];
    let units = fleet.on(STRUCK, &[&list[..], &["lockstep-step-*"]].concat())?;
    let step = units.split_whitespace().next().context("no step runs")?;
    let step_before = main_process(fleet, STRUCK, step)?;
    let agent_before = main_process(fleet, STRUCK, AGENT)?;
    strike()?;
    another_process(fleet, AGENT, agent_before, wait::SOON)?;
    let step_after = main_process(fleet, STRUCK, step)?;
    ensure!(
        step_after == step_before,
        "{step} is process {step_after}, not {step_before}"
    );
    Ok(())
}

/// Waits until a unit's main process is another one.
fn another_process(fleet: &Fleet, unit: &str, than: u32, within: Duration) -> Result<()> {
    let what = format!("another process of {unit}");
    wait::until(&what, within, || match main_process(fleet, STRUCK, unit) {
        Ok(pid) if pid != 0 && pid != than => Ok(()),
        Ok(pid) => Err(pid.to_string()),
        Err(error) => Err(format!("{error:#}")),
    })
}

/// Stops a daemon where it is, so that nothing but its watchdog can know; the step goes on.
fn freeze(fleet: &Fleet, unit: &str) -> Result<()> {
    let before = main_process(fleet, STRUCK, unit)?;
    let stop = ["systemctl", "kill", "--kill-whom=main", "--signal=STOP"];
    fleet.on(STRUCK, &[&stop[..], &["--", unit]].concat())?;
    another_process(fleet, unit, before, THAWED_WITHIN)
}

fn freeze_agent(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    freeze(fleet, AGENT)
}

fn freeze_link(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    freeze(fleet, "lockstep-link.service")
}

fn kill_agent(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    another_agent(fleet, || fleet.kill(STRUCK, AGENT))
}

fn restart_agent(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    let restart = ["systemctl", "restart", AGENT];
    another_agent(fleet, || fleet.on(STRUCK, &restart).map(drop))
}

/// Waits until the controller knows that the host is gone. How long that took is a promise.
fn flagged(fleet: &Fleet, since: Instant) -> Result<()> {
    wait::until("the controller to miss the host", FLAGGED_WITHIN, || {
        let connected = fleet.connected().map_err(|error| format!("{error:#}"))?;
        let gone = !connected.iter().any(|host| host == STRUCK);
        gone.then_some(()).ok_or_else(|| format!("{connected:?}"))
    })?;
    let took = since.elapsed();
    ensure!(took <= FLAGGED_WITHIN, "it took {took:?}");
    Ok(())
}

/// Off the network until the host is missed and the step has ended; nobody goes on meanwhile.
fn cut_network(fleet: &Fleet, rollout: &str, fault: &Fault) -> Result<()> {
    let since = Instant::now();
    fleet.cut(STRUCK)?;
    let away = flagged(fleet, since).and_then(|()| {
        wait::until("the work to be done without a network", wait::SOON, || {
            let noted = fault.noted(fleet, STRUCK, "work");
            let noted = noted.map_err(|error| format!("{error:#}"))?;
            let done = noted.iter().any(|effect| effect.what == "done");
            done.then_some(()).ok_or_else(|| format!("{noted:?}"))
        })?;
        fault.expect_noted(fleet, WITNESS, "after", &[])?;
        let document = fleet.operator(REQUESTER).rollout(rollout)?;
        let state = text(&document["state"]);
        ensure!(state == "running", "with a host cut off it is {state}");
        Ok(())
    });
    fleet.heal(STRUCK)?;
    away
}

/// The boot that the agent takes this one for, and the kernel's id, which containers share.
fn boot(fleet: &Fleet) -> Result<[String; 2]> {
    let journal = ["journalctl", "--no-pager", "-o", "cat", "-u", AGENT];
    let said = fleet.on(STRUCK, &journal)?;
    let mut boots = said.split_whitespace().rev();
    let own = boots.find_map(|word| word.strip_prefix("boot="));
    let own = own.context("the agent named no boot")?.to_owned();
    let kernel = fleet.on(STRUCK, &["cat", "/proc/sys/kernel/random/boot_id"])?;
    Ok([own, kernel])
}

/// Boots the host by `reboot`: a new boot for the agent, which the kernel's id would not show.
fn boot_again(fleet: &Fleet, reboot: impl FnOnce() -> Result<()>) -> Result<()> {
    let [own_before, kernel_before] = boot(fleet)?;
    reboot()?;
    wait::until(
        "the agent to name another boot",
        wait::SOON,
        || match boot(fleet) {
            Ok([own, _]) if own != own_before => Ok(()),
            seen => Err(format!("{seen:?}, and before {own_before}")),
        },
    )?;
    let [_, kernel] = boot(fleet)?;
    ensure!(kernel == kernel_before, "the hosts are no containers");
    Ok(())
}

fn restart_host(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    boot_again(fleet, || fleet.restart(STRUCK))
}

fn reset_host(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    boot_again(fleet, || fleet.reset(STRUCK))
}

/// Off until the host is missed. Its network goes first: where power is lost, nobody is left to
/// close connections.
fn lose_power(fleet: &Fleet, _rollout: &str, _fault: &Fault) -> Result<()> {
    boot_again(fleet, || {
        let since = Instant::now();
        fleet.cut(STRUCK)?;
        fleet.power_off(STRUCK)?;
        flagged(fleet, since)?;
        fleet.restart(STRUCK)?;
        fleet.heal(STRUCK)
    })
}
