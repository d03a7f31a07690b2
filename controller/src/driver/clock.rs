//! The controller's time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockstep_proto::values::{Period, Timestamp};
use tokio::time::Instant;

/// The controller's time: it begins at the wall clock or the last persisted entry, whichever is
/// later, goes on with the monotonic clock, and never goes back.
#[derive(Debug)]
pub(super) struct Clock {
    base: Timestamp,
    since: Instant,
}

impl Clock {
    pub(super) fn starting_at(last: Timestamp) -> Self {
        let wall = wall_clock();
        let ahead = last.since(wall);
        if ahead > Period::seconds(60) {
            tracing::warn!(
                %ahead,
                "the journal's last record is in the future of this machine's clock; the \
                 controller's time goes on from there"
            );
        }
        Self {
            base: wall.max(last),
            since: Instant::now(),
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        let elapsed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base.plus(Period(elapsed))
    }

    /// When the clock shows a time; a year from now stands for everything later.
    pub(super) fn instant(&self, at: Timestamp) -> Instant {
        const LATEST: Duration = Duration::from_hours(365 * 24);
        self.since
            + at.since(self.base)
                .to_std()
                .min(self.since.elapsed() + LATEST)
    }
}

/// This machine's clock.
pub(crate) fn wall_clock() -> Timestamp {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return Timestamp(world.wall_clock());
    }
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    let wall = wall.unwrap_or_default().as_millis();
    Timestamp(u64::try_from(wall).unwrap_or(u64::MAX))
}

/// After a tick that changed nothing although a deadline had come, the next one comes this much
/// later at the earliest.
const REST: Duration = Duration::from_secs(1);

/// When the driver wakes up by itself. A deadline that stays due, whatever is done, must not keep
/// a processor busy.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    not_before: Option<Instant>,
}

impl Alarm {
    /// When to wake up for the next deadline; none if there is none.
    pub(super) fn at(&self, deadline: Option<Instant>) -> Option<Instant> {
        deadline.map(|deadline| self.not_before.map_or(deadline, |rest| deadline.max(rest)))
    }

    /// Deadlines were looked at. `in_vain`: one had come, but there was nothing to do.
    pub(super) fn rang(&mut self, in_vain: bool) {
        self.not_before = in_vain.then(|| Instant::now() + REST);
    }
}
