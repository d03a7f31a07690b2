//! What a dry run makes of a host's answer. Nothing of the plan has been done, so what a step
//! misses may be what an earlier step brings; where none could, the step would fail. Pure.

use lockstep_proto::action::Action;
use lockstep_proto::ids::StepRef;
use lockstep_proto::plan::CompiledPlan;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::consent::HeldStep;
use crate::actions::{Done, Probe};
use crate::step::would;

/// A step that the plan has before the one that is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Earlier {
    action: Action,
    /// Whether this host may be asked to do it.
    here: bool,
}

/// The steps before one that change something, on whichever host.
pub(super) fn earlier(plan: &CompiledPlan, held: &[HeldStep], at: StepRef) -> Vec<Earlier> {
    let before = plan.steps().filter(|placed| placed.at < at);
    let changing = before.filter(|placed| placed.step.action.changes());
    let earlier = changing.map(|placed| {
        // With the host's own variables in it.
        let own = held.iter().find(|step| step.at == placed.at);
        Earlier {
            action: own.map_or(&placed.step.action, |step| &step.action).clone(),
            here: own.is_some(),
        }
    });
    earlier.collect()
}

/// What a dry run reports of a step.
pub(super) fn settle(
    action: &Action,
    earlier: &[Earlier],
    probe: Result<Probe, Failure>,
) -> Result<Done, Failure> {
    let depends = |may: fn(&Earlier, &Action) -> bool| earlier.iter().any(|it| may(it, action));
    let probe = match probe {
        Ok(Probe::Unmet(failure)) if depends(may_meet) => Probe::NotYet(now(&failure)),
        Ok(Probe::Unmet(failure)) => return Err(would_fail(failure)),
        // As things are it is done; nothing before it would undo that.
        Ok(Probe::NotYet(text)) if !depends(may_meet) => Probe::Present(text),
        Ok(probe) => probe,
        Err(failure) if failure.cause == Cause::Host && depends(may_bring) => {
            Probe::NotYet(now(&failure))
        }
        Err(failure) => return Err(would_fail(failure)),
    };
    would(probe).map_err(would_fail)
}

/// A failure as a dry run says it: nothing has been tried.
pub(super) fn would_fail(failure: Failure) -> Failure {
    Failure {
        message: format!("would fail: {}", failure.message),
        changed: false,
        ..failure
    }
}

fn now(failure: &Failure) -> String {
    match failure.cause {
        Cause::CheckUnmet => format!("not met now: {}", failure.message),
        _ => failure.message.clone(),
    }
}

/// Whether a step may bring what a later one misses on the host as it is.
fn may_meet(earlier: &Earlier, asked: &Action) -> bool {
    let Earlier { action, here } = earlier;
    let (family, _) = split(action);
    let is = |names: &[&str]| names.contains(&action.name());
    let same = |argument: &str| same(argument, action, asked);
    let is_program = is(&["exec.run"]);
    let data = || same("database") && is(DATA);
    let behaviour = || family == "service" || is(BEHAVIOUR) || is(DATA);
    match split(asked) {
        // A backup removes those that are too old.
        ("check", "disk") => *here && (is_program || is(&["postgres.backup"])),
        ("check", "port" | "process" | "log") | ("service", _) => {
            *here && (is_program || behaviour())
        }
        // The address may be any host's.
        ("check", "tcp" | "http" | "tls") => is_program || behaviour(),
        ("check", "command") | ("exec", _) => *here || data_of_any(action),
        ("release", _) => *here && (is_program || (family == "release" && same("app"))),
        ("env", _) => *here && (is_program || matches!(family, "release" | "env")),
        ("migration", _) => *here && (is_program || family == "release") || data(),
        ("postgres", "compare") => {
            same("database") && is(&["postgres.backup", "postgres.integrity"])
        }
        ("postgres", "rehearse") => {
            (*here && (is_program || family == "release"))
                || (same("database") && is(&["postgres.backup"]))
        }
        ("postgres", "verify_backup" | "restore") => same("database") && is(&["postgres.backup"]),
        ("postgres", "unfence") => same("database") && is(&["postgres.fence"]),
        ("postgres", "backup") => *here && is_program,
        // Applications write, too, and so do requests to them.
        ("postgres", "assert") | ("check", "sql") => {
            is_program || data() || family == "service" || is(&["check.http"])
        }
        _ => is_program || data(),
    }
}

/// Whether a step may bring what asking itself has failed for.
fn may_bring(earlier: &Earlier, asked: &Action) -> bool {
    let starts = matches!(
        earlier.action,
        Action::ServiceStart(_) | Action::ServiceRestart(_) | Action::ExecRun(_)
    );
    match split(asked) {
        ("check", "command") | ("exec", _) => may_meet(earlier, asked),
        // The server itself may be started by the plan.
        ("postgres" | "migration", _) | ("check", "sql") => starts,
        ("check", "disk" | "process") | ("service" | "release" | "env", _) => {
            earlier.here && matches!(earlier.action, Action::ExecRun(_))
        }
        _ => false,
    }
}

/// Actions that change what a database holds, or who may enter it.
const DATA: &[&str] = &[
    "migration.apply",
    "migration.downgrade",
    "postgres.restore",
    "postgres.fence",
    "postgres.unfence",
];

/// Actions beside those of services by which an application behaves otherwise.
const BEHAVIOUR: &[&str] = &["release.activate", "env.render"];

fn data_of_any(action: &Action) -> bool {
    DATA.contains(&action.name())
}

fn split(action: &Action) -> (&'static str, &'static str) {
    let name = action.info().name;
    name.split_once('.').unwrap_or((name, ""))
}

/// Whether two actions have the same value of an argument. One with a variable of another host
/// may have any.
fn same(argument: &str, one: &Action, other: &Action) -> bool {
    let (one, other) = (one.args(), other.args());
    let (one, other) = (&one[argument], &other[argument]);
    let open = |value: &Value| value.as_str().is_some_and(|text| text.contains("${host."));
    one == other || open(one) || open(other)
}

#[cfg(test)]
mod tests;
