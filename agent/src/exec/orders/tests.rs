use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_proto::ids::{Digest, StepRef};
use tokio::sync::mpsc;

use super::*;
use crate::journal::Held;
use crate::testing;

#[tokio::test]
async fn a_cancel_that_was_recorded_and_not_carried_out_is_carried_out_later() {
    let host = testing::Host::new();
    let config = Arc::new(host.config.clone());
    let mut exec = Exec::open(
        &config,
        "/agent.toml".as_ref(),
        "example.org",
        mpsc::channel(1).0,
    )
    .unwrap();
    let key = StepKey {
        rollout: RolloutId::from_random([1; 6]),
        host: config.host.clone(),
        at: StepRef { phase: 0, step: 0 },
        direction: Direction::Do,
        attempt: 1,
    };
    let records = [
        Record::Held(Held {
            rollout: key.rollout.clone(),
            plan: Digest::of(b"plan"),
            steps: Digest::of(b"steps"),
            log_offsets: BTreeMap::new(),
        }),
        Record::Intent(Intent {
            key: key.clone(),
            before: Value::Null,
            boot: exec.host.boot.clone(),
            at: wall_clock(),
        }),
        Record::Cancelled { key: key.clone() },
    ];
    exec.commit(records.into(), Need::Opens).unwrap();
    let dir = exec.host.dir(&key);
    dir.make().unwrap();
    // The daemon's start, and the controller's repeated word. Nothing of what they spawn runs.
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    exec.take_up();
    assert!(dir.cancel().exists(), "at the start");
    std::fs::remove_file(dir.cancel()).unwrap();
    let epoch = Epoch { counter: 1, id: 1 };
    exec.handle_cancel(&key.rollout, epoch).unwrap();
    assert!(dir.cancel().exists(), "when it is asked for again");
}
