//! Orders, reports and records as a rollout of a release has them.

use lockstep_core::{Entry, Record};
use lockstep_proto::ids::{Digest, Direction, Epoch, HostId, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact, Order};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::witness::Head;

pub(super) const NOW: Timestamp = Timestamp(1_790_000_000_000);

pub(super) const EPOCH: Epoch = Epoch {
    counter: 17,
    id: 0x05ee_d0fa_7e24,
};

pub(super) fn host(number: usize) -> HostId {
    let name = format!("app-{number:04}.production.example.com");
    name.parse().expect("a host's name")
}

pub(super) fn rollout() -> RolloutId {
    RolloutId::from_random([0x1c, 0x0c, 0x57, 0xe9, 0x40, 0x02])
}

fn key(host: HostId, phase: u16) -> StepKey {
    StepKey {
        rollout: rollout(),
        host,
        at: StepRef { phase, step: 1 },
        direction: Direction::Do,
        attempt: 1,
    }
}

/// An order to migrate behind a backup of another host's.
pub(super) fn order() -> Order {
    let backup = Fact::Backup {
        database: "employee_system".into(),
        id: "employee_system-20261122T151744Z".into(),
        digest: Digest::of(b"backup"),
        size: 734_003_200,
        taken_at: NOW,
        fence: Some("fe_5eed0fa7e2400017".into()),
    };
    let backup = Binding {
        origin: key(host(7), 4),
        fact: backup,
        signature: Some("5a".repeat(64)),
    };
    Order {
        key: key(host(1), 6),
        plan: Digest::of(b"plan"),
        epoch: EPOCH,
        not_after: NOW.plus(Period::seconds(300)),
        bindings: vec![backup],
    }
}

/// What a host says of a service that it has started.
pub(super) fn finished(key: StepKey) -> ReportBody {
    ReportBody::Finished {
        key,
        outcome: StepOutcome::Ok {
            changed: true,
            summary: "employee-backend is active and listens on port 8000".into(),
        },
        facts: vec![
            Fact::Healthy {
                url: "http://localhost:8000/health".into(),
            },
            Fact::Note {
                name: "started within".into(),
                value: "1.8 s, after 2 looks".into(),
            },
        ],
        took: Period(2_341),
        signatures: vec![],
    }
}

/// The same as a report of the host with this number.
pub(super) fn report(of_host: usize) -> Report {
    Report {
        number: 41,
        body: finished(key(host(of_host), 6)),
        head: Some(Head {
            journal: format!("in_{:016x}", of_host.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            number: 118,
            hash: Digest::of(&of_host.to_be_bytes()),
        }),
    }
}

/// The same as a record.
pub(super) fn entry(of_host: usize) -> Entry {
    let Report { number, body, head } = report(of_host);
    let record = Record::Reported {
        host: host(of_host),
        number,
        body,
        head,
    };
    Entry { at: NOW, record }
}
