use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_proto::ids::{Digest, StepRef};
use tokio::sync::mpsc;

use super::super::{Gathered, Offer, Outbound};
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
            round: 0,
        }),
        Record::Intent(Intent {
            key: key.clone(),
            before: Value::Null,
            boot: exec.host.boot.clone(),
            at: wall_clock(),
            counted: None,
        }),
        Record::Cancelled { key: key.clone() },
    ];
    exec.commit(records.into(), Need::Opens).unwrap();
    let dir = exec.host.dir(&key);
    dir.make(Keep::Durably).unwrap();
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

/// Of what only observes nothing but its intent need outlive a power loss: the host knows nonetheless
/// how it ended, and does not ask people.
#[tokio::test]
async fn what_observed_in_a_boot_that_is_over_has_failed_and_changed_nothing() {
    let host = testing::Host::new();
    let mut exec = connected(&host);
    let rollout = RolloutId::from_random([1; 6]);
    exec.held = Some(held_for(&mut exec, &rollout));
    let key = StepKey {
        rollout,
        host: exec.host.config.host.clone(),
        at: step().at,
        direction: Direction::Do,
        attempt: 1,
    };
    let intent = Record::Intent(Intent {
        key: key.clone(),
        before: Value::Null,
        boot: lockstep_proto::ids::BootId::from_bytes([9; 8]),
        at: wall_clock(),
        counted: None,
    });
    exec.commit(vec![intent], Need::Opens).unwrap();
    let local = tokio::task::LocalSet::new();
    let ended = local.run_until(async {
        exec.take_up();
        exec.events.recv().await.unwrap()
    });
    let Event::Ended(of, ended) = ended.await else {
        panic!("something else was told");
    };
    let StepOutcome::Failed(failure) = ended.outcome else {
        panic!("INV-1: {ended:?}");
    };
    let told = (failure.cause, failure.changed);
    assert_eq!((of, told), (key, (Cause::Interrupted, false)));
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
        seal: None,
        gates: None,
    };
    let mut exec = open();
    let record = Record::Held(Held {
        rollout: held.rollout.clone(),
        plan: Digest::of(b"plan"),
        steps: plan.write(&config.state_dir, &held.rollout).unwrap(),
        log_offsets: BTreeMap::new(),
        round: 0,
    });
    exec.commit(vec![record], Need::Opens).unwrap();
    plan.write(&config.state_dir, &ended.rollout).unwrap();
    let dirs = [&held, &ended].map(|key| exec.host.dir(key));
    for dir in &dirs {
        dir.make(Keep::Durably).unwrap();
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

/// What a controller does while the host is being looked at.
type Meanwhile<'a> = &'a dyn Fn(&mut Exec, &RolloutId);

/// How long the orders here may be obeyed.
const LIFE: Period = Period::seconds(60);

const A: Epoch = Epoch { counter: 1, id: 1 };
const B: Epoch = Epoch { counter: 2, id: 2 };

fn welcome(exec: &mut Exec, epoch: Epoch) {
    let welcome = lockstep_proto::wire::Welcome {
        version: 1,
        epoch,
        clock: Timestamp(1000),
        acknowledged: 0,
        earlier: 0,
    };
    exec.handle_welcome(&welcome, mpsc::channel(9).0).unwrap();
}

fn step() -> HeldStep {
    let args = serde_json::json!({"port": 1});
    HeldStep {
        at: StepRef { phase: 0, step: 0 },
        action: Action::deserialize_args("check.port", args)
            .unwrap()
            .unwrap(),
        timeout: Period::seconds(5),
        undo: lockstep_proto::plan::Undo::Auto,
        line: 1,
        duty: crate::exec::consent::Duty::default(),
    }
}

/// An agent in a session of A, which has told nothing yet.
fn connected(host: &testing::Host) -> Exec {
    let policy = host.path().join("policy.toml");
    std::fs::write(&policy, "").unwrap();
    let config = crate::config::Config {
        policy: Some(policy),
        ..host.config.clone()
    };
    let config = Arc::new(config);
    let logs = mpsc::channel(1).0;
    let mut exec = Exec::open(&config, "/agent.toml".as_ref(), "example.org", logs).unwrap();
    welcome(&mut exec, A);
    exec
}

/// The host holds itself for a rollout of one step.
fn held_for(exec: &mut Exec, rollout: &RolloutId) -> HeldPlan {
    let plan = HeldPlan {
        expires: wall_clock().plus(Period::seconds(60)),
        steps: vec![step()],
        seal: None,
        gates: None,
    };
    let held = Record::Held(Held {
        rollout: rollout.clone(),
        plan: Digest::of(b"plan"),
        steps: plan.write(&exec.host.config.state_dir, rollout).unwrap(),
        log_offsets: BTreeMap::new(),
        round: 0,
    });
    exec.commit(vec![held], Need::Opens).unwrap();
    plan
}

/// How an attempt ends; none if it began.
async fn prepared(meanwhile: Meanwhile<'_>) -> Option<(Cause, bool)> {
    let host = testing::Host::new();
    let mut exec = connected(&host);
    let rollout = RolloutId::from_random([1; 6]);
    exec.held = Some(held_for(&mut exec, &rollout));
    let key = StepKey {
        rollout: rollout.clone(),
        host: exec.host.config.host.clone(),
        at: step().at,
        direction: Direction::Do,
        attempt: 1,
    };
    let order = Order {
        key: key.clone(),
        plan: Digest::of(b"plan"),
        epoch: A,
        not_after: exec.session.as_ref().unwrap().now().plus(LIFE),
        bindings: vec![],
    };
    exec.handle_order(order).unwrap();
    let looked = exec.events.recv().await.unwrap();
    meanwhile(&mut exec, &rollout);
    exec.handle_event(looked).unwrap();
    let running = exec.memory.hold.as_ref().map(|hold| hold.running().count());
    if running == Some(1) {
        return None;
    }
    assert!(!exec.host.dir(&key).path().exists());
    let (_, position) = *exec.memory.outstanding.back().unwrap();
    match exec.journal.read(position).unwrap() {
        Record::Report {
            body:
                ReportBody::Finished {
                    outcome: StepOutcome::Failed(failure),
                    ..
                },
            ..
        } => Some((failure.cause, failure.changed)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_not_wanted_any_more_once_the_host_was_looked_at_never_begins() {
    let late = |exec: &mut Exec| {
        let preparing = exec.preparing.as_mut().unwrap();
        preparing.clock.said = Timestamp(LIFE.0 * 2);
    };
    let cases: [(Meanwhile, _); 5] = [
        (&|_, _| {}, None),
        // The controller has given it up.
        (&|exec, _| late(exec), Some((Cause::Refused, false))),
        // Also when nobody is there to say what time it is.
        (
            &|exec, _| {
                exec.session = None;
                late(exec);
            },
            Some((Cause::Refused, false)),
        ),
        (
            &|exec, rollout| exec.handle_release(rollout.clone(), A).unwrap(),
            Some((Cause::Cancelled, false)),
        ),
        (
            &|exec, _| welcome(exec, B),
            Some((Cause::Interrupted, false)),
        ),
    ];
    let local = tokio::task::LocalSet::new();
    for (number, (meanwhile, ends)) in cases.into_iter().enumerate() {
        let ended = local.run_until(prepared(meanwhile)).await;
        assert_eq!(ended, ends, "case {number}");
    }
}

/// Whether an offer of A ends with a hold.
fn considered(meanwhile: fn(&mut Exec, Offer)) -> bool {
    let host = testing::Host::new();
    let mut exec = connected(&host);
    let held = HeldPlan {
        expires: wall_clock().plus(Period::seconds(60)),
        steps: vec![step()],
        seal: None,
        gates: None,
    };
    let offer = Offer {
        rollout: RolloutId::from_random([1; 6]),
        plan: Digest::of(b"plan"),
        epoch: A,
        dry_run: false,
        signatures: vec![],
        round: 0,
    };
    exec.considering.push(offer.clone());
    meanwhile(&mut exec, offer.clone());
    let gathered = Gathered::Consent(Box::new((offer, held)));
    exec.handle_gathered(gathered, Ok(vec![])).unwrap();
    assert!(exec.considering.is_empty());
    exec.memory.hold.is_some()
}

#[test]
fn a_host_holds_for_no_offer_of_a_term_that_ended_meanwhile() {
    assert!(considered(|_, _| {}));
    assert!(!considered(|exec, _| welcome(exec, B)), "INV-4");
    let said_again = considered(|exec, offer| {
        welcome(exec, B);
        exec.handle_offer(Offer { epoch: B, ..offer }).unwrap();
    });
    assert!(said_again, "the successor wants it, too");
}

/// An agent that holds for a rollout, at whose one step an attempt has ended.
fn done(host: &testing::Host, action: &str, args: Value) -> (Exec, StepKey) {
    let mut exec = connected(host);
    let rollout = RolloutId::from_random([1; 6]);
    let step = HeldStep {
        action: Action::deserialize_args(action, args).unwrap().unwrap(),
        ..step()
    };
    let plan = HeldPlan {
        expires: wall_clock().plus(Period::seconds(60)),
        steps: vec![step.clone()],
        seal: None,
        gates: None,
    };
    let key = StepKey {
        rollout: rollout.clone(),
        host: exec.host.config.host.clone(),
        at: step.at,
        direction: Direction::Do,
        attempt: 1,
    };
    let held = Held {
        rollout: rollout.clone(),
        plan: Digest::of(b"plan"),
        steps: plan.write(&exec.host.config.state_dir, &rollout).unwrap(),
        log_offsets: BTreeMap::new(),
        round: 0,
    };
    let intent = Intent {
        key: key.clone(),
        before: Value::Null,
        boot: exec.host.boot.clone(),
        at: wall_clock(),
        counted: None,
    };
    let records = vec![Record::Held(held), Record::Intent(intent)];
    exec.commit(records, Need::Opens).unwrap();
    exec.held = Some(plan);
    (exec, key)
}

fn offer(rollout: &RolloutId, round: u32) -> Offer {
    Offer {
        rollout: rollout.clone(),
        plan: Digest::of(b"plan"),
        epoch: A,
        dry_run: false,
        signatures: vec![],
        round,
    }
}

#[tokio::test]
async fn a_host_is_freed_while_a_rollout_waits_only_if_nothing_was_changed() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let looks = ("check.port", serde_json::json!({"port": 1}));
    let changes = ("service.stop", serde_json::json!({"service": "web"}));
    for ((action, args), frees) in [(looks, true), (changes, false)] {
        let host = testing::Host::new();
        let (mut exec, key) = done(&host, action, args);
        exec.handle_freed(key.rollout.clone(), A).unwrap();
        assert!(exec.memory.hold.is_some(), "something runs");
        let outcome = StepOutcome::Ok {
            changed: false,
            summary: String::new(),
        };
        let ended = Ended {
            outcome,
            facts: vec![],
            took: Period(1),
        };
        exec.handle_ended(key.clone(), ended).unwrap();
        exec.handle_freed(key.rollout.clone(), A).unwrap();
        assert_eq!(exec.memory.hold.is_none(), frees, "{action}");
        assert_eq!(exec.held.is_none(), frees, "{action}");
        assert_eq!(exec.memory.waits(&key.rollout), frees, "{action}");
        assert!(!exec.memory.has_ended(&key.rollout), "{action}");

        // Whoever missed that hears of it by the next offer.
        exec.handle_offer(offer(&key.rollout, 1)).unwrap();
        assert_eq!(exec.awaiting_plan.len(), usize::from(frees), "{action}");
        exec.handle_release(key.rollout.clone(), A).unwrap();
        assert!(
            exec.memory.has_ended(&key.rollout),
            "the end is one: {action}"
        );
        assert!(!exec.memory.waits(&key.rollout));
    }
}

#[tokio::test]
async fn a_host_that_still_holds_for_an_earlier_round_looks_at_itself_again() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let host = testing::Host::new();
    let (mut exec, key) = done(&host, "check.port", serde_json::json!({"port": 1}));
    let outcome = StepOutcome::Ok {
        changed: false,
        summary: String::new(),
    };
    let ended = Ended {
        outcome,
        facts: vec![],
        took: Period(1),
    };
    exec.handle_ended(key.clone(), ended).unwrap();
    exec.handle_offer(offer(&key.rollout, 1)).unwrap();
    assert!(exec.memory.hold.is_none() && exec.memory.waits(&key.rollout));
    assert_eq!(exec.awaiting_plan, [offer(&key.rollout, 1)]);
}

/// Numbers of the reports that are in the journal, and how many sessions were refused.
fn written(host: &testing::Host) -> (Vec<u64>, u64) {
    let (mut reports, mut refused) = (vec![], 0);
    let visit = |_, record| match record {
        Record::Report { number, .. } => reports.push(number),
        Record::SessionsRefused(of) if of.why == Refusal::Unanswered => refused += of.count,
        _ => {}
    };
    drop(crate::journal::Journal::open(&host.config.state_dir, visit).unwrap());
    (reports, refused)
}

fn order(key: &StepKey) -> Order {
    Order {
        key: key.clone(),
        plan: Digest::of(b"plan"),
        epoch: A,
        not_after: Timestamp(1000).plus(LIFE),
        bindings: vec![],
    }
}

fn ok(summary: String) -> Ended {
    let changed = false;
    Ended {
        outcome: StepOutcome::Ok { changed, summary },
        facts: vec![],
        took: Period(1),
    }
}

/// Orders this, acknowledges whatever is said, and comes again when it is refused.
fn flood(exec: &mut Exec, orders: impl Iterator<Item = Order>) {
    for order in orders {
        exec.handle_order(order).unwrap();
        exec.handle_acknowledged(exec.memory.last_report);
        if !exec.admit(A).unwrap() {
            let welcome = lockstep_proto::wire::Welcome {
                version: 1,
                epoch: A,
                clock: Timestamp(1000),
                acknowledged: exec.memory.last_report,
                earlier: 0,
            };
            exec.handle_welcome(&welcome, mpsc::channel(9).0).unwrap();
        }
    }
}

/// What is ordered next, by the attempt that is done and a number.
type Orders<'a> = &'a dyn Fn(&StepKey, u16) -> StepKey;

#[tokio::test]
async fn whoever_asks_for_ever_for_what_began_nothing_fills_no_journal() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let looks = ("check.port", serde_json::json!({"port": 1}));
    let cases: [(&str, Orders); 4] = [
        ("done", &|key, _| key.clone()),
        ("refused", &|key, number| StepKey {
            attempt: number,
            ..key.clone()
        }),
        ("nothing to undo", &|key, number| StepKey {
            direction: Direction::Undo,
            attempt: number,
            ..key.clone()
        }),
        ("a dry run of no plan", &|key, number| StepKey {
            direction: Direction::Probe,
            attempt: number,
            ..key.clone()
        }),
    ];
    for (name, of) in cases {
        let host = testing::Host::new();
        let (mut exec, key) = done(&host, looks.0, looks.1.clone());
        exec.finish(key.clone(), ok("s".repeat(700))).unwrap();
        exec.allowance.left = 20 << 10;
        let before = exec.memory.last_report;
        flood(&mut exec, (2..500).map(|number| order(&of(&key, number))));
        let answered = exec.memory.last_report - before;
        assert!((10..=20).contains(&answered), "{name}: {answered}");

        // How what began has ended is said all the same.
        let other = StepKey {
            attempt: 1000,
            ..key.clone()
        };
        let intent = Intent {
            key: other.clone(),
            before: Value::Null,
            boot: exec.host.boot.clone(),
            at: wall_clock(),
            counted: None,
        };
        exec.commit(vec![Record::Intent(intent)], Need::Opens)
            .unwrap();
        exec.handle_ended(other, ok(String::new())).unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        stop.cancel();
        let last = exec.memory.last_report;
        exec.run(mpsc::channel(1).1, stop).await.unwrap();
        let (reports, refused) = written(&host);
        assert_eq!(reports, (1..=last).collect::<Vec<_>>(), "{name}");
        assert_eq!(last, before + answered + 1, "{name}");
        assert!(refused > 400, "INV-11: {name}: {refused}");
    }
}

#[tokio::test]
async fn what_was_refused_since_the_last_record_is_written_at_an_orderly_stop() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let host = testing::Host::new();
    let mut exec = connected(&host);
    exec.note_refused(Refusal::Unanswered);
    exec.write_refusals().unwrap();
    for _ in 0..3 {
        exec.note_refused(Refusal::Unanswered);
    }
    assert_eq!(written(&host).1, 1);
    let stop = tokio_util::sync::CancellationToken::new();
    stop.cancel();
    exec.run(mpsc::channel(1).1, stop).await.unwrap();
    assert_eq!(written(&host).1, 4, "INV-11");
}

#[tokio::test]
async fn orders_for_more_steps_than_a_plan_has_are_not_remembered() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let host = testing::Host::new();
    let (mut exec, key) = done(&host, "check.port", serde_json::json!({"port": 1}));
    exec.finish(key.clone(), ok(String::new())).unwrap();
    let hold = exec.memory.hold.as_mut().unwrap();
    let recorded = hold.attempt(&key).unwrap().ended.unwrap();
    for step in 1..=u16::MAX {
        let at = StepRef { phase: 0, step };
        hold.end(&StepKey { at, ..key.clone() }, recorded.0, recorded.1);
    }
    let before = exec.memory.last_report;
    let at = StepRef { phase: 1, step: 0 };
    exec.handle_order(order(&StepKey { at, ..key })).unwrap();
    assert_eq!(exec.memory.last_report, before);
    assert!(!exec.admit(A).unwrap(), "the session ends");
}

#[tokio::test]
async fn a_session_that_asks_too_much_hears_how_its_steps_have_ended_before_it_ends() {
    let local = tokio::task::LocalSet::new();
    let _entered = local.enter();
    let host = testing::Host::new();
    let (mut exec, key) = done(&host, "check.port", serde_json::json!({"port": 1}));
    exec.allowance.left = 0;
    let attempt = 2;
    exec.handle_order(order(&StepKey {
        attempt,
        ..key.clone()
    }))
    .unwrap();
    exec.finish(key, ok(String::new())).unwrap();
    let mut said = vec![];
    while exec.outgoing().is_some() {
        said.extend(exec.next_outbound().unwrap());
    }
    assert!(
        matches!(&said[..], [Outbound::Report(_), Outbound::Refuse(_)]),
        "{said:?}"
    );
}
