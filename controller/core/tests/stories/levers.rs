//! What people do to a rollout: going on with the hosts that failed, and cancelling.

use lockstep_core::LeftState;
use lockstep_proto::plan::Batch;
use lockstep_proto::report::HOLDS_NOT;

use super::*;

fn resume_failed(fleet: &mut Fleet) -> Result<Vec<String>, Refused> {
    let rollout = rollout(1);
    match fleet.call("olga", &[], Call::ResumeFailed { rollout })? {
        Answer::Again(lines) => Ok(lines),
        other => panic!("{other:?}"),
    }
}

fn refused_why(fleet: &mut Fleet) -> String {
    let before = fleet.journal.len();
    match resume_failed(fleet) {
        Err(Refused::NotNow(why)) => {
            assert_eq!(fleet.journal.len(), before, "a refusal changes nothing");
            why
        }
        other => panic!("{other:?}"),
    }
}

/// Orders since there were this many: `a undo 0.0 #1`.
fn orders_since(fleet: &Fleet, before: usize) -> Vec<String> {
    let say = |order: &Order| {
        let key = &order.key;
        format!("{} {} {} #{}", key.host, key.direction, key.at, key.attempt)
    };
    fleet.orders[before..].iter().map(say).collect()
}

fn unknown() -> StepOutcome {
    StepOutcome::Unknown {
        why: "the step process was killed".into(),
    }
}

fn failed_because(cause: Cause, changed: bool) -> StepOutcome {
    StepOutcome::Failed(Failure {
        cause,
        message: "no".into(),
        hint: None,
        last_lines: vec![],
        changed,
    })
}

fn run() -> Step {
    step("exec.run", json!({"name": "x", "argv": ["x"]}))
}

fn start_service() -> Step {
    step("service.start", json!({"service": "web"}))
}

#[test]
fn only_the_hosts_that_failed_try_again_and_undo_what_they_left_first() {
    let mut fleet = Fleet::new(&["a", "b", "c"]);
    fleet.start(vec![on("app", vec![stop(), start_service()])]);
    fleet.pause();
    fleet.finish("a", ok(), vec![]);
    fleet.finish("b", failed_because(Cause::Step, true), vec![]);
    fleet.finish("c", failed_because(Cause::Host, false), vec![]);
    let before = fleet.orders.len();
    let lines = resume_failed(&mut fleet).unwrap();
    assert_eq!(
        lines,
        [
            "b undoes what service.stop (do 0.0) left, then tries it again",
            "c tries service.stop (do 0.0) again"
        ]
    );
    assert_eq!(
        orders_since(&fleet, before),
        ["c do 0.0 #2", "b undo 0.0 #1", "a do 0.1 #1"],
        "a is not asked for what it has done"
    );
    // Survives a restart in the middle, and the rollout ends as if nothing had been.
    fleet.restart();
    for name in ["a", "b", "c"] {
        fleet.up(name);
    }
    let before = fleet.orders.len();
    fleet.finish("b", ok(), vec![]);
    assert_eq!(orders_since(&fleet, before), ["b do 0.0 #2"]);
    for name in ["a", "c", "c", "b", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
    let all = orders_since(&fleet, 0);
    let of_a: BTreeSet<&String> = all.iter().filter(|order| order.starts_with('a')).collect();
    assert_eq!(of_a.len(), 2, "{of_a:?}");
}

#[test]
fn plain_resume_lets_a_failure_count_as_one() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.pause();
    fleet.finish("a", ok(), vec![]);
    fleet.finish("b", failed(), vec![]);
    fleet.resume();
    assert_eq!(fleet.state(1), "rolling_back");
    assert_eq!(fleet.newest("b").direction, Direction::Undo);
}

#[test]
fn what_was_undone_before_another_attempt_is_undone_again_in_a_rollback() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![
        on("app", vec![stop()]),
        on("app", vec![start_service()]),
    ]);
    fleet.pause();
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    resume_failed(&mut fleet).unwrap();
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.newest("a").attempt, 2);
    fleet.finish("a", ok(), vec![]);
    // The next phase fails: the second attempt has to go back too.
    fleet.finish("b", ok(), vec![]);
    let before = fleet.orders.len();
    fleet.finish("a", failed(), vec![]);
    for name in ["a", "b", "a", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    let undone = orders_since(&fleet, before);
    assert_eq!(
        undone,
        [
            "a undo 1.0 #1",
            "b undo 1.0 #1",
            "b undo 0.0 #1",
            "a undo 0.0 #2"
        ],
        "INV-6"
    );
    for name in ["a", "b"] {
        fleet.surveyed(name, vec![]);
    }
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
}

#[test]
fn an_undo_that_fails_before_another_attempt_is_a_failure_and_may_be_tried_again() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.pause();
    fleet.finish("a", failed(), vec![]);
    resume_failed(&mut fleet).unwrap();
    fleet.pause();
    fleet.finish("a", failed(), vec![]);
    let before = fleet.orders.len();
    let lines = resume_failed(&mut fleet).unwrap();
    assert_eq!(lines, ["a tries service.stop (undo 0.0) again"]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(
        orders_since(&fleet, before),
        ["a undo 0.0 #2", "a do 0.0 #2"]
    );
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
}

#[test]
fn an_unknown_outcome_needs_a_person_s_word_first() {
    for action in [run(), stop()] {
        let mut fleet = Fleet::new(&["a", "b"]);
        fleet.start(vec![on("app", vec![action])]);
        fleet.pause();
        fleet.finish("a", unknown(), vec![]);
        fleet.finish("b", failed_because(Cause::Step, false), vec![]);
        let why = refused_why(&mut fleet);
        let command = "lockstep resolve ro_010101010101 a 0.0 --done";
        assert!(why.contains("unknown") && why.contains(command), "{why}");
        let resolve = Call::Resolve {
            rollout: rollout(1),
            host: host("a"),
            at: StepRef { phase: 0, step: 0 },
            done: true,
            reason: "seen".into(),
        };
        fleet.call("olga", &[], resolve).unwrap();
        assert_eq!(resume_failed(&mut fleet).unwrap().len(), 1);
        assert_eq!(fleet.newest("b").attempt, 2);
        fleet.finish("b", ok(), vec![]);
        assert_eq!(fleet.newest("a").attempt, 1, "INV-1");
        assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
    }
}

#[test]
fn a_lost_attempt_is_asked_for_again_by_its_own_number() {
    // Its host never saw the order.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.pause();
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(200);
    fleet.up("a");
    let before = fleet.orders.len();
    let lines = resume_failed(&mut fleet).unwrap();
    assert_eq!(lines, ["a is asked for exec.run (do 0.0) again"]);
    assert_eq!(
        orders_since(&fleet, before),
        ["a do 0.0 #1"],
        "INV-1: its agent knows whether it has begun it"
    );
    fleet.later(100);
    assert_eq!(fleet.state(1), "running", "it has its whole time again");
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");

    // It began, and stays away: given up once more, and not for ever.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.report(
        "a",
        ReportBody::Started {
            key: fleet.newest("a"),
        },
    );
    fleet.pause();
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(60);
    resume_failed(&mut fleet).unwrap();
    fleet.later(49);
    assert_eq!(fleet.state(1), "running");
    fleet.later(1);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
}

#[test]
fn a_host_left_behind_in_the_open_stage_joins_again_and_in_a_closed_one_does_not() {
    let rolling = |stage: Stage| Stage {
        strategy: Strategy::Rolling {
            batch: Batch::Hosts(1),
            max_failures: 1,
            pause: Period::seconds(30),
        },
        ..stage
    };
    let begun = || {
        let mut fleet = Fleet::new(&["a", "b"]);
        fleet.start(vec![
            rolling(on("app", vec![stop()])),
            on("app", vec![start_service()]),
        ]);
        fleet.finish("a", failed(), vec![]);
        fleet
    };

    // Between two waves.
    let mut fleet = begun();
    fleet.pause();
    let lines = resume_failed(&mut fleet).unwrap();
    assert!(lines[0].starts_with("a undoes"), "{lines:?}");
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.later(30);
    fleet.finish("b", ok(), vec![]);
    fleet.later(30);
    for name in ["a", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));

    // Beside the next wave; and a second failure counts again.
    let mut fleet = begun();
    fleet.later(30);
    fleet.pause();
    resume_failed(&mut fleet).unwrap();
    fleet.finish("b", ok(), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", failed(), vec![]);
    fleet.later(30);
    fleet.finish("b", ok(), vec![]);
    assert_eq!(fleet.state(1), "partial", "{}", fleet.reason(1));

    // The others have gone on.
    let mut fleet = begun();
    fleet.later(30);
    fleet.finish("b", ok(), vec![]);
    fleet.later(30);
    fleet.pause();
    let why = refused_why(&mut fleet);
    assert!(
        why.contains("a stays behind") && why.contains("apply the plan again"),
        "{why}"
    );
    fleet.resume();
    fleet.finish("b", ok(), vec![]);
    assert_eq!(fleet.state(1), "partial");
}

#[test]
fn it_works_after_a_halt_and_only_where_something_failed() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let mut short = plan(1, vec![on("app", vec![stop()])]);
    short.deadline = Period::seconds(300);
    fleet.submit(1, short).unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    let why = refused_why(&mut fleet);
    assert!(why.contains("running, not paused or halted"), "{why}");
    fleet.pause();
    let why = refused_why(&mut fleet);
    assert!(why.contains("no host has failed"), "{why}");
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    fleet.later(300);
    assert_eq!(fleet.state(1), "halted");
    let reason = fleet.reason(1);
    assert!(
        reason.contains("a: service.stop (step 0.0, line 7): step failed")
            && reason.contains("paused by olga"),
        "{reason}"
    );
    resume_failed(&mut fleet).unwrap();
    assert_eq!(fleet.state(1), "running");
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
}

#[test]
fn in_a_halted_rollback_the_undos_that_failed_are_tried_again() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    assert_eq!(fleet.state(1), "halted");
    let before = fleet.orders.len();
    let lines = resume_failed(&mut fleet).unwrap();
    assert_eq!(lines, ["a tries service.stop (undo 0.0) again"]);
    assert_eq!(orders_since(&fleet, before), ["a undo 0.0 #2"]);
    fleet.finish("a", ok(), vec![]);
    for name in ["a", "b"] {
        fleet.surveyed(name, vec![]);
    }
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));

    // A step that nobody knows of stops it as long as nobody has looked.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.finish("a", unknown(), vec![]);
    assert_eq!(fleet.state(1), "halted");
    assert!(refused_why(&mut fleet).contains("lockstep resolve ro_010101010101 a 0.0"));
}

#[test]
fn an_order_that_came_too_late_is_given_again_and_not_for_ever() {
    let late = || failed_because(Cause::Refused, false);
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    for attempt in 2..=3 {
        fleet.later(121);
        fleet.finish("a", late(), vec![]);
        assert_eq!(fleet.newest("a").attempt, attempt, "{}", fleet.reason(1));
        assert_eq!(fleet.state(1), "running");
    }
    let order = fleet.orders.last().unwrap();
    assert!(order.not_after.0 > fleet.now, "it has its time");
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");

    // A third time is no accident.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    for _ in 0..3 {
        fleet.later(121);
        fleet.finish("a", late(), vec![]);
    }
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back");
    assert!(fleet.reason(1).contains("refused"), "{}", fleet.reason(1));
    assert_eq!(fleet.newest("a").attempt, 3);

    // What is refused in time is refused.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.finish("a", late(), vec![]);
    assert_eq!(fleet.newest("a").attempt, 1);
}

fn cancel(fleet: &mut Fleet) {
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

fn back(fleet: &mut Fleet, name: &str, held: Option<RolloutId>) -> Vec<&'static str> {
    let before = fleet.sent.len();
    fleet.event(Event::HostUp {
        host: host(name),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        instance: InstanceId::from_random([1; 8]),
        agent_version: "1".into(),
        held,
    });
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
    fleet.surveyed("b", let_go());
    assert_eq!(left(&fleet)[1].1, LeftState::Stopped);
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
    use LeftState::{Running, Stopped, Unknown};
    assert_eq!(states, [Stopped, Running, Unknown, Unknown]);
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
    assert_eq!(left(&fleet)[1].1, Stopped);
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

#[test]
fn a_host_left_behind_stays_so_when_its_undo_is_tried_again() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let rolling = Strategy::Rolling {
        batch: Batch::Hosts(2),
        max_failures: 1,
        pause: Period(0),
    };
    let first = Stage {
        strategy: rolling,
        ..on("app", vec![stop()])
    };
    fleet.start(vec![first, on("app", vec![start_service()])]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    fleet.finish("b", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    resume_failed(&mut fleet).unwrap();
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    assert_eq!(document["hosts"][0]["quarantined"], true, "INV-5");
}

#[test]
fn a_report_that_comes_before_the_order_is_given_again_is_the_attempt_s_word() {
    // The undo of `a` is to be asked for again once `b` has gone back; it reports before that.
    for late in [ok(), unknown()] {
        let mut fleet = Fleet::new(&["a", "b"]);
        fleet.start(vec![
            on("app", vec![stop()]),
            on("app", vec![start_service()]),
        ]);
        for name in ["a", "b", "b"] {
            fleet.finish(name, ok(), vec![]);
        }
        fleet.finish("a", failed(), vec![]);
        fleet.finish("a", ok(), vec![]);
        fleet.finish("b", failed(), vec![]);
        let lost = fleet.newest("a");
        assert_eq!((lost.direction, lost.at.phase), (Direction::Undo, 0));
        fleet.event(Event::HostDown { host: host("a") });
        fleet.later(60);
        assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
        resume_failed(&mut fleet).unwrap();
        assert_eq!(fleet.newest("b").attempt, 2);
        assert_eq!(fleet.newest("a"), lost, "not yet");
        fleet.report(
            "a",
            ReportBody::Finished {
                key: lost.clone(),
                outcome: late,
                facts: vec![],
                took: Period(5),
            },
        );
        fleet.up("a");
        for _ in 0..2 {
            fleet.finish("b", ok(), vec![]);
        }
        assert_eq!(fleet.newest("a"), lost, "INV-1: it has told what it did");
    }
}

#[test]
fn a_restart_that_failed_is_made_again_and_undone_only_at_the_end_of_a_rollback() {
    let activate = step("release.activate", json!({"app": "a", "release": "r"}));
    let restart = step("service.restart", json!({"service": "web"}));
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![activate, restart])]);
    fleet.finish("a", ok(), vec![]);
    fleet.pause();
    fleet.finish("a", failed(), vec![]);
    let before = fleet.orders.len();
    resume_failed(&mut fleet).unwrap();
    fleet.finish("a", failed(), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(
        orders_since(&fleet, before),
        ["a do 0.1 #2", "a undo 0.0 #1", "a undo 0.1 #1"],
        "INV-6: the service runs what has gone back"
    );
}
