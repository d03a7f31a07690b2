//! What is said, or asked, after the rollout has gone on or has stopped.

use super::levers::{failed_because, run, unknown};
use super::*;

/// Where a rollout stops whose only host was lost with a step that nothing can prove.
fn lost_with_a_blind_step() -> Fleet {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(200);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    assert!(
        fleet.reason(1).contains("lockstep resolve"),
        "{}",
        fleet.reason(1)
    );
    fleet.up("a");
    fleet
}

fn resolve_first(done: bool) -> Call {
    resolve("a", StepRef { phase: 0, step: 0 }, done)
}

#[test]
fn a_lost_blind_step_holds_a_rollback_up_only_until_somebody_says_what_it_did() {
    for done in [true, false] {
        let mut fleet = lost_with_a_blind_step();
        fleet.resume();
        assert_eq!(fleet.state(1), "halted", "nobody has said anything");
        fleet.call("olga", &[], resolve_first(done)).unwrap();
        fleet.resume();
        fleet.surveyed("a", vec![]);
        assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    }
    let late = failed_because(Cause::Refused, false);
    for outcome in [ok(), failed(), late] {
        let mut fleet = lost_with_a_blind_step();
        fleet.finish("a", outcome, vec![]);
        fleet.resume();
        fleet.surveyed("a", vec![]);
        assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    }
}

#[test]
fn a_host_that_contradicts_a_person_is_heard_and_the_word_stays() {
    let mut fleet = lost_with_a_blind_step();
    fleet.call("olga", &[], resolve_first(false)).unwrap();
    fleet.finish("a", ok(), vec![]);
    let events = fleet.coordinator.events(&rollout(1), 0).unwrap();
    let last = &events.last().unwrap().message;
    assert_eq!(
        *last,
        "the host says now that it is done: done; what counts is the word of olga, not done"
    );
}

/// Everything that an agent can name, as it is and as it is not.
fn any_keys(fleet: &Fleet, name: &str) -> Vec<StepKey> {
    let numbers = [0, 1, 2, 3, 9, u16::MAX];
    let directions = [Direction::Do, Direction::Undo, Direction::Probe];
    let steps = numbers.into_iter().flat_map(|phase| {
        let steps = numbers.into_iter();
        steps.map(move |step| StepRef { phase, step })
    });
    let ordered: Vec<_> = fleet.orders.iter().map(|order| &order.key).collect();
    let mut keys = Vec::new();
    for at in steps {
        for direction in directions {
            for attempt in numbers {
                for number in [1, 7] {
                    keys.push(StepKey {
                        rollout: rollout(number),
                        host: host(name),
                        at,
                        direction,
                        attempt,
                    });
                }
            }
        }
    }
    keys.retain(|key| !ordered.contains(&key));
    keys
}

#[test]
fn what_nobody_ordered_is_acknowledged_and_changes_nothing() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![stop()])]);
    // A host that came later: the rollout does not mean it.
    fleet.up("c");
    let events = fleet.coordinator.events(&rollout(1), 0).unwrap().len();
    let before = fleet.coordinator.document(&rollout(1));
    let mut reports = 0;
    for name in ["a", "c"] {
        let mut bodies = Vec::new();
        for key in any_keys(&fleet, name) {
            bodies.push(ReportBody::Started { key: key.clone() });
            for outcome in [ok(), failed()] {
                bodies.push(ReportBody::Finished {
                    key: key.clone(),
                    outcome,
                    facts: vec![state("up")],
                    signatures: vec![],
                    took: Period(u64::MAX),
                });
            }
        }
        let plan = fleet.coordinator.summary(&rollout(1)).unwrap().digest;
        for number in [1, 7] {
            // It has consented, or is not asked.
            bodies.push(ReportBody::Consented {
                rollout: rollout(number),
                plan,
                state: vec![state("down")],
                round: 0,
            });
        }
        for body in bodies {
            reports += 1;
            fleet.report(name, body);
        }
        let info = fleet
            .coordinator
            .hosts()
            .find(|(known, _)| **known == host(name));
        let (_, info) = info.unwrap();
        assert_eq!(info.acknowledged, fleet.reports[&host(name)], "INV-2");
        assert!(info.unasked > 1000, "{}", info.unasked);
    }
    let refused = ReportBody::Declined {
        rollout: rollout(1),
        refusals: vec![],
    };
    fleet.report("c", refused);
    fleet.surveyed("c", vec![state("down")]);
    assert!(reports > 2000);
    let after = fleet.coordinator.events(&rollout(1), 0).unwrap().len();
    assert_eq!(after, events, "nobody is told");
    assert_eq!(fleet.coordinator.document(&rollout(1)), before);

    // What was ordered counts as ever, and a journal with all of it is read again.
    fleet.restart();
    for name in ["a", "b"] {
        let key = fleet.newest(name);
        fleet.report(name, ReportBody::Started { key });
        fleet.finish(name, ok(), vec![]);
        fleet.finish(name, failed(), vec![]);
    }
    assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
    let numbers = fleet.coordinator.events(&rollout(1), 0).unwrap();
    assert!(numbers.len() < events + 20, "{numbers:#?}");
}

#[test]
fn a_host_repeats_itself_and_nobody_hears_it_twice() {
    let mut fleet = lost_with_a_blind_step();
    fleet.call("olga", &[], resolve_first(false)).unwrap();
    let events = |fleet: &Fleet| fleet.coordinator.events(&rollout(1), 0).unwrap().len();
    let before = events(&fleet);
    for _ in 0..10 {
        fleet.finish("a", ok(), vec![]);
        let key = fleet.newest("a");
        fleet.report("a", ReportBody::Started { key });
        fleet.consent(1, "a", vec![]);
        let rollout = rollout(1);
        let refusals = vec![];
        fleet.report("a", ReportBody::Declined { rollout, refusals });
    }
    // The contradiction, that it began, and that it refuses.
    assert_eq!(events(&fleet), before + 3);
}

#[test]
fn the_last_number_of_all_is_no_end_of_the_controller() {
    let mut fleet = Fleet::new(&["a"]);
    let now = Timestamp(fleet.now);
    let effects = fleet
        .coordinator
        .skip_lost_reports(now, &host("a"), u64::MAX);
    fleet.take(effects);
    for number in [0, 1, u64::MAX] {
        fleet.reports.insert(host("a"), number.wrapping_sub(1));
        let key = StepKey {
            rollout: rollout(1),
            host: host("a"),
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt: 1,
        };
        fleet.event(Event::Report {
            host: host("a"),
            report: Report {
                number,
                body: ReportBody::Started { key },
                head: None,
            },
        });
    }
}

fn surveys(fleet: &Fleet) -> usize {
    let is = |(_, message): &&(HostId, Message)| matches!(message, Message::Survey { .. });
    fleet.sent.iter().filter(is).count()
}

/// Two hosts that were `up`, and have undone what failed.
fn undone() -> Fleet {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![state("up")]);
    }
    for outcome in [failed(), ok()] {
        fleet.finish("a", outcome.clone(), vec![]);
        fleet.finish("b", outcome, vec![]);
    }
    assert_eq!(fleet.state(1), "rolling_back");
    fleet
}

#[test]
fn a_host_that_did_not_say_its_state_in_time_is_asked_again() {
    let go_on: [fn(&mut Fleet); 2] = [Fleet::resume, |fleet| {
        let reason = "again".into();
        let rollout = rollout(1);
        let call = Call::RollBack { rollout, reason };
        fleet.call("olga", &[], call).unwrap();
    }];
    for go_on in go_on {
        let mut fleet = undone();
        fleet.surveyed("a", vec![state("up")]);
        fleet.later(61);
        assert_eq!(fleet.state(1), "halted");
        let before = surveys(&fleet);
        go_on(&mut fleet);
        assert_eq!(surveys(&fleet), before + 2);
        for name in ["a", "b"] {
            fleet.surveyed(name, vec![state("up")]);
        }
        assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    }
}

#[test]
fn what_a_host_said_before_a_resume_is_no_proof_after_it() {
    let mut fleet = undone();
    fleet.surveyed("a", vec![state("up")]);
    fleet.surveyed("b", vec![state("down")]);
    assert_eq!(fleet.state(1), "halted");
    fleet.resume();
    let note = Fact::Note {
        name: "not surveyed".into(),
        value: "the manager does not answer".into(),
    };
    fleet.surveyed("a", vec![note]);
    fleet.surveyed("b", vec![state("up")]);
    assert_eq!(fleet.state(1), "halted", "INV-6");
    assert!(
        fleet
            .reason(1)
            .contains("a: service web: was up, not reported now: the manager does not answer"),
        "{}",
        fleet.reason(1)
    );
}

#[test]
fn resume_does_not_repeat_a_check_whose_requests_nobody_can_account_for() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    let check = step(
        "check.http",
        json!({"url": "http://127.0.0.1:8000/", "method": "POST"}),
    );
    plan.after_rollback = Some(after_rollback(check));
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    for outcome in [failed(), ok(), unknown()] {
        fleet.finish("a", outcome, vec![]);
    }
    assert_eq!(fleet.state(1), "halted");
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 1, "INV-1");
    assert_eq!(fleet.state(1), "halted");
    let resolved = resolve("a", fleet.newest("a").at, false);
    fleet.call("olga", &[], resolved).unwrap();
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 2);
}

#[test]
fn what_runs_under_an_accepted_rollout_is_not_stopped_when_its_host_comes_back() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    let key = fleet.newest("a");
    fleet.report("a", ReportBody::Started { key });
    fleet.later(3600);
    assert_eq!(fleet.state(1), "halted");
    let close = Call::Close {
        rollout: rollout(1),
        reason: "it may run on".into(),
    };
    fleet.call("olga", &[], close).unwrap();
    fleet.event(Event::HostDown { host: host("a") });
    let before = fleet.sent.len();
    fleet.up_holding("a", Some(rollout(1)));
    let sent: Vec<&Message> = fleet.sent[before..].iter().map(|(_, it)| it).collect();
    let is = |wanted: fn(&Message) -> bool| sent.iter().any(|message| wanted(message));
    assert!(is(|message| matches!(message, Message::Release { .. })));
    assert!(!is(|message| matches!(message, Message::Cancel { .. })));
}

#[test]
fn a_host_that_consents_to_what_this_controller_never_knew_is_let_go() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.report(
        "a",
        ReportBody::Consented {
            rollout: rollout(7),
            plan: seal(plan(7, vec![on("app", vec![stop()])]))
                .unwrap()
                .digest(),
            state: vec![],
            round: 0,
        },
    );
    let released = |(_, message): &(HostId, Message)| matches!(message, Message::Release { rollout: of, .. } if *of == rollout(7));
    assert!(
        fleet.sent.iter().any(released),
        "INV-8: nothing stays locked"
    );
}

#[test]
fn a_window_is_waited_for_until_the_deadline_that_a_resume_has_moved() {
    let minutes = |from: u64, fleet: &mut Fleet| fleet.later(from * 60);
    let window = json!({"days": ["thu"], "utc": "02:00-03:00"});
    let mut fleet = Fleet::new(&["a"]);
    // It is 00:16 on a Thursday; the deadline is an hour.
    fleet.start(vec![on("controller", vec![step("gate.window", window)])]);
    for _ in 0..2 {
        minutes(40, &mut fleet);
        fleet.pause();
        fleet.resume();
        assert_eq!(fleet.state(1), "running", "{}", fleet.reason(1));
    }
    minutes(40, &mut fleet);
    assert_eq!(fleet.state(1), "succeeded", "it is 02:16");
}
