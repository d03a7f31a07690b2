//! What is known of each host of a rollout that has ended: whether anything still runs there.

use std::fmt::Write as _;

use lockstep_proto::ids::{Direction, HostId, StepRef};
use serde::Serialize;

use super::{Attempt, Rollout};

/// What a rollout that has ended left on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// The host.
    pub host: HostId,
    /// Whether something still runs there.
    pub state: LeftState,
    /// The step, if it runs or nobody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<StepRef>,
    /// The same for people; empty if nothing runs there.
    pub message: String,
}

/// Whether something still runs on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftState {
    /// Nothing runs there: nothing was ordered, or the host has reported how it ended.
    Stopped,
    /// It is connected, and was last heard to run a step.
    Running,
    /// It cannot be reached, or has not answered since.
    Unknown,
}

impl Rollout {
    /// What is left on each host; empty while the rollout goes on.
    pub(crate) fn left(&self, up: &dyn Fn(&HostId) -> bool) -> Vec<Left> {
        if self.ended.is_none() || self.dry_run {
            return vec![];
        }
        self.standings(up)
    }

    /// The same for one that is about to end.
    fn standings(&self, up: &dyn Fn(&HostId) -> bool) -> Vec<Left> {
        let hosts = self.members.keys();
        hosts.map(|host| self.left_on(host, up(host))).collect()
    }

    /// What is said of it when a person ends the rollout now: empty, or the end of a sentence.
    pub(crate) fn say_left(&self, up: &dyn Fn(&HostId) -> bool) -> String {
        /// So many hosts are named: the report has all.
        const MOST: usize = 20;
        let standings = self.standings(up);
        let open: Vec<&Left> = standings
            .iter()
            .filter(|left| left.state != LeftState::Stopped)
            .collect();
        let say = |left: &&Left| format!("; {} is {}", left.host, left.message);
        let mut said: String = open.iter().take(MOST).map(say).collect();
        if open.len() > MOST {
            let more = open.len() - MOST;
            let _ = write!(
                said,
                "; {more} more hosts: see `lockstep status {}`",
                self.id
            );
        }
        said
    }

    fn left_on(&self, host: &HostId, up: bool) -> Left {
        let open = self
            .unproven(host)
            .max_by_key(|(.., attempt)| attempt.ordered);
        let Some((at, direction, attempt)) = open else {
            return Left {
                host: host.clone(),
                state: LeftState::Stopped,
                step: None,
                message: String::new(),
            };
        };
        let name = self.placed(at).step.action.name();
        let step = format!("{name} ({direction} {at})");
        let running = up && attempt.started.is_some() && !self.members[host].anew;
        let (state, message) = if running {
            (LeftState::Running, format!("running: {step}"))
        } else {
            let what = match attempt.started {
                Some(_) => format!("{step} ran when it was last heard of"),
                None => format!("{step} was ordered, and it has not answered"),
            };
            let absent = if up { "" } else { ", and it is not connected" };
            (LeftState::Unknown, format!("unknown: {what}{absent}"))
        };
        Left {
            host: host.clone(),
            state,
            step: Some(at),
            message,
        }
    }

    /// Attempts on a host of which nobody has heard how they ended, and which may still run.
    fn unproven(&self, host: &HostId) -> impl Iterator<Item = (StepRef, Direction, &Attempt)> {
        let member = &self.members[host];
        // Its agent has let go of the rollout before it began this one.
        let never_begun =
            move |attempt: &Attempt| attempt.started.is_none() && member.answered && !member.anew;
        self.attempts
            .iter()
            .filter_map(move |((at, direction), hosts)| {
                let last = hosts.get(host)?.last()?;
                let open = last.result.is_none() || last.is_lost();
                (open && !never_begun(last)).then_some((*at, *direction, last))
            })
    }

    /// Hosts of a cancelled rollout that have yet to say that they let go of it.
    pub(super) fn unanswered(&self) -> Vec<&HostId> {
        if !self.is_cancelled() || self.dry_run {
            return vec![];
        }
        let silent = self.members.iter().filter(|(_, member)| !member.answered);
        silent
            .map(|(host, _)| host)
            .filter(|host| self.unproven(host).next().is_some())
            .collect()
    }
}
