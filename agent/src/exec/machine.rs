//! What the agent remembers, and what it decides about an order. Pure: the journal's records are
//! folded in by [`Memory::apply`], at start and while running alike.
//!
//! ```text
//! attempt:  (ordered) -> Intent -> running -> Finished
//!                   \-> refused, nothing to do: Finished without an intent
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{
    Digest, Direction, Epoch, InstanceId, PlanDigest, RolloutId, StepKey, StepRef,
};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::plan::Undo;
use lockstep_proto::report::{Cause, Failure, ReportBody, StepOutcome};
use lockstep_proto::values::Timestamp;

use super::admit;
use super::consent::{Duty, HeldStep};
use super::licences::Licences;
use super::policy::Begun;
use crate::faults::planted;
use crate::journal::{Position, Record, Seen};
use crate::step::{LogMark, failure};

/// How many ended rollouts are remembered, so that a late offer of one does not bring it back: its
/// approvals and facts would count once more. Late ones come from a restored controller, and from
/// one that was stolen. A megabyte at most.
const RELEASED: usize = 1 << 17;

/// How many rollouts may wait that have freed the host: what is forgotten ends when it is released.
const WAITING: usize = 64;

/// Everything the journal says.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Domain and installation, from the first record.
    pub(crate) opened: Option<(String, InstanceId)>,
    /// The highest epoch obeyed.
    pub(crate) epoch: Option<Epoch>,
    /// The rollout that the host holds itself for.
    pub(crate) hold: Option<Hold>,
    /// Rollouts that have ended here by the numbers in their ids, the newest last.
    released: VecDeque<u64>,
    /// Rollouts that wait, and have freed the host, the newest last.
    waiting: VecDeque<RolloutId>,
    /// The newest report.
    pub(crate) last_report: u64,
    /// The newest report that is durable at the controller.
    pub(crate) acknowledged: u64,
    /// What a controller has said last of its journal.
    pub(crate) seen: Option<Seen>,
    /// Where the reports after that are.
    pub(crate) outstanding: VecDeque<(u64, Position)>,
    /// Attempts that the policy's rates count.
    pub(crate) begun: Begun,
    /// The serials of sealed plans.
    pub(crate) licences: Licences,
    /// How many reports a controller has of which this journal knows fewer: then no order is
    /// taken.
    pub(crate) quarantined: Option<u64>,
    /// Whether people have signed from where this host may go on.
    anchored: bool,
}

/// The hold for a rollout, with what happened in it.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) rollout: RolloutId,
    pub(crate) plan: PlanDigest,
    pub(crate) steps: Digest,
    pub(crate) log_offsets: BTreeMap<PathBuf, LogMark>,
    /// Which time the rollout took its lock.
    pub(crate) round: u32,
    /// The report of the consent.
    pub(crate) consent: Option<Recorded>,
    /// The attempts at each step, in the order in which they were recorded.
    attempts: BTreeMap<StepRef, Vec<Attempt>>,
}

/// A report that is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) number: u64,
    pub(crate) position: Position,
}

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) direction: Direction,
    pub(crate) number: u16,
    /// Where its intent is; none if it never began.
    pub(crate) began: Option<Position>,
    /// People asked for it to be stopped.
    pub(crate) cancelled: bool,
    pub(crate) ended: Option<(Recorded, How)>,
}

/// How an attempt ended, as far as decisions need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Ok { changed: bool },
    Failed { changed: bool },
    Unknown,
}

impl From<&StepOutcome> for How {
    fn from(outcome: &StepOutcome) -> Self {
        match outcome {
            StepOutcome::Ok { changed, .. } => Self::Ok { changed: *changed },
            StepOutcome::Failed(failure) => Self::Failed {
                changed: failure.changed,
            },
            StepOutcome::Unknown { .. } => Self::Unknown,
        }
    }
}

/// What is done with an order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Decision {
    /// It comes from a controller whose term has ended (INV-4).
    Stale(String),
    /// It was carried out before: its report is sent again (INV-1).
    Repeat(Recorded),
    /// It is being carried out.
    Running,
    /// It is against the rules.
    Refuse(Failure),
    /// There is nothing to do, and this is why.
    Nothing(String),
    /// Only look.
    Look,
    /// Begin the attempt.
    Begin(Begin),
}

/// How an attempt begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begin {
    /// The intent whose before-state holds; none if the host has to be asked for it.
    pub(crate) before: Option<Position>,
}

/// What a decision depends on beside the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now<'a> {
    /// The controller's time: Welcome's clock and the monotonic time since.
    pub(crate) controller: Timestamp,
    /// The key of an attempt that is being prepared or carried out.
    pub(crate) busy: Option<&'a StepKey>,
    /// The steps that the host consented to.
    pub(crate) steps: &'a [HeldStep],
}

impl Memory {
    /// Folds a record in.
    pub(crate) fn apply(&mut self, position: Position, record: &Record) {
        match record {
            Record::Opened {
                format: _,
                domain,
                instance,
            } => self.opened = Some((domain.clone(), instance.clone())),
            Record::Epoch(epoch) => self.epoch = Some(*epoch),
            Record::Held(held) => {
                self.hold = Some(Hold {
                    rollout: held.rollout.clone(),
                    plan: held.plan,
                    steps: held.steps,
                    log_offsets: held.log_offsets.clone(),
                    round: held.round,
                    consent: None,
                    attempts: BTreeMap::new(),
                });
            }
            Record::Released {
                rollout,
                comes_back,
            } => {
                self.hold.take_if(|hold| hold.rollout == *rollout);
                self.waiting.retain(|waits| waits != rollout);
                if *comes_back {
                    if self.waiting.len() == WAITING {
                        self.waiting.pop_front();
                    }
                    self.waiting.push_back(rollout.clone());
                } else {
                    self.end(rollout);
                }
            }
            Record::Licensed { of, rollout } => self.licences.license(of, rollout),
            Record::Quarantined { acknowledged } => self.quarantined = Some(*acknowledged),
            Record::Anchored {
                floor: _,
                raised,
                instance,
            } => {
                self.licences.raise(&raised.fleet, &raised.serials);
                if let Some(hold) = self.hold.take() {
                    self.end(&hold.rollout);
                }
                if let Some((_, own)) = &mut self.opened {
                    *own = instance.clone();
                }
                (self.last_report, self.acknowledged) = (0, 0);
                self.outstanding.clear();
                self.quarantined = None;
                self.anchored = true;
            }
            Record::Intent(intent) => {
                if let Some(counted) = &intent.counted {
                    let at = admit::began(intent, counted);
                    self.begun.note(&counted.rules, &at);
                }
                if let Some(attempt) = self.attempt_mut(&intent.key) {
                    attempt.began = Some(position);
                }
            }
            Record::Cancelled { key } => {
                if let Some(attempt) = self.attempt_mut(key) {
                    attempt.cancelled = true;
                }
            }
            // What was refused changes nothing.
            Record::SessionsRefused(_) => {}
            Record::Report { number, body } => self.apply_report(position, *number, body),
            Record::Acknowledged { number, seen } => {
                self.acknowledge(*number);
                if seen.is_some() {
                    self.seen.clone_from(seen);
                }
            }
        }
    }

    /// A rollout has ended here, for ever.
    fn end(&mut self, rollout: &RolloutId) {
        self.licences.end(rollout);
        if self.released.len() == RELEASED {
            self.released.pop_front();
        }
        self.released.push_back(number_of(rollout));
    }

    fn apply_report(&mut self, position: Position, number: u64, body: &ReportBody) {
        self.last_report = number;
        self.outstanding.push_back((number, position));
        let recorded = Recorded { number, position };
        match body {
            ReportBody::Consented { rollout, .. } => {
                if let Some(hold) = self.hold.as_mut().filter(|hold| hold.rollout == *rollout) {
                    hold.consent.get_or_insert(recorded);
                }
            }
            ReportBody::Finished { key, outcome, .. } => {
                if let Some(attempt) = self.attempt_mut(key) {
                    attempt
                        .ended
                        .get_or_insert_with(|| (recorded, outcome.into()));
                }
            }
            ReportBody::Started { .. }
            | ReportBody::Declined { .. }
            | ReportBody::Surveyed { .. } => {}
        }
    }

    /// Whether this journal says nothing of what this host may have done before it.
    pub(crate) fn is_new(&self) -> bool {
        self.last_report == 0 && !self.anchored
    }

    /// Forgets reports that are durable at the controller. Says whether that was news.
    pub(crate) fn acknowledge(&mut self, number: u64) -> bool {
        let news = number > self.acknowledged;
        self.acknowledged = self.acknowledged.max(number);
        while self
            .outstanding
            .front()
            .is_some_and(|(first, _)| *first <= number)
        {
            self.outstanding.pop_front();
        }
        news
    }

    fn attempt_mut(&mut self, key: &StepKey) -> Option<&mut Attempt> {
        if key.direction == Direction::Probe {
            return None;
        }
        let hold = self
            .hold
            .as_mut()
            .filter(|hold| hold.rollout == key.rollout)?;
        let attempts = hold.attempts.entry(key.at).or_default();
        let found = attempts
            .iter()
            .position(|a| a.direction == key.direction && a.number == key.attempt);
        let index = found.unwrap_or_else(|| {
            attempts.push(Attempt {
                direction: key.direction,
                number: key.attempt,
                began: None,
                cancelled: false,
                ended: None,
            });
            attempts.len() - 1
        });
        attempts.get_mut(index)
    }

    /// Whether a controller of this term may be obeyed (INV-4).
    pub(crate) fn check_epoch(&self, epoch: Epoch) -> Result<(), String> {
        let highest = self.epoch.unwrap_or(Epoch::NONE);
        if epoch.is_current(highest) || planted!(AgentIgnoresEpoch) {
            return Ok(());
        }
        let why = if epoch.counter == highest.counter {
            "two controllers claim the same term: one of them runs on a copy of the other's state"
        } else {
            "its term has ended: another controller has taken over"
        };
        Err(format!(
            "the controller has epoch {epoch}, this host has obeyed {highest}; {why}"
        ))
    }

    /// Whether a rollout waits, and has freed this host.
    pub(crate) fn waits(&self, rollout: &RolloutId) -> bool {
        self.waiting.contains(rollout)
    }

    /// Whether a rollout has ended on this host.
    pub(crate) fn has_ended(&self, rollout: &RolloutId) -> bool {
        self.released.contains(&number_of(rollout))
    }

    /// What is done with an order. The caller has made its epoch durable if it is a new one.
    pub(crate) fn decide(&self, order: &Order, now: Now<'_>) -> Decision {
        if let Err(why) = self.check_epoch(order.epoch) {
            return Decision::Stale(why);
        }
        let key = &order.key;
        if key.direction == Direction::Probe {
            return match check_freshness(order, now.controller) {
                Ok(()) => Decision::Look,
                Err(failure) => Decision::Refuse(failure),
            };
        }
        let hold = match self.check_hold(order) {
            Ok(hold) => hold,
            Err(failure) => return Decision::Refuse(failure),
        };
        if let Some(attempt) = hold.attempt(key) {
            return match &attempt.ended {
                Some(_) if planted!(ReuseStepKey) => Decision::Begin(Begin { before: None }),
                Some((recorded, _)) => Decision::Repeat(*recorded),
                None => Decision::Running,
            };
        }
        if now.busy == Some(key) {
            return Decision::Running;
        }
        let decide = || {
            check_freshness(order, now.controller)?;
            hold.check_order(order, now)
        };
        match decide() {
            Ok(decision) => decision,
            Err(failure) => Decision::Refuse(failure),
        }
    }

    fn check_hold(&self, order: &Order) -> Result<&Hold, Failure> {
        let rollout = &order.key.rollout;
        let Some(hold) = &self.hold else {
            let what = if self.has_ended(rollout) {
                format!("{rollout} has ended on this host")
            } else {
                format!("this host holds for no rollout, and has not consented to {rollout}")
            };
            return Err(refused(what, "offer the plan first"));
        };
        if hold.rollout != *rollout {
            return Err(refused(
                format!("this host holds for {}", hold.rollout),
                "end that rollout first",
            ));
        }
        if hold.plan != order.plan {
            return Err(refused(
                format!(
                    "this host consented to plan {}, the order points into {}",
                    hold.plan.short(),
                    order.plan.short()
                ),
                "a rollout has one plan: submit the other one as a rollout of its own",
            ));
        }
        Ok(hold)
    }
}

/// The number in a rollout's id: twelve hexadecimal digits after `ro_`.
fn number_of(rollout: &RolloutId) -> u64 {
    let digits = rollout.as_str().trim_start_matches("ro_");
    u64::from_str_radix(digits, 16).expect("an id is held against its form when it is read")
}

/// Refuses an order that is too old by the controller's clock.
pub(crate) fn check_freshness(order: &Order, controller: Timestamp) -> Result<(), Failure> {
    if controller > order.not_after && !planted!(IgnoreNotAfter) {
        let late = controller.since(order.not_after);
        return Err(refused(
            format!("the order came {} ms too late", late.0),
            "nothing was done; the controller may give it again",
        ));
    }
    Ok(())
}

impl Hold {
    /// What is known of an attempt.
    pub(crate) fn attempt(&self, key: &StepKey) -> Option<&Attempt> {
        self.attempts
            .get(&key.at)?
            .iter()
            .find(|a| a.direction == key.direction && a.number == key.attempt)
    }

    /// Whether a step has begun under this hold that may change something, or is none of these.
    pub(crate) fn has_changed(&self, steps: &[HeldStep]) -> bool {
        let only_looks = |at: StepRef| {
            let step = steps.iter().find(|step| step.at == at);
            step.is_some_and(|step| !step.action.changes())
        };
        let began = |attempts: &[Attempt]| attempts.iter().any(|a| a.began.is_some());
        let mut begun = self.attempts.iter().filter(|(_, attempts)| began(attempts));
        begun.any(|(at, _)| !only_looks(*at))
    }

    /// Whether a step after this place has begun.
    pub(crate) fn has_begun_after(&self, at: StepRef) -> bool {
        let began = |attempt: &Attempt| attempt.began.is_some();
        let mut later = self.attempts.range(at..).filter(|(later, _)| **later > at);
        later.any(|(_, attempts)| attempts.iter().any(began))
    }

    /// The attempts that began and have no outcome.
    pub(crate) fn running(&self) -> impl Iterator<Item = (StepRef, &Attempt)> {
        self.attempts.iter().flat_map(|(at, attempts)| {
            attempts
                .iter()
                .filter(|a| a.began.is_some() && a.ended.is_none())
                .map(|a| (*at, a))
        })
    }

    /// Whether another attempt at the same step changed something that has not been undone since.
    /// Then an attempt that finds everything in place counts as having changed it.
    pub(crate) fn changed_by_others(&self, key: &StepKey) -> bool {
        let attempts = self.attempts.get(&key.at).map_or(&[][..], Vec::as_slice);
        let others = attempts
            .iter()
            .filter(|a| (a.direction, a.number) != (key.direction, key.attempt));
        key.direction == Direction::Do && others.fold(Chain::default(), Chain::then).changed
    }

    fn chain(&self, at: StepRef) -> Chain {
        let attempts = self.attempts.get(&at).map_or(&[][..], Vec::as_slice);
        attempts.iter().fold(Chain::default(), Chain::then)
    }

    fn check_order(&self, order: &Order, now: Now<'_>) -> Result<Decision, Failure> {
        let key = &order.key;
        let step = now
            .steps
            .iter()
            .find(|step| step.at == key.at)
            .ok_or_else(|| {
                refused(
                    format!("step {} of the plan is not meant for this host", key.at),
                    "the labels that decide it are in the host's own agent.toml",
                )
            })?;
        let running = self.running().next().map(|(at, a)| describe(at, a));
        if let Some(other) = running.or_else(|| now.busy.map(ToString::to_string)) {
            return Err(refused(
                format!("{other} is still running on this host"),
                "a host takes one step at a time: wait for it, or cancel it",
            ));
        }
        let attempts = self.attempts.get(&key.at).map_or(&[][..], Vec::as_slice);
        let same = attempts.iter().filter(|a| a.direction == key.direction);
        if let Some(newest) = same.map(|a| a.number).max().filter(|n| *n > key.attempt) {
            return Err(refused(
                format!("attempt {newest} of this step has been taken already"),
                "attempts are numbered upwards",
            ));
        }
        let chain = self.chain(key.at);
        if key.direction == Direction::Undo {
            return Ok(chain.undo(step));
        }
        if let Some(later) = self.latest_done().filter(|later| *later > key.at) {
            return Err(refused(
                format!(
                    "step {later} was taken already, and {} comes before it",
                    key.at
                ),
                "a host takes steps in the order of the plan",
            ));
        }
        // What was taken back stays so: forward again means another rollout.
        if let Some(done) = attempts.iter().find(|a| a.is_done()) {
            return Err(refused(
                format!("attempt {} of this step was done", done.number),
                "its report says so; nothing is done twice",
            ));
        }
        if let Some(missing) = self.missing_before(order, step, now.steps) {
            return Err(refused(
                format!(
                    "step {missing} is not done on this host, and {} comes after it",
                    key.at
                ),
                "a host takes every step of the plan that is meant for it; if a person knows that \
                 it was done, `lockstep resolve` says so",
            ));
        }
        let resolved = |a: &Attempt| {
            order.bindings.iter().any(|binding| {
                (binding.origin.direction, binding.origin.attempt) == (a.direction, a.number)
                    && matches!(binding.fact, Fact::Resolved { done: false, .. })
            })
        };
        let unknown = |a: &Attempt| matches!(a.ended, Some((_, How::Unknown)));
        let unproven = |a: &&Attempt| a.direction == Direction::Do && unknown(a) && !resolved(a);
        if step.action.info().class != Class::Observing
            && let Some(unproven) = since_undone(attempts).iter().find(unproven)
        {
            return Err(refused(
                format!(
                    "what attempt {} of this step did is unknown, and nothing can prove it",
                    unproven.number
                ),
                "look at the host, then say what you see with `lockstep resolve`",
            ));
        }
        if !comes_after_rollbacks(&step.action)
            && let Some(undone) = self.undone_before(key.at)
        {
            return Err(refused(
                format!(
                    "step {undone} was undone on this host, and {} comes after it",
                    key.at
                ),
                "a rollback has begun here, which the controller does not know of: it runs on an \
                 older copy of its state; close this rollout, and apply the plan again",
            ));
        }
        Ok(Decision::Begin(Begin {
            before: chain.before.filter(|_| chain.changed),
        }))
    }

    /// The first step before the one ordered that this host has not done, and has to.
    fn missing_before(
        &self,
        order: &Order,
        step: &HeldStep,
        steps: &[HeldStep],
    ) -> Option<StepRef> {
        if step.duty == Duty::AfterRollback {
            return None;
        }
        let said = |at: StepRef| {
            order.bindings.iter().any(|binding| {
                let origin = &binding.origin;
                (origin.at, origin.direction, &origin.host) == (at, Direction::Do, &order.key.host)
                    && matches!(binding.fact, Fact::Resolved { done: true, .. })
            })
        };
        let done = |at: StepRef| {
            let attempts = self.attempts.get(&at).map_or(&[][..], Vec::as_slice);
            attempts.iter().any(Attempt::is_done) || said(at)
        };
        let earlier = steps.iter().filter(|earlier| earlier.at < step.at);
        let mut required = earlier.filter(|earlier| earlier.duty == Duty::AllHosts);
        required
            .find(|earlier| !done(earlier.at))
            .map(|earlier| earlier.at)
    }

    /// A step before this one whose newest word is that it was undone.
    fn undone_before(&self, at: StepRef) -> Option<StepRef> {
        let undone = |attempts: &[Attempt]| {
            let newest = attempts.iter().rfind(|a| a.began.is_some());
            newest.is_some_and(Attempt::undid)
        };
        let mut earlier = self.attempts.range(..at);
        earlier
            .find(|(_, attempts)| undone(attempts))
            .map(|(at, _)| *at)
    }

    /// The attempts at this step of which nobody knows what they did, or whether anything of them
    /// still runs: another one must see to their end first.
    pub(crate) fn unknown(&self, at: StepRef) -> impl Iterator<Item = &Attempt> {
        let attempts = self.attempts.get(&at).map_or(&[][..], Vec::as_slice);
        let unknown = |a: &&Attempt| matches!(a.ended, Some((_, How::Unknown)));
        attempts.iter().filter(unknown)
    }

    /// The last step in plan order that was done and not undone.
    fn latest_done(&self) -> Option<StepRef> {
        let done = |at: &&StepRef| self.chain(**at).before.is_some();
        self.attempts.keys().rev().find(done).copied()
    }
}

impl Attempt {
    /// Whether it did what the step is for.
    fn is_done(&self) -> bool {
        let ok = matches!(self.ended, Some((_, How::Ok { .. })));
        self.direction == Direction::Do && self.began.is_some() && ok
    }

    /// Whether it took back what was done.
    fn undid(&self) -> bool {
        let ok = matches!(self.ended, Some((_, How::Ok { .. })));
        self.direction == Direction::Undo && self.began.is_some() && ok
    }
}

/// The attempts after the last undo that went well.
fn since_undone(attempts: &[Attempt]) -> &[Attempt] {
    let undone = attempts.iter().rposition(Attempt::undid);
    &attempts[undone.map_or(0, |undone| undone + 1)..]
}

/// What a plan may have in `after_rollback`: it looks at what undos have left.
fn comes_after_rollbacks(action: &Action) -> bool {
    !action.changes() || action.name().starts_with("check.")
}

fn describe(at: StepRef, attempt: &Attempt) -> String {
    format!(
        "attempt {} of step {at} ({})",
        attempt.number, attempt.direction
    )
}

/// What the attempts at one step have come to since it was last undone.
#[derive(Debug, Clone, Copy, Default)]
struct Chain {
    /// The first intent: its before-state is the one to return to.
    before: Option<Position>,
    /// Whether something may have been changed.
    changed: bool,
}

impl Chain {
    fn then(self, attempt: &Attempt) -> Self {
        let how = attempt.ended.as_ref().map(|(_, how)| *how);
        match (attempt.direction, attempt.began) {
            (Direction::Undo, Some(_)) if matches!(how, Some(How::Ok { .. })) => Self::default(),
            (Direction::Do, Some(began)) => Self {
                // What an attempt found before it, while nothing had been changed, is newer.
                before: Some(self.before.filter(|_| self.changed).unwrap_or(began)),
                changed: self.changed
                    || !matches!(
                        how,
                        Some(How::Ok { changed: false } | How::Failed { changed: false })
                    ),
            },
            _ => self,
        }
    }

    fn undo(self, step: &HeldStep) -> Decision {
        let info = step.action.info();
        let nothing = |why: &str| Decision::Nothing(why.to_owned());
        match self.before {
            _ if step.undo == Undo::Keep => nothing("kept, as the plan says"),
            None => nothing("nothing was done here"),
            Some(_) if !self.changed => nothing("nothing was changed here"),
            Some(_) if !info.undo => nothing("there is nothing to return to"),
            Some(before) => Decision::Begin(Begin {
                before: Some(before),
            }),
        }
    }
}

/// A refusal.
pub(crate) fn refused(message: impl Into<String>, hint: &str) -> Failure {
    Failure {
        hint: Some(hint.to_owned()),
        ..failure(Cause::Refused, message)
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
