//! What follows from one host's report, as far as that host alone can tell.

use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::report::ReportBody;
use lockstep_proto::values::Timestamp;

use super::forward::Progress;
use super::{Cursor, Mode, REFUSALS_WITHIN, Rollout, order_life};
use crate::record::Record;

/// What follows from a host's report.
pub(crate) enum Follows {
    /// Nothing now; by then something may be due that was not before.
    Nothing(Option<Timestamp>),
    /// These records, and nothing else.
    These(Vec<Record>),
    /// All has to be looked at.
    Anything,
}

impl Rollout {
    /// What follows from a report that has been folded, as far as that can be told from its host
    /// alone: while others are still at work, nothing else moves.
    pub(crate) fn follows(&self, now: Timestamp, host: &HostId, body: &ReportBody) -> Follows {
        if self.ended.is_some() {
            return Follows::Anything;
        }
        match body {
            ReportBody::Started { key } => {
                let attempt = self.last_attempt(key.at, key.direction, host);
                let timeout = self.compiled().step(key.at).map(|it| it.step.timeout);
                let gives_up = attempt.zip(timeout);
                Follows::Nothing(gives_up.map(|(attempt, timeout)| attempt.give_up_at(timeout)))
            }
            ReportBody::Consented { .. } if self.is_waiting_for_consent() => Follows::Nothing(None),
            ReportBody::Declined { .. } if self.is_waiting_for_consent() => {
                Follows::Nothing(Some(now.plus(REFUSALS_WITHIN)))
            }
            ReportBody::Finished { key, .. } => match (&self.mode, key.direction) {
                _ if self.paused || self.open.is_empty() => Follows::Anything,
                (Mode::Forward(cursor), Direction::Do | Direction::Probe) => {
                    self.follows_forward(cursor, now, host, key.at)
                }
                _ => Follows::Anything,
            },
            _ => Follows::Anything,
        }
    }

    /// What follows from the report of a host on a step while others are at work: its next order.
    fn follows_forward(
        &self,
        cursor: &Cursor,
        now: Timestamp,
        host: &HostId,
        at: StepRef,
    ) -> Follows {
        let stage = self.stage_of(cursor.phase, cursor.stage);
        let Some(((phase, stage), _)) = stage.zip(cursor.wave) else {
            return Follows::Anything;
        };
        let first = Self::first_step(phase, cursor.stage);
        // Whoever was ordered a step of the stage is in one of its waves.
        let is_of_stage = at.phase == cursor.phase
            && (usize::from(first)..usize::from(first) + stage.steps.len())
                .contains(&usize::from(at.step));
        if !is_of_stage || self.members[host].quarantined.is_some() {
            return Follows::Anything;
        }
        match self.progress(cursor.phase, first, stage, host) {
            Progress::Done | Progress::Waiting => Follows::Nothing(None),
            Progress::Next(at, direction, attempt) => {
                let until = now.plus(order_life(direction));
                let host = std::slice::from_ref(host);
                Follows::These(self.dispatch(at, direction, attempt, host, until))
            }
            Progress::Failed(_) => Follows::Anything,
        }
    }

    fn is_waiting_for_consent(&self) -> bool {
        matches!(self.mode, Mode::Consenting) && !self.silent.is_empty()
    }
}
