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

use lockstep_proto::ids::{Digest, Direction, HostId, OperatorName, RolloutId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::plan::{CompiledPlan, Phase, Placed, Stage, Target};
use lockstep_proto::report::{Failure, Refusal, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

use crate::event::RolloutEvent;
use crate::record::{End, Lost, NoticeRef, Record};

mod backward;
mod bindings;
mod document;
mod forward;
mod gate;
mod narrate;
mod notices;

/// How long hosts have to consent.
pub const CONSENT_WITHIN: Period = Period::seconds(60);

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

/// How long hosts have to say what their state is after a rollback.
pub const SURVEY_WITHIN: Period = Period::seconds(60);

/// A rollout.
#[derive(Debug, Clone)]
pub struct Rollout {
    pub(crate) id: RolloutId,
    pub(crate) plan: Arc<SealedPlan>,
    pub(crate) requester: OperatorName,
    pub(crate) dry_run: bool,
    pub(crate) submitted: Timestamp,
    /// The hosts that the plan meant when it was submitted (INV-12).
    pub(crate) members: BTreeMap<HostId, Member>,
    /// Which of them each group of the plan meant.
    pub(crate) groups: BTreeMap<String, BTreeSet<HostId>>,
    pub(crate) elected: BTreeMap<Vec<String>, HostId>,
    pub(crate) mode: Mode,
    pub(crate) paused: bool,
    pub(crate) ended: Option<Ending>,
    pub(crate) closed: Option<(Timestamp, OperatorName, String)>,
    pub(crate) attempts: BTreeMap<(StepRef, Direction), BTreeMap<HostId, Vec<Attempt>>>,
    pub(crate) phases: BTreeMap<u16, PhaseTimes>,
    pub(crate) gates: BTreeMap<StepRef, Gate>,
    pub(crate) notices: BTreeMap<NoticeRef, NoticeState>,
    pub(crate) signoffs: Vec<SignOff>,
    pub(crate) events: Vec<RolloutEvent>,
}

/// What is known of a host in a rollout.
#[derive(Debug, Clone, Default)]
pub(crate) struct Member {
    pub(crate) consent: Option<Result<(), Vec<Refusal>>>,
    pub(crate) quarantined: Option<String>,
    /// The host's state before, by name: digest and words.
    pub(crate) before: BTreeMap<String, (Digest, String)>,
    /// The same after a rollback.
    pub(crate) after: BTreeMap<String, (Digest, String)>,
    pub(crate) surveyed: bool,
}

/// Which way a rollout goes. That it has ended is said by `Rollout::ended`, beside it: a halted
/// rollout can be resumed where it stood.
#[derive(Debug, Clone)]
pub(crate) enum Mode {
    /// Hosts are asked whether they may; nothing has happened.
    Consenting,
    /// Phases run in plan order.
    Forward(Cursor),
    /// What was done is undone.
    Backward(Backward),
}

/// Where the forward engine stands.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cursor {
    pub(crate) phase: u16,
    pub(crate) opened: Option<Timestamp>,
    pub(crate) stage: u16,
    /// The hosts of the current stage in waves; empty before the stage's first wave.
    pub(crate) waves: Vec<Vec<HostId>>,
    /// The wave that is open.
    pub(crate) wave: Option<usize>,
    /// The last wave that was closed in this stage, and when.
    pub(crate) closed: Option<(usize, Timestamp)>,
}

/// Where a rollback stands.
#[derive(Debug, Clone)]
pub(crate) struct Backward {
    pub(crate) started: Timestamp,
    pub(crate) reason: String,
    pub(crate) operator: Option<OperatorName>,
    /// When every undo had ended.
    pub(crate) undone: Option<Timestamp>,
    /// The checks after the rollback.
    pub(crate) checks: Cursor,
    pub(crate) checks_closed: Option<Timestamp>,
    /// Undo attempts below this number failed before a person said to go on.
    pub(crate) retry_from: BTreeMap<(StepRef, HostId), u16>,
}

/// How and why a rollout ended.
#[derive(Debug, Clone)]
pub(crate) struct Ending {
    pub(crate) at: Timestamp,
    pub(crate) end: End,
    pub(crate) reason: String,
}

/// One attempt at a step on a host.
#[derive(Debug, Clone)]
pub(crate) struct Attempt {
    pub(crate) number: u16,
    pub(crate) ordered: Timestamp,
    pub(crate) not_after: Timestamp,
    pub(crate) started: Option<Timestamp>,
    pub(crate) result: Option<AttemptResult>,
    /// The controller stopped waiting for it. A report that comes later is known, but what was
    /// decided without it stays.
    pub(crate) given_up: bool,
    /// A person said to go on after it failed.
    pub(crate) forgiven: bool,
}

/// How an attempt ended, as far as the controller knows.
#[derive(Debug, Clone)]
pub(crate) struct AttemptResult {
    pub(crate) at: Timestamp,
    pub(crate) took: Period,
    pub(crate) outcome: Outcome,
    pub(crate) facts: Vec<Fact>,
}

/// INV-5, for one attempt; `skipped` is a host that has none.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Ok { changed: bool, summary: String },
    Failed(Failure),
    Unknown { why: String },
    Lost(Lost),
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PhaseTimes {
    pub(crate) opened: Option<Timestamp>,
    pub(crate) closed: Option<Timestamp>,
}

/// A gate that waits or waited.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(crate) opened: Timestamp,
    pub(crate) until: Timestamp,
    pub(crate) evidence: Digest,
    pub(crate) decisions: Vec<Decision>,
    pub(crate) closed: Option<(Timestamp, bool, String)>,
}

/// What somebody decided.
#[derive(Debug, Clone)]
pub(crate) struct Decision {
    pub(crate) at: Timestamp,
    pub(crate) operator: OperatorName,
    pub(crate) groups: Vec<String>,
    pub(crate) approve: bool,
    pub(crate) items: Vec<u32>,
    pub(crate) comment: String,
}

#[derive(Debug, Clone)]
pub(crate) struct NoticeState {
    pub(crate) ordered: Timestamp,
    pub(crate) sent: Option<Option<String>>,
}

#[derive(Debug, Clone)]
pub(crate) struct SignOff {
    pub(crate) at: Timestamp,
    pub(crate) role: String,
    pub(crate) operator: OperatorName,
    pub(crate) comment: String,
}

/// A record that does not fit the state that it is applied to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{record} does not fit {state}")]
pub struct IllegalTransition {
    /// The record's kind.
    pub record: &'static str,
    /// The rollout's state.
    pub state: &'static str,
}

impl Attempt {
    /// The controller waits no longer than this for the attempt's report.
    pub(crate) fn give_up_at(&self, timeout: Period) -> Timestamp {
        match self.started {
            Some(started) => started.plus(timeout).plus(REPORT_GRACE),
            None => self.not_after.plus(REPORT_GRACE),
        }
    }

    pub(crate) fn is_ok(&self) -> bool {
        !self.given_up
            && matches!(
                &self.result,
                Some(AttemptResult {
                    outcome: Outcome::Ok { .. },
                    ..
                })
            )
    }
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
            plan,
            requester,
            dry_run,
            submitted,
            members: BTreeMap::new(),
            groups,
            elected: BTreeMap::new(),
            mode: Mode::Consenting,
            paused: false,
            ended: None,
            closed: None,
            attempts: BTreeMap::new(),
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

    /// Whether it still has its lock: also while halted, until a person decides.
    pub(crate) fn is_locking(&self) -> bool {
        let halted = || {
            self.ended
                .as_ref()
                .is_some_and(|ending| ending.end == End::Halted)
        };
        !self.dry_run && self.closed.is_none() && (self.ended.is_none() || halted())
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
    pub(crate) fn hosts_of(&self, target: &Target) -> Vec<HostId> {
        let all: BTreeSet<&HostId> = match target {
            Target::Controller => BTreeSet::new(),
            Target::Groups(groups) => groups
                .iter()
                .flat_map(|group| &self.groups[group])
                .collect(),
            Target::OneOf(groups) => self.elected.get(groups).into_iter().collect(),
        };
        let sound = |host: &&HostId| self.members[*host].quarantined.is_none();
        all.into_iter().filter(sound).cloned().collect()
    }

    pub(crate) fn last_attempt(
        &self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
    ) -> Option<&Attempt> {
        self.attempts.get(&(at, direction))?.get(host)?.last()
    }

    /// Attempts that were ordered and have no result.
    pub(crate) fn outstanding(
        &self,
    ) -> impl Iterator<Item = (StepRef, Direction, &HostId, &Attempt)> {
        self.attempts.iter().flat_map(|((at, direction), hosts)| {
            hosts.iter().filter_map(|(host, attempts)| {
                let last = attempts.last()?;
                last.result
                    .is_none()
                    .then_some((*at, *direction, host, last))
            })
        })
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
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        if self.ended.is_some() {
            return self.due_notices(now);
        }
        if now >= self.deadline() {
            let blocked = self.what_blocks();
            let reason = format!(
                "the deadline of {} passed: {blocked}",
                self.compiled().deadline
            );
            return vec![self.end(End::Halted, reason)];
        }
        let given_up = self.due_give_ups(now, floor, up);
        if !given_up.is_empty() {
            return given_up;
        }
        let notices = self.due_notices(now);
        if !notices.is_empty() {
            return notices;
        }
        match &self.mode {
            Mode::Consenting => self.advance_consent(now, floor),
            _ if self.paused => vec![],
            Mode::Forward(cursor) => self.advance_forward(cursor, now, up),
            Mode::Backward(backward) => self.advance_backward(backward, now, floor, up),
        }
    }

    /// When something may become due without an event; none if only events matter.
    pub(crate) fn next_deadline(&self, floor: Timestamp) -> Option<Timestamp> {
        if self.ended.is_some() {
            return None;
        }
        let give_ups = self.outstanding().map(|(at, _, _, attempt)| {
            attempt
                .give_up_at(self.placed(at).step.timeout)
                .max(floor.plus(REPORT_GRACE))
        });
        let mode = match &self.mode {
            Mode::Consenting => Some(self.submitted.max(floor).plus(CONSENT_WITHIN)),
            Mode::Forward(cursor) => self.cursor_deadline(cursor),
            Mode::Backward(backward) => match backward.undone {
                None => None,
                Some(_) if backward.checks_closed.is_none() => {
                    self.cursor_deadline(&backward.checks)
                }
                Some(undone) => Some(
                    self.survey_from(backward, undone, floor)
                        .plus(SURVEY_WITHIN),
                ),
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
        self.submitted.plus(self.compiled().deadline)
    }

    fn due_give_ups(
        &self,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let floor = floor.plus(REPORT_GRACE);
        self.outstanding()
            .filter(|(at, _, _, attempt)| {
                now >= attempt.give_up_at(self.placed(*at).step.timeout).max(floor)
            })
            .map(|(at, direction, host, attempt)| Record::GivenUp {
                rollout: self.id.clone(),
                at,
                direction,
                attempt: attempt.number,
                host: host.clone(),
                why: if up(host) {
                    Lost::TimedOut
                } else {
                    Lost::Unreachable
                },
            })
            .collect()
    }

    fn advance_consent(&self, now: Timestamp, floor: Timestamp) -> Vec<Record> {
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
        if !declined.is_empty() {
            return vec![self.end(
                End::Cancelled,
                format!("nothing was done: {}", declined.join("; ")),
            )];
        }
        let silent: Vec<&str> = self
            .members
            .iter()
            .filter(|(_, member)| member.consent.is_none())
            .map(|(host, _)| host.as_str())
            .collect();
        if silent.is_empty() {
            return vec![Record::Consented {
                rollout: self.id.clone(),
            }];
        }
        if now >= self.submitted.max(floor).plus(CONSENT_WITHIN) {
            let reason = format!(
                "nothing was done: no answer from {} within {CONSENT_WITHIN}; see `lockstep hosts`",
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

    /// What a rollout that does not move waits for, with hosts and steps by name.
    pub(crate) fn what_blocks(&self) -> String {
        let silent: Vec<String> = match &self.mode {
            Mode::Consenting => self
                .members
                .iter()
                .filter(|(_, member)| member.consent.is_none())
                .map(|(host, _)| format!("{host} has not consented"))
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
                "{host}: {} ({direction} {at}) {word}",
                self.placed(at).step.action.name()
            )
        });
        let gates = self
            .gates
            .iter()
            .filter(|(_, gate)| gate.closed.is_none())
            .map(|(at, _)| {
                format!(
                    "{} ({at}) waits for {}",
                    self.placed(*at).step.action.name(),
                    self.missing(*at)
                )
            });
        let all: Vec<String> = silent.into_iter().chain(steps).chain(gates).collect();
        if all.is_empty() {
            format!("in phase `{}`", self.phase_name())
        } else {
            all.join("; ")
        }
    }

    /// Folds one record. The running path and recovery both go through here.
    pub(crate) fn apply(
        &mut self,
        at: Timestamp,
        record: &Record,
    ) -> Result<(), IllegalTransition> {
        self.fold(at, record)?;
        self.narrate(at, record);
        Ok(())
    }

    fn fold(&mut self, now: Timestamp, record: &Record) -> Result<(), IllegalTransition> {
        let state = self.state();
        let illegal = |record| Err(IllegalTransition { record, state });
        match record {
            Record::TermBegan { .. }
            | Record::HostSeen { .. }
            | Record::Submitted { .. }
            | Record::Matched { .. } => return illegal("a record of the coordinator"),
            Record::Reported { host, body, .. } => self.fold_report(now, host, body),
            Record::Consented { .. } => match self.mode {
                Mode::Consenting => self.mode = Mode::Forward(Cursor::default()),
                _ => return illegal("consented"),
            },
            Record::PhaseOpened { phase, .. } => {
                self.phases.entry(*phase).or_default().opened = Some(now);
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("phase opened");
                };
                *cursor = Cursor {
                    phase: *phase,
                    opened: Some(now),
                    ..Cursor::default()
                };
            }
            Record::Elected { groups, host, .. } => {
                self.elected.insert(groups.clone(), host.clone());
            }
            Record::WaveOpened {
                phase, stage, wave, ..
            } => {
                let waves = self.waves_of(*phase, *stage);
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("wave opened");
                };
                if cursor.waves.is_empty() {
                    cursor.waves = waves;
                }
                cursor.wave = Some(*wave as usize);
            }
            Record::WaveClosed { .. } => {
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("wave closed");
                };
                let Some(wave) = cursor.wave.take() else {
                    return illegal("wave closed");
                };
                cursor.closed = Some((wave, now));
            }
            Record::StageClosed { .. } => {
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("stage closed");
                };
                let Cursor {
                    phase,
                    opened,
                    stage,
                    ..
                } = *cursor;
                *cursor = Cursor {
                    phase,
                    opened,
                    stage: stage + 1,
                    ..Cursor::default()
                };
            }
            Record::PhaseClosed { phase, .. } => {
                self.phases.entry(*phase).or_default().closed = Some(now);
                match &mut self.mode {
                    Mode::Forward(cursor) => {
                        *cursor = Cursor {
                            phase: phase + 1,
                            ..Cursor::default()
                        }
                    }
                    Mode::Backward(backward) => backward.checks_closed = Some(now),
                    Mode::Consenting => return illegal("phase closed"),
                }
            }
            Record::Dispatched {
                at,
                direction,
                attempt,
                hosts,
                not_after,
                ..
            } => {
                let by_host = self.attempts.entry((*at, *direction)).or_default();
                for host in hosts {
                    let attempts = by_host.entry(host.clone()).or_default();
                    match attempts.last_mut() {
                        // Said again after a restart, with a later end.
                        Some(last) if last.number == *attempt => last.not_after = *not_after,
                        _ => attempts.push(Attempt {
                            number: *attempt,
                            ordered: now,
                            not_after: *not_after,
                            started: None,
                            result: None,
                            given_up: false,
                            forgiven: false,
                        }),
                    }
                }
            }
            Record::GivenUp {
                at,
                direction,
                attempt,
                host,
                why,
                ..
            } => {
                let Some(attempt) = self.attempt_mut(*at, *direction, host, *attempt) else {
                    return illegal("given up");
                };
                attempt.given_up = true;
                let since = attempt.started.unwrap_or(attempt.ordered);
                attempt.result = Some(AttemptResult {
                    at: now,
                    took: now.since(since),
                    outcome: Outcome::Lost(*why),
                    facts: vec![],
                });
            }
            Record::Quarantined { host, why, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return illegal("quarantined");
                };
                member.quarantined = Some(why.clone());
            }
            Record::GateOpened {
                at,
                evidence,
                until,
                ..
            } => {
                let gate = Gate {
                    opened: now,
                    until: *until,
                    evidence: *evidence,
                    decisions: vec![],
                    closed: None,
                };
                self.gates.insert(*at, gate);
            }
            Record::GateDecided {
                at,
                operator,
                groups,
                approve,
                items,
                comment,
                ..
            } => {
                let Some(gate) = self.gates.get_mut(at) else {
                    return illegal("gate decided");
                };
                gate.decisions.push(Decision {
                    at: now,
                    operator: operator.clone(),
                    groups: groups.clone(),
                    approve: *approve,
                    items: items.clone(),
                    comment: comment.clone(),
                });
            }
            Record::GateClosed { at, met, why, .. } => {
                let Some(gate) = self.gates.get_mut(at) else {
                    return illegal("gate closed");
                };
                gate.closed = Some((now, *met, why.clone()));
            }
            Record::NoticeOrdered { which, .. } => {
                self.notices.insert(
                    *which,
                    NoticeState {
                        ordered: now,
                        sent: None,
                    },
                );
            }
            Record::NoticeSent { which, error, .. } => {
                let Some(notice) = self.notices.get_mut(which) else {
                    return illegal("notice sent");
                };
                notice.sent = Some(error.clone());
            }
            Record::Paused { .. } => self.paused = true,
            Record::Resumed { .. } => self.fold_resumed(),
            Record::RollbackStarted {
                reason, operator, ..
            } => {
                self.paused = false;
                self.ended = None;
                match &mut self.mode {
                    Mode::Backward(_) => self.fold_resumed(),
                    mode => {
                        *mode = Mode::Backward(Backward {
                            started: now,
                            reason: reason.clone(),
                            operator: operator.clone(),
                            undone: None,
                            checks: Cursor {
                                phase: self.plan.plan().after_rollback_index(),
                                ..Cursor::default()
                            },
                            checks_closed: None,
                            retry_from: BTreeMap::new(),
                        });
                    }
                }
            }
            Record::Undone { .. } => match &mut self.mode {
                Mode::Backward(backward) => backward.undone = Some(now),
                _ => return illegal("undone"),
            },
            Record::Ended { end, reason, .. } => {
                self.paused = false;
                self.ended = Some(Ending {
                    at: now,
                    end: *end,
                    reason: reason.clone(),
                });
            }
            Record::Closed {
                operator, reason, ..
            } => {
                self.closed = Some((now, operator.clone(), reason.clone()));
            }
            Record::SignedOff {
                role,
                operator,
                comment,
                ..
            } => self.signoffs.push(SignOff {
                at: now,
                role: role.clone(),
                operator: operator.clone(),
                comment: comment.clone(),
            }),
        }
        Ok(())
    }

    fn fold_report(&mut self, now: Timestamp, host: &HostId, body: &ReportBody) {
        match body {
            ReportBody::Consented { state, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return;
                };
                if member.consent.is_none() {
                    member.consent = Some(Ok(()));
                    keep_states(&mut member.before, state);
                }
            }
            ReportBody::Declined { refusals, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return;
                };
                member.consent.get_or_insert_with(|| Err(refusals.clone()));
            }
            ReportBody::Started { key } => {
                if let Some(attempt) = self.attempt_mut(key.at, key.direction, host, key.attempt) {
                    attempt.started.get_or_insert(now);
                }
            }
            ReportBody::Finished {
                key,
                outcome,
                facts,
                took,
            } => {
                let Some(attempt) = self.attempt_mut(key.at, key.direction, host, key.attempt)
                else {
                    return;
                };
                let known = attempt.result.as_ref().map(|result| &result.outcome);
                // A host that was given up may still say what happened; it knows better.
                if !matches!(known, None | Some(Outcome::Lost(_))) {
                    return;
                }
                attempt.result = Some(AttemptResult {
                    at: now,
                    took: *took,
                    outcome: match outcome.clone() {
                        StepOutcome::Ok { changed, summary } => Outcome::Ok { changed, summary },
                        StepOutcome::Failed(failure) => Outcome::Failed(failure),
                        StepOutcome::Unknown { why } => Outcome::Unknown { why },
                    },
                    facts: facts.clone(),
                });
                let Some(member) = self.members.get_mut(host) else {
                    return;
                };
                match key.direction {
                    Direction::Do => keep_states(&mut member.before, facts),
                    Direction::Undo => keep_states(&mut member.after, facts),
                    Direction::Probe => {}
                }
            }
            ReportBody::Surveyed { state, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return;
                };
                keep_states(&mut member.after, state);
                member.surveyed = true;
            }
        }
    }

    /// What failed is tried again, as a new attempt.
    fn fold_resumed(&mut self) {
        self.paused = false;
        self.ended = None;
        let backward = matches!(self.mode, Mode::Backward(_));
        let wanted = if backward {
            Direction::Undo
        } else {
            Direction::Do
        };
        let mut retry = BTreeMap::new();
        for ((at, direction), hosts) in &mut self.attempts {
            if *direction != wanted {
                continue;
            }
            for (host, attempts) in hosts {
                let Some(last) = attempts.last_mut() else {
                    continue;
                };
                if last.result.is_some() && !last.is_ok() {
                    last.forgiven = true;
                    retry.insert((*at, host.clone()), last.number + 1);
                }
            }
        }
        if let Mode::Backward(state) = &mut self.mode {
            state.retry_from = retry;
            state.undone = None;
            let phase = state.checks.phase;
            state.checks = Cursor {
                phase,
                ..Cursor::default()
            };
            state.checks_closed = None;
            for member in self.members.values_mut() {
                member.surveyed = false;
            }
        }
    }

    fn attempt_mut(
        &mut self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
        number: u16,
    ) -> Option<&mut Attempt> {
        let attempts = self.attempts.get_mut(&(at, direction))?.get_mut(host)?;
        attempts.iter_mut().find(|attempt| attempt.number == number)
    }

    fn cursor_mut(&mut self) -> Option<&mut Cursor> {
        match &mut self.mode {
            Mode::Consenting => None,
            Mode::Forward(cursor) => Some(cursor),
            Mode::Backward(backward) => Some(&mut backward.checks),
        }
    }
}

fn keep_states(states: &mut BTreeMap<String, (Digest, String)>, facts: &[Fact]) {
    for fact in facts {
        if let Fact::State { name, digest, text } = fact {
            states.insert(name.clone(), (*digest, text.clone()));
        }
    }
}
