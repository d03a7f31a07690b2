//! What comes between an event and all that follows from it: deadlines, and other events.

use super::*;

/// Three hosts with two steps of one stage, at work on the first.
fn at_work(deadline: Period) -> Fleet {
    let mut fleet = Fleet::new(&["a", "b", "c"]);
    let mut plan = plan(1, vec![on("app", vec![stop(), stop()])]);
    plan.deadline = deadline;
    fleet.submit(1, plan).unwrap();
    for name in ["a", "b", "c"] {
        fleet.consent(1, name, vec![]);
    }
    fleet
}

/// The result of a host's first step, as its report.
fn result(fleet: &Fleet, name: &str, outcome: StepOutcome) -> Event {
    let body = ReportBody::Finished {
        key: fleet.newest(name),
        outcome,
        facts: vec![],
        signatures: vec![],
        took: Period(5),
    };
    let report = Report {
        number: 2,
        body,
        head: None,
    };
    Event::Report {
        host: host(name),
        report,
    }
}

fn taken(fleet: &mut Fleet, event: Event) {
    let mut effects = Effects::default();
    let now = Timestamp(fleet.now);
    fleet.coordinator.take(now, event, &mut effects);
    fleet.take(effects);
}

fn settled(fleet: &mut Fleet) {
    let mut effects = Effects::default();
    let now = Timestamp(fleet.now);
    fleet.coordinator.settle_up(now, &mut effects);
    fleet.take(effects);
}

/// Which first and second steps were ordered, forward.
fn forward(fleet: &Fleet) -> Vec<(String, u16)> {
    let orders = fleet.orders.iter();
    let forward = orders.filter(|order| order.key.direction == Direction::Do);
    let place = |order: &Order| (order.key.host.to_string(), order.key.at.step);
    forward.map(place).collect()
}

fn firsts() -> Vec<(String, u16)> {
    ["a", "b", "c"].map(|name| (name.to_owned(), 0)).to_vec()
}

#[test]
fn a_report_after_the_deadline_moves_nothing_forward() {
    let mut fleet = at_work(Period::seconds(20));
    // Nobody has looked at the time since.
    fleet.now += 20_000;
    let report = result(&fleet, "a", ok());
    taken(&mut fleet, report);
    settled(&mut fleet);
    assert_eq!(forward(&fleet), firsts(), "INV-8");
    assert_eq!(fleet.state(1), "halted");
}

#[test]
fn a_report_that_comes_with_a_failure_moves_nothing_forward() {
    let mut fleet = at_work(Period::seconds(3600));
    for (name, outcome) in [("a", failed()), ("b", ok())] {
        let report = result(&fleet, name, outcome);
        taken(&mut fleet, report);
    }
    settled(&mut fleet);
    assert_eq!(forward(&fleet), firsts(), "INV-5");
    assert_eq!(fleet.state(1), "rolling_back");
}

#[test]
fn a_person_who_speaks_with_a_failure_speaks_of_what_has_followed() {
    let mut fleet = at_work(Period::seconds(3600));
    let report = result(&fleet, "a", failed());
    taken(&mut fleet, report);
    let pause = Event::Operator {
        operator: "olga".into(),
        groups: vec![],
        call: Call::Pause {
            rollout: rollout(1),
        },
    };
    taken(&mut fleet, pause);
    let rolls_back = |entry: &Entry| matches!(entry.record, Record::RollbackStarted { .. });
    let pauses = |entry: &Entry| matches!(entry.record, Record::Paused { .. });
    let began = fleet.journal.iter().position(rolls_back);
    let paused = fleet.journal.iter().position(pauses);
    assert!(began.is_some() && began < paused, "{began:?} {paused:?}");
}

#[test]
fn a_step_that_has_begun_is_given_up_by_its_own_time() {
    let mut fleet = at_work(Period::seconds(3600));
    let key = fleet.newest("a");
    fleet.report("a", ReportBody::Started { key });
    // Its timeout and the report's grace: sooner than an order lives that nobody has begun.
    let due = fleet.coordinator.next_deadline().unwrap();
    assert!(due.0 <= fleet.now + 50_000, "INV-8: {}", due.0 - fleet.now);
}

#[test]
fn a_host_that_refuses_leaves_the_others_a_moment() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    let refused = ReportBody::Declined {
        rollout: rollout(1),
        refusals: vec![],
    };
    fleet.report("a", refused);
    let due = fleet.coordinator.next_deadline().unwrap();
    assert!(due.0 <= fleet.now + 2_000, "INV-8: {}", due.0 - fleet.now);
}

#[test]
fn a_late_word_on_an_earlier_step_opens_no_later_wave() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let rolling = one_by_one(0);
    let run = step("exec.run", json!({"name": "x", "argv": ["x"]}));
    let mut waves = on("app", vec![stop()]);
    waves.strategy = rolling;
    fleet.start(vec![on("app", vec![run]), waves]);
    fleet.pause();
    let late = fleet.newest("b");
    let why = "the step process was killed".into();
    fleet.finish("b", StepOutcome::Unknown { why }, vec![]);
    let resolved = resolve("b", late.at, true);
    fleet.call("olga", &[], resolved).unwrap();
    fleet.finish("a", ok(), vec![]);
    fleet.resume();
    assert_eq!(fleet.newest("a").at.phase, 1, "the first wave is at work");
    let word = ReportBody::Finished {
        key: late,
        outcome: ok(),
        facts: vec![],
        signatures: vec![],
        took: Period(5),
    };
    fleet.report("b", word);
    assert_eq!(fleet.newest("b").at.phase, 0, "its wave is not open");
}

/// What was due of the first step comes later than what is due of the second.
#[test]
fn a_next_step_with_less_time_is_given_up_in_its_own() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let mut slow = stop();
    slow.timeout = Period::seconds(600);
    fleet.start(vec![on("app", vec![slow, stop()])]);
    for name in ["a", "b"] {
        let key = fleet.newest(name);
        fleet.report(name, ReportBody::Started { key });
    }
    fleet.later(300);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.newest("a").at.step, 1, "its next step");
    let due = fleet.coordinator.next_deadline().unwrap();
    assert!(due.0 < fleet.now + 200_000, "{} ms", due.0 - fleet.now);
}
