//! Going on after a pause or a halt, with the hosts that failed.

use lockstep_proto::plan::Batch;

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

pub(super) fn unknown() -> StepOutcome {
    StepOutcome::Unknown {
        why: "the step process was killed".into(),
    }
}

pub(super) fn failed_because(cause: Cause, changed: bool) -> StepOutcome {
    StepOutcome::Failed(Failure {
        cause,
        message: "no".into(),
        hint: None,
        last_lines: vec![],
        changed,
    })
}

pub(super) fn run() -> Step {
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
        let resolve = resolve("a", StepRef { phase: 0, step: 0 }, true);
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
                signatures: vec![],
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
