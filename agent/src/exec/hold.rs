//! The hold for a rollout: the attempts at each step, and what may come after what.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{Digest, Direction, PlanDigest, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::plan::Undo;
use lockstep_proto::report::{Failure, StepOutcome};

use super::consent::{Duty, HeldStep};
use super::machine::{Begin, Decision, Now, refused};
use crate::journal::{Held, Position};
use crate::step::LogMark;

/// The steps that a hold remembers: more than a plan of a megabyte can have. Orders may name others.
const STEPS: usize = 1 << 15;

/// The hold for a rollout, with what happened in it.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) rollout: RolloutId,
    pub(crate) plan: PlanDigest,
    pub(crate) steps: Digest,
    pub(crate) log_offsets: BTreeMap<PathBuf, LogMark>,
    /// Which time the rollout took its lock.
    pub(crate) round: u32,
    /// The newest report of the consent.
    pub(crate) consent: Option<Recorded>,
    /// The attempts at each step, in the order in which they were recorded. Of those that never
    /// began there is one in each direction, the newest: an older one comes after it no more.
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

impl Hold {
    /// A hold in which nothing has happened yet.
    pub(super) fn new(held: &Held) -> Self {
        Self {
            rollout: held.rollout.clone(),
            plan: held.plan,
            steps: held.steps,
            log_offsets: held.log_offsets.clone(),
            round: held.round,
            consent: None,
            attempts: BTreeMap::new(),
        }
    }

    /// An attempt, which is a new one if it is not known.
    pub(super) fn attempt_mut(&mut self, key: &StepKey) -> &mut Attempt {
        let attempts = self.attempts.entry(key.at).or_default();
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
        &mut attempts[index]
    }

    /// Whether it can remember what happens at a step.
    pub(super) fn has_room_for(&self, at: StepRef) -> bool {
        self.attempts.len() < STEPS || self.attempts.contains_key(&at)
    }

    /// An attempt has ended, or never began; or that is said again.
    pub(super) fn end(&mut self, key: &StepKey, recorded: Recorded, how: How) {
        if self.attempt(key).is_none() {
            let attempts = self.attempts.entry(key.at).or_default();
            let never = |a: &Attempt| a.direction == key.direction && a.began.is_none();
            if let Some(other) = attempts.iter().position(never) {
                if attempts[other].number > key.attempt {
                    return;
                }
                attempts.remove(other);
            }
        }
        let ended = &mut self.attempt_mut(key).ended;
        let how = ended.as_ref().map_or(how, |(_, how)| *how);
        *ended = Some((recorded, how));
    }

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

    /// Whether an attempt that nobody knows yet may be made now, and how.
    pub(super) fn check_order(&self, order: &Order, now: Now<'_>) -> Result<Decision, Failure> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_orders_are_remembered_within_bounds() {
        let mut hold = Hold::new(&Held {
            rollout: RolloutId::from_random([1; 6]),
            plan: Digest::of(b"plan"),
            steps: Digest::of(b"steps"),
            log_offsets: BTreeMap::new(),
            round: 0,
        });
        let mut refuse = |at: StepRef, direction, attempt| {
            let key = StepKey {
                rollout: hold.rollout.clone(),
                host: "app-1".parse().unwrap(),
                at,
                direction,
                attempt,
            };
            let recorded = Recorded {
                number: u64::from(attempt),
                position: Position::default(),
            };
            hold.end(&key, recorded, How::Failed { changed: false });
            (hold.attempts[&at].len(), hold.attempt(&key).is_some())
        };
        let first = StepRef { phase: 0, step: 0 };
        for attempt in 1..1000 {
            assert_eq!(refuse(first, Direction::Do, attempt), (1, true));
        }
        assert_eq!(refuse(first, Direction::Undo, 1), (2, true));
        assert_eq!(refuse(first, Direction::Do, 1), (2, false), "an older one");
        for step in 1..STEPS {
            let step = u16::try_from(step).unwrap();
            refuse(StepRef { phase: 0, step }, Direction::Do, 1);
        }
        assert!(hold.has_room_for(first));
        assert!(!hold.has_room_for(StepRef { phase: 1, step: 0 }));
    }
}
