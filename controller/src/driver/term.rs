//! Terms (INV-4): how one takes over, and what an agent's introduction says of this one.

use lockstep_proto::ids::{Epoch, HostId};
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::Hello;
use tonic::Status;

use super::{Driver, DriverError};

/// The counter of a term that takes over: the time, in seconds since 1970.
///
/// Terms that begin otherwise count by one, and a controller needs more than a second for a start,
/// so no counter is ahead of the time. A controller that takes over is therefore above every term
/// that began before, in whatever copy of the state; and of several that do, the one that was
/// started last wins, because each counts up only once, at its start.
pub(crate) fn taken_over(last: u64, now: Timestamp) -> u64 {
    (now.0 / 1000).max(last.saturating_add(1))
}

/// Why a controller ends that has met another one's term.
pub(super) fn superseded(host: &HostId, theirs: Epoch, ours: Epoch) -> String {
    let go_on = format!(
        "If this one is to go on, end the other one first, and start this one with `--take-over`, \
         or with `--epoch-above {}` if this machine's clock is behind",
        theirs.counter
    );
    if theirs.counter == ours.counter {
        return format!(
            "{host} obeys the term {theirs}, and this controller has {ours}, which counts the \
             same: two controllers were started from copies of one state directory. This one \
             sends nothing more. {go_on}"
        );
    }
    format!(
        "{host} has seen the term {theirs}, this controller has {ours}: another controller took \
         over, or this one's state came from a backup. This one sends nothing more. {go_on}"
    )
}

impl Driver {
    /// Whether an agent was told that more of its reports are durable than are here: the newest
    /// of them, if this controller took over since, and so goes on without them. Otherwise the
    /// records were lost behind everybody's back (INV-2), and it ends; an agent that nothing is
    /// known of is only refused, because it may have served another controller.
    pub(super) fn find_lost(
        &self,
        hello: &Hello,
    ) -> Result<Result<Option<u64>, Status>, DriverError> {
        let host = &hello.host;
        let ours = self.coordinator.acknowledged(host, &hello.instance);
        let took_over = self.coordinator.took_over();
        // An agent that has obeyed this term or a later one has lost nothing to an older copy.
        let since = took_over.is_some_and(|term| hello.highest_epoch.counter < term.counter);
        if since && let Some(rollout) = &hello.held_rollout {
            let known = self.coordinator.summary(rollout).is_some()
                || self.coordinator.archived(rollout).is_some();
            if !known {
                tracing::warn!(
                    %host, %rollout,
                    "the agent holds its host for a rollout that is not in this journal: what it \
                     runs is cancelled, and the host is free. Look at what was done there"
                );
            }
        }
        let theirs = hello.acknowledged;
        if theirs <= ours {
            return Ok(Ok(None));
        }
        if since {
            tracing::warn!(
                %host, from = ours + 1, to = theirs,
                "reports of this host are lost: a controller before this one had recorded them, \
                 and its later records are not in this journal"
            );
            return Ok(Ok(Some(theirs)));
        }
        let mut known = self.coordinator.hosts();
        if known.any(|(known, info)| known == host && info.instance == hello.instance) {
            return Err(DriverError::Outdated {
                host: host.clone(),
                theirs,
                ours,
            });
        }
        Ok(Err(Status::failed_precondition(format!(
            "{host}'s agent has reported to another controller, which recorded its reports up to \
             {theirs}; this one has none of them. If this controller's state came from a backup, \
             start it with `lockstep serve --take-over`; if the host moves here from another \
             controller, move the agent's state directory aside"
        ))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_over_is_above_every_term_that_counts_by_one() {
        let now = Timestamp(1_763_716_427_123);
        assert_eq!(taken_over(7, now), 1_763_716_427);
        assert_eq!(taken_over(1_763_716_430, now), 1_763_716_431);
        assert_eq!(taken_over(u64::MAX, now), u64::MAX);
    }
}
