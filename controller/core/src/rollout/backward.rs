//! Backward: the same engine, over the stages in reverse, on touched hosts only (INV-6).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use lockstep_proto::action::migration::UndoBy;
use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::plan::{Step, Undo};
use lockstep_proto::report::Cause;
use lockstep_proto::values::Timestamp;

use super::cause::Class as CauseClass;
use super::{Attempt, Backward, Mode, Outcome, Rollout, SURVEY_WITHIN, next_attempt, order_life};
use crate::faults::planted;
use crate::record::{End, Lost, Record};

/// When hosts are asked for their state at the end of a rollback.
pub(super) fn survey_from(backward: &Backward, undone: Timestamp, floor: Timestamp) -> Timestamp {
    backward.checks_closed.unwrap_or(undone).max(floor)
}

/// What a step that was ordered means for a rollback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing was changed, or the plan says that it stays.
    Nothing,
    /// It must be undone.
    Undo,
    /// Nobody knows what it did, and it cannot be undone: the host's chain stops here.
    Stuck,
}

/// What attempts at a step, since it was last undone, mean for a rollback.
pub(super) fn need(step: &Step, attempts: &[Attempt]) -> Need {
    let mut needs = attempts.iter().rev().map(|attempt| need_of(step, attempt));
    match needs.next() {
        // A later attempt that found everything in place does not undo what an earlier one did.
        Some(Need::Nothing) if needs.any(|need| need == Need::Undo) => Need::Undo,
        Some(last) => last,
        None => Need::Nothing,
    }
}

fn need_of(step: &Step, attempt: &Attempt) -> Need {
    let info = step.action.info();
    if step.undo == Undo::Keep || info.class == Class::Observing {
        return Need::Nothing;
    }
    let Some(result) = &attempt.result else {
        return Need::Undo;
    };
    // What has an undo is undone whatever its host says later; what has none, nothing follows from
    // but a question to people, and a late report or a person's word answers it.
    let outcome = if attempt.given_up && info.undo {
        &Outcome::Lost(Lost::Unreachable)
    } else {
        &result.outcome
    };
    match (outcome, info.undo) {
        (Outcome::Ok { changed: false, .. }, _) => Need::Nothing,
        (Outcome::Failed(failure), _) if failure.cause == Cause::Refused => Need::Nothing,
        (_, true) => Need::Undo,
        (Outcome::Unknown { .. } | Outcome::Lost(_), false) if info.class == Class::Blind => {
            Need::Stuck
        }
        (_, false) => Need::Nothing,
    }
}

/// Whether an attempt may have left something: one that says that it changed nothing has not.
pub(super) fn leaves_something(attempt: &Attempt) -> bool {
    let unchanged = attempt.result.as_ref().is_some_and(
        |result| matches!(&result.outcome, Outcome::Failed(failure) if !failure.changed),
    );
    !unchanged || (attempt.given_up && attempt.resolved.is_none())
}

/// Where the undoing of a rollout stands.
#[derive(Debug, Default)]
struct Standing {
    /// Undo orders that are due now.
    due: Vec<(StepRef, u16, HostId)>,
    /// Undo orders are under way; nothing further back may begin.
    waiting: bool,
    /// Hosts that could not go back, with the reason.
    blocked: BTreeMap<HostId, String>,
    /// Why the whole rollback stopped: the fleet's data could not go back.
    stopped: Option<String>,
}

impl Rollout {
    pub(super) fn advance_backward(
        &self,
        backward: &Backward,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let Some(undone) = backward.undone else {
            return self.advance_undo(now);
        };
        let standing = self.standing();
        if standing.stopped.is_some() || !standing.blocked.is_empty() {
            return vec![self.halted(backward, &standing)];
        }
        let index = self.compiled().after_rollback_index();
        if self.checks_pending(backward)
            && let Some(phase) = self.compiled().phase(index)
        {
            return self.advance_phase(&backward.checks, phase, now, up);
        }
        self.advance_survey(backward, undone, now, floor, up)
    }

    /// Whether the checks after a rollback are still to be made. Where nothing was touched there
    /// is nothing to check.
    pub(super) fn checks_pending(&self, backward: &Backward) -> bool {
        backward.checks_closed.is_none()
            && self.compiled().after_rollback.is_some()
            && !self.touched().is_empty()
    }

    fn advance_undo(&self, now: Timestamp) -> Vec<Record> {
        let forward_open = self
            .outstanding()
            .any(|(_, direction, _, _)| direction == Direction::Do);
        if forward_open {
            return vec![];
        }
        let standing = self.standing();
        if !standing.due.is_empty() {
            let mut by_step: BTreeMap<(StepRef, u16), Vec<HostId>> = BTreeMap::new();
            for (at, attempt, host) in standing.due {
                by_step.entry((at, attempt)).or_default().push(host);
            }
            return by_step
                .into_iter()
                .flat_map(|((at, attempt), hosts)| {
                    self.dispatch(
                        at,
                        Direction::Undo,
                        attempt,
                        &hosts,
                        now.plus(order_life(Direction::Undo)),
                    )
                })
                .collect();
        }
        if standing.waiting {
            vec![]
        } else {
            vec![Record::Undone {
                rollout: self.id.clone(),
            }]
        }
    }

    /// Walks the stages in reverse until one is not finished.
    fn standing(&self) -> Standing {
        let mut standing = Standing::default();
        let mut stages: Vec<(u16, usize)> = self
            .attempts
            .keys()
            .filter(|(_, direction)| *direction == Direction::Do)
            .filter(|(at, _)| at.phase < self.compiled().after_rollback_index())
            .map(|(at, _)| (at.phase, self.placed(*at).stage))
            .collect();
        stages.sort_unstable();
        stages.dedup();
        stages.reverse();
        // A service that was restarted is restarted again at the very end: it has to find what it
        // reads (release, environment, database) as it was.
        for last in [false, true] {
            for &(phase, stage) in &stages {
                self.standing_of(phase, stage, last, &mut standing);
                let open = standing.waiting || !standing.due.is_empty();
                if open || standing.stopped.is_some() {
                    return standing;
                }
            }
        }
        standing
    }

    fn standing_of(&self, phase: u16, stage: usize, last: bool, standing: &mut Standing) {
        // Host by host, the stage's ordered steps from last to first.
        let mut chains: BTreeMap<&HostId, Vec<StepRef>> = BTreeMap::new();
        let ordered = self.attempts.iter().rev().filter(|((at, direction), _)| {
            let placed = self.placed(*at);
            *direction == Direction::Do
                && at.phase == phase
                && placed.stage == stage
                && matches!(placed.step.action, Action::ServiceRestart(_)) == last
        });
        for ((at, _), hosts) in ordered {
            for host in hosts.keys() {
                chains.entry(host).or_default().push(*at);
            }
        }
        for (host, chain) in chains.into_iter().skip(usize::from(planted!(SkipAnUndo))) {
            if !standing.blocked.contains_key(host) {
                self.standing_of_host(host, &chain, standing);
            }
            // Data belongs to the whole fleet: nothing further back may run on a schema that did
            // not go back.
            if let Some(why) = standing.blocked.get(host)
                && chain.iter().any(|at| self.data_stays(*at, host))
            {
                standing.stopped = Some(format!("{host}: {why}"));
            }
        }
    }

    /// Whether a step has changed the fleet's data on a host, and that has not been undone.
    fn data_stays(&self, at: StepRef, host: &HostId) -> bool {
        let step = self.placed(at).step;
        let name = step.action.name();
        (name.starts_with("postgres.") || name.starts_with("migration."))
            && need(step, self.live_attempts(at, host)) != Need::Nothing
    }

    fn standing_of_host(&self, host: &HostId, chain: &[StepRef], standing: &mut Standing) {
        for &at in chain {
            let undo = self.current_undo(at, host);
            if planted!(UndoTwice) && undo.is_some_and(|it| it.is_ok() && it.number == 1) {
                standing.due.push((at, 2, host.clone()));
                return;
            }
            let step = self.placed(at).step;
            match need(step, self.live_attempts(at, host)) {
                Need::Nothing => continue,
                Need::Undo => {}
                Need::Stuck => {
                    let why = format!(
                        "{} (step {at}): unknown: it may have been done, and cannot be undone: \
                         look, then say so with `lockstep resolve {} {host} {at}`",
                        step.action.name(),
                        self.id
                    );
                    standing.blocked.insert(host.clone(), why);
                    return;
                }
            }
            match undo {
                None => {
                    let number = self.next_undo(at, host);
                    standing.due.push((at, number, host.clone()));
                    return;
                }
                Some(attempt) => match &attempt.result {
                    None => {
                        standing.waiting = true;
                        return;
                    }
                    Some(_) if attempt.is_ok() => {}
                    Some(result) => {
                        if let Some(number) = self.undo_again(at, host) {
                            standing.due.push((at, number, host.clone()));
                        } else {
                            let why = format!("undo of {}", self.say_failure(at, result));
                            standing.blocked.insert(host.clone(), why);
                        }
                        return;
                    }
                },
            }
        }
    }

    /// The attempts at a step on a host since it was last undone there.
    pub(super) fn live_attempts(&self, at: StepRef, host: &HostId) -> &[Attempt] {
        let attempts = self.attempts_at(at, Direction::Do, host);
        let undos = self.attempts_at(at, Direction::Undo, host);
        let undone = undos.iter().rev().find(|undo| undo.is_ok());
        let undone = undone.map_or(0, |undo| undo.number);
        let live = attempts.partition_point(|attempt| attempt.after_undo < undone);
        &attempts[live..]
    }

    /// The newest undo of the newest attempt at a step.
    pub(super) fn current_undo(&self, at: StepRef, host: &HostId) -> Option<&Attempt> {
        let done = self.last_attempt(at, Direction::Do, host)?;
        self.last_attempt(at, Direction::Undo, host)
            .filter(|undo| undo.number > done.after_undo)
    }

    /// The number of an undo that is the first of its attempt.
    pub(super) fn next_undo(&self, at: StepRef, host: &HostId) -> u16 {
        let last = self.last_attempt(at, Direction::Undo, host);
        last.map_or(1, |last| last.number + 1)
    }

    /// The number under which the current undo is tried again; none if it stands as it is.
    pub(super) fn undo_again(&self, at: StepRef, host: &HostId) -> Option<u16> {
        next_attempt(self.attempts_at(at, Direction::Undo, host))
    }

    fn halted(&self, backward: &Backward, standing: &Standing) -> Record {
        let blocked = standing.blocked.iter();
        let blocked: Vec<String> = blocked
            .map(|(host, why)| format!("{host}: {why}"))
            .collect();
        let mut reason = format!("{}; not undone: {}", backward.reason, blocked.join("; "));
        if standing.stopped.is_some() {
            reason.push_str("; nothing before it was undone, on any host");
        }
        let left: Vec<String> = self
            .touched()
            .into_iter()
            .map(|host| (host, self.not_undone(host)))
            .filter(|(_, steps)| !steps.is_empty())
            .map(|(host, steps)| format!("{host}: {}", steps.join(", ")))
            .collect();
        if !left.is_empty() {
            let _ = write!(reason, "; what stays: {}", left.join("; "));
        }
        self.end(End::Halted, reason)
    }

    /// What was or may have been changed on a host and is not undone, the last first.
    fn not_undone(&self, host: &HostId) -> Vec<String> {
        let done = self.attempts.iter().rev();
        done.filter(|((_, direction), _)| *direction == Direction::Do)
            .filter_map(|((at, _), hosts)| {
                let step = self.placed(*at).step;
                hosts.get(host)?;
                let stays = need(step, self.live_attempts(*at, host)) != Need::Nothing;
                stays.then(|| format!("{} ({at})", step.action.name()))
            })
            .collect()
    }

    /// Which databases stay behind a fence if the rollout ends here, and what opens them: empty, or
    /// the end of a sentence.
    pub(crate) fn left_shut(&self) -> String {
        let mut shut: BTreeMap<&String, &HostId> = BTreeMap::new();
        for ((at, direction), hosts) in &self.attempts {
            for (host, _) in hosts.iter().filter(|(host, _)| {
                self.last_attempt(*at, *direction, host)
                    .is_some_and(Attempt::is_ok)
            }) {
                let undone = self.live_attempts(*at, host).is_empty();
                match (&self.placed(*at).step.action, direction) {
                    (Action::PostgresFence(fence), Direction::Do) if !undone => {
                        shut.insert(&fence.database, host);
                    }
                    (Action::PostgresUnfence(fence), Direction::Do) if !undone => {
                        shut.remove(&fence.database);
                    }
                    _ => {}
                }
            }
        }
        let shut: Vec<String> = shut
            .iter()
            .map(|(database, host)| format!("`{database}` ({host})"))
            .collect();
        if shut.is_empty() {
            return String::new();
        }
        format!(
            "; {} stays behind a fence: a plan with `postgres.unfence` and `left_by: {}` opens it",
            shut.join(", "),
            self.id
        )
    }

    /// Hosts on which something may have been changed.
    pub(crate) fn touched(&self) -> BTreeSet<&HostId> {
        self.attempts
            .iter()
            .filter(|((at, direction), _)| {
                *direction == Direction::Do && self.placed(*at).step.action.changes()
            })
            .flat_map(|(_, hosts)| hosts.keys())
            .collect()
    }

    /// Hosts that have yet to say what their state is.
    pub(crate) fn unsurveyed(&self) -> Vec<&HostId> {
        if self.ended.is_some() {
            return self.unanswered();
        }
        self.uncompared()
    }

    /// Whether a host's word on its state answers something: once each time that it is asked, be it
    /// late. Of a cancelled rollout, once more that it `lets_go`.
    pub(super) fn counts_survey(&self, host: &HostId, lets_go: bool) -> bool {
        let member = self.members.get(host);
        let first = member.is_some_and(|member| member.surveyed.is_none());
        self.uncompared().contains(&host)
            || ((first || lets_go) && self.unanswered().contains(&host))
    }

    /// Touched hosts of a rollback that is through, of which nobody knows what their state is.
    fn uncompared(&self) -> Vec<&HostId> {
        let Mode::Backward(backward) = &self.mode else {
            return vec![];
        };
        if backward.undone.is_none() || self.checks_pending(backward) {
            return vec![];
        }
        self.touched()
            .into_iter()
            .filter(|host| self.members[*host].surveyed.is_none())
            .collect()
    }

    fn advance_survey(
        &self,
        backward: &Backward,
        undone: Timestamp,
        now: Timestamp,
        floor: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let silent = self.unsurveyed();
        if !silent.is_empty() {
            if now < survey_from(backward, undone, floor).plus(SURVEY_WITHIN) {
                return vec![];
            }
            let name = |host: &&HostId| {
                let class = CauseClass::of_silence(up(host));
                format!("{host} ({})", class.as_str())
            };
            let names: Vec<String> = silent.iter().map(name).collect();
            let reason = format!(
                "{}; everything was undone, but {} did not say what the state is now",
                backward.reason,
                names.join(", ")
            );
            return vec![self.end(End::Halted, reason)];
        }
        let different = self.differences();
        if different.is_empty() || planted!(SkipAnUndo) {
            let mut reason = backward.reason.clone();
            let kept = self.kept();
            for (database, _) in kept
                .iter()
                .filter(|(_, hosts)| hosts.values().any(|it| *it))
            {
                let _ = write!(
                    reason,
                    "; database {database} keeps its new schema, as the plan says"
                );
            }
            vec![self.end(End::RolledBack, reason)]
        } else {
            let reason = format!(
                "{}; not as before (check unmet): {}",
                backward.reason,
                different.join("; ")
            );
            vec![self.end(End::Halted, reason)]
        }
    }

    /// Databases that migrations changed which the plan keeps; and the hosts that did it, with
    /// whether the schema stays: the step is kept as a whole, or its undo said so.
    fn kept(&self) -> BTreeMap<&str, BTreeMap<&HostId, bool>> {
        let mut kept: BTreeMap<&str, BTreeMap<&HostId, bool>> = BTreeMap::new();
        for ((at, direction), hosts) in &self.attempts {
            let step = self.placed(*at).step;
            let Action::MigrationApply(act) = &step.action else {
                continue;
            };
            let keeps = step.undo == Undo::Keep || act.undo_by == UndoBy::Keep;
            if !keeps || *direction != Direction::Do {
                continue;
            }
            for (host, attempts) in hosts {
                let did = attempts.iter().any(|attempt| {
                    let result = attempt.result.as_ref();
                    let found_there = result.is_some_and(|result| {
                        matches!(result.outcome, Outcome::Ok { changed: false, .. })
                    });
                    !found_there && leaves_something(attempt)
                });
                if did {
                    let stays = step.undo == Undo::Keep || self.stays(*at, host, &act.database);
                    *kept
                        .entry(&act.database)
                        .or_default()
                        .entry(host)
                        .or_default() |= stays;
                }
            }
        }
        kept
    }

    /// Whether the undo of a step has said that a schema stays.
    fn stays(&self, at: StepRef, host: &HostId, database: &str) -> bool {
        let undo = self.current_undo(at, host).filter(|undo| undo.is_ok());
        let mut facts = undo
            .iter()
            .flat_map(|undo| &undo.result)
            .flat_map(|it| &it.facts);
        facts.any(|fact| fact.staying() == Some(database))
    }

    /// Where the state of touched hosts differs from before.
    fn differences(&self) -> Vec<String> {
        let (touched, kept) = (self.touched(), self.kept());
        let mut different = Vec::new();
        for (host, member) in self
            .members
            .iter()
            .filter(|(host, _)| touched.contains(host))
        {
            let before = member.before.iter();
            // A host that migrated speaks for itself: databases of one name may be several. For one
            // that did not, all have to say so that did.
            let stays = |name: &String| {
                let hosts = name
                    .strip_prefix("database ")
                    .and_then(|name| kept.get(name));
                hosts.is_some_and(|hosts| match hosts.get(host) {
                    Some(stays) => *stays,
                    None => hosts.values().all(|stays| *stays),
                })
            };
            for (name, (before, words)) in before.filter(|(name, _)| !stays(name)) {
                match member.after(name) {
                    Some((after, _)) if after == before => {}
                    Some((_, now)) => {
                        different.push(format!("{host}: {name}: was {words}, is {now}"));
                    }
                    // A state that only a step reports is seen again only if that step was undone.
                    None if self.reported_by_steps(host, name) => {}
                    None => {
                        let survey = member.surveyed.as_ref();
                        let note = survey.and_then(|survey| survey.note.as_ref());
                        let why = note.map_or(String::new(), |why| format!(": {why}"));
                        different.push(format!(
                            "{host}: {name}: was {words}, not reported now{why}"
                        ));
                    }
                }
            }
        }
        different
    }

    /// Whether a state came from a step that had nothing to undo.
    fn reported_by_steps(&self, host: &HostId, name: &str) -> bool {
        let says = |fact: &Fact| matches!(fact, Fact::State { name: other, .. } if other == name);
        self.attempts.iter().any(|((at, direction), hosts)| {
            let attempts = hosts.get(host).map_or(&[][..], Vec::as_slice);
            let mut facts = attempts
                .iter()
                .flat_map(|a| &a.result)
                .flat_map(|r| &r.facts);
            *direction == Direction::Do
                && facts.any(says)
                && need(self.placed(*at).step, attempts) == Need::Nothing
        })
    }
}
