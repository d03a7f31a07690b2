//! Single decisions of the coordinator, told as stories over one small fleet.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_core::{
    Answer, Call, Config, Coordinator, Effects, Entry, Event, Message, Record, Refused,
};
use lockstep_proto::action::Action;
use lockstep_proto::ids::{Digest, Direction, Epoch, HostId, InstanceId, RolloutId, StepKey};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::plan::{
    CompiledPlan, Notice, NoticeWhen, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Cause, Failure, Refusal, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

fn step(name: &str, args: serde_json::Value) -> Step {
    let action = Action::deserialize_args(name, args).unwrap().unwrap();
    Step {
        name: None,
        action,
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line: 7,
    }
}

fn on(group: &str, steps: Vec<Step>) -> Stage {
    let target = match group {
        "controller" => Target::Controller,
        group => Target::Groups(vec![group.into()]),
    };
    Stage {
        target,
        strategy: Strategy::All,
        steps,
    }
}

fn stop() -> Step {
    step("service.stop", json!({"service": "web"}))
}

fn approval() -> Step {
    step(
        "gate.approval",
        json!({"from": {"dba": 1}, "timeout": "30m"}),
    )
}

fn plan(serial: u64, stages: Vec<Stage>) -> CompiledPlan {
    let phases = stages.into_iter().enumerate().map(|(index, stage)| Phase {
        name: format!("p{index}"),
        stages: vec![stage],
        deadline: None,
        planned: None,
    });
    CompiledPlan {
        format: 1,
        plan: "story".into(),
        serial,
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX),
        deadline: Period::seconds(3600),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([(
            "app".into(),
            Selector {
                labels: BTreeMap::from([("role".into(), "app".into())]),
            },
        )]),
        phases: phases.collect(),
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec!["qa_lead".into()],
    }
}

/// One controller and hosts that do as the story says.
struct Fleet {
    now: u64,
    coordinator: Coordinator,
    journal: Vec<Entry>,
    plans: BTreeMap<Digest, Arc<SealedPlan>>,
    orders: Vec<Order>,
    sent: Vec<(HostId, Message)>,
    notified: usize,
    reports: BTreeMap<HostId, u64>,
}

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn rollout(number: u8) -> RolloutId {
    RolloutId::from_random([number; 6])
}

impl Fleet {
    fn new(hosts: &[&str]) -> Self {
        let config = Config {
            epoch: Epoch { counter: 1, id: 1 },
        };
        let mut fleet = Self {
            now: 1_000_000,
            coordinator: Coordinator::recover(config, [], |_| None).unwrap(),
            journal: vec![],
            plans: BTreeMap::new(),
            orders: vec![],
            sent: vec![],
            notified: 0,
            reports: BTreeMap::new(),
        };
        for name in hosts {
            fleet.up(name);
        }
        fleet
    }

    fn up(&mut self, name: &str) {
        self.event(Event::HostUp {
            host: host(name),
            labels: BTreeMap::from([("role".into(), "app".into())]),
            instance: InstanceId::from_random([1; 8]),
            agent_version: "1".into(),
            held: None,
        });
    }

    fn event(&mut self, event: Event) -> Option<Result<Answer, Refused>> {
        let effects = self.coordinator.handle(Timestamp(self.now), event);
        self.take(effects)
    }

    fn take(&mut self, effects: Effects) -> Option<Result<Answer, Refused>> {
        self.journal.extend(effects.persist);
        self.notified += effects.notify.len();
        for (host, message) in effects.send {
            if let Message::Order(order) = &message {
                self.orders.push(order.clone());
            }
            self.sent.push((host, message));
        }
        effects.answer
    }

    fn call(&mut self, operator: &str, groups: &[&str], call: Call) -> Result<Answer, Refused> {
        let groups = groups.iter().map(ToString::to_string).collect();
        self.event(Event::Operator {
            operator: operator.into(),
            groups,
            call,
        })
        .unwrap()
    }

    fn submit(&mut self, number: u8, plan: CompiledPlan) -> Result<Answer, Refused> {
        let plan = Arc::new(seal(plan).unwrap());
        self.plans.insert(plan.digest(), plan.clone());
        self.call(
            "olga",
            &[],
            Call::Submit {
                rollout: rollout(number),
                plan,
                dry_run: false,
            },
        )
    }

    fn report(&mut self, name: &str, body: ReportBody) {
        let number = self.reports.entry(host(name)).or_default();
        *number += 1;
        let report = Report {
            number: *number,
            body,
        };
        self.event(Event::Report {
            host: host(name),
            report,
        });
    }

    fn consent(&mut self, number: u8, name: &str, state: Vec<Fact>) {
        let plan = self.coordinator.summary(&rollout(number)).unwrap().digest;
        self.report(
            name,
            ReportBody::Consented {
                rollout: rollout(number),
                plan,
                state,
            },
        );
    }

    /// Answers the newest order to a host.
    fn finish(&mut self, name: &str, outcome: StepOutcome, facts: Vec<Fact>) {
        let key = self.newest(name);
        self.report(
            name,
            ReportBody::Finished {
                key,
                outcome,
                facts,
                took: Period(5),
            },
        );
    }

    fn newest(&self, name: &str) -> StepKey {
        let mine = self
            .orders
            .iter()
            .rev()
            .find(|order| order.key.host == host(name));
        mine.expect("an order was given").key.clone()
    }

    fn state(&self, number: u8) -> &'static str {
        self.coordinator.summary(&rollout(number)).unwrap().state
    }

    fn reason(&self, number: u8) -> String {
        self.coordinator.summary(&rollout(number)).unwrap().reason
    }

    fn evidence(&self) -> Digest {
        let opened = self
            .journal
            .iter()
            .rev()
            .find_map(|entry| match &entry.record {
                Record::GateOpened { evidence, .. } => Some(*evidence),
                _ => None,
            });
        opened.expect("a gate is open")
    }

    fn decide(
        &mut self,
        operator: &str,
        groups: &[&str],
        evidence: Digest,
    ) -> Result<Answer, Refused> {
        let call = Call::Decide {
            rollout: rollout(1),
            gate: None,
            evidence,
            approve: true,
            items: vec![],
            comment: String::new(),
        };
        self.call(operator, groups, call)
    }

    fn later(&mut self, seconds: u64) {
        self.now += seconds * 1000;
        self.event(Event::Tick);
    }

    fn restart(&mut self) {
        let config = Config {
            epoch: Epoch { counter: 2, id: 2 },
        };
        let plans = self.plans.clone();
        let found = move |digest| plans.get(&digest).cloned();
        self.coordinator = Coordinator::recover(config, self.journal.clone(), found).unwrap();
        let effects = self.coordinator.resume(Timestamp(self.now));
        self.take(effects);
    }
}

fn ok() -> StepOutcome {
    StepOutcome::Ok {
        changed: true,
        summary: "done".into(),
    }
}

fn failed() -> StepOutcome {
    StepOutcome::Failed(Failure {
        cause: Cause::Step,
        message: "exit code 1".into(),
        hint: None,
        last_lines: vec!["boom".into()],
        changed: true,
    })
}

fn state(digest: &str) -> Fact {
    Fact::State {
        name: "service web".into(),
        digest: Digest::of(digest.as_bytes()),
        text: digest.into(),
    }
}

#[test]
fn an_approval_binds_to_what_was_shown_and_excludes_the_requester() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(
            1,
            plan(
                1,
                vec![on("controller", vec![approval()]), on("app", vec![stop()])],
            ),
        )
        .unwrap();
    fleet.consent(1, "a", vec![]);
    let evidence = fleet.evidence();
    assert!(matches!(
        fleet.decide("dana", &["dba"], Digest::of(b"else")),
        Err(Refused::Invalid(_))
    ));
    assert!(matches!(
        fleet.decide("olga", &["dba"], evidence),
        Err(Refused::NotAllowed(_))
    ));
    assert!(matches!(
        fleet.decide("quinn", &["qa"], evidence),
        Err(Refused::NotAllowed(_))
    ));
    assert!(
        fleet.orders.is_empty(),
        "INV-12: nothing runs before the approval"
    );
    assert_eq!(
        fleet.decide("dana", &["dba"], evidence),
        Ok(Answer::Missing(String::new()))
    );
    assert_eq!(fleet.orders.len(), 1);
}

#[test]
fn a_gate_that_nobody_answers_ends_the_rollout() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("controller", vec![approval()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(30 * 60);
    assert_eq!(fleet.state(1), "rolled_back");
    assert!(fleet.reason(1).contains("1 of dba"), "{}", fleet.reason(1));
}

#[test]
fn a_refusal_before_anything_happened_ends_the_rollout_and_frees_the_hosts() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    let refusals = vec![Refusal {
        at: None,
        reason: "the policy lists no service.stop".into(),
    }];
    fleet.report(
        "b",
        ReportBody::Declined {
            rollout: rollout(1),
            refusals,
        },
    );
    assert_eq!(fleet.state(1), "cancelled");
    assert!(fleet.reason(1).contains("b refuses") && fleet.orders.is_empty());
    let released = |name: &str| {
        fleet
            .sent
            .iter()
            .any(|(to, message)| *to == host(name) && matches!(message, Message::Release { .. }))
    };
    assert!(released("a") && released("b"));
}

#[test]
fn a_second_rollout_is_refused_with_the_first_ones_name() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    let refused = fleet
        .submit(2, plan(2, vec![on("app", vec![stop()])]))
        .unwrap_err();
    assert!(
        matches!(&refused, Refused::Locked { holder, .. } if *holder == rollout(1)),
        "{refused}"
    );
    assert!(matches!(
        fleet.submit(3, plan(1, vec![])),
        Err(Refused::SerialUsed(1, _))
    ));
}

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
        fleet.report(
            name,
            ReportBody::Surveyed {
                rollout: rollout(1),
                state: vec![state("up")],
            },
        );
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
    fleet.report(
        "a",
        ReportBody::Surveyed {
            rollout: rollout(1),
            state: vec![state("down")],
        },
    );
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
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
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
    fleet
        .call(
            "olga",
            &[],
            Call::Resume {
                rollout: rollout(1),
            },
        )
        .unwrap();
    assert_eq!(fleet.newest("a").attempt, 2);
    fleet.finish("a", ok(), vec![]);
    fleet.report(
        "a",
        ReportBody::Surveyed {
            rollout: rollout(1),
            state: vec![],
        },
    );
    assert_eq!(fleet.state(1), "rolled_back");
}

#[test]
fn cancel_needs_no_agent() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.event(Event::HostDown { host: host("a") });
    let cancel = Call::Cancel {
        rollout: rollout(1),
        reason: "wrong day".into(),
    };
    fleet.call("olga", &[], cancel).unwrap();
    assert_eq!(fleet.state(1), "cancelled");
    fleet.sent.clear();
    fleet.event(Event::HostUp {
        host: host("a"),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        instance: InstanceId::from_random([1; 8]),
        agent_version: "1".into(),
        held: Some(rollout(1)),
    });
    assert!(
        fleet
            .sent
            .iter()
            .any(|(_, message)| matches!(message, Message::Cancel { .. }))
    );
}

#[test]
fn a_paused_rollout_sends_nothing_new() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop(), stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet
        .call(
            "olga",
            &[],
            Call::Pause {
                rollout: rollout(1),
            },
        )
        .unwrap();
    fleet.finish("a", ok(), vec![]);
    assert_eq!((fleet.orders.len(), fleet.state(1)), (1, "paused"));
    fleet.later(60);
    assert!(
        fleet
            .coordinator
            .next_deadline()
            .is_some_and(|due| due.0 > fleet.now)
    );
    fleet
        .call(
            "olga",
            &[],
            Call::Resume {
                rollout: rollout(1),
            },
        )
        .unwrap();
    assert_eq!(fleet.orders.len(), 2);
}

#[test]
fn a_notice_is_sent_at_most_once() {
    let mut fleet = Fleet::new(&["a"]);
    let args = json!({"url": "http://localhost/x", "text": "${rollout.state}"});
    let action = Action::deserialize_args("notify.webhook", args)
        .unwrap()
        .unwrap();
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    plan.notices = vec![Notice {
        when: NoticeWhen::Started,
        action,
    }];
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    assert_eq!(fleet.notified, 1);
    fleet.restart();
    fleet.later(1);
    assert_eq!(
        fleet.notified, 1,
        "it may have been sent before the restart"
    );
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
fn a_signature_needs_the_role() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    let sign = || Call::SignOff {
        rollout: rollout(1),
        role: "qa_lead".into(),
        comment: String::new(),
    };
    assert!(matches!(
        fleet.call("quinn", &["qa_lead"], sign()),
        Err(Refused::NotNow(_))
    ));
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    assert!(matches!(
        fleet.call("olga", &[], sign()),
        Err(Refused::NotAllowed(_))
    ));
    fleet.call("quinn", &["qa_lead"], sign()).unwrap();
}

#[test]
fn an_agent_that_was_installed_anew_numbers_its_reports_anew() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    let anew = InstanceId::from_random([2; 8]);
    fleet.event(Event::HostUp {
        host: host("a"),
        instance: anew.clone(),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        agent_version: "1".into(),
        held: None,
    });
    assert_eq!(fleet.coordinator.acknowledged(&host("a"), &anew), 0);
    fleet.reports.clear();
    fleet
        .submit(2, plan(2, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(2, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(2), "succeeded");
}

fn canary_plan(serial: u64, phases: Vec<(Target, Strategy, Step)>) -> CompiledPlan {
    let stages = phases.into_iter().map(|(target, strategy, step)| Stage {
        target,
        strategy,
        steps: vec![step],
    });
    plan(serial, stages.collect())
}

#[test]
fn the_step_of_an_elected_host_that_stayed_behind_is_not_skipped() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let one = || Target::OneOf(vec!["app".into()]);
    let rolling = Strategy::Rolling {
        batch: lockstep_proto::plan::Batch::Hosts(1),
        max_failures: 1,
        pause: Period(0),
    };
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
fn resume_opens_a_gate_that_timed_out_anew() {
    let mut fleet = Fleet::new(&["a"]);
    let args = json!({"from": {"dba": 1}, "timeout": "1m", "on_timeout": "halt"});
    let gate = step("gate.approval", args);
    fleet
        .submit(1, plan(1, vec![on("controller", vec![gate])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(60);
    assert_eq!(fleet.state(1), "halted");
    fleet
        .call(
            "olga",
            &[],
            Call::Resume {
                rollout: rollout(1),
            },
        )
        .unwrap();
    assert_eq!(fleet.state(1), "running");
    fleet.decide("dana", &["dba"], fleet.evidence()).unwrap();
    assert_eq!(fleet.state(1), "succeeded");
}

#[test]
fn resume_asks_a_failed_check_after_a_rollback_again() {
    let mut fleet = Fleet::new(&["a"]);
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    let check = step("check.disk", json!({"path": "/", "free": "1B"}));
    plan.after_rollback = Some(Phase {
        name: "after_rollback".into(),
        stages: vec![on("app", vec![check])],
        deadline: None,
        planned: None,
    });
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    for outcome in [failed(), ok(), failed()] {
        fleet.finish("a", outcome, vec![]);
    }
    assert_eq!(fleet.state(1), "halted");
    fleet
        .call(
            "olga",
            &[],
            Call::Resume {
                rollout: rollout(1),
            },
        )
        .unwrap();
    assert_eq!(
        (fleet.newest("a").at.phase, fleet.newest("a").attempt),
        (1, 2)
    );
    fleet.finish("a", ok(), vec![]);
    fleet.report(
        "a",
        ReportBody::Surveyed {
            rollout: rollout(1),
            state: vec![],
        },
    );
    assert_eq!(fleet.state(1), "rolled_back");
}

#[test]
fn a_late_report_of_success_is_not_done_again() {
    let mut fleet = Fleet::new(&["a"]);
    let run = step("exec.run", json!({"name": "x", "argv": ["x"]}));
    fleet
        .submit(1, plan(1, vec![on("app", vec![run])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet
        .call(
            "olga",
            &[],
            Call::Pause {
                rollout: rollout(1),
            },
        )
        .unwrap();
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(200);
    fleet.up("a");
    fleet.finish("a", ok(), vec![]);
    fleet
        .call(
            "olga",
            &[],
            Call::Resume {
                rollout: rollout(1),
            },
        )
        .unwrap();
    assert_eq!(fleet.newest("a").attempt, 1, "INV-1");
    assert_eq!(fleet.state(1), "succeeded");
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
    fleet.submit(1, plan(1, stages)).unwrap();
    fleet.consent(1, "a", vec![]);
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

#[test]
fn a_host_that_is_gone_for_good_is_forgotten() {
    let mut fleet = Fleet::new(&["a", "old"]);
    let forget = || Call::Forget { host: host("old") };
    assert!(
        matches!(fleet.call("olga", &[], forget()), Err(Refused::NotNow(_))),
        "connected"
    );
    fleet.event(Event::HostDown { host: host("old") });
    fleet.call("olga", &[], forget()).unwrap();
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    fleet.restart();
    assert_eq!(fleet.coordinator.hosts().count(), 1);
}
