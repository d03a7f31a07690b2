//! Terms (INV-4): how one takes over, and what an agent's introduction says of this one.

use lockstep_core::trust::Subject;
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

/// So many hosts must say that this controller is not the newest one before it ends. Anybody with
/// the key of one host can say so, and a controller that ends cannot be asked to suspend it; two
/// hosts that lie at once are another thing than one. Until the second one says so nothing is lost:
/// agents themselves obey no lower term (INV-4), and nothing is sent to the host that said it.
const WITNESSES: usize = 2;

/// A term's counter is a number of starts, or of seconds. More than ten years of them above both
/// this controller's term and its clock is no other controller.
const TOO_FAR: u64 = 10 * 366 * 24 * 60 * 60;

/// More reports than any host makes: a thousand each second take thirty years.
const TOO_MANY_REPORTS: u64 = 1 << 40;

/// Whether a controller can have begun such a term.
fn is_possible(theirs: Epoch, ours: Epoch, now: Timestamp) -> bool {
    theirs.counter <= ours.counter.max(now.0 / 1000).saturating_add(TOO_FAR)
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
    /// An agent says that it has obeyed a term that this one is not above. It is not admitted.
    pub(super) fn meet_term(
        &mut self,
        host: &HostId,
        theirs: Epoch,
    ) -> Result<Status, DriverError> {
        let ours = self.epoch;
        if !is_possible(theirs, ours, self.clock.now()) {
            let counter = theirs.counter;
            let why = format!("{host} says that it obeys the term {theirs}");
            return Ok(not_believed(host, &why, counter));
        }
        let host = host.clone();
        self.doubt(DriverError::Superseded { host, theirs, ours })
    }

    /// One more host says what only a newer controller explains, or a newer journal than this
    /// one's. This controller ends with it once so many say so, or this host is its whole fleet;
    /// before that the host is refused, and people are told.
    fn doubt(&mut self, why: DriverError) -> Result<Status, DriverError> {
        let (DriverError::Superseded { host, .. } | DriverError::Outdated { host, .. }) = &why
        else {
            return Err(why);
        };
        self.doubted_by.insert(host.clone());
        let banned = self.coordinator.trust().banned();
        self.doubted_by
            .retain(|host| !banned.subjects.contains_key(&Subject::Host(host.clone())));
        let alone = !self.coordinator.hosts().any(|(known, _)| known != host);
        if alone || self.doubted_by.len() >= WITNESSES {
            return Err(why);
        }
        tracing::error!(
            %host, why = %why,
            "one host alone says that this controller is not the newest one. The host is refused; \
             everything else goes on, until another host says so too. If another controller took \
             over, end this one; if none did, the host or its key is in other hands: \
             `lockstep suspend host:{host} --reason ...`"
        );
        Ok(Status::failed_precondition(why.to_string()))
    }

    /// Whether an agent was told that more of its reports are durable than are here: the newest
    /// of them, if this controller took over since, and so goes on without them. Otherwise the
    /// records were lost behind everybody's back (INV-2), and it ends; an agent that nothing is
    /// known of is only refused, because it may have served another controller.
    pub(super) fn find_lost(
        &mut self,
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
        if theirs > TOO_MANY_REPORTS {
            let why = format!("{host} says that its reports up to {theirs} are durable");
            return Ok(Err(not_believed(host, &why, theirs)));
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
            drop(known);
            let host = host.clone();
            return self
                .doubt(DriverError::Outdated { host, theirs, ours })
                .map(Err);
        }
        Ok(Err(Status::failed_precondition(format!(
            "{host}'s agent has reported to another controller, which recorded its reports up to \
             {theirs}; this one has none of them. If this controller's state came from a backup, \
             start it with `lockstep serve --take-over`; if the host moves here from another \
             controller, move the agent's state directory aside"
        ))))
    }
}

/// A host says what cannot be.
fn not_believed(host: &HostId, why: &str, number: u64) -> Status {
    tracing::error!(
        %host, number,
        "{why}, which no controller can have told it: the host is refused. It or its key is in \
         other hands, or its agent's state is damaged"
    );
    Status::failed_precondition(format!("{why}, which cannot be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_beyond_all_clocks_is_no_controller() {
        let now = Timestamp(1_763_716_427_123);
        let term = |counter| Epoch { counter, id: 1 };
        let possible = |theirs, ours| is_possible(term(theirs), term(ours), now);
        assert!(possible(7, 7), "a twin");
        assert!(possible(1_763_716_500, 3), "a successor");
        assert!(possible(1_763_716_427 + TOO_FAR, 3), "another clock");
        assert!(!possible(1_763_716_428 + TOO_FAR, 3));
        assert!(!possible(u64::MAX, 3));
        assert!(possible(u64::MAX, u64::MAX - 1), "after `--epoch-above`");
    }

    #[test]
    fn who_takes_over_is_above_every_term_that_counts_by_one() {
        let now = Timestamp(1_763_716_427_123);
        assert_eq!(taken_over(7, now), 1_763_716_427);
        assert_eq!(taken_over(1_763_716_430, now), 1_763_716_431);
        assert_eq!(taken_over(u64::MAX, now), u64::MAX);
    }
}
