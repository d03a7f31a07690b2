//! From a plan and the values of its inputs to the compiled plan. Total and deterministic: the
//! same plan, inputs, serial and time give the same bytes, and so the same digest (INV-12).

use std::collections::BTreeMap;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::postgres::{Baseline, Fence, Unfence};
use lockstep_proto::action::{Action, check};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Notice, Phase, Planned, Selector, Slo, Stage, Step, Strategy, Target,
    Undo,
};
use lockstep_proto::seal::{InvalidPlan, SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};

use crate::plan::check::{DEADLINE, EXPIRES};
use crate::plan::draft::{DraftFence, DraftPhase, DraftStep, On};
use crate::plan::raw::RawStrategy;
use crate::plan::{Code, Filled, Findings, Plan};

/// Compiles a plan. `serial` licenses one rollout, for ever; the plan may be used from `now`
/// until it expires. The findings are those that depend on the values of the inputs.
pub fn compile(
    plan: &Plan,
    inputs: &BTreeMap<String, String>,
    serial: u64,
    now: Timestamp,
) -> Result<SealedPlan, Findings> {
    let filled = plan.with_inputs(inputs)?;
    let compiled = build(&filled, serial, now);
    seal(compiled).map_err(|error| match error {
        InvalidPlan::TooLarge(_) => {
            let hint = "split it into several plans".to_owned();
            plan.finding(Code::TooLarge, error.to_string(), Some(hint))
        }
        other => unreachable!("a compiled plan can be encoded: {other}"),
    })
}

/// What the checks have made sure of: without errors, nothing that is needed is missing.
const CHECKED: &str = "a plan without errors has it";

fn build(filled: &Filled, serial: u64, now: Timestamp) -> CompiledPlan {
    let draft = &filled.draft;
    let raw = &draft.raw;
    let expires = raw.expires.as_ref().map_or(EXPIRES, |at| at.value);
    let slo = raw.slo.as_ref();
    let fleet = raw.fleet.as_ref().expect(CHECKED).0.iter();
    let after_rollback = draft.after_rollback.as_ref();
    CompiledPlan {
        format: FORMAT,
        plan: raw.plan.as_ref().expect(CHECKED).value.clone(),
        serial,
        fleet_name: String::new(),
        not_before: now,
        expires: now.plus(expires),
        deadline: raw.deadline.as_ref().map_or(DEADLINE, |at| at.value),
        inputs: filled.inputs.clone(),
        fleet: fleet
            .map(|(name, group)| {
                let labels = group.labels.as_ref().expect(CHECKED).value.clone();
                (name.value.clone(), Selector { labels })
            })
            .collect(),
        phases: window_phase(filled)
            .into_iter()
            .chain(draft.phases.iter().map(|phase| build_phase(filled, phase)))
            .collect(),
        after_rollback: after_rollback.map(|phase| build_phase(filled, phase)),
        max_failures: raw.max_failures,
        notices: draft
            .notices
            .iter()
            .map(|notice| Notice {
                when: notice.when.expect(CHECKED),
                action: notice.action.clone().expect(CHECKED),
            })
            .collect(),
        slo: Slo {
            total: slo.and_then(|slo| slo.total),
            downtime: slo.and_then(|slo| slo.downtime),
            rollback: slo.and_then(|slo| slo.rollback),
        },
        signoff: raw
            .signoff
            .iter()
            .flatten()
            .map(|role| role.value.clone())
            .collect(),
    }
}

/// The top-level `window` is a first phase that waits for it.
fn window_phase(filled: &Filled) -> Option<Phase> {
    let (node, action) = filled.draft.window.as_ref()?;
    let step = Step {
        name: None,
        action: action.clone(),
        timeout: default_timeout(action),
        undo: Undo::Auto,
        line: filled.line(*node),
    };
    Some(Phase {
        name: "window".to_owned(),
        stages: vec![stage(Target::Controller, Strategy::All, vec![step])],
        deadline: None,
        planned: None,
    })
}

fn stage(target: Target, strategy: Strategy, steps: Vec<Step>) -> Stage {
    Stage {
        target,
        strategy,
        steps,
    }
}

fn build_phase(filled: &Filled, phase: &DraftPhase) -> Phase {
    let own = phase.name.as_ref().map(|name| name.value.as_str());
    let name = own.unwrap_or("after_rollback");
    let mut stages: Vec<Stage> = Vec::new();
    // Fences that end here are lowered first, in the order in which they were raised.
    for holder in &filled.draft.phases {
        if let Some(fence) = &holder.fence
            && own == Some(fence.raw.until.value.as_str())
        {
            stages.push(fence_stage(filled, holder, fence, lower(fence)));
        }
    }
    if let Some(fence) = &phase.fence {
        stages.push(fence_stage(filled, phase, fence, raise(fence)));
    }
    let fences = stages.len();
    let strategy = phase
        .strategy
        .as_ref()
        .map_or(Strategy::All, |at| build_strategy(&at.value));
    for step in &phase.steps {
        let target = target_of(phase, step);
        let step = build_step(filled, step);
        match stages.get_mut(fences..).and_then(<[Stage]>::last_mut) {
            Some(last) if last.target == target => last.steps.push(step),
            _ => stages.push(stage(target, strategy.clone(), vec![step])),
        }
    }
    let planned = phase.planned.as_ref();
    Phase {
        name: name.to_owned(),
        stages,
        deadline: phase.deadline.as_ref().map(|at| at.value),
        planned: planned.map(|planned| Planned {
            at: planned.at,
            takes: planned.takes,
            owner: planned.owner.clone(),
        }),
    }
}

/// A fence has a stage of its own, on all its hosts at once: in a rolling phase it must be up
/// before the first batch begins.
fn fence_stage(filled: &Filled, phase: &DraftPhase, fence: &DraftFence, action: Action) -> Stage {
    let on = fence.on.as_ref().or(phase.on.as_ref()).expect(CHECKED);
    let step = Step {
        name: None,
        timeout: fence
            .raw
            .timeout
            .as_ref()
            .map_or_else(|| default_timeout(&action), |at| at.value),
        action,
        undo: Undo::Auto,
        line: filled.line(fence.node),
    };
    stage(target(on), Strategy::All, vec![step])
}

fn raise(fence: &DraftFence) -> Action {
    Action::PostgresFence(Fence {
        database: fence.raw.database.clone(),
        via: fence.raw.via,
        roles: fence.raw.roles.clone(),
    })
}

fn lower(fence: &DraftFence) -> Action {
    Action::PostgresUnfence(Unfence {
        left_by: None,
        database: fence.raw.database.clone(),
        via: fence.raw.via,
        roles: fence.raw.roles.clone(),
    })
}

fn target_of(phase: &DraftPhase, step: &DraftStep) -> Target {
    if step.is_controllers() {
        return Target::Controller;
    }
    target(step.on.as_ref().or(phase.on.as_ref()).expect(CHECKED))
}

/// The groups sorted and each once: the same hosts are the same target, and one election.
fn target(on: &On) -> Target {
    let mut groups: Vec<String> = on.groups.iter().map(|group| group.value.clone()).collect();
    groups.sort();
    groups.dedup();
    if on.one_of {
        Target::OneOf(groups)
    } else {
        Target::Groups(groups)
    }
}

fn build_strategy(raw: &RawStrategy) -> Strategy {
    match raw {
        RawStrategy::All => Strategy::All,
        RawStrategy::Rolling(rolling) => Strategy::Rolling {
            batch: rolling.batch.0,
            max_failures: rolling.max_failures,
            pause: rolling.pause,
        },
        RawStrategy::Canary(canary) => Strategy::Canary {
            first: canary.first.0,
            soak: canary.soak,
        },
    }
}

fn build_step(filled: &Filled, step: &DraftStep) -> Step {
    let action = step.action.clone().expect(CHECKED);
    let timeout = step.timeout.as_ref().map(|at| at.value);
    Step {
        name: step.name.clone(),
        timeout: timeout.unwrap_or_else(|| default_timeout(&action)),
        action,
        undo: step.undo.as_ref().map_or(Undo::Auto, |at| at.value),
        line: filled.line(step.node),
    }
}

const MINUTE: Period = Period::seconds(60);
const HOUR: Period = Period::seconds(3600);

/// How long one attempt at an action may take if the plan does not say: what the action itself
/// may wait for, and room for its work.
pub fn default_timeout(action: &Action) -> Period {
    let plus = |own: Period, room: u64| Period(own.0.saturating_add(room * 1000));
    let minutes = |n: u64| Period::seconds(n * 60);
    let waiting = |within: Option<Period>| plus(within.unwrap_or_default(), 60);
    match action {
        Action::ServiceStop(args) => plus(args.within, 30),
        Action::ServiceStart(args) => plus(args.within, 30),
        Action::ServiceRestart(args) => plus(args.within, 30),
        Action::ReleaseFetch(_) | Action::ExecRun(_) => minutes(10),
        Action::ReleaseBuild(_) => minutes(30),
        Action::PostgresBackup(_)
        | Action::PostgresVerifyBackup(_)
        | Action::PostgresRestore(_)
        // Raising and lowering a fence read every row for its checksums, as a backup does.
        | Action::PostgresFence(_)
        | Action::PostgresUnfence(_)
        | Action::PostgresIntegrity(_)
        | Action::PostgresAnalyze(_) => HOUR,
        // Each row of the server is read once.
        Action::PostgresRestorePoint(args) if args.recoverable => plus(args.archived_within, 3600),
        Action::PostgresRestorePoint(args) => plus(args.archived_within, 60),
        // A whole server may be large.
        Action::PostgresExternalBackup(_) => Period::seconds(4 * 3600),
        Action::PostgresCompare(args) if args.with == Baseline::Integrity => HOUR,
        Action::PostgresCounts(_) | Action::PostgresCompare(_) | Action::PostgresAssert(_) => {
            minutes(10)
        }
        // Its way back is that of `postgres.restore`.
        Action::MigrationApply(args) if args.undo_by == UndoBy::Restore => {
            HOUR.max(plus(args.statement_timeout, 300))
        }
        // And its way back that of a whole server.
        Action::MigrationApply(args) if args.undo_by == UndoBy::Recover => {
            Period::seconds(4 * 3600).max(plus(args.statement_timeout, 300))
        }
        Action::MigrationApply(args) => plus(args.statement_timeout, 300),
        // Restoring and looking take as long as anywhere; the migration comes on top, there and back.
        Action::PostgresRehearse(args) => plus(Period(args.statement_timeout.0 * 2), 3600),
        Action::MigrationDowngrade(args) => plus(args.statement_timeout, 300),
        Action::MigrationCurrent(_) | Action::MigrationPlan(_) | Action::MigrationVerify(_) => {
            minutes(5)
        }
        Action::CheckHttp(args) => waiting(Some(chain(args))),
        Action::CheckTcp(args) => waiting(args.within),
        Action::CheckLog(args) => waiting(args.watch),
        Action::CheckCommand(args) => waiting(args.within),
        Action::GateApproval(args) => args.timeout,
        Action::GateChecklist(args) => args.timeout,
        Action::GateWait(args) => plus(args.r#for, 60),
        // A weekly window is at most a week away.
        Action::GateWindow(_) => Period::seconds(7 * 86_400),
        Action::ServiceStatus(_)
        | Action::ReleaseActivate(_)
        | Action::ReleasePrevious(_)
        | Action::EnvDiff(_)
        | Action::EnvRender(_)
        | Action::CheckPort(_)
        | Action::CheckProcess(_)
        | Action::CheckDisk(_)
        | Action::CheckTls(_)
        | Action::CheckSql(_)
        | Action::NotifyWebhook(_)
        | Action::NotifySlack(_)
        | Action::NotifyEmail(_) => MINUTE,
    }
}

/// What the requests of a chain may take together.
fn chain(http: &check::Http) -> Period {
    let following = http.then.len() + http.cleanup.len();
    let each = http.timeout.0.saturating_mul(following as u64 + 1);
    Period(each.saturating_add(http.within.unwrap_or_default().0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_migration_that_a_restore_brings_back_has_the_time_of_one() {
        let timeout = |more: serde_json::Value| {
            let mut action = json!({
                "tool": "alembic", "app": "a", "release": "r", "database": "d", "dir": "b",
                "statement_timeout": "1m",
            });
            let more = more.as_object().unwrap().clone();
            action.as_object_mut().unwrap().extend(more);
            let action = Action::deserialize_args("migration.apply", action);
            default_timeout(&action.unwrap().unwrap())
        };
        assert_eq!(timeout(json!({})), Period::seconds(60 + 300));
        let restore = json!({"undo_by": "restore"});
        assert_eq!(timeout(restore), HOUR);
        let long = json!({"undo_by": "restore", "statement_timeout": "2h"});
        assert_eq!(timeout(long), Period::seconds(7200 + 300));
    }
}
