//! When agents are told which of their reports are durable: with the next message to them, or once
//! nothing else is to be done. An order most often follows upon a result, and both are one packet;
//! where thousands report at once, this spares as many packets.

use std::time::Duration;

use tokio::time::Instant;

/// Nothing was heard for so long: nothing else is to be done.
const QUIET: Duration = Duration::from_millis(20);

/// An agent is told after so long at the latest: longer than a step of 10,000 hosts takes, for then
/// the next order takes it along.
const AT_MOST: Duration = Duration::from_secs(2);

/// What agents are owed.
#[derive(Debug, Default)]
pub(super) struct Dues {
    /// Since when anybody is owed something, and since when nothing was heard.
    since: Option<(Instant, Instant)>,
}

impl Dues {
    /// When they are paid, if nothing comes before.
    pub(super) fn at(&self) -> Option<Instant> {
        let (owing, quiet) = self.since?;
        Some((owing + AT_MOST).min(quiet + QUIET))
    }

    /// Whether they are to be paid now, which is taken to be done. `heard`: something has just come.
    pub(super) fn are_due(&mut self, now: Instant, owes: bool, heard: bool) -> bool {
        let (owing, quiet) = self.since.unwrap_or((now, now));
        self.since = owes.then_some((owing, if heard { now } else { quiet }));
        let due = self.at().is_some_and(|at| at <= now);
        if due {
            self.since = None;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_are_told_when_it_is_quiet_and_in_the_end_anyway() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut dues = Dues::default();
        assert_eq!(dues.at(), None);
        assert!(!dues.are_due(at(0), true, true));
        assert_eq!(dues.at(), Some(at(20)));
        assert!(!dues.are_due(at(10), true, false));
        assert!(dues.are_due(at(20), true, false));
        assert_eq!(dues.at(), None, "they are paid");

        let heard = (100..).step_by(10);
        let paid = heard.take_while(|ms| !dues.are_due(at(*ms), true, true));
        assert_eq!(paid.last(), Some(2090), "two seconds after the first");

        assert!(!dues.are_due(at(3000), true, true));
        assert!(!dues.are_due(at(3010), false, true));
        assert_eq!(dues.at(), None, "all went with other messages");
    }
}
