//! What the agent remembers, and what it decides about an order. Pure: the journal's records are
//! folded in by [`Memory::apply`], at start and while running alike.
//!
//! ```text
//! attempt:  (ordered) -> Intent -> running -> Finished
//!                   \-> refused, nothing to do: Finished without an intent
//! ```

use std::collections::VecDeque;

use lockstep_proto::ids::{Direction, Epoch, InstanceId, RolloutId, StepKey};
use lockstep_proto::order::Order;
use lockstep_proto::report::{Cause, Failure, ReportBody};
use lockstep_proto::values::Timestamp;

use super::admit;
use super::consent::HeldStep;
use super::hold::{Attempt, Hold, Recorded};
use super::licences::Licences;
use super::policy::Begun;
use crate::faults::planted;
use crate::journal::{Position, Record, Seen};
use crate::step::failure;

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
                self.hold = Some(Hold::new(held));
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
                    hold.consent = Some(recorded);
                }
            }
            ReportBody::Finished { key, outcome, .. } => {
                if let Some(hold) = self.hold_of(key) {
                    hold.end(key, recorded, outcome.into());
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
        Some(self.hold_of(key)?.attempt_mut(key))
    }

    /// The hold that an attempt belongs to.
    fn hold_of(&mut self, key: &StepKey) -> Option<&mut Hold> {
        let hold = self.hold.as_mut();
        hold.filter(|hold| key.direction != Direction::Probe && hold.rollout == key.rollout)
    }

    /// Whether more cannot be remembered of orders that were refused, and this is one more.
    pub(crate) fn is_crowded(&self, key: &StepKey) -> bool {
        let hold = self.hold_for(&key.rollout);
        key.direction != Direction::Probe && hold.is_some_and(|hold| !hold.has_room_for(key.at))
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

    /// The hold, if it is for this rollout.
    pub(crate) fn hold_for(&self, rollout: &RolloutId) -> Option<&Hold> {
        self.hold.as_ref().filter(|hold| hold.rollout == *rollout)
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
        let hold = match self.check_hold(key) {
            Ok(hold) => hold,
            Err(failure) => return Decision::Refuse(failure),
        };
        // Before everything that may refuse it: a refusal is recorded as this attempt's end.
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
            check_plan(hold, order)?;
            check_freshness(order, now.controller)?;
            hold.check_order(order, now)
        };
        match decide() {
            Ok(decision) => decision,
            Err(failure) => Decision::Refuse(failure),
        }
    }

    fn check_hold(&self, key: &StepKey) -> Result<&Hold, Failure> {
        let rollout = &key.rollout;
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
        Ok(hold)
    }
}

fn check_plan(hold: &Hold, order: &Order) -> Result<(), Failure> {
    if hold.plan == order.plan {
        return Ok(());
    }
    Err(refused(
        format!(
            "this host consented to plan {}, the order points into {}",
            hold.plan.short(),
            order.plan.short()
        ),
        "a rollout has one plan: submit the other one as a rollout of its own",
    ))
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
