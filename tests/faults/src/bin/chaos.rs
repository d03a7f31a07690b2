//! `make chaos`: kills at every write, and what must hold afterwards.
//!
//! ```text
//! chaos                                      both halves, whole: target/reports/chaos.json
//! chaos --controller [--variant NAME] [--point N] [--scenario NAME]
//! chaos --agent [KIND] [--point CASE]
//! ... [--sample N] [--parallel N]            every N-th point; so many at a time
//! ```
//!
//! Ends with 1 if a promise was broken, with 2 if it could not be found out.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_faults::chaos::agent::{self, AgentFigures};
use lockstep_faults::chaos::controller::{self, say};
use lockstep_faults::chaos::report::{self, Half};
use lockstep_faults::chaos::scenarios::Scenario;
use lockstep_faults::chaos::script::Variant;

/// The most kinds of the agent whose outcome may be unknown: `exec.run`, `check.http`, and a migration
/// outside of a transaction.
const UNKNOWN_KINDS: usize = 3;

/// What a killed controller may take until its rollout goes on, in milliseconds.
const RESUME_P99_MS: u64 = 5_000;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("chaos: {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// What is asked for.
struct Asked {
    controller: Option<controller::Options>,
    agent: Option<agent::Options>,
    /// Nothing is left out, so that the figures are those of a whole run.
    whole: bool,
}

fn asked() -> Result<Asked> {
    let binary = lockstep_tests::binaries::directory()?.join("faulty-lockstep-agent");
    let mut controller = controller::Options::default();
    let mut agent = agent::Options::whole(binary);
    let (mut only_controller, mut only_agent, mut whole) = (false, false, true);
    let mut point = None;
    let mut arguments = std::env::args().skip(1).peekable();
    while let Some(argument) = arguments.next() {
        whole &= argument == "--parallel";
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--controller" => only_controller = true,
            "--agent" => {
                only_agent = true;
                let kind = arguments.next_if(|word| !word.starts_with('-'));
                agent.kinds.extend(kind);
            }
            "--sample" => {
                controller.nth = value()?.parse()?;
                agent.every = controller.nth;
            }
            "--parallel" => {
                controller.parallel = value()?.parse()?;
                agent.workers = controller.parallel;
            }
            "--variant" => {
                let variant = Variant::named(&value()?).context("there is no such variant")?;
                (only_controller, controller.variants) = (true, vec![variant]);
                controller.scenarios = vec![];
            }
            "--scenario" => {
                let scenario = Scenario::named(&value()?).context("there is no such scenario")?;
                (only_controller, controller.scenarios) = (true, vec![scenario]);
                controller.variants = vec![];
            }
            "--point" => point = Some(value()?),
            other => bail!("{other} is not known here"),
        }
    }
    ensure!(
        !(only_controller && only_agent),
        "one half or the other, or both without a word"
    );
    match point {
        Some(point) if only_agent => agent.point = Some(point),
        Some(point) => {
            ensure!(controller.variants.len() == 1, "--point needs --variant");
            controller.point = Some(point.parse()?);
        }
        None => {}
    }
    agent.planted = std::env::var("LOCKSTEP_PLANTED").ok();
    Ok(Asked {
        controller: (!only_agent).then_some(controller),
        agent: (!only_controller).then_some(agent),
        whole,
    })
}

fn run() -> Result<bool> {
    let asked = asked()?;
    let (mut first, mut second) = (Half::default(), AgentFigures::default());
    let mut failures = vec![];
    if let Some(options) = &asked.controller {
        let outcome = controller::run(options, &say)?;
        failures.extend(outcome.failures);
        first = outcome.half;
        if first.resume_p99_ms > RESUME_P99_MS {
            failures.push(format!("resume took {} ms at p99", first.resume_p99_ms));
        }
        say(&serde_json::to_string_pretty(&first)?);
    }
    if let Some(options) = &asked.agent {
        second = agent::run(options)?;
        failures.extend(second.violations.iter().cloned());
        if second.unknown.len() > UNKNOWN_KINDS {
            let kinds: Vec<&String> = second.unknown.keys().collect();
            failures.push(format!(
                "outcomes are unknown of more than {UNKNOWN_KINDS} kinds: {kinds:?}"
            ));
        }
        say(&serde_json::to_string_pretty(&second)?);
    }
    if asked.whole {
        report::save(&first, &second)?;
        say(&format!("the figures are in {}", report::path().display()));
    }
    for failure in &failures {
        say(failure);
    }
    Ok(failures.is_empty())
}
