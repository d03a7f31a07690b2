//! What one host may have the driver do: far more than an agent ever does, and less than fills a
//! disk. A host that goes beyond loses its session, and is heard again when it has waited.

use lockstep_proto::ids::HostId;
use lockstep_proto::values::Timestamp;
use tonic::Status;

use crate::rates::{Rate, Used};

/// Sessions. An agent that is refused waits longer each time; one that starts and ends in a loop
/// needs some tenths of a second for it.
const SESSIONS: Rate = Rate {
    burst: 600,
    per_second: 5,
};

/// Sessions in which a host is otherwise than before, a record each: other labels, another release,
/// another installation. In thousandths, so that one comes back every ten seconds.
const CHANGES: Rate = Rate {
    burst: 100 * CHANGE,
    per_second: CHANGE / 10,
};
const CHANGE: u64 = 1000;

/// Reports, in bytes of the journal: 1,000 of a usual size each second, and as many at once as an
/// agent has that was away for a day.
const REPORTS: Rate = Rate {
    burst: 64 << 20,
    per_second: 512 << 10,
};

/// The same, of reports that answer nothing: a controller from a backup sees the last ones of each
/// host. 350 MB a day, so that somebody can read the log before the disk is full.
const UNASKED: Rate = Rate {
    burst: 8 << 20,
    per_second: 4 << 10,
};

/// What hosts have used.
#[derive(Debug)]
pub(super) struct Rates {
    sessions: Used<HostId>,
    changes: Used<HostId>,
    reports: Used<HostId>,
    unasked: Used<HostId>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            sessions: Used::new(SESSIONS),
            changes: Used::new(CHANGES),
            reports: Used::new(REPORTS),
            unasked: Used::new(UNASKED),
        }
    }
}

impl Rates {
    /// Whether a host may have one more session.
    pub(super) fn may_open(&mut self, now: Timestamp, host: &HostId) -> Result<(), Status> {
        if !self.sessions.is_left(now, host) {
            return Err(too_much(host, "connects too often"));
        }
        if !self.reports.is_left(now, host) || !self.unasked.is_left(now, host) {
            return Err(too_much(host, "has reported too much"));
        }
        self.sessions.take(now, host.clone(), 1);
        Ok(())
    }

    /// Whether a host may be otherwise than before.
    pub(super) fn may_change(&mut self, now: Timestamp, host: &HostId) -> Result<(), Status> {
        if self.changes.take(now, host.clone(), CHANGE) {
            Ok(())
        } else {
            Err(too_much(host, "says too often that it is another one"))
        }
    }

    /// A report was journalled; whether there may be more.
    pub(super) fn pay_report(
        &mut self,
        now: Timestamp,
        host: &HostId,
        bytes: u64,
        unasked: bool,
    ) -> Result<(), Status> {
        self.reports.take(now, host.clone(), bytes);
        if unasked {
            self.unasked.take(now, host.clone(), bytes);
        }
        if self.reports.is_left(now, host) && self.unasked.is_left(now, host) {
            Ok(())
        } else {
            Err(too_much(host, "reports too much"))
        }
    }
}

fn too_much(host: &HostId, what: &str) -> Status {
    tracing::warn!(%host, what, "a host is refused for a while");
    Status::resource_exhausted(format!("{host} {what}; it is heard again later"))
}

#[cfg(test)]
mod tests {
    use lockstep_proto::values::Period;

    use super::*;

    #[test]
    fn an_agent_never_meets_a_rate_and_a_flood_does() {
        let host: HostId = "app-1".parse().unwrap();
        let mut rates = Rates::default();
        let at = |ms: u64| Timestamp(1_000_000 + ms);
        // A day's work in a second, and then 1,000 reports each second.
        for number in 0..50_000 {
            rates
                .pay_report(at(number / 50), &host, 500, false)
                .unwrap();
        }
        for number in 0..600_000 {
            rates
                .pay_report(at(1000 + number), &host, 500, false)
                .unwrap();
        }
        // What nobody asked for ends soon, and the host is out until it has waited.
        let now = at(700_000);
        let flood = (0..).take_while(|_| rates.pay_report(now, &host, 30_000, true).is_ok());
        let flood = flood.count();
        assert!((200..400).contains(&flood), "{flood}");
        assert!(rates.may_open(now, &host).is_err());
        assert!(rates.may_open(now, &"app-2".parse().unwrap()).is_ok());
        assert!(rates.may_open(now.plus(Period::seconds(60)), &host).is_ok());

        let labels = (0..).take_while(|_| rates.may_change(now, &host).is_ok());
        assert_eq!(labels.count(), 100);
        // One for every ten seconds.
        let later = now.plus(Period::seconds(95));
        let labels = (0..).take_while(|_| rates.may_change(later, &host).is_ok());
        assert_eq!(labels.count(), 10);
    }
}
