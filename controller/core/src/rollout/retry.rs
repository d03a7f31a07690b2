//! `resume --failed`: which hosts get another attempt, and which cannot.
//!
//! A failed attempt has told what it did, so another one is not blind (INV-1): what it left is
//! undone first, where its step can be undone. A lost one is asked for again by its own number,
//! since its agent knows what became of it. One that is unknown waits for a person's word.

use std::collections::BTreeSet;

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{Direction, HostId, StepRef};

use super::backward::{Need, leaves_something, need};
use super::{Mode, Outcome, Rollout};

/// Another attempt for a host that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Again {
    pub(crate) host: HostId,
    pub(crate) at: StepRef,
    pub(crate) direction: Direction,
    /// What the last attempt left is undone first.
    pub(crate) undo_first: bool,
    words: String,
}

/// What `resume --failed` does.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    pub(crate) again: Vec<Again>,
    /// Attempts that a person has to settle first.
    pub(crate) unsettled: Vec<(HostId, StepRef, String)>,
    /// Hosts that stay behind, and why.
    pub(crate) behind: Vec<(HostId, String)>,
}

impl Retry {
    /// One line for each host.
    pub(crate) fn lines(&self) -> Vec<String> {
        let again = self.again.iter().map(|again| again.words.clone());
        let behind = self
            .behind
            .iter()
            .map(|(host, why)| format!("{host} {why}"));
        again.chain(behind).collect()
    }
}

impl Rollout {
    /// What `resume --failed` would do now. Makes sense for a rollout that is paused or halted.
    pub(crate) fn retry(&self) -> Retry {
        let mut retry = Retry::default();
        match &self.mode {
            Mode::Consenting => {}
            Mode::Forward(_) => self.retry_forward(&mut retry),
            Mode::Backward(_) => self.retry_backward(&mut retry),
        }
        retry
    }

    /// Hosts of the open stage. Those that failed in an earlier one stay behind: the others have
    /// gone on since, and no host may be ordered past a closed barrier (INV-3).
    fn retry_forward(&self, retry: &mut Retry) {
        let hosts = self.hosts_of_open_stage();
        for host in &hosts {
            match self.trouble(host) {
                Some((at, direction)) => self.retry_attempt(host, at, direction, retry),
                // Its report came late: nothing is wrong there.
                None if self.members[host].quarantined.is_some() => {
                    retry.again.extend(self.takes_part_again(host));
                }
                None => {}
            }
        }
        let tried: BTreeSet<&HostId> = retry
            .again
            .iter()
            .map(|again| &again.host)
            .chain(retry.unsettled.iter().map(|(host, ..)| host))
            .collect();
        let behind = self
            .members
            .iter()
            .filter(|(host, member)| member.quarantined.is_some() && !tried.contains(host));
        let behind = behind.map(|(host, _)| {
            let why = "stays behind: the stage that it failed in is closed, and the others have \
                       gone on; mend it and apply the plan again afterwards";
            (host.clone(), why.to_owned())
        });
        retry.behind = behind.collect();
    }

    fn hosts_of_open_stage(&self) -> Vec<HostId> {
        let Mode::Forward(cursor) = &self.mode else {
            return vec![];
        };
        let newest = cursor.wave.or_else(|| cursor.closed.map(|(wave, _)| wave));
        let begun = newest.map_or(0, |wave| wave + 1);
        cursor.waves.iter().take(begun).flatten().cloned().collect()
    }

    /// The first attempt of a host in the open stage that is over and not well.
    fn trouble(&self, host: &HostId) -> Option<(StepRef, Direction)> {
        let Mode::Forward(cursor) = &self.mode else {
            return None;
        };
        let (phase, stage) = self.stage_of(cursor.phase, cursor.stage)?;
        let first = Self::first_step(phase, cursor.stage);
        for (_, step) in stage.steps.iter().zip(first..) {
            let at = StepRef {
                phase: cursor.phase,
                step,
            };
            let last = self.last_attempt(at, Direction::Do, host)?;
            if last.is_ok() {
                continue;
            }
            last.result.as_ref()?;
            return match self.current_undo(at, host) {
                Some(undo) if undo.result.is_none() => None,
                Some(undo) if !undo.is_ok() => Some((at, Direction::Undo)),
                _ => Some((at, Direction::Do)),
            };
        }
        None
    }

    fn takes_part_again(&self, host: &HostId) -> Option<Again> {
        let mut attempts = self.attempts.iter().rev();
        let ((at, direction), _) = attempts.find(|(_, hosts)| hosts.contains_key(host))?;
        Some(Again {
            host: host.clone(),
            at: *at,
            direction: *direction,
            undo_first: false,
            words: format!("{host} takes part again"),
        })
    }

    /// Undos that failed, checks after the rollback, and steps that stop a host's chain.
    fn retry_backward(&self, retry: &mut Retry) {
        let checks = self.compiled().after_rollback_index();
        for ((at, direction), hosts) in &self.attempts {
            for host in hosts.keys() {
                let stuck = *direction == Direction::Do
                    && at.phase != checks
                    && need(self.placed(*at).step, self.live_attempts(*at, host)) == Need::Stuck;
                let mine = match direction {
                    Direction::Do => at.phase == checks || stuck,
                    Direction::Undo => self.current_undo(*at, host).is_some(),
                    Direction::Probe => false,
                };
                let last = self.last_attempt(*at, *direction, host);
                let over = last.is_some_and(|last| last.result.is_some() && !last.is_ok());
                if stuck {
                    let words = self.say_last(host, *at, *direction);
                    retry.unsettled.push((host.clone(), *at, words));
                } else if mine && over {
                    self.retry_attempt(host, *at, *direction, retry);
                }
            }
        }
    }

    fn retry_attempt(&self, host: &HostId, at: StepRef, direction: Direction, retry: &mut Retry) {
        let step = self.placed(at).step;
        let name = format!("{} ({direction} {at})", step.action.name());
        let Some(last) = self.last_attempt(at, direction, host) else {
            return;
        };
        let Some(result) = &last.result else {
            return;
        };
        let observing = step.action.info().class == Class::Observing;
        let live = self.live_attempts(at, host);
        // A restart finds what is there now. Undone here, it would not be once more at the end of a
        // rollback, when what it reads has gone back.
        let restart = matches!(step.action, Action::ServiceRestart(_));
        let undo_first = direction == Direction::Do
            && !restart
            && !last.is_lost()
            && need(step, live) == Need::Undo
            && live.iter().any(leaves_something);
        let words = match &result.outcome {
            Outcome::Unknown { .. } if !observing => {
                let words = self.say_last(host, at, direction);
                retry.unsettled.push((host.clone(), at, words));
                return;
            }
            Outcome::Ok { .. } => format!("{host} has done {name} after all"),
            Outcome::Lost(_) => format!("{host} is asked for {name} again"),
            _ if undo_first => format!("{host} undoes what {name} left, then tries it again"),
            _ => format!("{host} tries {name} again"),
        };
        retry.again.push(Again {
            host: host.clone(),
            at,
            direction,
            undo_first,
            words,
        });
    }

    fn say_last(&self, host: &HostId, at: StepRef, direction: Direction) -> String {
        self.last_attempt(at, direction, host)
            .and_then(|last| last.result.as_ref())
            .map(|result| self.say_failure(at, result))
            .unwrap_or_default()
    }
}
