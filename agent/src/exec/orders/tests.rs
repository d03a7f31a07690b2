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

#[tokio::test]
async fn what_a_killed_agent_had_still_to_remove_goes_at_its_next_start() {
    let host = testing::Host::new();
    let config = Arc::new(host.config.clone());
    let open = || {
        let logs = mpsc::channel(1).0;
        Exec::open(&config, "/agent.toml".as_ref(), "example.org", logs).unwrap()
    };
    let key = |byte| StepKey {
        rollout: RolloutId::from_random([byte; 6]),
        host: config.host.clone(),
        at: StepRef { phase: 0, step: 0 },
        direction: Direction::Do,
        attempt: 1,
    };
    let (held, ended) = (key(1), key(2));
    let plan = HeldPlan {
        expires: Timestamp(0),
        steps: vec![],
    };
    let mut exec = open();
    let record = Record::Held(Held {
        rollout: held.rollout.clone(),
        plan: Digest::of(b"plan"),
        steps: plan.write(&config.state_dir, &held.rollout).unwrap(),
        log_offsets: BTreeMap::new(),
    });
    exec.commit(vec![record], Need::Opens).unwrap();
    plan.write(&config.state_dir, &ended.rollout).unwrap();
    let dirs = [&held, &ended].map(|key| exec.host.dir(key));
    for dir in &dirs {
        dir.make().unwrap();
    }
    let plans = plans::dir(&config.state_dir);
    let boot = config.run_dir.join("boot.1");
    for half in [&plans.join("half.new"), &boot] {
        std::fs::write(half, "").unwrap();
    }
    drop(exec);
    let exec = open();
    assert!(dirs[0].path().exists() && !dirs[1].path().exists());
    let names: Vec<_> = std::fs::read_dir(plans)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names, [format!("{}.steps.json", held.rollout)]);
    assert!(exec.held.is_some() && !boot.exists());
}
