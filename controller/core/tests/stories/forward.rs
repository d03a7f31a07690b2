//! Orders, reports and deadlines on the way forward.

use lockstep_proto::action::postgres::Level;

use super::*;

fn canary_plan(serial: u64, phases: Vec<(Target, Strategy, Step)>) -> CompiledPlan {
    let stages = phases.into_iter().map(|(target, strategy, step)| Stage {
        target,
        strategy,
        steps: vec![step],
    });
    plan(serial, stages.collect())
}

#[test]
fn a_deadline_ends_the_rollout_and_names_what_blocked_it() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    plan.deadline = Period::seconds(20);
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    assert!(
        fleet
            .coordinator
            .next_deadline()
            .is_some_and(|due| due.0 <= fleet.now + 20_000)
    );
    fleet.later(20);
    assert_eq!(fleet.state(1), "halted");
    assert!(
        fleet
            .reason(1)
            .contains("a: service.stop (do 0.0) has not begun"),
        "{}",
        fleet.reason(1)
    );
}

#[test]
fn what_a_host_says_of_what_is_not_its_own_means_nothing() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop(), stop()])]);
    fleet.event(Event::HostUp {
        host: host("b"),
        instance: InstanceId::from_random([2; 8]),
        labels: BTreeMap::from([("role".into(), "other".into())]),
        agent_version: "1".into(),
        held: None,
    });
    let ordered = fleet.newest("a");
    let digest = fleet.coordinator.summary(&rollout(1)).unwrap().digest;
    let events = |fleet: &Fleet| fleet.coordinator.events(&rollout(1), 0).unwrap().len();
    let before = events(&fleet);
    let place = |phase, step| StepRef { phase, step };
    for (name, at, attempt) in [
        ("b", ordered.at, 1),
        ("a", place(0, 1), 1),
        ("a", place(0, 9), 1),
        ("a", place(9, 0), 1),
        ("a", ordered.at, 2),
    ] {
        let key = StepKey {
            host: host(name),
            at,
            attempt,
            ..ordered.clone()
        };
        fleet.report(name, ReportBody::Started { key: key.clone() });
        let finished = ReportBody::Finished {
            key,
            outcome: ok(),
            facts: vec![],
            signatures: vec![],
            took: Period(5),
        };
        fleet.report(name, finished);
    }
    for plan in [digest, Digest::of(b"another plan")] {
        let consented = ReportBody::Consented {
            rollout: rollout(1),
            plan,
            state: vec![],
            round: 0,
        };
        fleet.report("b", consented);
    }
    assert_eq!(events(&fleet), before);
    assert_eq!(fleet.newest("a"), ordered, "nothing was ordered by that");
}

#[test]
fn an_agent_that_was_installed_anew_numbers_its_reports_anew() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    let before = fleet.coordinator.hosts().next().unwrap().1.acknowledged;
    assert!(before > 0);
    let anew = InstanceId::from_random([2; 8]);
    assert_eq!(fleet.coordinator.earlier(&host("a"), &anew), before);
    fleet.event(Event::HostUp {
        host: host("a"),
        instance: anew.clone(),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        agent_version: "1".into(),
        held: None,
    });
    let said = |fleet: &Fleet| {
        let core = &fleet.coordinator;
        (
            core.acknowledged(&host("a"), &anew),
            core.earlier(&host("a"), &anew),
        )
    };
    assert_eq!(
        said(&fleet),
        (0, before),
        "a host that lost its journal is told so"
    );
    fleet.reports.clear();
    fleet
        .submit(2, plan(2, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(2, "a", vec![]);
    assert_eq!(said(&fleet), (1, 0));
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(2), "succeeded");
}

#[test]
fn the_step_of_an_elected_host_that_stayed_behind_is_not_skipped() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let one = || Target::OneOf(vec!["app".into()]);
    let rolling = one_by_one(1);
    let run = |name: &str| step("exec.run", json!({"name": name, "argv": ["x"]}));
    let phases = vec![
        (one(), Strategy::All, run("first")),
        (Target::Groups(vec!["app".into()]), rolling, stop()),
        (one(), Strategy::All, run("second")),
    ];
    fleet.submit(1, canary_plan(1, phases)).unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    fleet.finish("a", ok(), vec![]);
    fleet.finish("a", failed(), vec![]);
    fleet.finish("b", ok(), vec![]);
    assert_eq!(
        fleet.state(1),
        "rolling_back",
        "INV-3: `second` has no host"
    );
}

#[test]
fn a_budget_does_not_stand_in_for_the_elected_host() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let rolling = one_by_one(1);
    let one = Target::OneOf(vec!["app".into()]);
    let look = step("check.disk", json!({"path": "/", "free": "1B"}));
    let all = Target::Groups(vec!["app".into()]);
    let phases = vec![(one, rolling, look), (all, Strategy::All, stop())];
    fleet.submit(1, canary_plan(1, phases)).unwrap();
    for name in ["a", "b"] {
        fleet.consent(1, name, vec![]);
    }
    fleet.finish("a", failed(), vec![]);
    assert_eq!(
        fleet.orders.len(),
        1,
        "INV-3: nobody has done the first step"
    );
    assert_eq!(fleet.state(1), "rolled_back");
}

#[test]
fn resume_after_a_deadline_opens_a_new_one() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    plan.deadline = Period::seconds(20);
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(20);
    assert_eq!(fleet.state(1), "halted");
    let back = Call::RollBack {
        rollout: rollout(1),
        reason: "too late".into(),
    };
    fleet.call("olga", &[], back).unwrap();
    assert_eq!(fleet.state(1), "rolling_back");
}

#[test]
fn a_late_report_of_success_is_not_done_again() {
    let mut fleet = Fleet::new(&["a"]);
    let run = step("exec.run", json!({"name": "x", "argv": ["x"]}));
    fleet.start(vec![on("app", vec![run])]);
    fleet.pause();
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(200);
    fleet.up("a");
    fleet.finish("a", ok(), vec![]);
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 1, "INV-1");
    assert_eq!(fleet.state(1), "succeeded");
}

fn refused() -> Vec<Fact> {
    let address = "127.0.0.1:8000".into();
    vec![Fact::Refused { address }]
}

fn healthy() -> Vec<Fact> {
    let url = "http://127.0.0.1:8000/".into();
    vec![Fact::Healthy { url }]
}

#[test]
fn downtime_ends_with_the_last_host_and_what_is_taken_back_does_not_count() {
    let check = || step("check.http", json!({"url": "http://127.0.0.1:8000/"}));
    let begun = || {
        let mut fleet = Fleet::new(&["a", "b"]);
        let mut plan = plan(1, vec![on("app", vec![stop()]), on("app", vec![check()])]);
        plan.after_rollback = Some(Phase {
            name: "after_rollback".into(),
            stages: vec![on("app", vec![check()])],
            deadline: None,
            planned: None,
        });
        fleet.submit(1, plan).unwrap();
        for name in ["a", "b"] {
            fleet.consent(1, name, vec![]);
        }
        for name in ["a", "b"] {
            fleet.finish(name, ok(), refused());
        }
        fleet.later(3);
        fleet.finish("a", ok(), healthy());
        fleet.later(4);
        fleet
    };
    let downtime = |fleet: &Fleet| {
        let document = fleet.coordinator.document(&rollout(1)).unwrap();
        document["downtime"]["ms"].clone()
    };

    let mut fleet = begun();
    assert_eq!(downtime(&fleet), json!(null), "b has not come back");
    fleet.finish("b", ok(), healthy());
    assert_eq!(downtime(&fleet), json!(7000));

    let mut fleet = begun();
    fleet.finish("b", failed(), vec![]);
    for name in ["a", "b"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(
        downtime(&fleet),
        json!(null),
        "the release that was healthy is gone"
    );
    fleet.later(5);
    for name in ["a", "b"] {
        fleet.finish(name, ok(), healthy());
    }
    assert_eq!(downtime(&fleet), json!(12000));
}

#[test]
fn what_lies_on_a_host_is_bound_to_its_own_orders_first() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let database = json!({"database": "d"});
    let [backup, verify] = ["postgres.backup", "postgres.verify_backup"];
    fleet.start(vec![
        on("app", vec![step(backup, database.clone())]),
        on("app", vec![step(verify, database)]),
    ]);
    for name in ["a", "b"] {
        fleet.finish(name, ok(), vec![backup_of(name)]);
    }
    for name in ["a", "b"] {
        let mut orders = fleet.orders.iter().rev();
        let order = orders.find(|order| order.key.host == host(name)).unwrap();
        let [binding] = order.bindings.as_slice() else {
            panic!("{:?}", order.bindings)
        };
        let own = format!("of-{name}");
        assert!(matches!(&binding.fact, Fact::Backup { id, .. } if *id == own));
    }
}

/// A backup of the database `d`.
fn backup_of(name: &str) -> Fact {
    Fact::Backup {
        database: "d".into(),
        id: format!("of-{name}"),
        digest: Digest::of(name.as_bytes()),
        size: 1,
        taken_at: Timestamp(1),
        fence: None,
    }
}

fn proof_of(name: &str, level: Level) -> Fact {
    Fact::BackupVerified {
        database: "d".into(),
        id: format!("of-{name}"),
        digest: Digest::of(name.as_bytes()),
        fence: None,
        level,
        taken_at: None,
    }
}

/// What the newest order of a host has of backups and their proofs.
fn known_of_backups(fleet: &Fleet, name: &str) -> Vec<(String, Option<Level>)> {
    let mut orders = fleet.orders.iter().rev();
    let order = orders.find(|order| order.key.host == host(name)).unwrap();
    let known = order.bindings.iter().filter_map(|bound| match &bound.fact {
        Fact::Backup { id, .. } => Some((id.clone(), None)),
        Fact::BackupVerified { id, level, .. } => Some((id.clone(), Some(*level))),
        _ => None,
    });
    known.collect()
}

/// Three hosts: these have such facts, and the order of a last step goes out.
fn facts_before_the_last_step(facts: &[(&str, Vec<Fact>)]) -> Fleet {
    let mut fleet = Fleet::new(&["a", "b", "c"]);
    let database = json!({"database": "d"});
    let verify = "postgres.verify_backup";
    fleet.start(vec![
        on("app", vec![step("postgres.backup", database.clone())]),
        on("app", vec![step(verify, database)]),
    ]);
    for name in ["a", "b", "c"] {
        let of = facts.iter().find(|(of, _)| *of == name);
        let facts = of.map(|(_, facts)| facts.clone()).unwrap_or_default();
        fleet.finish(name, ok(), facts);
    }
    fleet
}

#[test]
fn the_strongest_proof_of_a_hosts_own_backup_is_bound_and_no_others() {
    let (a, b) = ("of-a".to_owned(), "of-b".to_owned());
    // The prover has proven more than the host itself, and something of another backup.
    let of_a = vec![backup_of("a"), proof_of("a", Level::Read)];
    let of_b = vec![backup_of("b")];
    let of_c = vec![
        proof_of("a", Level::Equal),
        proof_of("other", Level::Checked),
    ];
    let fleet = facts_before_the_last_step(&[("a", of_a), ("b", of_b), ("c", of_c)]);
    let own = vec![(a.clone(), None), (a, Some(Level::Equal))];
    assert_eq!(known_of_backups(&fleet, "a"), own);
    assert_eq!(known_of_backups(&fleet, "b"), [(b, None)], "INV-7");
    assert_eq!(known_of_backups(&fleet, "c"), [], "whose would it be?");
}
