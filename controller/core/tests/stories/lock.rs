//! The lock while a gate waits: freed, taken by others, taken again, and what is then still true.

use super::*;

fn releasing(gate: &str, mut args: serde_json::Value) -> Step {
    args["lock"] = json!("release");
    step(gate, args)
}

fn asks() -> Step {
    releasing(
        "gate.approval",
        json!({"from": {"dba": 1}, "timeout": "30m"}),
    )
}

fn look() -> Step {
    step("check.disk", json!({"path": "/", "free": "1B"}))
}

fn sql(text: &str) -> Fact {
    Fact::SqlPlan {
        database: "d".into(),
        from: "1".into(),
        to: "2".into(),
        digest: Digest::of(text.as_bytes()),
        sql: text.into(),
        tool: None,
        files: None,
        opaque: vec![],
        hazards: vec![],
    }
}

fn window(utc: &str) -> Step {
    // Every story begins on a Thursday at 00:16:40.
    releasing("gate.window", json!({"days": ["thu"], "utc": utc}))
}

fn waits() -> Step {
    releasing("gate.wait", json!({"for": "10m"}))
}

/// Looks, asks, and then stops a service.
fn stages() -> Vec<Stage> {
    vec![
        on("app", vec![look()]),
        on("controller", vec![asks()]),
        on("app", vec![stop()]),
    ]
}

impl Fleet {
    fn consent_in(&mut self, round: u32, number: u8, name: &str, state: Vec<Fact>) {
        let plan = self.coordinator.summary(&rollout(number)).unwrap().digest;
        self.report(
            name,
            ReportBody::Consented {
                rollout: rollout(number),
                plan,
                state,
                round,
            },
        );
    }

    /// What the newest gate asks about.
    fn asked(&self) -> Digest {
        let mut newest = self.journal.iter().rev();
        let asked = newest.find_map(|entry| match &entry.record {
            Record::GateOpened { evidence, .. } | Record::GateReopened { evidence, .. } => {
                Some(*evidence)
            }
            _ => None,
        });
        asked.expect("a gate is open")
    }

    fn locked_by(&self, name: &str) -> Option<RolloutId> {
        self.coordinator.locked_by(&host(name)).cloned()
    }

    /// Starts rollout 1 up to its gate.
    fn come_to_the_gate(&mut self, before: &str) {
        self.submit(1, plan(1, stages())).unwrap();
        self.consent(1, "a", vec![state(before)]);
        self.finish("a", ok(), vec![]);
    }

    fn rounds(&self) -> Vec<u32> {
        let offers = self.sent.iter().filter_map(|(_, message)| match message {
            Message::Offer {
                rollout: of, round, ..
            } if *of == rollout(1) => Some(*round),
            _ => None,
        });
        offers.collect()
    }

    fn reopened(&self) -> usize {
        self.count(|it| matches!(it, Record::GateReopened { .. }))
    }

    fn count(&self, what: fn(&Record) -> bool) -> usize {
        let records = self.journal.iter().map(|entry| &entry.record);
        records.filter(|record| what(record)).count()
    }
}

#[test]
fn a_gate_frees_the_hosts_and_takes_them_again_before_anything_goes_on() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.come_to_the_gate("up");
    assert_eq!(fleet.locked_by("a"), None);
    let freed = |(_, message): &(HostId, Message)| matches!(message, Message::Release { comes_back: true, rollout: of, .. } if *of == rollout(1));
    assert!(fleet.sent.iter().any(freed), "the host may hold for others");
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert_eq!(fleet.locked_by("a"), Some(rollout(1)));
    assert_eq!(fleet.rounds(), [0, 1], "consent is asked for anew");
    assert_eq!(fleet.orders.len(), 1, "nothing is ordered before it");

    // A consent that was under way since the first time is none for this one.
    fleet.consent_in(0, 1, "a", vec![state("up")]);
    assert_eq!(fleet.orders.len(), 1);
    fleet.restart();
    fleet.up("a");
    fleet.consent_in(1, 1, "a", vec![state("up")]);
    let again = fleet.newest("a");
    assert_eq!((again.at.phase, again.attempt), (0, 2), "it looks again");
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.newest("a").at.phase, 2);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    assert_eq!(
        fleet.count(|it| matches!(it, Record::LockReleased { .. })),
        1
    );
    assert_eq!(
        fleet.count(|it| matches!(it, Record::GateReopened { .. })),
        0
    );
}

#[test]
fn another_rollout_takes_the_hosts_and_the_first_waits_for_them() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.come_to_the_gate("up");
    fleet
        .submit(2, plan(2, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(2, "a", vec![state("up")]);
    assert_eq!(fleet.locked_by("a"), Some(rollout(2)));
    let missing = fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert!(
        matches!(&missing, Answer::Missing(what) if what.contains("another rollout")),
        "{missing:?}"
    );
    assert_eq!(fleet.rounds(), [0]);
    let refused = fleet.submit(3, plan(3, vec![on("app", vec![stop()])]));
    assert!(matches!(refused, Err(Refused::Locked(_))));

    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(2), "succeeded");
    assert_eq!(fleet.locked_by("a"), Some(rollout(1)), "it was waiting");
    assert_eq!(fleet.rounds(), [0, 1]);

    // The other one has changed what people saw: they are asked again, and the host is free.
    fleet.consent_in(1, 1, "a", vec![state("down")]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(
        fleet.count(|it| matches!(it, Record::GateReopened { .. })),
        1
    );
    assert_eq!(fleet.locked_by("a"), None);
    assert_eq!(fleet.newest("a").at.phase, 0, "nothing goes on");
    let events = fleet.coordinator.events(&rollout(1), 0).unwrap();
    let said =
        |event: &Arc<lockstep_core::RolloutEvent>| event.message.contains("was up and is down");
    assert!(events.iter().any(said), "{events:#?}");

    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert_eq!(fleet.rounds(), [0, 1, 2]);
    fleet.consent_in(2, 1, "a", vec![state("down")]);
    assert_eq!(fleet.newest("a").attempt, 3);
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
}

#[test]
fn sql_that_is_another_than_was_shown_is_shown_again() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.submit(1, plan(1, stages())).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("one")]);
    let first = fleet.asked();
    fleet.decide("dana", &["dba"], first).unwrap();
    fleet.consent_in(1, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    let second = fleet.asked();
    assert_ne!(first, second, "INV-12");
    assert!(fleet.decide("dana", &["dba"], first).is_err());
    fleet.decide("dana", &["dba"], second).unwrap();
    fleet.consent_in(2, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.newest("a").at.phase, 2);
    let bound = &fleet.orders.last().unwrap().bindings;
    assert!(bound.is_empty(), "what was seen before is bound no more");
}

#[test]
fn an_earlier_decision_is_void_too() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![
        on("controller", vec![approval(), waits()]),
        on("app", vec![stop()]),
    ]);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert_eq!(fleet.locked_by("a"), None);
    fleet.later(601);
    fleet.consent_in(1, 1, "a", vec![state("other")]);
    assert_eq!(
        fleet.count(|it| matches!(it, Record::GateReopened { .. })),
        1
    );
    assert!(fleet.orders.is_empty());
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.later(601);
    fleet.consent_in(2, 1, "a", vec![state("other")]);
    assert_eq!(fleet.orders.len(), 1);
}

#[test]
fn a_broken_glass_is_void_too() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![
        on("app", vec![look()]),
        on("controller", vec![approval(), waits()]),
        on("app", vec![stop()]),
    ]);
    fleet.finish("a", ok(), vec![sql("one")]);
    let one = fleet.asked();
    for who in ["ira", "joe"] {
        fleet.break_glass(who, &["incident"]).unwrap();
    }
    assert_eq!(fleet.locked_by("a"), None);
    fleet.later(601);
    fleet.consent_in(1, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.reopened(), 1, "INV-12");
    assert_eq!(
        fleet
            .coordinator
            .document(&rollout(1))
            .unwrap()
            .get("break_glass"),
        None
    );
    fleet.later(601);
    assert_eq!(
        fleet.newest("a").at.phase,
        0,
        "nobody has seen the other SQL"
    );
    assert!(fleet.decide("dana", &["dba"], one).is_err());
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.later(601);
    fleet.consent_in(2, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.newest("a").at.phase, 2);
}

#[test]
fn nobody_decides_at_a_gate_before_the_rollout_is_there_again() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![
        on("controller", vec![asks()]),
        on("app", vec![look()]),
        on("controller", vec![asks()]),
        on("app", vec![stop()]),
    ]);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.consent_in(1, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    let early = fleet.asked();
    // What the first gate was met for is no more, while people look at the second one.
    fleet.decide("dana", &["dba"], early).unwrap();
    fleet.consent_in(2, 1, "a", vec![state("two")]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.reopened(), 1);
    let second = Call::Decide {
        rollout: rollout(1),
        gate: Some(StepRef { phase: 2, step: 0 }),
        evidence: early,
        approve: true,
        items: vec![],
        comment: String::new(),
        signed: None,
    };
    let refused = fleet.call("dana", &["dba"], second);
    assert!(matches!(refused, Err(Refused::NotNow(_))), "{refused:?}");
    // And it changes once more before anybody has seen it there.
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.consent_in(3, 1, "a", vec![state("three")]);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.consent_in(4, 1, "a", vec![state("three")]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.orders.last().unwrap().key.at.phase, 1, "INV-12");
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.consent_in(5, 1, "a", vec![state("three")]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.newest("a").at.phase, 3);
}

#[test]
fn what_is_shown_after_a_gate_voids_no_decision_at_it() {
    let between = |second: Step| {
        let mut fleet = Fleet::new(&["a"]);
        fleet.start(vec![
            on("controller", vec![asks()]),
            on("app", vec![look()]),
            on("controller", vec![second]),
            on("app", vec![stop()]),
        ]);
        fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
        fleet.consent_in(1, 1, "a", vec![]);
        assert_eq!(fleet.newest("a").at.phase, 1);
        fleet.finish("a", ok(), vec![sql("one")]);
        fleet
    };
    // A second gate that is met when it is come to.
    let fleet = between(window("00:00-24:00"));
    assert_eq!(fleet.reopened(), 0);
    assert_eq!(fleet.newest("a").at.phase, 3);

    // One that waits: people are asked once again, and only once, for what has changed.
    let mut fleet = between(waits());
    fleet.later(601);
    fleet.consent_in(2, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.reopened(), 1);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.consent_in(3, 1, "a", vec![]);
    assert_eq!(fleet.reopened(), 1, "the SQL is shown after this gate");
    fleet.finish("a", ok(), vec![sql("two")]);
    fleet.later(601);
    fleet.consent_in(4, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.reopened(), 1);
    assert_eq!(fleet.newest("a").at.phase, 3);
}

#[test]
fn a_window_that_has_closed_meanwhile_does_not_hide_what_has_changed() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![
        on("app", vec![look()]),
        on("controller", vec![approval(), window("00:20-00:22")]),
        on("app", vec![stop()]),
    ]);
    fleet.finish("a", ok(), vec![sql("one")]);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    fleet.later(290);
    fleet.later(40);
    fleet.consent_in(1, 1, "a", vec![]);
    fleet.finish("a", ok(), vec![sql("two")]);
    assert_eq!(fleet.reopened(), 1, "INV-12");
    assert_eq!(fleet.locked_by("a"), Some(rollout(1)), "the approval holds");
}

#[test]
fn a_rollout_that_has_freed_its_hosts_ends_without_touching_them() {
    type End = fn(&mut Fleet);
    let reject: End = |fleet| {
        let call = Call::Decide {
            rollout: rollout(1),
            gate: None,
            evidence: fleet.asked(),
            approve: false,
            items: vec![],
            comment: "no".into(),
            signed: None,
        };
        fleet.call("dana", &["dba"], call).unwrap();
    };
    let cancel: End = |fleet| {
        let reason = "no more".to_owned();
        let rollout = rollout(1);
        fleet
            .call("olga", &[], Call::Cancel { rollout, reason })
            .unwrap();
    };
    let deadline: End = |fleet| {
        fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
        fleet.later(3601);
    };
    let ends: [(&str, End); 4] = [
        ("rejected by dana", reject),
        ("timed out", |fleet| fleet.later(1801)),
        ("cancelled by olga", cancel),
        ("deadline", deadline),
    ];
    for (why, end) in ends {
        let mut fleet = Fleet::new(&["a"]);
        fleet.come_to_the_gate("up");
        fleet
            .submit(2, plan(2, vec![on("app", vec![stop()])]))
            .unwrap();
        fleet.consent(2, "a", vec![]);
        let mine = |fleet: &Fleet| {
            let orders = fleet.orders.iter();
            orders.filter(|it| it.key.rollout == rollout(1)).count()
        };
        let (orders, sent) = (mine(&fleet), fleet.sent.len());
        let undo = Call::RollBack {
            rollout: rollout(1),
            reason: "x".into(),
        };
        let refused = fleet.call("olga", &[], undo).unwrap_err();
        assert!(refused.to_string().contains("lockstep cancel"), "{refused}");
        end(&mut fleet);
        assert_eq!(fleet.state(1), "cancelled", "{why}");
        assert!(fleet.reason(1).contains(why), "{}", fleet.reason(1));
        assert_eq!(mine(&fleet), orders, "{why}");
        let survey = |(_, message): &(HostId, Message)| matches!(message, Message::Survey { rollout: of, .. } if *of == rollout(1));
        assert!(!fleet.sent[sent..].iter().any(survey), "{why}");
        if fleet.state(2) == "running" {
            assert_eq!(fleet.locked_by("a"), Some(rollout(2)), "{why}");
        }
    }
}

#[test]
fn a_host_that_has_not_heard_of_it_is_told_when_it_is_back() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.come_to_the_gate("up");
    fleet.sent.clear();
    fleet.restart();
    fleet.up_holding("a", Some(rollout(1)));
    let freed = |(_, message): &(HostId, Message)| {
        matches!(
            message,
            Message::Release {
                comes_back: true,
                ..
            }
        )
    };
    assert!(fleet.sent.iter().any(freed));
    let no_offer = |(_, message): &(HostId, Message)| matches!(message, Message::Offer { .. });
    assert!(!fleet.sent.iter().any(no_offer));
}

#[test]
fn a_paused_rollout_takes_nothing_and_a_resumed_one_is_still_free() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.come_to_the_gate("up");
    fleet.pause();
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert_eq!(fleet.locked_by("a"), None);
    fleet.resume();
    assert_eq!(fleet.locked_by("a"), Some(rollout(1)));

    // Paused for longer than the gate waits: it opens anew.
    let mut fleet = Fleet::new(&["a"]);
    fleet.come_to_the_gate("up");
    fleet.pause();
    fleet.later(1900);
    fleet.resume();
    assert_eq!(fleet.locked_by("a"), None);
    fleet.decide("dana", &["dba"], fleet.asked()).unwrap();
    assert_eq!(fleet.locked_by("a"), Some(rollout(1)));
    fleet.consent_in(1, 1, "a", vec![state("up")]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.newest("a").at.phase, 2);
}
