//! The compiled plan: complete, ordered, with nothing left to decide but timing.
//!
//! Its canonical encoding is JSON: UTF-8, no white space, fields in the order of their
//! declaration here, fields that have their default left out where so declared, maps sorted by
//! key, durations and sizes in their one canonical text. A text is a compiled plan only if
//! encoding what was read from it gives the same bytes again ([`crate::seal::open`]), so one plan
//! has one encoding and one digest, and `sha256sum` computes it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::action::gate::MOST_APPROVALS;
use crate::action::{Action, Site};
use crate::ids::StepRef;
use crate::values::{Period, Timestamp};

/// The version of this encoding.
pub const FORMAT: u32 = 1;

/// How far two machines' clocks may differ before a plan's validity is judged wrongly. Wall clocks
/// serve validity only.
pub const CLOCK_TOLERANCE: Period = Period::seconds(300);

/// The largest compiled plan, in bytes. It travels in one message and is held by every agent.
pub const MAX_PLAN_BYTES: usize = 1 << 20;

/// A plan with its inputs applied: what is signed, approved, and read by agents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompiledPlan {
    /// [`FORMAT`].
    pub format: u32,
    /// The plan's name.
    pub plan: String,
    /// Licenses one rollout, for ever. Made when the plan is compiled.
    pub serial: u64,
    /// The fleet that it is for; empty in a plan that is not meant to be sealed. Hosts that ask
    /// for a seal name theirs, so that a plan of another fleet does not run there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fleet_name: String,
    /// No agent takes an order of it before.
    pub not_before: Timestamp,
    /// No agent takes an order of it afterwards, but those that undo.
    pub expires: Timestamp,
    /// The rollout has ended this long after it was submitted (INV-8).
    pub deadline: Period,
    /// The inputs that were applied, for people. Never secret.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
    /// The groups of hosts that phases name, by label.
    pub fleet: BTreeMap<String, Selector>,
    /// The phases, in order. Each is a barrier (INV-3).
    pub phases: Vec<Phase>,
    /// Checks that run after a rollback; its steps have the phase number `phases.len()`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_rollback: Option<Phase>,
    /// How many hosts of the whole fleet may fail before the rollout is undone. Absent: only the
    /// stages' own budgets count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_failures: Option<u32>,
    /// Messages that are sent when something happens to the rollout.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<Notice>,
    /// Times that the report holds against what was measured.
    #[serde(default)]
    pub slo: Slo,
    /// Roles that sign the report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signoff: Vec<String>,
}

/// Hosts that carry all of these labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// Label names and the values they must have.
    pub labels: BTreeMap<String, String>,
}

impl Selector {
    /// Whether a host with these labels is meant.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels
            .iter()
            .all(|(name, value)| labels.get(name) == Some(value))
    }
}

/// A part of a plan that is closed on every host before the next one begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Its name, unique in the plan.
    pub name: String,
    /// Runs of steps with the same target; each is closed before the next one begins.
    pub stages: Vec<Stage>,
    /// The phase has been closed this long after it was opened, or the rollout is undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Period>,
    /// When it was meant to begin and how long to take, for the report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planned: Option<Planned>,
}

/// A row of the runbook's timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Planned {
    /// From the rollout's start.
    pub at: Period,
    /// How long it should take.
    pub takes: Period,
    /// Who is responsible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// Steps that run on the same target, one after the other on each host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Where.
    pub target: Target,
    /// How the stage spreads over the target's hosts.
    #[serde(default, skip_serializing_if = "Strategy::is_all")]
    pub strategy: Strategy,
    /// The steps.
    pub steps: Vec<Step>,
}

/// Where a stage runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// On the controller: gates and notices.
    Controller,
    /// On every host of these groups.
    Groups(Vec<String>),
    /// On one host of these groups. The first stage of a rollout with the same groups elects it,
    /// and it stays elected.
    OneOf(Vec<String>),
}

impl Target {
    /// The groups that are named.
    pub fn groups(&self) -> &[String] {
        match self {
            Self::Controller => &[],
            Self::Groups(groups) | Self::OneOf(groups) => groups,
        }
    }
}

/// How a stage spreads over hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// All hosts at once; none may fail.
    #[default]
    All,
    /// One batch after the other.
    Rolling {
        /// Hosts in a batch.
        batch: Batch,
        /// How many hosts of the stage may fail; they are quarantined.
        max_failures: u32,
        /// Pause between batches.
        pause: Period,
    },
    /// A few hosts first, then, after a time without failures, the others.
    Canary {
        /// How many hosts go first.
        first: Batch,
        /// How long they are watched before the others follow.
        soak: Period,
    },
}

impl Strategy {
    fn is_all(&self) -> bool {
        *self == Self::All
    }

    /// How many hosts of the stage may fail before the rollout is undone.
    pub fn max_failures(&self) -> u32 {
        match self {
            Self::All | Self::Canary { .. } => 0,
            Self::Rolling { max_failures, .. } => *max_failures,
        }
    }
}

/// A number of hosts: absolute, or in percent of the stage's hosts, rounded up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Batch {
    /// So many hosts.
    Hosts(u32),
    /// So many percent, 1 to 100.
    Percent(u32),
}

impl Batch {
    /// The number for a stage with `total` hosts; at least one.
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Hosts(hosts) => (hosts as usize).max(1),
            Self::Percent(percent) => (total * percent as usize).div_ceil(100).max(1),
        }
    }
}

/// One line of a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// A name for people, if the plan gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What is done.
    pub action: Action,
    /// The longest time for one attempt, on the agent's monotonic clock.
    pub timeout: Period,
    /// What a rollback does with it.
    #[serde(default, skip_serializing_if = "Undo::is_auto")]
    pub undo: Undo,
    /// The line in the plan file, for reports and errors.
    pub line: u32,
}

/// What a rollback does with a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    /// What the action says: return to the recorded before-state, if there is one.
    #[default]
    Auto,
    /// Nothing: the plan says that what the step did stays.
    Keep,
}

impl Undo {
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// A message that is sent when something happens to the rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// When it is sent.
    pub when: NoticeWhen,
    /// A `notify` action.
    pub action: Action,
}

/// When a notice is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoticeWhen {
    /// At the beginning.
    Started,
    /// Again and again, until the rollout ends.
    Every(Period),
    /// When people must decide.
    Waiting,
    /// When a rollback begins.
    RollingBack,
    /// At the end, if it succeeded, wholly or within its budget.
    Succeeded,
    /// At the end, if it was rolled back.
    RolledBack,
    /// At the end, if it was halted or cancelled.
    Halted,
}

/// Times that the report holds against what was measured. None changes how the rollout runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// The whole rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<Period>,
    /// From the first verified refusal to the first healthy check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Period>,
    /// From the decision to roll back to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Period>,
}

/// A step with its place.
#[derive(Debug, Clone, Copy)]
pub struct Placed<'a> {
    /// Phase and step.
    pub at: StepRef,
    /// The stage's index in the phase.
    pub stage: usize,
    /// The phase.
    pub phase: &'a Phase,
    /// The target of the stage that holds it.
    pub target: &'a Target,
    /// The step.
    pub step: &'a Step,
}

impl Phase {
    /// The steps of all stages, numbered through.
    pub fn steps(&self) -> impl Iterator<Item = (usize, &Stage, &Step)> {
        self.stages
            .iter()
            .enumerate()
            .flat_map(|(index, stage)| stage.steps.iter().map(move |step| (index, stage, step)))
    }
}

/// The longest name of a fleet.
const MAX_FLEET_NAME: usize = 64;

/// Whether a fleet can have this name: 1 to 64 letters, digits, `-`, `_` and `.`.
pub fn check_fleet_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_FLEET_NAME || !name.chars().all(plain) {
        let name = name.escape_debug();
        return Err(format!(
            "`{name}` is no name of a fleet: 1 to {MAX_FLEET_NAME} letters, digits, `-`, `_`, `.`"
        ));
    }
    Ok(())
}

impl CompiledPlan {
    /// The phase with this number; the number after the last is the checks after a rollback.
    pub fn phase(&self, index: u16) -> Option<&Phase> {
        let index = usize::from(index);
        if index == self.phases.len() {
            self.after_rollback.as_ref()
        } else {
            self.phases.get(index)
        }
    }

    /// The number of the phase that holds the checks after a rollback.
    pub fn after_rollback_index(&self) -> u16 {
        u16::try_from(self.phases.len()).expect("a compiled plan has fewer than 2^16 phases")
    }

    /// The step at a place.
    pub fn step(&self, at: StepRef) -> Option<Placed<'_>> {
        let phase = self.phase(at.phase)?;
        let (stage, holder, step) = phase.steps().nth(usize::from(at.step))?;
        Some(Placed {
            at,
            stage,
            phase,
            target: &holder.target,
            step,
        })
    }

    /// Every step in plan order, the checks after a rollback last.
    pub fn steps(&self) -> impl Iterator<Item = Placed<'_>> {
        let phases = self.phases.iter().chain(&self.after_rollback);
        phases.zip(0_u16..).flat_map(|(phase, number)| {
            phase
                .steps()
                .zip(0_u16..)
                .map(move |((stage, holder, step), index)| Placed {
                    at: StepRef {
                        phase: number,
                        step: index,
                    },
                    stage,
                    phase,
                    target: &holder.target,
                    step,
                })
        })
    }

    /// The groups that some step is meant for.
    pub fn groups(&self) -> BTreeSet<&String> {
        let phases = self.phases.iter().chain(&self.after_rollback);
        let stages = phases.flat_map(|phase| &phase.stages);
        stages.flat_map(|stage| stage.target.groups()).collect()
    }

    /// What the types cannot say: whoever handles an opened plan may rely on it. An error says
    /// what is wrong, for people who write compiled plans with other tools.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !self.fleet_name.is_empty() {
            check_fleet_name(&self.fleet_name)?;
        }
        let phases = self.phases.iter().chain(&self.after_rollback);
        if self.phases.len() >= usize::from(u16::MAX) {
            return Err("it has too many phases".into());
        }
        for phase in phases {
            let wrong = |why: String| Err(format!("phase `{}` {why}", phase.name));
            if phase.steps().count() >= usize::from(u16::MAX) {
                return wrong("has too many steps".into());
            }
            for stage in &phase.stages {
                if stage.steps.is_empty() {
                    return wrong("has a stage without a step".into());
                }
                let unknown = |group: &&String| !self.fleet.contains_key(*group);
                if let Some(group) = stage.target.groups().iter().find(unknown) {
                    return wrong(format!(
                        "names the group `{group}`, which is not in `fleet`"
                    ));
                }
                let site = match stage.target {
                    Target::Controller => Site::Controller,
                    Target::Groups(_) | Target::OneOf(_) => Site::Host,
                };
                let misplaced = |step: &&Step| step.action.info().site != site;
                if let Some(step) = stage.steps.iter().find(misplaced) {
                    return wrong(format!("has {} where it cannot run", step.action.name()));
                }
                for step in &stage.steps {
                    if let Action::GateApproval(approval) = &step.action
                        && approval
                            .from
                            .values()
                            .any(|people| *people > MOST_APPROVALS)
                    {
                        return wrong(format!("asks for more than {MOST_APPROVALS} approvals"));
                    }
                }
            }
        }
        Ok(())
    }

    /// That no name moves a cursor or begins a line on the screen of whoever reads it. Asked of new
    /// plans only: journals hold older ones.
    pub(crate) fn check_names(&self) -> Result<(), String> {
        let phases = || self.phases.iter().chain(&self.after_rollback);
        let steps = phases().flat_map(Phase::steps);
        let names = [&self.plan]
            .into_iter()
            .chain(self.inputs.keys())
            .chain(self.fleet.keys())
            .chain(&self.signoff)
            .chain(phases().map(|phase| &phase.name))
            .chain(steps.filter_map(|(_, _, step)| step.name.as_ref()));
        for name in names {
            if name.contains(char::is_control) {
                return Err(format!("the name {name:?} has control characters in it"));
            }
        }
        Ok(())
    }

    /// The steps that a host with these labels may be asked to run.
    pub fn steps_for<'a>(
        &'a self,
        labels: &'a BTreeMap<String, String>,
    ) -> impl Iterator<Item = Placed<'a>> {
        self.steps().filter(move |placed| {
            placed.step.action.info().site == Site::Host && self.targets(placed.target, labels)
        })
    }

    /// Whether a target may mean a host with these labels.
    pub fn targets(&self, target: &Target, labels: &BTreeMap<String, String>) -> bool {
        target
            .groups()
            .iter()
            .filter_map(|group| self.fleet.get(group))
            .any(|selector| selector.matches(labels))
    }
}
