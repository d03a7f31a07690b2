//! Cancelling: at once, with any number of agents offline, and honest about each host.

use lockstep_core::LeftState;
use lockstep_proto::report::HOLDS_NOT;

use super::levers::{failed_because, run, unknown};
use super::*;

pub(super) fn cancel(fleet: &mut Fleet) {
    let cancel = Call::Cancel {
        rollout: rollout(1),
        reason: "wrong day".into(),
    };
    fleet.call("olga", &[], cancel).unwrap();
    assert_eq!(fleet.state(1), "cancelled");
    let ended = fleet.coordinator.summary(&rollout(1)).unwrap().ended_at;
    assert_eq!(ended, Some(Timestamp(fleet.now)), "INV-8: at once");
    fleet
        .submit(9, plan(9, vec![on("app", vec![stop()])]))
        .unwrap();
}

fn let_go() -> Vec<Fact> {
    let name = "not surveyed".into();
    let value = HOLDS_NOT.into();
    vec![Fact::Note { name, value }]
}

fn left(fleet: &Fleet) -> Vec<(String, LeftState, String)> {
    let left = fleet.coordinator.left(&rollout(1)).into_iter();
    left.map(|left| (left.host.to_string(), left.state, left.message))
        .collect()
}

pub(super) fn back(fleet: &mut Fleet, name: &str, held: Option<RolloutId>) -> Vec<&'static str> {
    let before = fleet.sent.len();
    fleet.up_holding(name, held);
    let to_it = fleet.sent[before..].iter();
    to_it
        .filter_map(|(to, message)| match message {
            _ if *to != host(name) => None,
            Message::Cancel { rollout: of, .. } if *of == rollout(1) => Some("cancel"),
            Message::Release { rollout: of, .. } if *of == rollout(1) => Some("release"),
            Message::Survey { rollout: of, .. } if *of == rollout(1) => Some("survey"),
            Message::Order(order) if order.key.rollout == rollout(1) => Some("order"),
            _ => None,
        })
        .collect()
}

#[test]
fn cancel_ends_at_once_with_every_agent_offline_and_hears_of_them_later() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.report(
        "a",
        ReportBody::Started {
            key: fleet.newest("a"),
        },
    );
    for name in ["a", "b"] {
        fleet.event(Event::HostDown { host: host(name) });
    }
    cancel(&mut fleet);
    let said = left(&fleet);
    assert_eq!(said[0].1, LeftState::Unknown);
    assert_eq!(
        said[0].2,
        "unknown: exec.run (do 0.0) ran when it was last heard of, and it is not connected"
    );
    assert_eq!(
        said[1].2,
        "unknown: exec.run (do 0.0) was ordered, and it has not answered, and it is not connected"
    );
    assert!(fleet.reason(1).contains(&said[0].2), "{}", fleet.reason(1));

    // The host that ran it gets the cancel, and reports how it ended.
    fleet.restart();
    let sent = back(&mut fleet, "a", Some(rollout(1)));
    assert_eq!(sent, ["cancel", "release", "survey"]);
    assert_eq!(
        left(&fleet)[0].1,
        LeftState::Running,
        "it is back, and has not said"
    );
    let key = StepKey {
        rollout: rollout(1),
        host: host("a"),
        at: StepRef { phase: 0, step: 0 },
        direction: Direction::Do,
        attempt: 1,
    };
    let outcome = failed_because(Cause::Cancelled, true);
    fleet.report(
        "a",
        ReportBody::Finished {
            key,
            outcome,
            facts: vec![],
            signatures: vec![],
            took: Period(5),
        },
    );
    assert_eq!(left(&fleet)[0].1, LeftState::Stopped);

    // The one that had not answered let go of it: it never begins what it was ordered.
    let sent = back(&mut fleet, "b", Some(rollout(1)));
    assert_eq!(sent, ["cancel", "release", "survey"]);
    assert_eq!(left(&fleet)[1].1, LeftState::Unknown);
    fleet.surveyed("b", vec![]);
    assert_eq!(left(&fleet)[1].1, LeftState::Unknown, "it still holds");
    let unasked = fleet.unasked;
    fleet.surveyed("b", vec![]);
    assert_eq!(fleet.unasked, unasked + 1, "it has said so already");
    fleet.surveyed("b", let_go());
    assert_eq!(left(&fleet)[1].1, LeftState::Stopped);
    assert_eq!(fleet.unasked, unasked + 1);
    for (name, state) in [("b", let_go()), ("a", let_go()), ("a", vec![])] {
        fleet.surveyed(name, state);
    }
    assert_eq!(fleet.unasked, unasked + 4, "nobody asks any more");
    assert_eq!(
        back(&mut fleet, "b", None),
        [""; 0],
        "nothing is left to ask"
    );
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    let attempts = &document["phases"][0]["steps"][0]["attempts"];
    assert_eq!(attempts[0]["cause"], "cancelled");
    assert_eq!(attempts[0]["class"], "step failed");
    assert_eq!(attempts[1]["outcome"], "skipped");
    assert_eq!(fleet.state(1), "cancelled");
}

#[test]
fn cancel_with_half_the_agents_offline_tells_them_apart() {
    let mut fleet = Fleet::new(&["a", "b", "c", "d"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.finish("a", ok(), vec![]);
    for name in ["b", "d"] {
        fleet.report(
            name,
            ReportBody::Started {
                key: fleet.newest(name),
            },
        );
    }
    for name in ["c", "d"] {
        fleet.event(Event::HostDown { host: host(name) });
    }
    let before = fleet.sent.len();
    cancel(&mut fleet);
    let states: Vec<LeftState> = left(&fleet)
        .into_iter()
        .map(|(_, state, _)| state)
        .collect();
    assert_eq!(
        states,
        [
            LeftState::Stopped,
            LeftState::Running,
            LeftState::Unknown,
            LeftState::Unknown
        ]
    );
    assert_eq!(left(&fleet)[1].2, "running: exec.run (do 0.0)");
    let reason = fleet.reason(1);
    assert!(
        reason.contains("; b is running: exec.run (do 0.0); c is unknown:")
            && !reason.contains("a is"),
        "{reason}"
    );
    let cancelled = |name: &str| {
        fleet.sent[before..]
            .iter()
            .any(|(to, message)| *to == host(name) && matches!(message, Message::Cancel { .. }))
    };
    assert!(cancelled("b"), "the one that runs it is told");
    fleet.finish("b", failed_because(Cause::Cancelled, true), vec![]);
    assert_eq!(left(&fleet)[1].1, LeftState::Stopped);
    assert_eq!(fleet.state(1), "cancelled", "late reports do not move it");
}

#[test]
fn an_agent_that_was_installed_anew_proves_nothing_of_the_one_before_it() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.event(Event::HostDown { host: host("a") });
    cancel(&mut fleet);
    let anew = InstanceId::from_random([2; 8]);
    fleet.event(Event::HostUp {
        host: host("a"),
        instance: anew,
        labels: BTreeMap::from([("role".into(), "app".into())]),
        agent_version: "1".into(),
        held: None,
    });
    fleet.reports.clear();
    fleet.surveyed("a", let_go());
    assert_eq!(left(&fleet)[0].1, LeftState::Unknown);
}

#[test]
fn what_cannot_be_cancelled_says_what_to_do_instead() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.finish("a", unknown(), vec![]);
    assert_eq!(fleet.state(1), "halted");
    let cancel = Call::Cancel {
        rollout: rollout(1),
        reason: "x".into(),
    };
    let refused = fleet.call("olga", &[], cancel).unwrap_err().to_string();
    assert!(
        refused.contains("lockstep close ro_010101010101 --accept"),
        "{refused}"
    );
}

#[test]
fn a_consent_that_comes_after_the_end_is_told_to_let_go() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    let call = Call::Cancel {
        rollout: rollout(1),
        reason: "not today".into(),
    };
    fleet.call("olga", &[], call).unwrap();
    let before = fleet.sent.len();
    fleet.consent(1, "a", vec![]);
    let released = fleet.sent[before..].iter().any(|(to, message)| {
        let release = |it: &RolloutId| *to == host("a") && *it == rollout(1);
        matches!(message, Message::Release { rollout, .. } if release(rollout))
    });
    assert!(released, "a would hold itself for ever");
}
