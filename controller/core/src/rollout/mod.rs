//! One rollout: its state as the fold of its records.
//!
//! ```text
//! consenting -> forward: phase -> stage -> wave -> host -> step      forward.rs
//!                  |                         gates on the way         gate.rs
//!                  v failure beyond the budget, a trigger, a person
//!               backward: the stages in reverse, touched hosts only   backward.rs
//!                  -> checks after the rollback -> survey -> compare
//! ```
//!
//! `apply` is the only place that changes a [`Rollout`]; `advance` reads it and says which records
//! are due. Both know nothing of sockets: a lost agent is an attempt without a result whose time
//! has come.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_proto::ids::{Direction, HostId, OperatorName, RolloutId, StepRef};
use lockstep_proto::plan::{CompiledPlan, Phase, Placed, Stage, Target};
use lockstep_proto::report::Refusal;
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

use crate::ascending::Ascending;
use crate::record::{End, Lost, Record};

mod backward;
mod bindings;
mod cause;
mod document;
mod fold;
mod follows;
mod forward;
mod gate;
mod glass;
mod left;
mod lock;
mod narrate;
mod notices;
mod refers;
mod retry;
mod state;

use cause::Class;
pub(crate) use follows::Follows;
pub use glass::LOUD;
pub use left::{Left, LeftState};
pub use state::Rollout;
pub(crate) use state::{Attempt, Backward, Cursor, Gate, Lock, Member, Mode, Outcome};
use state::{AttemptResult, next_attempt};

/// How long hosts have to consent.
pub const CONSENT_WITHIN: Period = Period::seconds(60);

/// How long the others still have once one has refused.
pub const REFUSALS_WITHIN: Period = Period::seconds(2);

/// How long an order may be obeyed after it was given: a host that comes back later is not
/// surprised by an old one. Undos live shorter, for the others should not wait long for a host
/// that is lost.
pub fn order_life(direction: Direction) -> Period {
    match direction {
        Direction::Do | Direction::Probe => Period::seconds(120),
        Direction::Undo => Period::seconds(30),
    }
}

/// How much longer than its timeout an attempt may take until its report is here.
pub const REPORT_GRACE: Period = Period::seconds(20);

/// A host that is connected so long, and has not begun what it was ordered before, never will: its
/// agent heard the order first, looks at the host for 30 s at most, and answers pings within 10.
const BEGINS_WITHIN: Period = Period::seconds(40);

/// A step whose process dies this often is not ordered again: something on the host kills it.
pub const MOST_ATTEMPTS: u16 = 3;

/// How long hosts have to say what their state is after a rollback.
pub const SURVEY_WITHIN: Period = Period::seconds(60);

/// Who pauses rollouts when it is not a person; no operator's name has spaces.
pub(crate) const HELD_BACK_BY: &str = "the controller: ";

/// Since when a host is connected; none if it is not.
pub(crate) type Since<'a> = &'a dyn Fn(&HostId) -> Option<Timestamp>;

/// A record that does not fit the state that it is applied to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{record} does not fit {state}")]
pub struct IllegalTransition {
    /// The record's kind.
    pub record: &'static str,
    /// The rollout's state.
    pub state: &'static str,
}

impl Rollout {
    pub(crate) fn new(
        id: RolloutId,
        plan: Arc<SealedPlan>,
        requester: OperatorName,
        dry_run: bool,
        submitted: Timestamp,
    ) -> Self {
        let groups = plan
            .plan()
            .fleet
            .keys()
            .map(|name| (name.clone(), BTreeSet::new()))
            .collect();
        Self {
            id,
            records: 0,
            plan,
            requester,
            dry_run,
            signatures: Arc::default(),
            submitted,
            deadline_from: submitted,
            members: BTreeMap::new(),
            groups,
            elected: BTreeMap::new(),
            mode: Mode::Consenting,
            paused: false,
            paused_by: OperatorName::new(),
            ended: None,
            closed: None,
            lock: Lock::default(),
            attempts: BTreeMap::new(),
            open: BTreeMap::new(),
            silent: BTreeSet::new(),
            phases: BTreeMap::new(),
            gates: BTreeMap::new(),
            notices: BTreeMap::new(),
            signoffs: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Adds a matched host with the labels that it had at the time.
    pub(crate) fn add_member(&mut self, host: &HostId, labels: &BTreeMap<String, String>) {
        for (name, selector) in &self.plan.plan().fleet {
            if selector.matches(labels) {
                self.groups
                    .entry(name.clone())
                    .or_default()
                    .insert(host.clone());
            }
        }
        self.silent.insert(host.clone());
        self.members.insert(host.clone(), Member::default());
    }

    pub(crate) fn compiled(&self) -> &CompiledPlan {
        self.plan.plan()
    }

    /// The word for the rollout's state.
    pub(crate) fn state(&self) -> &'static str {
        match (&self.ended, &self.mode) {
            (Some(ending), _) => ending.end.as_str(),
            (None, _) if self.paused => "paused",
            (None, Mode::Backward(_)) => "rolling_back",
            (None, Mode::Consenting | Mode::Forward(_)) => "running",
        }
    }

    /// Whether the controller itself has paused it.
    pub(crate) fn is_held_back(&self) -> bool {
        self.paused && self.paused_by.starts_with(HELD_BACK_BY)
    }

    /// Whether people ended it where it stood.
    pub(crate) fn is_cancelled(&self) -> bool {
        let ending = self.ended.as_ref();
        ending.is_some_and(|ending| ending.end == End::Cancelled)
    }

    /// Whether it still has its lock: also while halted, until a person decides.
    pub(crate) fn is_locking(&self) -> bool {
        let halted = || {
            self.ended
                .as_ref()
                .is_some_and(|ending| ending.end == End::Halted)
        };
        let free = self.dry_run || self.lock.released || self.closed.is_some();
        !free && (self.ended.is_none() || halted())
    }

    /// The place that is worked at, for people.
    pub(crate) fn phase_name(&self) -> &str {
        let index = match &self.mode {
            Mode::Consenting => return "consent",
            Mode::Forward(cursor) => cursor.phase,
            Mode::Backward(_) => return "rollback",
        };
        self.compiled()
            .phase(index)
            .map_or("end", |phase| &phase.name)
    }

    /// Which hosts a target means, those in quarantine left out.
    pub(crate) fn hosts_of(&self, target: &Target) -> impl Iterator<Item = &HostId> {
        self.sound(self.all_hosts_of(target).into_iter())
    }

    /// Those of these hosts that are not in quarantine.
    fn sound<'a>(
        &'a self,
        hosts: impl Iterator<Item = &'a HostId>,
    ) -> impl Iterator<Item = &'a HostId> {
        let mut members = Ascending::new(Some(&self.members));
        hosts.filter(move |host| {
            let member = members.get(host).expect("what is meant are members");
            member.quarantined.is_none()
        })
    }

    pub(crate) fn last_attempt(
        &self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
    ) -> Option<&Attempt> {
        self.attempts_at(at, direction, host).last()
    }

    /// Every attempt at a step on a host.
    pub(crate) fn attempts_at(
        &self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
    ) -> &[Attempt] {
        let hosts = self.attempts.get(&(at, direction));
        hosts
            .and_then(|hosts| hosts.get(host))
            .map_or(&[], Vec::as_slice)
    }

    /// Attempts that were ordered and have no result.
    pub(crate) fn outstanding(
        &self,
    ) -> impl Iterator<Item = (StepRef, Direction, &HostId, &Attempt)> {
        self.open.iter().flat_map(|((at, direction), hosts)| {
            let mut attempts = Ascending::new(self.attempts.get(&(*at, *direction)));
            hosts.iter().map(move |host| {
                let last = attempts.get(host).and_then(|attempts| attempts.last());
                let last = last.expect("what is open was ordered");
                (*at, *direction, host, last)
            })
        })
    }

    /// The same of one host.
    pub(crate) fn outstanding_of<'a>(
        &'a self,
        host: &'a HostId,
    ) -> impl Iterator<Item = (StepRef, Direction, &'a Attempt)> {
        let of_host = self
            .open
            .iter()
            .filter(move |(_, hosts)| hosts.contains(host));
        of_host.map(move |((at, direction), _)| {
            let last = self.last_attempt(*at, *direction, host);
            (*at, *direction, last.expect("what is open was ordered"))
        })
    }

    /// Looks anew whether the last attempt of a host at a step is open.
    pub(super) fn note_open(&mut self, at: StepRef, direction: Direction, host: &HostId) {
        let last = self.last_attempt(at, direction, host);
        let is_open = last.is_some_and(|last| last.result.is_none());
        self.set_open(at, direction, host, is_open);
    }

    /// Notes whether the last attempt of a host at a step is open.
    pub(super) fn set_open(
        &mut self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
        is_open: bool,
    ) {
        let hosts = self.open.entry((at, direction)).or_default();
        if is_open {
            hosts.insert(host.clone());
        } else {
            hosts.remove(host);
            if hosts.is_empty() {
                self.open.remove(&(at, direction));
            }
        }
    }

    pub(crate) fn placed(&self, at: StepRef) -> Placed<'_> {
        self.compiled()
            .step(at)
            .expect("places are made from the plan")
    }

    pub(crate) fn stage_of(&self, phase: u16, stage: u16) -> Option<(&Phase, &Stage)> {
        let phase = self.compiled().phase(phase)?;
        Some((phase, phase.stages.get(usize::from(stage))?))
    }

    /// The number of the first step of a stage within its phase.
    pub(crate) fn first_step(phase: &Phase, stage: u16) -> u16 {
        let before = phase.stages.iter().take(usize::from(stage));
        u16::try_from(before.map(|stage| stage.steps.len()).sum::<usize>())
            .expect("a phase has fewer than 2^16 steps")
    }

    /// What is due now. Applying the records and asking again leads to a state in which nothing
    /// is due. `floor` is when this controller began: nothing is given up before hosts had time
    /// to come back.
    pub(crate) fn advance(
        &self,
        now: Timestamp,
        floor: Timestamp,
        since: Since<'_>,
    ) -> Vec<Record> {
        if self.ended.is_some() {
            return self.due_notices(now);
        }
        let up = &|host: &HostId| since(host).is_some();
        if now >= self.deadline() {
            let blocked = self.what_blocks(now, up);
            let reason = format!(
                "the deadline of {} passed: {blocked}",
                self.compiled().deadline
            );
            let end = if self.dry_run || self.lock.released {
                End::Cancelled
            } else {
                End::Halted
            };
            return vec![self.end(end, reason)];
        }
        let given_up = self.due_give_ups(now, floor, since);
        if !given_up.is_empty() {
            return given_up;
        }
        let notices = self.due_notices(now);
        if !notices.is_empty() {
            return notices;
        }
        self.advance_mode(now, floor, up)
    }

    fn advance_mode(
        &self,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        match &self.mode {
            Mode::Consenting => self.advance_consent(now, floor, up),
            _ if self.paused => vec![],
            Mode::Forward(cursor) => self.advance_forward(cursor, now, up),
            Mode::Backward(backward) => self.advance_backward(backward, now, floor, up),
        }
    }

    /// What follows at once from failures that nothing has followed from yet, because the rollout
    /// was paused or the controller was not there: a host stays behind, or the rollout goes back.
    pub(crate) fn due_failures(
        &self,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        if self.ended.is_some() || now >= self.deadline() {
            return vec![];
        }
        let mut due = self.advance_mode(now, floor, up);
        due.retain(|record| {
            matches!(
                record,
                Record::Quarantined { .. } | Record::RollbackStarted { .. }
            )
        });
        due
    }

    /// When something may become due without an event; none if only events matter.
    pub(crate) fn next_deadline(
        &self,
        now: Timestamp,
        floor: Timestamp,
        since: Since<'_>,
    ) -> Option<Timestamp> {
        if self.ended.is_some() {
            return None;
        }
        let give_ups = self.outstanding();
        let give_ups = give_ups.map(|outstanding| self.give_up_at(outstanding, floor, since));
        let mode = match &self.mode {
            Mode::Consenting => Some(self.consent_until(floor)),
            // Nothing becomes due while paused.
            _ if self.paused => None,
            Mode::Forward(cursor) => self.cursor_deadline(cursor, now),
            Mode::Backward(backward) => match backward.undone {
                None => None,
                Some(_) if self.checks_pending(backward) => {
                    self.cursor_deadline(&backward.checks, now)
                }
                Some(undone) => {
                    Some(backward::survey_from(backward, undone, floor).plus(SURVEY_WITHIN))
                }
            },
        };
        give_ups
            .chain(mode)
            .chain(self.next_notice())
            .chain([self.deadline()])
            .min()
    }

    /// The rollout has ended by then (INV-8).
    pub(crate) fn deadline(&self) -> Timestamp {
        self.deadline_from.plus(self.compiled().deadline)
    }

    /// Whether an order led forward, and the rollout goes back.
    pub(crate) fn is_of_the_past(&self, at: StepRef, direction: Direction) -> bool {
        let forward =
            direction == Direction::Do && at.phase != self.compiled().after_rollback_index();
        forward && matches!(self.mode, Mode::Backward(_))
    }

    /// The controller waits no longer than this for what is outstanding. A rollback does not wait
    /// for the end of a forward order that a connected host has never begun, and that is not said
    /// again.
    fn give_up_at(
        &self,
        (at, direction, host, attempt): (StepRef, Direction, &HostId, &Attempt),
        floor: Timestamp,
        since: Since<'_>,
    ) -> Timestamp {
        let latest = attempt.give_up_at(self.placed(at).step.timeout);
        let is_left = attempt.started.is_none() && self.is_of_the_past(at, direction);
        let never = is_left.then(|| since(host)).flatten();
        let never = never.map(|since| since.max(attempt.ordered()).plus(BEGINS_WITHIN));
        let until = never.map_or(latest, |never| never.min(latest));
        until.max(floor.plus(REPORT_GRACE))
    }

    fn due_give_ups(&self, now: Timestamp, floor: Timestamp, since: Since<'_>) -> Vec<Record> {
        self.outstanding()
            .filter(|outstanding| now >= self.give_up_at(*outstanding, floor, since))
            .map(|(at, direction, host, attempt)| Record::GivenUp {
                rollout: self.id.clone(),
                at,
                direction,
                attempt: attempt.number,
                host: host.clone(),
                why: if since(host).is_some() {
                    Lost::TimedOut
                } else {
                    Lost::Unreachable
                },
            })
            .collect()
    }

    /// Until when hosts may answer. One that refuses ends the rollout; the others get a moment, so
    /// that people read all refusals at once.
    fn consent_until(&self, floor: Timestamp) -> Timestamp {
        let asked = self.lock.taken.unwrap_or(self.submitted);
        let latest = asked.max(floor).plus(CONSENT_WITHIN);
        let declined = self.members.values().filter_map(|member| member.declined);
        let refused = declined.min().map(|at| at.plus(REFUSALS_WITHIN));
        refused.map_or(latest, |refused| refused.min(latest))
    }

    fn advance_consent(
        &self,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let declined: Vec<String> = self
            .members
            .iter()
            .filter_map(|(host, member)| match &member.consent {
                Some(Err(refusals)) => {
                    Some(format!("{host} refuses: {}", self.say_refusals(refusals)))
                }
                _ => None,
            })
            .collect();
        let silent: Vec<String> = self
            .silent
            .iter()
            .map(|host| format!("{host} ({})", Class::of_silence(up(host)).as_str()))
            .collect();
        let over = now >= self.consent_until(floor);
        if !declined.is_empty() && !silent.is_empty() && !over {
            return vec![];
        }
        if !declined.is_empty() {
            return vec![self.end(
                End::Cancelled,
                format!("nothing was done (refused): {}", declined.join("; ")),
            )];
        }
        if silent.is_empty() {
            return vec![Record::Consented {
                rollout: self.id.clone(),
            }];
        }
        if over {
            let reason = format!(
                "nothing was done: no answer from {} within {CONSENT_WITHIN}; see `lockstep hosts`, and \
                 `lockstep forget HOST` for one that is gone for good",
                silent.join(", ")
            );
            return vec![self.end(End::Cancelled, reason)];
        }
        vec![]
    }

    pub(crate) fn say_refusals(&self, refusals: &[Refusal]) -> String {
        let say = |refusal: &Refusal| match refusal.at.and_then(|at| self.compiled().step(at)) {
            Some(placed) => format!(
                "step {} {} (line {}): {}",
                placed.at,
                placed.step.action.name(),
                placed.step.line,
                refusal.reason
            ),
            None => refusal.reason.clone(),
        };
        refusals.iter().map(say).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn end(&self, end: End, reason: String) -> Record {
        Record::Ended {
            rollout: self.id.clone(),
            end,
            reason,
            operator: None,
        }
    }

    /// What a rollout that does not move waits for, with hosts, steps and the class of the cause.
    pub(crate) fn what_blocks(&self, now: Timestamp, up: &dyn Fn(&HostId) -> bool) -> String {
        let silence = |host: &HostId| Class::of_silence(up(host)).as_str();
        let silent: Vec<String> = match &self.mode {
            Mode::Consenting => self
                .members
                .iter()
                .filter(|(_, member)| member.consent.is_none())
                .map(|(host, _)| format!("{host} has not consented ({})", silence(host)))
                .collect(),
            _ => vec![],
        };
        let steps = self.outstanding().map(|(at, direction, host, attempt)| {
            let word = if attempt.started.is_some() {
                "runs"
            } else {
                "has not begun"
            };
            format!(
                "{host}: {} ({direction} {at}) {word} ({})",
                self.placed(at).step.action.name(),
                silence(host)
            )
        });
        let gates = self
            .gates
            .iter()
            .filter(|(_, gate)| gate.closed.is_none())
            .map(|(at, _)| {
                format!(
                    "{} ({at}) waits for {} ({})",
                    self.placed(*at).step.action.name(),
                    self.missing_now(*at, now),
                    Class::TimedOut.as_str()
                )
            });
        let survey = self
            .unsurveyed()
            .into_iter()
            .map(|host| format!("{host} has not said its state ({})", silence(host)));
        let failed = self.paused.then(|| self.failed_meanwhile());
        let paused = self.paused.then(|| format!("paused by {}", self.paused_by));
        let all: Vec<String> = silent
            .into_iter()
            .chain(steps)
            .chain(gates)
            .chain(survey)
            .chain(failed.into_iter().flatten())
            .chain(paused)
            .collect();
        if all.is_empty() {
            let class = Class::TimedOut.as_str();
            format!("{class} in phase `{}`", self.phase_name())
        } else {
            all.join("; ")
        }
    }

    /// Hosts that failed while the rollout was paused, so that nothing has followed from it yet.
    fn failed_meanwhile(&self) -> Vec<String> {
        let retry = self.retry();
        let failed = retry.again.iter().filter_map(|again| {
            let last = self.last_attempt(again.at, again.direction, &again.host)?;
            let result = last.result.as_ref().filter(|_| !last.is_ok())?;
            Some(format!(
                "{}: {}",
                again.host,
                self.say_failure(again.at, result)
            ))
        });
        let unknown = retry.unsettled.iter();
        failed
            .chain(unknown.map(|(host, _, words)| format!("{host}: {words}")))
            .collect()
    }
}
