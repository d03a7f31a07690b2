//! `make chaos`: kills at every write, and what must hold afterwards.
//!
//! ```text
//! chaos [controller|agent] [--sample N] [--variant NAME] [--point N] [--scenario NAME]
//! ```
//!
//! Without arguments both halves run whole. Ends with 1 if a promise was broken.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use lockstep_faults::chaos::controller::{self, Options, say};
use lockstep_faults::chaos::report;
use lockstep_faults::chaos::scenarios::Scenario;
use lockstep_faults::chaos::script::Variant;

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

fn run() -> Result<bool> {
    let mut options = Options::default();
    let mut half = String::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "controller" | "agent" => half = argument,
            "--sample" => options.nth = value()?.parse()?,
            "--parallel" => options.parallel = value()?.parse()?,
            "--variant" => {
                let variant = Variant::named(&value()?).context("no such variant")?;
                options.variants = vec![variant];
                options.scenarios = vec![];
            }
            "--point" => options.point = Some(value()?.parse()?),
            "--scenario" => {
                let scenario = Scenario::named(&value()?).context("no such scenario")?;
                options.scenarios = vec![scenario];
                options.variants = vec![];
            }
            other => bail!("{other} is not known here"),
        }
    }
    let mut sound = true;
    if half != "agent" {
        let outcome = controller::run(&options, &say)?;
        for failure in &outcome.failures {
            say(failure);
        }
        sound &= outcome.failures.is_empty() && outcome.half.is_sound();
        let whole = options.point.is_none() && options.nth == 1 && options.variants.len() > 1;
        if whole {
            report::save(|report| {
                report.resume_p99_ms = outcome.resume_p99_ms;
                report.controller = outcome.half.clone();
            })?;
        }
        say(&format!(
            "{} p99 {} ms",
            serde_json::to_string(&outcome.half)?,
            outcome.resume_p99_ms
        ));
    }
    Ok(sound)
}
