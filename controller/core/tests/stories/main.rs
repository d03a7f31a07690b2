//! Single decisions of the coordinator, told as stories over one small fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_core::{
    Answer, Call, Config, Coordinator, Effects, Entry, Event, Message, Record, Refused,
};
use lockstep_proto::action::Action;
use lockstep_proto::ids::{
    Digest, Direction, Epoch, HostId, InstanceId, RolloutId, StepKey, StepRef,
};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::plan::{
    Batch, CompiledPlan, Notice, NoticeWhen, Phase, Selector, Slo, Stage, Step, Strategy, Target,
    Undo,
};
use lockstep_proto::report::{Cause, Failure, Refusal, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

mod archive;
mod backward;
mod batch;
mod cancel;
mod ends;
mod forward;
mod glass;
mod later;
mod levers;
mod lock;
mod people;

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

/// Batches of one host.
fn one_by_one(max_failures: u32) -> Strategy {
    Strategy::Rolling {
        batch: Batch::Hosts(1),
        max_failures,
        pause: Period(0),
    }
}

/// A person's word on an attempt that is unknown.
fn resolve(name: &str, at: StepRef, done: bool) -> Call {
    Call::Resolve {
        rollout: rollout(1),
        host: host(name),
        at,
        done,
        reason: "seen".into(),
        signed: None,
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
        fleet_name: String::new(),
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

fn after_rollback(check: Step) -> Phase {
    Phase {
        name: "after_rollback".into(),
        stages: vec![on("app", vec![check])],
        deadline: None,
        planned: None,
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
    notified: Vec<Action>,
    /// Reports that answered nothing.
    unasked: usize,
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
            break_glass: Some("incident".into()),
        };
        let mut fleet = Self {
            now: 1_000_000,
            coordinator: Coordinator::recover(config, [], |_| None).unwrap(),
            journal: vec![],
            plans: BTreeMap::new(),
            orders: vec![],
            sent: vec![],
            notified: vec![],
            unasked: 0,
            reports: BTreeMap::new(),
        };
        for name in hosts {
            fleet.up(name);
        }
        fleet
    }

    fn up(&mut self, name: &str) {
        self.up_holding(name, None);
    }

    fn up_holding(&mut self, name: &str, held: Option<RolloutId>) {
        self.event(Event::HostUp {
            host: host(name),
            labels: BTreeMap::from([("role".into(), "app".into())]),
            instance: InstanceId::from_random([1; 8]),
            agent_version: "1".into(),
            held,
        });
    }

    fn event(&mut self, event: Event) -> Option<Result<Answer, Refused>> {
        let effects = self.coordinator.handle(Timestamp(self.now), event);
        self.take(effects)
    }

    fn take(&mut self, effects: Effects) -> Option<Result<Answer, Refused>> {
        self.journal.extend(effects.persist);
        let notices = effects.notify.into_iter();
        self.notified.extend(notices.map(|notice| notice.action));
        self.unasked += effects.unasked.len();
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
                signatures: vec![],
            },
        )
    }

    /// Submits rollout 1, to which every host consents.
    fn start(&mut self, stages: Vec<Stage>) {
        self.submit(1, plan(1, stages)).unwrap();
        let hosts = self.coordinator.hosts().map(|(name, _)| name.to_string());
        for name in hosts.collect::<Vec<String>>() {
            self.consent(1, &name, vec![]);
        }
    }

    fn pause(&mut self) {
        let rollout = rollout(1);
        self.call("olga", &[], Call::Pause { rollout }).unwrap();
    }

    fn resume(&mut self) {
        let rollout = rollout(1);
        self.call("olga", &[], Call::Resume { rollout }).unwrap();
    }

    fn surveyed(&mut self, name: &str, state: Vec<Fact>) {
        let rollout = rollout(1);
        self.report(name, ReportBody::Surveyed { rollout, state });
    }

    fn report(&mut self, name: &str, body: ReportBody) {
        let number = self.reports.entry(host(name)).or_default();
        *number += 1;
        let report = Report {
            number: *number,
            body,
            head: None,
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
                round: 0,
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
                signatures: vec![],
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
            signed: None,
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
            break_glass: None,
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

fn unchanged() -> StepOutcome {
    StepOutcome::Ok {
        changed: false,
        summary: "it was there".into(),
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
