use super::*;
use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{BootId, Digest, PlanDigest, StepRef};
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::plan::Undo;
use lockstep_proto::report::StepOutcome;
use lockstep_proto::values::Period;
use serde_json::{Value, json};

use crate::exec::consent::Duty;
use crate::journal::{Held, Intent, Journal, Need};

/// A memory with the journal that it comes from, so that every test also proves the replay.
struct Agent {
    dir: tempfile::TempDir,
    journal: Journal,
    memory: Memory,
    steps: Vec<HeldStep>,
    clock: u64,
}

const EPOCH: Epoch = Epoch { counter: 3, id: 30 };

fn rollout(byte: u8) -> RolloutId {
    RolloutId::from_random([byte; 6])
}

fn plan() -> PlanDigest {
    PlanDigest::of(b"plan")
}

fn held_step(step: u16, action: &str, args: Value) -> HeldStep {
    HeldStep {
        at: StepRef { phase: 0, step },
        action: Action::deserialize_args(action, args).unwrap().unwrap(),
        timeout: Period::seconds(5),
        undo: Undo::Auto,
        line: 1,
        duty: Duty::default(),
    }
}

fn key(step: u16, direction: Direction, attempt: u16) -> StepKey {
    StepKey {
        rollout: rollout(1),
        host: "app-1".parse().unwrap(),
        at: StepRef { phase: 0, step },
        direction,
        attempt,
    }
}

fn order(key: StepKey) -> Order {
    Order {
        key,
        plan: plan(),
        epoch: EPOCH,
        not_after: Timestamp(1000),
        bindings: vec![],
    }
}

use Direction::{Do, Undo as Back};

impl Agent {
    /// Holds for rollout 1, with a service to stop, a check, and a service to start.
    fn holding() -> Self {
        let mut agent = Self::fresh();
        agent.write(Record::Held(Held {
            rollout: rollout(1),
            plan: plan(),
            steps: Digest::of(b"steps"),
            log_offsets: BTreeMap::new(),
            round: 0,
        }));
        agent
    }

    fn fresh() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), |_, _| {}).unwrap();
        let mut agent = Self {
            dir,
            journal,
            memory: Memory::default(),
            steps: vec![
                held_step(0, "service.stop", json!({"service": "web"})),
                held_step(1, "check.port", json!({"port": 1})),
                held_step(2, "service.start", json!({"service": "web"})),
                held_step(3, "exec.run", json!({"name": "x", "argv": ["x"]})),
            ],
            clock: 500,
        };
        agent.write(Record::Epoch(EPOCH));
        agent
    }

    fn write(&mut self, record: Record) {
        let records = [record];
        let positions = self.journal.append(&records, Need::Opens).unwrap();
        self.memory.apply(positions[0], &records[0]);
    }

    fn begin(&mut self, key: &StepKey) {
        self.write(Record::Intent(Intent {
            key: key.clone(),
            before: json!({"of": key.to_string()}),
            boot: BootId::from_bytes([1; 8]),
            at: Timestamp(1),
            counted: None,
        }));
    }

    fn end(&mut self, key: &StepKey, outcome: StepOutcome) {
        let number = self.memory.last_report + 1;
        let body = ReportBody::Finished {
            key: key.clone(),
            outcome,
            facts: vec![],
            signatures: vec![],
            took: Period(1),
        };
        self.write(Record::Report { number, body });
    }

    fn run(&mut self, key: &StepKey, outcome: StepOutcome) {
        self.begin(key);
        self.end(key, outcome);
    }

    fn decide(&self, order: &Order) -> Decision {
        let mut again = Memory::default();
        // Dropped at once: the lock is `identity::StateLock`, not the file.
        drop(Journal::open(self.dir.path(), |at, record| again.apply(at, &record)).unwrap());
        let decide = |memory: &Memory| {
            memory.decide(
                order,
                Now {
                    controller: Timestamp(self.clock),
                    busy: None,
                    steps: &self.steps,
                },
            )
        };
        let decision = decide(&self.memory);
        assert_eq!(decide(&again), decision, "replay decides alike");
        decision
    }

    fn before(&self, decision: &Decision) -> Option<String> {
        let Decision::Begin(Begin { before }) = decision else {
            panic!("{decision:?} does not begin");
        };
        before.map(|position| match self.journal.read(position).unwrap() {
            Record::Intent(intent) => intent.before["of"].as_str().unwrap().to_owned(),
            other => panic!("{other:?}"),
        })
    }
}

fn ok(changed: bool) -> StepOutcome {
    StepOutcome::Ok {
        changed,
        summary: "s".into(),
    }
}

fn failed(changed: bool) -> StepOutcome {
    StepOutcome::Failed(Failure {
        changed,
        ..failure(Cause::Step, "f")
    })
}

fn unknown() -> StepOutcome {
    StepOutcome::Unknown { why: "w".into() }
}

fn refusal(decision: Decision) -> String {
    match decision {
        Decision::Refuse(failure) => {
            assert_eq!(failure.cause, Cause::Refused);
            assert!(!failure.changed && failure.hint.is_some());
            failure.message
        }
        other => panic!("{other:?} is no refusal"),
    }
}

#[test]
fn a_first_order_begins_and_asks_for_the_before_state() {
    let agent = Agent::holding();
    let decision = agent.decide(&order(key(0, Do, 1)));
    assert_eq!(decision, Decision::Begin(Begin { before: None }));
}

#[test]
fn a_repeated_order_is_never_carried_out_twice() {
    let mut agent = Agent::holding();
    agent.begin(&key(0, Do, 1));
    assert_eq!(agent.decide(&order(key(0, Do, 1))), Decision::Running);
    agent.end(&key(0, Do, 1), ok(true));
    agent.clock = 5000;
    match agent.decide(&order(key(0, Do, 1))) {
        Decision::Repeat(recorded) => assert_eq!(recorded.number, 1, "even when it is late"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_report_that_was_said_again_is_on_its_way_until_it_is_acknowledged() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), ok(true));
    agent.end(&key(0, Do, 1), ok(true));
    match agent.decide(&order(key(0, Do, 1))) {
        Decision::Repeat(recorded) => assert_eq!(recorded.number, 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_refused_order_never_begins_under_its_key() {
    let mut agent = Agent::holding();
    for attempt in 1..=3 {
        agent.end(&key(0, Do, attempt), failed(false));
    }
    match agent.decide(&order(key(0, Do, 3))) {
        Decision::Repeat(recorded) => assert_eq!(recorded.number, 3),
        other => panic!("{other:?}"),
    }
    // It is not remembered by itself any more.
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("attempt 3"));
    assert!(matches!(
        agent.decide(&order(key(0, Do, 4))),
        Decision::Begin(_)
    ));
}

#[test]
fn an_order_that_points_elsewhere_ends_no_attempt() {
    let mut agent = Agent::holding();
    let elsewhere = Order {
        plan: PlanDigest::of(b"other"),
        ..order(key(0, Do, 1))
    };
    agent.begin(&key(0, Do, 1));
    // A refusal would be the record of its end.
    assert_eq!(agent.decide(&elsewhere), Decision::Running, "INV-1");
    agent.end(&key(0, Do, 1), ok(true));
    assert!(matches!(agent.decide(&elsewhere), Decision::Repeat(_)));
}

#[test]
fn a_consent_that_is_said_again_is_the_newest_report_of_it() {
    let mut agent = Agent::holding();
    for number in 1..=2 {
        let body = ReportBody::Consented {
            rollout: rollout(1),
            plan: plan(),
            state: vec![],
            round: 0,
        };
        agent.write(Record::Report { number, body });
        let consent = agent.memory.hold.as_ref().unwrap().consent.unwrap();
        assert_eq!(consent.number, number);
    }
}

#[test]
fn a_term_that_ended_is_refused_and_so_is_its_double() {
    let agent = Agent::holding();
    for epoch in [Epoch { counter: 2, id: 30 }, Epoch { counter: 3, id: 31 }] {
        let stale = Order {
            epoch,
            ..order(key(0, Do, 1))
        };
        assert!(
            matches!(agent.decide(&stale), Decision::Stale(_)),
            "{epoch}"
        );
    }
    let newer = Order {
        epoch: Epoch { counter: 4, id: 1 },
        ..order(key(0, Do, 1))
    };
    assert!(matches!(agent.decide(&newer), Decision::Begin(_)));
}

#[test]
fn a_late_order_is_refused() {
    let mut agent = Agent::holding();
    agent.clock = 1000;
    assert!(matches!(
        agent.decide(&order(key(0, Do, 1))),
        Decision::Begin(_)
    ));
    agent.clock = 1001;
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("too late"));
}

#[test]
fn an_order_needs_the_hold_and_its_plan() {
    let mut agent = Agent::fresh();
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("holds for no rollout"));
    agent = Agent::holding();
    let other_plan = Order {
        plan: PlanDigest::of(b"other"),
        ..order(key(0, Do, 1))
    };
    assert!(refusal(agent.decide(&other_plan)).contains("consented to plan"));
    let other_rollout = StepKey {
        rollout: rollout(2),
        ..key(0, Do, 1)
    };
    assert!(refusal(agent.decide(&order(other_rollout))).contains(rollout(1).as_str()));
    assert!(refusal(agent.decide(&order(key(9, Do, 1)))).contains("not meant for this host"));
    agent.write(Record::Released {
        rollout: rollout(1),
        comes_back: false,
    });
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("has ended"));
}

#[test]
fn a_host_takes_one_step_at_a_time_and_in_plan_order() {
    let mut agent = Agent::holding();
    agent.begin(&key(1, Do, 1));
    assert!(refusal(agent.decide(&order(key(2, Do, 1)))).contains("still running"));
    assert!(refusal(agent.decide(&order(key(1, Do, 2)))).contains("still running"));
    agent.end(&key(1, Do, 1), failed(true));
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("comes before"));
    assert!(matches!(
        agent.decide(&order(key(1, Do, 2))),
        Decision::Begin(_)
    ));
    assert!(matches!(
        agent.decide(&order(key(2, Do, 1))),
        Decision::Begin(_)
    ));
}

#[test]
fn attempts_go_upwards() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 2), failed(false));
    assert!(refusal(agent.decide(&order(key(0, Do, 1)))).contains("attempt 2"));
    assert!(matches!(
        agent.decide(&order(key(0, Do, 3))),
        Decision::Begin(_)
    ));
}

#[test]
fn what_is_done_is_not_done_again_under_another_number() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), ok(true));
    // However often it is asked for.
    for attempt in 2..5 {
        let why = refusal(agent.decide(&order(key(0, Do, attempt))));
        assert!(why.contains("attempt 1"), "INV-1: {why}");
        agent.end(
            &key(0, Do, attempt),
            StepOutcome::Failed(refused(why, "hint")),
        );
    }
    // Nor when it was taken back: a stolen controller could go on like that for ever.
    agent.run(&key(0, Back, 1), ok(true));
    let why = refusal(agent.decide(&order(key(0, Do, 5))));
    assert!(why.contains("attempt 1"), "INV-1: {why}");
}

#[test]
fn an_undo_with_nothing_to_take_back_makes_no_step_new() {
    let mut agent = Agent::holding();
    agent.run(&key(3, Do, 1), ok(true));
    let undo = agent.decide(&order(key(3, Back, 1)));
    assert!(matches!(undo, Decision::Nothing(_)), "{undo:?}");
    agent.end(&key(3, Back, 1), ok(false));
    for (step, words) in [(3, "attempt 1"), (2, "comes before")] {
        let why = refusal(agent.decide(&order(key(step, Do, 2))));
        assert!(why.contains(words), "INV-1: {why}");
    }
}

#[test]
fn no_step_is_left_out_that_every_host_does() {
    let mut agent = Agent::holding();
    agent.steps[0].duty = Duty::AllHosts;
    agent.steps[1].duty = Duty::AllHosts;
    agent.steps[3].duty = Duty::AfterRollback;
    let decide = |agent: &Agent, step| agent.decide(&order(key(step, Do, 1)));
    assert!(refusal(decide(&agent, 2)).contains("step 0.0 is not done"));
    agent.run(&key(0, Do, 1), failed(true));
    assert!(refusal(decide(&agent, 1)).contains("step 0.0 is not done"));
    agent.run(&key(0, Do, 2), ok(true));
    assert!(refusal(decide(&agent, 2)).contains("step 0.1 is not done"));
    // Whatever happened before, the checks after a rollback look at what is left.
    assert!(matches!(decide(&agent, 3), Decision::Begin(_)));
    // What a person knows counts; what was said of another host does not.
    let said = |host: &str, done| Order {
        bindings: vec![Binding {
            origin: StepKey {
                host: host.parse().unwrap(),
                ..key(1, Do, 1)
            },
            fact: Fact::Resolved {
                done,
                by: "olga".into(),
            },
            signature: None,
        }],
        ..order(key(2, Do, 1))
    };
    for (host, done) in [("app-2", true), ("app-1", false)] {
        let why = refusal(agent.decide(&said(host, done)));
        assert!(why.contains("step 0.1 is not done"), "{why}");
    }
    let decided = agent.decide(&said("app-1", true));
    assert!(matches!(decided, Decision::Begin(_)), "{decided:?}");
    agent.run(&key(1, Do, 1), ok(false));
    assert!(matches!(decide(&agent, 2), Decision::Begin(_)));
}

#[test]
fn a_later_attempt_returns_to_the_state_before_the_first_that_changed_something() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), failed(false));
    let decision = agent.decide(&order(key(0, Do, 2)));
    assert_eq!(
        agent.before(&decision),
        None,
        "nothing was changed: look again"
    );
    agent.run(&key(0, Do, 2), failed(true));
    agent.run(&key(0, Do, 3), ok(false));
    let undo = agent.decide(&order(key(0, Back, 1)));
    assert_eq!(agent.before(&undo), Some(key(0, Do, 2).to_string()));
    let hold = agent.memory.hold.as_ref().unwrap();
    assert!(hold.changed_by_others(&key(0, Do, 3)));
    assert!(!hold.changed_by_others(&key(0, Do, 2)), "only by itself");
}

#[test]
fn only_what_was_done_here_is_undone() {
    let mut agent = Agent::holding();
    let undo = |agent: &Agent, step| agent.decide(&order(key(step, Back, 1)));
    assert_eq!(
        undo(&agent, 0),
        Decision::Nothing("nothing was done here".into())
    );
    agent.run(&key(0, Do, 1), ok(false));
    assert!(
        matches!(undo(&agent, 0), Decision::Nothing(_)),
        "it was so before"
    );
    agent.run(&key(2, Do, 1), unknown());
    assert!(
        matches!(undo(&agent, 2), Decision::Begin(_)),
        "it may have been done"
    );
    agent.run(&key(3, Do, 1), ok(true));
    assert!(
        matches!(undo(&agent, 3), Decision::Nothing(_)),
        "a command has no undo"
    );
    agent.steps[2].undo = Undo::Keep;
    assert_eq!(
        undo(&agent, 2),
        Decision::Nothing("kept, as the plan says".into())
    );
}

#[test]
fn a_refused_attempt_is_nothing_to_undo() {
    let mut agent = Agent::holding();
    agent.end(&key(0, Do, 1), StepOutcome::Failed(refused("no", "hint")));
    assert!(matches!(
        agent.decide(&order(key(0, Do, 1))),
        Decision::Repeat(_)
    ));
    assert!(matches!(
        agent.decide(&order(key(0, Back, 1))),
        Decision::Nothing(_)
    ));
    assert!(matches!(
        agent.decide(&order(key(0, Do, 2))),
        Decision::Begin(_)
    ));
}

#[test]
fn what_was_undone_is_not_undone_again_but_a_failed_undo_is() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), ok(true));
    agent.run(&key(0, Back, 1), failed(true));
    let again = agent.decide(&order(key(0, Back, 2)));
    assert_eq!(agent.before(&again), Some(key(0, Do, 1).to_string()));
    agent.run(&key(0, Back, 2), ok(true));
    assert!(matches!(
        agent.decide(&order(key(0, Back, 3))),
        Decision::Nothing(_)
    ));
}

#[test]
fn what_nothing_can_prove_is_not_tried_again() {
    // Of whatever class: the host's answer was asked for, and proved nothing.
    for step in [0, 3] {
        let mut agent = Agent::holding();
        agent.run(&key(step, Do, 1), unknown());
        let why = refusal(agent.decide(&order(key(step, Do, 2))));
        assert!(why.contains("attempt 1"), "{why}");

        let mut again = order(key(step, Do, 2));
        let word = |done| Binding {
            origin: key(step, Do, 1),
            fact: Fact::Resolved {
                done,
                by: "olga".into(),
            },
            signature: None,
        };
        again.bindings = vec![word(true)];
        refusal(agent.decide(&again));
        again.bindings = vec![word(false)];
        assert!(matches!(agent.decide(&again), Decision::Begin(_)));
    }
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), unknown());
    agent.run(&key(0, Back, 1), ok(true));
    assert!(
        matches!(agent.decide(&order(key(0, Do, 2))), Decision::Begin(_)),
        "it was undone, whatever it was"
    );
    agent.run(&key(1, Do, 1), unknown());
    assert!(
        matches!(agent.decide(&order(key(1, Do, 2))), Decision::Begin(_)),
        "looking does nothing"
    );
}

#[test]
fn nothing_is_done_after_a_step_that_was_undone() {
    let mut agent = Agent::holding();
    agent.run(&key(0, Do, 1), ok(true));
    agent.run(&key(0, Back, 1), failed(true));
    assert!(
        matches!(agent.decide(&order(key(2, Do, 1))), Decision::Begin(_)),
        "it was not undone"
    );
    agent.run(&key(0, Back, 2), ok(true));
    let why = refusal(agent.decide(&order(key(2, Do, 1))));
    assert!(why.contains("0.0 was undone"), "{why}");
    // Nor when an order of the step itself was refused since.
    agent.end(&key(0, Do, 2), StepOutcome::Failed(refused("no", "hint")));
    refusal(agent.decide(&order(key(2, Do, 2))));
    assert!(
        matches!(agent.decide(&order(key(1, Do, 1))), Decision::Begin(_)),
        "checks come after a rollback"
    );
    agent.run(&key(0, Do, 3), ok(true));
    assert!(
        matches!(agent.decide(&order(key(2, Do, 3))), Decision::Begin(_)),
        "it was done again"
    );
    // An undo of a step asks for nothing of the kind.
    agent.run(&key(2, Do, 3), failed(true));
    agent.run(&key(0, Back, 3), ok(true));
    assert!(matches!(
        agent.decide(&order(key(2, Back, 1))),
        Decision::Begin(_)
    ));
}

#[test]
fn a_probe_needs_no_hold() {
    let agent = Agent::fresh();
    let mut probe = order(key(0, Direction::Probe, 1));
    assert_eq!(agent.decide(&probe), Decision::Look);
    probe.not_after = Timestamp(1);
    assert!(refusal(agent.decide(&probe)).contains("too late"));
}

#[test]
fn reports_are_kept_until_they_are_acknowledged() {
    let mut agent = Agent::holding();
    for attempt in 1..=3 {
        agent.run(&key(0, Do, attempt), failed(false));
    }
    assert_eq!(agent.memory.outstanding.len(), 3);
    assert!(agent.memory.acknowledge(2));
    assert!(!agent.memory.acknowledge(1), "no news");
    assert_eq!(agent.memory.outstanding.front().unwrap().0, 3);
}
