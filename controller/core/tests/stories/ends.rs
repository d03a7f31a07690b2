//! INV-8: every class of cause, driven to its end. The reason names host, step and class, and the
//! end comes by the deadline and 10 s.

use super::*;

/// What goes wrong on host `a`, of two.
type Fault = fn(&mut Fleet);

/// A class, the fault that brings it about, how the rollout ends, and what its reason contains.
type Row = (&'static str, Fault, &'static str, &'static [&'static str]);

const DEADLINE: u64 = 400;

fn fail(fleet: &mut Fleet, cause: Cause) {
    let failure = Failure {
        cause,
        message: "so it is".into(),
        hint: None,
        last_lines: vec![],
        changed: true,
    };
    fleet.finish("a", StepOutcome::Failed(failure), vec![]);
}

const ROWS: &[Row] = &[
    (
        "agent lost",
        |fleet| {
            fleet.event(Event::HostDown { host: host("a") });
        },
        // Its undo cannot be proven either.
        "halted",
        &[
            "a failed in phase `p0`",
            "not undone: a: undo of",
            "(step 0.0, line 7): agent lost",
        ],
    ),
    (
        "timed out",
        // It begins, and says nothing more.
        |fleet| {
            fleet.report(
                "a",
                ReportBody::Started {
                    key: fleet.newest("a"),
                },
            );
        },
        "halted",
        &[
            "a failed in phase `p0`",
            "service.stop (step 0.0, line 7): timed out: no report within",
        ],
    ),
    (
        "timed out",
        |fleet| fail(fleet, Cause::TimedOut),
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "service.stop (step 0.0, line 7): timed out: so it is",
        ],
    ),
    (
        "step failed",
        |fleet| fail(fleet, Cause::Step),
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "service.stop (step 0.0, line 7): step failed: so it is",
        ],
    ),
    (
        "step failed",
        |fleet| fail(fleet, Cause::Host),
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "(step 0.0, line 7): step failed (host not ready): so it is",
        ],
    ),
    (
        "check unmet",
        |fleet| fail(fleet, Cause::CheckUnmet),
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "service.stop (step 0.0, line 7): check unmet: so it is",
        ],
    ),
    (
        "refused",
        |fleet| fail(fleet, Cause::Refused),
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "service.stop (step 0.0, line 7): refused: so it is",
        ],
    ),
    (
        "unknown",
        |fleet| {
            let why = "the step process was killed".into();
            fleet.finish("a", StepOutcome::Unknown { why }, vec![]);
        },
        "rolled_back",
        &[
            "a failed in phase `p0`",
            "(step 0.0, line 7): unknown: the step process was killed",
        ],
    ),
];

/// Runs a fleet on: every host but one that is `lost` obeys; each second the clock is looked at.
/// Returns the second at which the rollout ended.
fn run_on(fleet: &mut Fleet, lost: Option<&str>) -> u64 {
    let begun = fleet.now;
    // What was ordered before the fault is the fault's.
    let mut answered = 2;
    let mut surveyed: BTreeSet<HostId> = BTreeSet::new();
    loop {
        while let Some(order) = fleet.orders.get(answered).cloned() {
            answered += 1;
            if lost != Some(order.key.host.as_str()) {
                let body = ReportBody::Finished {
                    key: order.key.clone(),
                    outcome: ok(),
                    facts: vec![],
                    signatures: vec![],
                    took: Period(5),
                };
                fleet.report(order.key.host.as_str(), body);
            }
        }
        let asked: Vec<HostId> = fleet
            .sent
            .iter()
            .filter(|(_, message)| matches!(message, Message::Survey { .. }))
            .map(|(host, _)| host.clone())
            .collect();
        for host in asked {
            if lost != Some(host.as_str()) && surveyed.insert(host.clone()) {
                fleet.surveyed(host.as_str(), vec![]);
            }
        }
        if fleet.coordinator.summary(&rollout(1)).unwrap().ended {
            return (fleet.now - begun) / 1000;
        }
        assert!(
            fleet.now - begun <= (DEADLINE + 10) * 1000,
            "INV-8: it hangs"
        );
        fleet.later(1);
    }
}

fn begun() -> Fleet {
    let mut fleet = Fleet::new(&["a", "b"]);
    let mut plan = plan(1, vec![on("app", vec![stop()]), on("app", vec![stop()])]);
    plan.deadline = Period::seconds(DEADLINE);
    fleet.submit(1, plan).unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    fleet.finish("b", ok(), vec![]);
    fleet
}

#[test]
fn every_class_of_cause_ends_in_time_with_host_step_and_class() {
    for (class, fault, end, words) in ROWS {
        let mut fleet = begun();
        fault(&mut fleet);
        let silent = *end == "halted";
        let took = run_on(&mut fleet, silent.then_some("a"));
        let reason = fleet.reason(1);
        assert_eq!(fleet.state(1), *end, "{class}: {reason}");
        for word in *words {
            assert!(
                reason.contains(word),
                "{class}: {word:?} is not in: {reason}"
            );
        }
        assert!(reason.contains(class), "{class}: {reason}");
        assert!(took <= DEADLINE + 10, "INV-8: {class} took {took} s");
        let document = fleet.coordinator.document(&rollout(1)).unwrap();
        let attempt = &document["phases"][0]["steps"][0]["attempts"][0];
        assert_eq!(attempt["class"], *class, "{attempt}");
    }
}

/// The same at the deadline itself, where nothing has failed yet.
#[test]
fn a_deadline_says_of_each_host_whether_it_was_lost_or_slow() {
    let mut fleet = begun();
    fleet.finish("a", ok(), vec![]);
    // Both are in the second phase when the fleet is paused for too long.
    fleet.report(
        "a",
        ReportBody::Started {
            key: fleet.newest("a"),
        },
    );
    fleet.event(Event::HostDown { host: host("b") });
    fleet.now += (DEADLINE - 1) * 1000;
    // The give-ups of this second come before the deadline's.
    fleet.later(1);
    assert_eq!(fleet.state(1), "halted");
    let reason = fleet.reason(1);
    assert!(
        reason.contains("a: service.stop (do 1.0) runs (timed out)"),
        "{reason}"
    );
    assert!(
        reason.contains("b: service.stop (do 1.0) has not begun (agent lost)"),
        "{reason}"
    );
}

#[test]
fn hosts_that_never_answer_are_named_before_anything_begins() {
    let mut fleet = Fleet::new(&["a", "b", "c"]);
    fleet.event(Event::HostDown { host: host("b") });
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(60);
    assert_eq!(fleet.state(1), "cancelled");
    let reason = fleet.reason(1);
    let words = "no answer from b (agent lost), c (timed out) within";
    assert!(reason.contains(words), "{reason}");
}

#[test]
fn a_host_that_does_not_say_its_state_is_named_with_the_class() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(60);
    assert_eq!(fleet.state(1), "halted");
    let reason = fleet.reason(1);
    assert!(reason.contains("a (agent lost) did not say"), "{reason}");
}

#[test]
fn a_lock_names_its_holder_its_phase_and_both_times() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()]), on("app", vec![stop()])]);
    let submitted = fleet.now;
    fleet.later(5);
    fleet.finish("a", ok(), vec![]);
    let lock = |fleet: &mut Fleet| match fleet.submit(2, plan(2, vec![on("app", vec![stop()])])) {
        Err(Refused::Locked(lock)) => *lock,
        other => panic!("{other:?}"),
    };
    let held = lock(&mut fleet);
    assert_eq!((held.holder, held.host), (rollout(1), host("a")));
    assert_eq!((held.phase.as_str(), held.state), ("p1", "running"));
    assert_eq!(held.since_ms, submitted);
    assert_eq!(held.until_ms, Some(submitted + 3_600_000));
    // Its agent and the controller die: the lock stays as long as the rollout, and no longer.
    fleet.event(Event::HostDown { host: host("a") });
    fleet.restart();
    assert_eq!(lock(&mut fleet).until_ms, Some(submitted + 3_600_000));
    fleet.later(3600);
    assert_eq!(fleet.state(1), "halted");
    let held = lock(&mut fleet);
    assert_eq!(
        (held.state, held.until_ms),
        ("halted", None),
        "it waits for a person"
    );
    let close = Call::Close {
        rollout: rollout(1),
        reason: "seen".into(),
    };
    fleet.call("olga", &[], close).unwrap();
    // Free without the agent; and when it comes back holding, it is told.
    fleet
        .submit(3, plan(3, vec![on("app", vec![stop()])]))
        .unwrap();
    let before = fleet.sent.len();
    fleet.event(Event::HostUp {
        host: host("a"),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        instance: InstanceId::from_random([1; 8]),
        agent_version: "1".into(),
        held: Some(rollout(1)),
    });
    let release = |message: &Message| matches!(message, Message::Release { rollout: of, .. } if *of == rollout(1));
    assert!(
        fleet.sent[before..]
            .iter()
            .any(|(_, message)| release(message))
    );
}

#[test]
fn one_of_elects_once_whatever_restarts_and_resumes() {
    let one = || Stage {
        target: Target::OneOf(vec!["app".into()]),
        ..on("app", vec![stop()])
    };
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.event(Event::HostDown { host: host("a") });
    fleet
        .submit(1, plan(1, vec![one(), on("app", vec![stop()]), one()]))
        .unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    assert_eq!(fleet.newest("b").at.phase, 0, "the one that is connected");
    fleet.pause();
    fleet.restart();
    // Now the other one is there, and the elected one is not.
    fleet.up("a");
    fleet.resume();
    fleet.up("b");
    for name in ["b", "a", "b", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
    let elections = fleet.journal.iter();
    let elections = elections.filter(|entry| matches!(entry.record, Record::Elected { .. }));
    assert_eq!(elections.count(), 1, "it is written down");
}
