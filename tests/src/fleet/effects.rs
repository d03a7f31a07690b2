//! An independent record of effects on the hosts: a program that notes when it begins and when it
//! is done, in a synced file that nothing of Lockstep's reads or writes.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail};

use super::Fleet;
use super::machine::Stage;

/// The program: `effect NAME PART SECONDS`.
pub const PROGRAM: &str = "/usr/local/bin/effect";

/// Where it notes itself; kept over reboots.
const LEDGER: &str = "/var/log/effects";

/// Its text. It ends as the kernel has it end: no signal is caught.
const SOURCE: &str = r#"#!/usr/bin/python3
import os, sys, time

name, part, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])

def note(what):
    line = f"{time.time_ns()} {name} {part} {what}\n".encode()
    ledger = os.open("/var/log/effects", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(ledger, line)
    os.fsync(ledger)
    os.close(ledger)

note("begin")
time.sleep(seconds)
note("done")
"#;

/// A service `effect-NAME-PART`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Service {
    /// The fault that it belongs to.
    pub(super) name: &'static str,
    /// The part that its start is.
    pub(super) part: &'static str,
    /// How long it takes to start, in seconds.
    pub(super) start: u32,
    /// How long it takes to stop, if that is the part `undo`.
    pub(super) stop: Option<u32>,
}

impl Service {
    /// It stays active, and no boot starts it.
    fn unit(&self) -> String {
        let Self {
            name, part, start, ..
        } = self;
        let run = "[Service]\nType=oneshot\nRemainAfterExit=yes";
        let mut unit = format!("{run}\nExecStart={PROGRAM} {name} {part} {start}\n");
        if let Some(seconds) = self.stop {
            let _ = writeln!(unit, "ExecStop={PROGRAM} {name} undo {seconds}");
        }
        unit
    }
}

/// What the hosts' policies allow besides the example's.
const POLICY: &str = r#"
[[allow]]
action = "service.*"
where = { service = ["effect-*"] }

[[allow]]
action = "exec.run"
where = { argv = [["/usr/local/bin/effect", "**"]] }
"#;

/// A line of a host's record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// Nanoseconds since 1970, by the clock that all hosts of the machine share.
    pub at: u128,
    /// The fault that it belongs to.
    pub name: String,
    /// Which of its steps.
    pub part: String,
    /// `begin` or `done`.
    pub what: String,
}

/// Puts all this among a host's files.
pub(super) fn stage(stage: &Stage, policy: &str, services: &[Service]) -> Result<()> {
    stage.write(&PROGRAM[1..], SOURCE, 0o755)?;
    stage.write(&LEDGER[1..], "", 0o600)?;
    for service in services {
        let Service { name, part, .. } = service;
        let path = format!("etc/systemd/system/effect-{name}-{part}.service");
        stage.write(&path, &service.unit(), 0o644)?;
    }
    let policy = format!("{policy}{POLICY}");
    stage.write("etc/lockstep/policy.toml", &policy, 0o644)
}

impl Fleet {
    /// A host's record of one fault's effects, in the order in which they were noted.
    pub fn effects(&self, host: &str, name: &str) -> Result<Vec<Effect>> {
        let lines = self.on(host, &["cat", LEDGER])?;
        let effects = lines.lines().map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let [at, name, part, what] = words[..] else {
                bail!("{host} has a record of effects with the line `{line}`");
            };
            let [name, part, what] = [name, part, what].map(str::to_owned);
            Ok(Effect {
                at: at.parse().context("a time in nanoseconds")?,
                name,
                part,
                what,
            })
        });
        let mut effects: Vec<Effect> = effects.collect::<Result<_>>()?;
        effects.retain(|effect| effect.name == name);
        Ok(effects)
    }
}
