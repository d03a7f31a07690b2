//! What a rollout is, at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_proto::approval::Signature;
use lockstep_proto::ids::{Digest, Direction, HostId, LossId, OperatorName, RolloutId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure, Refusal};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

use super::{MOST_ATTEMPTS, REPORT_GRACE, order_life};
use crate::event::RolloutEvent;
use crate::faults::planted;
use crate::record::{End, Lost, NoticeRef};

/// A rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    pub(crate) id: RolloutId,
    /// How many records of the journal are of it.
    pub(crate) records: u64,
    pub(crate) plan: Arc<SealedPlan>,
    pub(crate) requester: OperatorName,
    pub(crate) dry_run: bool,
    /// The signatures that came with the plan.
    pub(crate) signatures: Arc<[String]>,
    pub(crate) submitted: Timestamp,
    /// The deadline counts from here: from the submission, or from when a person last decided
    /// that an ended or running rollout goes on.
    pub(crate) deadline_from: Timestamp,
    /// The hosts that the plan meant when it was submitted (INV-12).
    pub(crate) members: BTreeMap<HostId, Member>,
    /// Which of them each group of the plan meant.
    pub(crate) groups: BTreeMap<String, BTreeSet<HostId>>,
    pub(crate) elected: BTreeMap<Vec<String>, HostId>,
    pub(crate) mode: Mode,
    pub(crate) paused: bool,
    /// Who paused it last.
    pub(crate) paused_by: OperatorName,
    pub(crate) ended: Option<Ending>,
    pub(crate) closed: Option<(Timestamp, OperatorName, String)>,
    pub(crate) lock: Lock,
    pub(crate) attempts: BTreeMap<(StepRef, Direction), BTreeMap<HostId, Vec<Attempt>>>,
    /// Whose last attempt at a step has no result: what else is known of many hosts is not gone
    /// through for each report of one.
    pub(crate) open: BTreeMap<(StepRef, Direction), BTreeSet<HostId>>,
    /// Members that have not answered the offer.
    pub(crate) silent: BTreeSet<HostId>,
    pub(crate) phases: BTreeMap<u16, PhaseTimes>,
    pub(crate) gates: BTreeMap<StepRef, Gate>,
    pub(crate) notices: BTreeMap<NoticeRef, NoticeState>,
    pub(crate) signoffs: Vec<SignOff>,
    pub(crate) events: Vec<Arc<RolloutEvent>>,
}

/// The rollout's right to change what its plan touches.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lock {
    /// A gate waits that frees it: nobody has consented to anything that could be done now.
    pub(crate) released: bool,
    /// How often it was taken again. What hosts said in an earlier round counts no more.
    pub(crate) round: u32,
    /// When it was taken last, if that was not with the submission.
    pub(crate) taken: Option<Timestamp>,
    /// The SQL that had been shown, before the gate that freed it; none if it never was free, if
    /// that gate has closed since, or if people have been asked again.
    pub(crate) shown: Option<Vec<Digest>>,
}

/// Parts of a host's state by name: digest and words.
pub(crate) type States = BTreeMap<String, (Digest, String)>;

/// A host's answer when it was asked for its state.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Survey {
    pub(crate) states: States,
    /// Why it could not say.
    pub(crate) note: Option<String>,
}

/// What is known of a host in a rollout.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Member {
    pub(crate) consent: Option<Result<(), Vec<Refusal>>>,
    /// When it refused.
    pub(crate) declined: Option<Timestamp>,
    pub(crate) quarantined: Option<String>,
    /// The host's state before.
    pub(crate) before: States,
    /// The same when the lock was freed that has been taken again since.
    pub(crate) approved: States,
    /// The same after a rollback, as undone steps reported it.
    pub(crate) undone: States,
    /// What it said when it was asked for its state after the rollback; none before it did.
    pub(crate) surveyed: Option<Survey>,
    /// It said, after the rollout had been cancelled, that it holds for it no more: what it had not
    /// begun by then, it never begins.
    pub(crate) answered: bool,
    /// Its agent was installed anew since: it knows nothing of what the one before it ran.
    pub(crate) anew: bool,
    /// People have said what an attempt of it did.
    pub(crate) spoken_for: bool,
}

/// Which way a rollout goes. That it has ended is said by `Rollout::ended`, beside it: a halted
/// rollout can be resumed where it stood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Mode {
    /// Hosts are asked whether they may; nothing has happened.
    Consenting,
    /// Phases run in plan order.
    Forward(Cursor),
    /// What was done is undone.
    Backward(Backward),
}

/// Where the forward engine stands.
#[derive(Debug, Clone, Default, PartialEq)]
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
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Backward {
    pub(crate) started: Timestamp,
    pub(crate) reason: String,
    pub(crate) operator: Option<OperatorName>,
    /// When every undo had ended.
    pub(crate) undone: Option<Timestamp>,
    /// The checks after the rollback.
    pub(crate) checks: Cursor,
    pub(crate) checks_closed: Option<Timestamp>,
}

/// How and why a rollout ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    pub(crate) at: Timestamp,
    pub(crate) end: End,
    pub(crate) reason: String,
}

/// One attempt at a step on a host. There is one for each order of a rollout, so that what hardly
/// any of them has is kept elsewhere.
#[derive(Debug, Clone, PartialEq)]
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
    /// What it left is undone before it is made again.
    pub(crate) undo_first: bool,
    /// When its order was given again after the controller had stopped waiting for it.
    pub(crate) asked_again: Option<Timestamp>,
    /// For attempts forward: the number of the last undo before it, on the same host; 0 if none.
    pub(crate) after_undo: u16,
    /// A person's word on what it did, and whose.
    pub(crate) resolved: Option<Box<Resolved>>,
    /// A person's word that what it would lose may be lost: it is an undo that refused.
    pub(crate) accepted: Option<Box<Accepted>>,
    /// The lock was free since: what it has seen counts no more, and it is made again.
    pub(crate) stale: bool,
}

/// A person's word on what an attempt did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    pub(crate) done: bool,
    pub(crate) by: OperatorName,
    /// Armoured.
    pub(crate) signature: Option<String>,
    /// The host has said since what it knows of it.
    pub(crate) answered: bool,
}

/// A person's word that what an undo would lose may be lost.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Accepted {
    pub(crate) at: Timestamp,
    pub(crate) loss: LossId,
    pub(crate) by: OperatorName,
    pub(crate) reason: String,
    /// Armoured.
    pub(crate) signature: Option<String>,
}

/// How an attempt ended, as far as the controller knows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttemptResult {
    pub(crate) at: Timestamp,
    pub(crate) took: Period,
    pub(crate) outcome: Outcome,
    pub(crate) facts: Vec<Fact>,
    /// For each fact its host's signature, or an empty text.
    pub(crate) signatures: Vec<String>,
}

/// INV-5, for one attempt; `skipped` is a host that has none.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Ok { changed: bool, summary: String },
    Failed(Failure),
    Unknown { why: String },
    Lost(Lost),
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PhaseTimes {
    pub(crate) opened: Option<Timestamp>,
    pub(crate) closed: Option<Timestamp>,
}

/// A gate that waits or waited.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Gate {
    pub(crate) opened: Timestamp,
    pub(crate) until: Timestamp,
    pub(crate) evidence: Digest,
    /// The round in which it freed the lock last.
    pub(crate) released: Option<u32>,
    /// What people said to have it met without what it waits for.
    pub(crate) glass: Vec<Glass>,
    pub(crate) decisions: Vec<Decision>,
    pub(crate) closed: Option<(Timestamp, bool, String)>,
}

/// A person's word that a gate is to be met without what it waits for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Glass {
    pub(crate) at: Timestamp,
    pub(crate) operator: OperatorName,
    pub(crate) reason: String,
    pub(crate) until: Timestamp,
    pub(crate) signed: Option<Signature>,
}

/// What somebody decided.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    pub(crate) at: Timestamp,
    pub(crate) operator: OperatorName,
    pub(crate) groups: Vec<String>,
    pub(crate) approve: bool,
    pub(crate) items: Vec<u32>,
    pub(crate) comment: String,
    pub(crate) signed: Option<Signature>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NoticeState {
    pub(crate) ordered: Timestamp,
    /// Whether it was sent, or why not; none as long as that is open.
    pub(crate) sent: Option<Result<(), String>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SignOff {
    pub(crate) at: Timestamp,
    pub(crate) role: String,
    pub(crate) operator: OperatorName,
    pub(crate) comment: String,
}

impl Member {
    /// A part of its state after a rollback.
    pub(crate) fn after(&self, name: &str) -> Option<&(Digest, String)> {
        let surveyed = self.surveyed.as_ref();
        let now = surveyed.and_then(|survey| survey.states.get(name));
        now.or_else(|| self.undone.get(name))
    }
}

impl Attempt {
    /// The controller waits no longer than this for the attempt's report.
    pub(crate) fn give_up_at(&self, timeout: Period) -> Timestamp {
        match self.started {
            Some(started) => {
                let since = self.asked_again.map_or(started, |again| again.max(started));
                since.plus(timeout).plus(REPORT_GRACE)
            }
            None => self.not_after.plus(REPORT_GRACE),
        }
    }

    /// When the order was given last.
    pub(crate) fn ordered(&self) -> Timestamp {
        Timestamp(self.not_after.0.saturating_sub(order_life(Direction::Do).0))
    }

    /// The attempt was cut off, and its host has proven what is there: another one is no blind
    /// retry (INV-1).
    fn was_interrupted(&self) -> bool {
        !self.given_up && self.failed_by(Cause::Interrupted)
    }

    /// The order came after its time, so its agent refused it: nothing was done. Agents go by the
    /// controller's clock as they heard it, which is never ahead.
    fn came_late(&self) -> bool {
        let late = self
            .result
            .as_ref()
            .is_some_and(|result| result.at > self.not_after);
        !self.given_up && self.started.is_none() && late && self.failed_by(Cause::Refused)
    }

    fn failed_by(&self, cause: Cause) -> bool {
        self.result.as_ref().is_some_and(
            |result| matches!(&result.outcome, Outcome::Failed(failure) if failure.cause == cause),
        )
    }

    /// Nobody has heard how it ended.
    pub(crate) fn is_lost(&self) -> bool {
        self.result
            .as_ref()
            .is_some_and(|result| matches!(result.outcome, Outcome::Lost(_)))
    }

    /// Whether only a person can say what it did.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.result.as_ref().is_some_and(|result| {
            matches!(result.outcome, Outcome::Unknown { .. } | Outcome::Lost(_))
        })
    }

    /// What it would lose, if it is an undo that refused because of that.
    pub(crate) fn would_lose(&self) -> Option<LossId> {
        match &self.result.as_ref()?.outcome {
            Outcome::Failed(failure) => LossId::in_message(&failure.message),
            _ => None,
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

/// The number of the attempt that follows these; none if the last one stands as it is. One that
/// was lost is asked for again by its own number: its agent knows what became of it (INV-1).
pub(crate) fn next_attempt(attempts: &[Attempt]) -> Option<u16> {
    let last = attempts.last()?;
    let often = |what: fn(&Attempt) -> bool| {
        let times = attempts.iter().filter(|attempt| what(attempt)).count();
        what(last) && times < usize::from(MOST_ATTEMPTS)
    };
    if last.stale {
        Some(last.number + 1)
    } else if last.forgiven && last.is_lost() {
        Some(last.number)
    } else if last.forgiven
        || often(Attempt::was_interrupted)
        || often(Attempt::came_late)
        || (planted!(RetryUnknown)
            && often(|it| {
                let outcome = it.result.as_ref().map(|result| &result.outcome);
                matches!(outcome, Some(Outcome::Unknown { .. }))
            }))
    {
        Some(last.number + 1)
    } else {
        None
    }
}
