//! The way back.

use lockstep_proto::ids::LossId;

use super::levers::failed_because;
use super::*;

#[test]
fn a_failure_is_undone_beginning_with_the_failed_step() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let start = step("service.start", json!({"service": "web"}));
    fleet
        .submit(
            1,
            plan(1, vec![on("app", vec![stop()]), on("app", vec![start])]),
        )
        .unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![state("up")]);
    }
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.orders.len(), 2, "INV-3: b has not closed the phase");
    fleet.finish("b", ok(), vec![]);
    fleet.finish("a", failed(), vec![]);
    assert_eq!(fleet.state(1), "rolling_back");
    assert_eq!(
        fleet.orders.len(),
        4,
        "b is still at work: nothing is undone yet"
    );
    fleet.finish("b", ok(), vec![]);
    let undone: Vec<String> = fleet.orders[4..]
        .iter()
        .map(|order| format!("{} {}", order.key.host, order.key.at))
        .collect();
    assert_eq!(undone, ["a 1.0", "b 1.0"]);
    for name in ["a", "b", "a", "b"] {
        assert_eq!(fleet.newest(name).direction, Direction::Undo);
        fleet.finish(name, ok(), vec![]);
    }
    for name in ["a", "b"] {
        fleet.surveyed(name, vec![state("up")]);
    }
    assert_eq!(fleet.state(1), "rolled_back");
    assert!(
        fleet
            .reason(1)
            .contains("a failed in phase `p1`: service.start (step 1.0, line 7)")
    );
}

#[test]
fn a_state_that_is_not_as_before_halts_with_the_exact_list_and_keeps_the_lock() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![state("up")]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.surveyed("a", vec![state("down")]);
    assert_eq!(fleet.state(1), "halted");
    assert!(
        fleet.reason(1).contains("a: service web: was up, is down"),
        "{}",
        fleet.reason(1)
    );
    assert!(
        fleet
            .submit(2, plan(2, vec![on("app", vec![stop()])]))
            .is_err()
    );
    let close = Call::Close {
        rollout: rollout(1),
        reason: "replaced by hand".into(),
    };
    fleet.call("olga", &[], close).unwrap();
    fleet
        .submit(3, plan(3, vec![on("app", vec![stop()])]))
        .unwrap();
}

#[test]
fn resume_after_a_halt_tries_the_failed_undo_again() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("a", failed(), vec![]);
    assert_eq!(fleet.state(1), "halted");
    assert!(
        fleet
            .reason(1)
            .contains("not undone: a: undo of service.stop"),
        "{}",
        fleet.reason(1)
    );
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 2);
    fleet.finish("a", ok(), vec![]);
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back");
}

#[test]
fn resume_asks_a_failed_check_after_a_rollback_again() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    let check = step("check.disk", json!({"path": "/", "free": "1B"}));
    plan.after_rollback = Some(after_rollback(check));
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    for outcome in [failed(), ok(), failed()] {
        fleet.finish("a", outcome, vec![]);
    }
    assert_eq!(fleet.state(1), "halted");
    fleet.resume();
    assert_eq!(
        (fleet.newest("a").at.phase, fleet.newest("a").attempt),
        (1, 2)
    );
    fleet.finish("a", ok(), vec![]);
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back");
}

#[test]
fn a_rollback_gives_no_forward_order_new_life() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    fleet.event(Event::HostDown { host: host("b") });
    fleet.finish("a", failed(), vec![]);
    assert_eq!(fleet.state(1), "rolling_back");
    let before = fleet.orders.len();
    fleet.restart();
    fleet.up("b");
    let given: Vec<_> = fleet.orders[before..]
        .iter()
        .map(|order| order.key.direction)
        .collect();
    assert!(!given.contains(&Direction::Do), "INV-6: {given:?}");
}

#[test]
fn restarts_are_undone_last() {
    let mut fleet = Fleet::new(&["a"]);
    let activate = step("release.activate", json!({"app": "a", "release": "r"}));
    let restart = step("service.restart", json!({"service": "web"}));
    let fails = step("check.disk", json!({"path": "/", "free": "1B"}));
    let stages = vec![on("app", vec![activate, restart]), on("app", vec![fails])];
    fleet.start(stages);
    for outcome in [ok(), ok(), failed()] {
        fleet.finish("a", outcome, vec![]);
    }
    assert_eq!(fleet.newest("a").at.step, 0, "the link goes back first");
    fleet.finish("a", ok(), vec![]);
    assert_eq!(
        fleet.newest("a").at.step,
        1,
        "then the service runs what is there"
    );
}

/// Services stop, one host migrates, services start; then a check.
fn migration_plan() -> Vec<Stage> {
    let migrate =
        json!({"tool": "alembic", "app": "a", "release": "r", "database": "d", "dir": "b"});
    let mut one = on("app", vec![step("migration.apply", migrate)]);
    one.target = Target::OneOf(vec!["app".into()]);
    let start = step("service.start", json!({"service": "web"}));
    let check = step("check.disk", json!({"path": "/", "free": "1B"}));
    vec![
        on("app", vec![stop()]),
        one,
        on("app", vec![start]),
        on("app", vec![check]),
    ]
}

#[test]
fn nothing_goes_back_past_data_that_stays() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(migration_plan());
    for name in ["a", "b", "a", "a", "b", "a"] {
        fleet.finish(name, ok(), vec![]);
    }
    fleet.finish("b", failed(), vec![]);
    // The elected host cannot even undo what came after the migration.
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    assert_eq!(fleet.state(1), "halted");
    let undone = fleet
        .orders
        .iter()
        .filter(|order| order.key.direction == Direction::Undo);
    let earliest = undone.map(|order| order.key.at.phase).min();
    assert_eq!(
        earliest,
        Some(2),
        "INV-6: the old release must not start on the new schema"
    );
    let left = "what stays: a: service.start (2.0), migration.apply (1.0), service.stop (0.0); \
                b: service.stop (0.0)";
    assert!(fleet.reason(1).contains(left), "{}", fleet.reason(1));
}

#[test]
fn an_undo_that_would_lose_rows_goes_on_once_a_person_has_accepted_just_that() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(migration_plan()[1..2].to_vec());
    let newest = fleet.newest("a");
    fleet.finish("a", failed(), vec![]);
    let undo = fleet.newest("a");
    assert_eq!((undo.at, undo.direction), (newest.at, Direction::Undo));
    let loss = |line: &str| LossId::of(&undo, &[line.to_owned()]);
    let one = loss("1 row");
    let accept = |loss: &LossId, signed| Call::AcceptLoss {
        rollout: rollout(1),
        host: host("a"),
        at: undo.at,
        loss: loss.clone(),
        reason: "they are tests".into(),
        signed,
    };
    let not_now = |fleet: &mut Fleet, loss: &LossId, signed, why: &str| {
        let refused = fleet.call("olga", &[], accept(loss, signed)).unwrap_err();
        assert!(matches!(refused, Refused::NotNow(_)), "{refused}");
        assert!(refused.to_string().contains(why), "{refused}");
    };
    not_now(&mut fleet, &one, None, "has refused to lose anything");
    let mut refuses = failed_because(Cause::Refused, false);
    if let StepOutcome::Failed(failure) = &mut refuses {
        failure.message = format!("rows. Lost would be {} 1 row", one.shown());
    }
    fleet.finish("a", refuses, vec![]);
    assert_eq!(fleet.state(1), "halted");
    not_now(&mut fleet, &loss("2 rows"), None, "look again");
    let signed = Some((newest, "armour".to_owned()));
    not_now(&mut fleet, &one, signed, "what was signed is about");
    let signed = Some((undo.clone(), "armour".to_owned()));
    fleet.call("olga", &[], accept(&one, signed)).unwrap();
    assert_eq!(fleet.state(1), "halted", "nothing goes on by itself");
    fleet.restart();
    fleet.up("a");
    fleet.resume();
    let order = fleet.orders.last().unwrap();
    assert_eq!((order.key.at, order.key.attempt), (undo.at, 2));
    let given = &order.bindings[0];
    assert_eq!(
        (&given.origin, &given.signature),
        (&undo, &Some("armour".to_owned()))
    );
    let by = "olga".to_owned();
    assert_eq!(given.fact, Fact::LossAccepted { loss: one, by });
    fleet.finish("a", ok(), vec![]);
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    let document = fleet.coordinator.document(&rollout(1)).unwrap().to_string();
    assert!(
        document.contains(r#""reason":"they are tests""#),
        "{document}"
    );
}

#[test]
fn a_rollback_after_a_halt_has_time_for_what_was_not_begun() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    plan.deadline = Period::seconds(300);
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.finish("a", failed(), vec![]);
    assert_eq!(fleet.newest("a").direction, Direction::Undo);
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(300);
    assert_eq!(fleet.state(1), "halted");
    let back = Call::RollBack {
        rollout: rollout(1),
        reason: "the host is back".into(),
    };
    fleet.call("olga", &[], back).unwrap();
    assert_eq!(fleet.state(1), "rolling_back", "{}", fleet.reason(1));
}

#[test]
fn a_state_that_nobody_asked_for_changes_nothing() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![state("up")]);
    }
    let compared = |fleet: &Fleet| {
        let document = fleet.coordinator.document(&rollout(1)).unwrap();
        document["state_compared"].clone()
    };
    let unasked = |fleet: &mut Fleet, what: &str| {
        let before = (fleet.unasked, compared(fleet));
        fleet.surveyed("a", vec![state("forged")]);
        assert_eq!(
            (fleet.unasked, compared(fleet)),
            (before.0 + 1, before.1),
            "{what}"
        );
    };
    unasked(&mut fleet, "nothing has gone back");
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    unasked(&mut fleet, "it is being undone");
    for name in ["a", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    fleet.surveyed("a", vec![state("up")]);
    assert_eq!(fleet.unasked, 2, "it was asked");
    unasked(&mut fleet, "it has said so already");
    // The other one is silent, and says it late.
    fleet.later(61);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    unasked(&mut fleet, "it has ended");
    fleet.surveyed("b", vec![state("down")]);
    assert_eq!(fleet.unasked, 4);
    assert_eq!(compared(&fleet)[1]["after_text"], "down");
    let document = fleet.coordinator.document(&rollout(1));
    fleet.surveyed("b", vec![state("up")]);
    assert_eq!(fleet.unasked, 5, "once");
    assert_eq!(fleet.coordinator.document(&rollout(1)), document);
    fleet.restart();
    assert_eq!(fleet.coordinator.document(&rollout(1)), document, "INV-2");

    // After a resume both are asked anew.
    for name in ["a", "b"] {
        fleet.up(name);
    }
    fleet.resume();
    for name in ["a", "b"] {
        fleet.surveyed(name, vec![state("up")]);
    }
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    unasked(&mut fleet, "it was rolled back");
}

#[test]
fn hosts_are_asked_for_their_state_again_after_a_resume() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![state("up")]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("a", ok(), vec![]);
    let surveys = |fleet: &Fleet| {
        let sent = fleet.sent.iter();
        sent.filter(|(_, message)| matches!(message, Message::Survey { .. }))
            .count()
    };
    assert_eq!(surveys(&fleet), 1);
    fleet.surveyed("a", vec![state("down")]);
    assert_eq!(fleet.state(1), "halted");
    // Somebody has mended it by hand.
    fleet.resume();
    assert_eq!(surveys(&fleet), 2, "in the same session too");
    fleet.surveyed("a", vec![state("up")]);
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
}

#[test]
fn a_rollback_waits_no_longer_than_needed_for_orders_that_were_never_begun() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![stop()])]);
    // The order for b is lost with the controller, and a fails before b is back.
    fleet.restart();
    fleet.up("a");
    fleet.finish("a", failed(), vec![]);
    assert_eq!(fleet.state(1), "rolling_back");
    fleet.up("b");
    fleet.later(39);
    let undos = |fleet: &Fleet| {
        let mut orders = fleet.orders.iter();
        orders.any(|order| order.key.direction == Direction::Undo && order.key.host == host("b"))
    };
    assert!(!undos(&fleet), "b may still be looking at what it heard");
    fleet.later(1);
    assert!(undos(&fleet), "b has not begun, and nobody tells it to");
}

#[test]
fn a_database_whose_new_schema_the_plan_keeps_is_not_held_against_the_start() {
    let database = |digest: &str| Fact::State {
        name: "database staff".into(),
        digest: Digest::of(digest.as_bytes()),
        text: digest.into(),
    };
    let migration = |undo_by: &str| {
        let args = json!({"database": "staff", "app": "web", "release": "v2", "dir": "db",
                          "undo_by": undo_by});
        on("app", vec![step("migration.apply", args)])
    };
    let fence = step(
        "postgres.fence",
        json!({"database": "staff", "roles": ["app"]}),
    );
    let differs = "database staff: was old, is new";
    let keeps = "database staff keeps its new schema";
    for (undo_by, migrated, stays, state, says) in [
        ("keep", ok(), true, "rolled_back", keeps),
        ("downgrade", ok(), true, "halted", differs),
        // Nothing is kept of what changed nothing.
        ("keep", unchanged(), true, "halted", differs),
        // Nobody has looked whether it may stay: it was cut off, or its revision is the old one.
        ("keep", ok(), false, "halted", differs),
        ("keep", failed(), false, "halted", differs),
    ] {
        let mut fleet = Fleet::new(&["a"]);
        fleet.start(vec![
            on("app", vec![fence.clone()]),
            migration(undo_by),
            on("app", vec![stop()]),
        ]);
        fleet.finish("a", ok(), vec![database("old")]);
        let goes_on = migrated != failed();
        fleet.finish("a", migrated, vec![]);
        if goes_on {
            fleet.finish("a", failed(), vec![]);
        }
        // The way back: the failed step, the migration if it did anything, the fence.
        while fleet.newest("a").at.phase > 0 {
            let of_migration = fleet.newest("a").at.phase == 1 && stays;
            let fact = || Fact::schema_stays("staff", "stays".into());
            fleet.finish("a", ok(), of_migration.then(fact).into_iter().collect());
        }
        fleet.finish("a", ok(), vec![database("new")]);
        fleet.surveyed("a", vec![]);
        assert_eq!(fleet.state(1), state, "INV-6: {}", fleet.reason(1));
        assert!(fleet.reason(1).contains(says), "{}", fleet.reason(1));
    }
}

#[test]
fn a_host_that_migrated_speaks_for_its_own_database_only() {
    let database = |digest: &str| Fact::State {
        name: "database staff".into(),
        digest: Digest::of(digest.as_bytes()),
        text: digest.into(),
    };
    let args = json!({"database": "staff", "app": "web", "release": "v2", "dir": "db",
                      "undo_by": "keep"});
    let fence = json!({"database": "staff", "roles": ["app"]});
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![
        on("app", vec![step("postgres.fence", fence)]),
        on("app", vec![step("migration.apply", args)]),
        on("app", vec![stop()]),
    ]);
    for facts in [vec![database("old")], vec![]] {
        fleet.finish("a", ok(), facts.clone());
        fleet.finish("b", ok(), facts);
    }
    for name in ["a", "b"] {
        fleet.finish(name, failed(), vec![]);
    }
    let stays = || vec![Fact::schema_stays("staff", "stays".into())];
    for phase in [2, 1, 0] {
        for name in ["a", "b"] {
            assert_eq!(fleet.newest(name).at.phase, phase);
            let facts = match (phase, name) {
                (1, "a") => stays(),
                (0, _) => vec![database("new")],
                _ => vec![],
            };
            fleet.finish(name, ok(), facts);
        }
    }
    for name in ["a", "b"] {
        fleet.surveyed(name, vec![]);
    }
    assert_eq!(fleet.state(1), "halted", "INV-6: {}", fleet.reason(1));
    let reason = fleet.reason(1);
    assert!(
        reason.contains("b: database staff: was old, is new"),
        "{reason}"
    );
    assert!(!reason.contains("a: database staff"), "{reason}");
}
