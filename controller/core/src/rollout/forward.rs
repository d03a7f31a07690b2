//! Forward: phases, stages and waves, each a barrier (INV-3), within the budgets (INV-5).

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::action::Site;
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::plan::{Phase, Stage, Strategy, Target};
use lockstep_proto::values::Timestamp;

use super::cause::say_cause;
use super::{Attempt, AttemptResult, Cursor, Mode, Outcome, Rollout, next_attempt, order_life};
use crate::ascending::Ascending;
use crate::faults::planted;
use crate::record::{End, Lost, MAX_HOSTS_PER_RECORD, Record};

/// Where a host stands in a stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Progress {
    /// This step is next, this way, as this attempt.
    Next(StepRef, Direction, u16),
    /// An attempt is under way.
    Waiting,
    /// Every step is done.
    Done,
    /// A step failed, in words.
    Failed(String),
}

impl Rollout {
    pub(super) fn advance_forward(
        &self,
        cursor: &Cursor,
        now: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let Some(phase) = self.compiled().phases.get(usize::from(cursor.phase)) else {
            return vec![self.completed()];
        };
        self.advance_phase(cursor, phase, now, up)
    }

    /// One phase, by the same rules forward and for the checks after a rollback.
    pub(super) fn advance_phase(
        &self,
        cursor: &Cursor,
        phase: &Phase,
        now: Timestamp,
        up: &dyn Fn(&HostId) -> bool,
    ) -> Vec<Record> {
        let rollout = self.id.clone();
        let Some(opened) = cursor.opened else {
            return vec![Record::PhaseOpened {
                rollout,
                phase: cursor.phase,
            }];
        };
        if phase
            .deadline
            .is_some_and(|deadline| now >= opened.plus(deadline))
        {
            let reason = format!(
                "phase `{}` passed its deadline: {}",
                phase.name,
                self.what_blocks(now, up)
            );
            return vec![self.failed(reason)];
        }
        let Some(stage) = phase.stages.get(usize::from(cursor.stage)) else {
            return vec![Record::PhaseClosed {
                rollout,
                phase: cursor.phase,
            }];
        };
        match &stage.target {
            Target::Controller => self.advance_controller_stage(cursor, phase, stage, now),
            Target::OneOf(groups) if self.must_elect(groups) => self.elect(groups, up),
            _ => self.advance_host_stage(cursor, phase, stage, now),
        }
    }

    /// What happens when the way forward is blocked: a rollback, or, among the checks after one,
    /// a halt. A dry run just ends.
    pub(super) fn failed(&self, reason: String) -> Record {
        match self.mode {
            Mode::Backward(_) => self.end(End::Halted, format!("after the rollback: {reason}")),
            _ if self.dry_run => self.end(End::Cancelled, reason),
            // The hosts are not this rollout's, and nothing was changed.
            _ if self.lock.released => {
                self.end(End::Cancelled, format!("nothing was done: {reason}"))
            }
            _ => Record::RollbackStarted {
                rollout: self.id.clone(),
                reason,
                operator: None,
            },
        }
    }

    /// Every phase is closed.
    fn completed(&self) -> Record {
        let behind = self.left_behind();
        if behind.is_empty() {
            self.end(End::Succeeded, String::new())
        } else {
            self.end(End::Partial, format!("left behind: {behind}"))
        }
    }

    /// The hosts in quarantine, each with the reason; empty if there is none.
    fn left_behind(&self) -> String {
        let behind = self.members.iter().filter_map(|(host, member)| {
            let why = member.quarantined.as_ref()?;
            Some(format!("{host}: {why}"))
        });
        behind.collect::<Vec<_>>().join("; ")
    }

    /// Whether a host is to be elected: for the first time, or again because the elected one is
    /// quarantined and has changed nothing in such a stage.
    fn must_elect(&self, groups: &[String]) -> bool {
        let Some(elected) = self.elected.get(groups) else {
            return true;
        };
        let target = Target::OneOf(groups.to_vec());
        let changed = self.attempts.iter().any(|((at, direction), hosts)| {
            let placed = self.placed(*at);
            *direction == Direction::Do
                && *placed.target == target
                && placed.step.action.changes()
                && hosts.contains_key(elected)
        });
        self.members[elected].quarantined.is_some() && !changed
    }

    /// Elects one host for stages with these groups: a connected one if there is one, then by
    /// name. It stays elected, so that the apply never moves.
    fn elect(&self, groups: &[String], up: &dyn Fn(&HostId) -> bool) -> Vec<Record> {
        let target = Target::Groups(groups.to_vec());
        let mut candidates = self.hosts_of(&target).peekable();
        let first = candidates.peek().copied();
        let Some(host) = candidates.find(|host| up(host)).or(first) else {
            return vec![self.failed(format!(
                "no host of {} is left: {}",
                groups.join(", "),
                self.left_behind()
            ))];
        };
        vec![Record::Elected {
            rollout: self.id.clone(),
            groups: groups.to_vec(),
            host: host.clone(),
        }]
    }

    fn advance_host_stage(
        &self,
        cursor: &Cursor,
        phase: &Phase,
        stage: &Stage,
        now: Timestamp,
    ) -> Vec<Record> {
        let rollout = self.id.clone();
        let first = Self::first_step(phase, cursor.stage);
        let Some(wave) = cursor.wave else {
            return self.next_wave(cursor, stage, now);
        };
        // Hosts of earlier waves are done, but for those that people gave another attempt.
        let hosts = cursor.waves[..=wave].iter().flatten();
        let steps = (first..).zip(&stage.steps).map(|(step, _)| StepRef {
            phase: cursor.phase,
            step,
        });
        let attempts = |at| Ascending::new(self.attempts.get(&(at, self.forward())));
        let mut attempts: Vec<_> = steps.map(attempts).collect();
        let mut due: BTreeMap<(StepRef, Direction, u16), Vec<HostId>> = BTreeMap::new();
        let mut open = false;
        for host in self.sound(hosts) {
            let attempts_at = |at: StepRef| attempts[usize::from(at.step - first)].get(host);
            match self.progress_by(cursor.phase, first, stage, host, attempts_at) {
                Progress::Done => {}
                Progress::Waiting => open = !planted!(OpenPhaseEarly),
                Progress::Next(at, direction, attempt) => {
                    let key = (at, direction, attempt);
                    due.entry(key).or_default().push(host.clone());
                }
                Progress::Failed(why) => return vec![self.failure(stage, phase, host, why)],
            }
        }
        if !due.is_empty() {
            return due
                .into_iter()
                .flat_map(|((at, direction, attempt), hosts)| {
                    self.dispatch(
                        at,
                        direction,
                        attempt,
                        &hosts,
                        now.plus(order_life(direction)),
                    )
                })
                .collect();
        }
        if open {
            vec![]
        } else {
            vec![Record::WaveClosed { rollout }]
        }
    }

    /// One record for each [`MAX_HOSTS_PER_RECORD`] hosts.
    pub(super) fn dispatch(
        &self,
        at: StepRef,
        direction: Direction,
        attempt: u16,
        hosts: &[HostId],
        not_after: Timestamp,
    ) -> Vec<Record> {
        hosts
            .chunks(MAX_HOSTS_PER_RECORD)
            .map(|hosts| Record::Dispatched {
                rollout: self.id.clone(),
                at,
                direction,
                attempt,
                hosts: hosts.to_vec(),
                not_after,
            })
            .collect()
    }

    /// Which way orders go as long as none is undone.
    fn forward(&self) -> Direction {
        if self.dry_run {
            Direction::Probe
        } else {
            Direction::Do
        }
    }

    /// Where a host stands in a stage.
    pub(super) fn progress(
        &self,
        phase: u16,
        first: u16,
        stage: &Stage,
        host: &HostId,
    ) -> Progress {
        self.progress_by(phase, first, stage, host, |at| {
            self.attempts.get(&(at, self.forward()))?.get(host)
        })
    }

    /// The same; `attempts_at` finds the host's attempts at a step.
    fn progress_by<'a>(
        &'a self,
        phase: u16,
        first: u16,
        stage: &Stage,
        host: &HostId,
        mut attempts_at: impl FnMut(StepRef) -> Option<&'a Vec<Attempt>>,
    ) -> Progress {
        let direction = self.forward();
        for (step, number) in stage.steps.iter().zip(first..) {
            debug_assert_eq!(step.action.info().site, Site::Host);
            let at = StepRef {
                phase,
                step: number,
            };
            let attempts = attempts_at(at).map_or(&[][..], Vec::as_slice);
            let Some(attempt) = attempts.last() else {
                return Progress::Next(at, direction, 1);
            };
            let Some(result) = &attempt.result else {
                return Progress::Waiting;
            };
            match &result.outcome {
                Outcome::Ok { .. } if !attempt.given_up && !attempt.stale => {}
                Outcome::Lost(_) if planted!(UnreachableIsOk) => {}
                // A dry run goes on: it says all that would happen.
                _ if self.dry_run => {}
                _ => {
                    return match next_attempt(attempts) {
                        None => Progress::Failed(self.say_failure(at, result)),
                        Some(number) if attempt.undo_first => self.undo_first(at, host, number),
                        Some(number) => Progress::Next(at, direction, number),
                    };
                }
            }
        }
        Progress::Done
    }

    /// What the last attempt left is undone before the next one (INV-6).
    fn undo_first(&self, at: StepRef, host: &HostId, next: u16) -> Progress {
        let Some(undo) = self.current_undo(at, host) else {
            return Progress::Next(at, Direction::Undo, self.next_undo(at, host));
        };
        match &undo.result {
            None => Progress::Waiting,
            Some(_) if undo.is_ok() => Progress::Next(at, Direction::Do, next),
            Some(result) => match self.undo_again(at, host) {
                Some(number) => Progress::Next(at, Direction::Undo, number),
                None => Progress::Failed(format!("undo of {}", self.say_failure(at, result))),
            },
        }
    }

    /// A failed attempt in one line.
    pub(super) fn say_failure(&self, at: StepRef, result: &AttemptResult) -> String {
        let placed = self.placed(at);
        let step = format!(
            "{} (step {at}, line {})",
            placed.step.action.name(),
            placed.step.line
        );
        let cause = say_cause(&result.outcome);
        match &result.outcome {
            Outcome::Ok { summary, .. } => format!("{step}: {summary}"),
            Outcome::Failed(failure) => format!("{step}: {cause}: {}", failure.message),
            Outcome::Unknown { why } => format!("{step}: {cause}: {why}"),
            Outcome::Lost(Lost::Unreachable) => {
                format!("{step}: {cause}: the host is unreachable")
            }
            Outcome::Lost(Lost::TimedOut) => format!(
                "{step}: {cause}: no report within {} and its grace",
                placed.step.timeout
            ),
        }
    }

    /// A host failed: it stays behind if the budgets allow it, else the rollout is undone. None
    /// leaves the denominator (INV-5): whatever kept a host from `ok` counts.
    fn failure(&self, stage: &Stage, phase: &Phase, host: &HostId, why: String) -> Record {
        let in_stage = self.all_hosts_of(&stage.target);
        let failed: BTreeSet<&HostId> = self
            .members
            .iter()
            .filter(|(_, member)| member.quarantined.is_some())
            .map(|(host, _)| host)
            .chain([host])
            .collect();
        let failed_in_stage = failed
            .iter()
            .filter(|host| in_stage.contains(**host))
            .count();
        // What one host does for all is not done by leaving that host behind.
        let budget = match stage.target {
            Target::OneOf(_) => 0,
            _ => stage.strategy.max_failures() as usize,
        };
        let fleet_budget = self
            .compiled()
            .max_failures
            .map_or(usize::MAX, |most| most as usize);
        let reason = format!("{host} failed in phase `{}`: {why}", phase.name);
        let budget = budget + if planted!(IgnoreBudget) { 1000 } else { 0 };
        if failed_in_stage <= budget && failed.len() <= fleet_budget && !self.is_verifying() {
            Record::Quarantined {
                rollout: self.id.clone(),
                host: host.clone(),
                why,
            }
        } else {
            self.failed(reason)
        }
    }

    fn is_verifying(&self) -> bool {
        matches!(self.mode, Mode::Backward(_))
    }

    /// Which hosts a target means, those in quarantine too.
    pub(super) fn all_hosts_of(&self, target: &Target) -> BTreeSet<&HostId> {
        match target {
            Target::Controller => BTreeSet::new(),
            Target::Groups(groups) => groups
                .iter()
                .flat_map(|group| &self.groups[group])
                .collect(),
            Target::OneOf(groups) => self.elected.get(groups).into_iter().collect(),
        }
    }

    /// The stage's hosts in waves, as they stand when its first wave opens.
    pub(super) fn waves_of(&self, phase: u16, stage: u16) -> Vec<Vec<HostId>> {
        let Some((_, stage)) = self.stage_of(phase, stage) else {
            return vec![];
        };
        let mut hosts: Vec<HostId> = self.hosts_of(&stage.target).cloned().collect();
        // A dry run has no barriers to keep: nothing is changed.
        if self.dry_run {
            return vec![hosts];
        }
        match stage.strategy {
            Strategy::All => vec![hosts],
            Strategy::Rolling { batch, .. } => hosts
                .chunks(batch.of(hosts.len()))
                .map(<[_]>::to_vec)
                .collect(),
            Strategy::Canary { first, .. } => {
                let others = hosts.split_off(first.of(hosts.len()).min(hosts.len()));
                [hosts, others]
                    .into_iter()
                    .filter(|wave| !wave.is_empty())
                    .collect()
            }
        }
    }

    fn next_wave(&self, cursor: &Cursor, stage: &Stage, now: Timestamp) -> Vec<Record> {
        let rollout = self.id.clone();
        let next = match cursor.closed {
            None if self.hosts_of(&stage.target).next().is_none() => {
                return vec![self.deserted(stage)];
            }
            None => 0,
            Some((wave, _)) if wave + 1 == cursor.waves.len() => {
                return vec![Record::StageClosed { rollout }];
            }
            Some((wave, closed)) if now >= wave_pause_ends(stage, closed) => wave + 1,
            Some(_) => return vec![],
        };
        vec![Record::WaveOpened {
            rollout,
            phase: cursor.phase,
            stage: cursor.stage,
            wave: u32::try_from(next).expect("waves are fewer than hosts"),
        }]
    }

    /// No host is left to do a stage. It is not skipped: what follows may rest on it (INV-3).
    fn deserted(&self, stage: &Stage) -> Record {
        if self.is_verifying() {
            return Record::StageClosed {
                rollout: self.id.clone(),
            };
        }
        let groups = stage.target.groups().join(", ");
        let steps: Vec<&str> = stage.steps.iter().map(|step| step.action.name()).collect();
        let steps = steps.join(", ");
        self.failed(format!(
            "every host of {groups} that could do {steps} is quarantined: {}",
            self.left_behind()
        ))
    }

    /// When the cursor may move without an event.
    pub(super) fn cursor_deadline(&self, cursor: &Cursor, now: Timestamp) -> Option<Timestamp> {
        let (phase, stage) = self.stage_of(cursor.phase, cursor.stage)?;
        let phase_end = cursor
            .opened
            .zip(phase.deadline)
            .map(|(opened, within)| opened.plus(within));
        let wave = cursor
            .closed
            .filter(|_| cursor.wave.is_none())
            .map(|(_, closed)| wave_pause_ends(stage, closed));
        let gate = self.gate_deadline(cursor, now);
        [phase_end, wave, gate].into_iter().flatten().min()
    }
}

/// When the next wave may open after one was closed.
fn wave_pause_ends(stage: &Stage, closed: Timestamp) -> Timestamp {
    match stage.strategy {
        Strategy::All => closed,
        Strategy::Rolling { pause, .. } => closed.plus(pause),
        Strategy::Canary { soak, .. } => closed.plus(soak),
    }
}
