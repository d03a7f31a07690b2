//! Rollouts of plans that anybody wrote, with agents that say anything, and journals that say
//! anything of them.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use lockstep_core::compile::compile;
use lockstep_core::coordinator::Config;
use lockstep_core::plan::Plan;
use lockstep_core::{Call, Coordinator, Effects, Entry, Event, MAX_TEXT, Message};
use lockstep_proto::ids::{
    Digest, Direction, Epoch, HostId, InstanceId, RolloutId, StepKey, StepRef,
};
use lockstep_proto::report::{Cause, Failure, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::{Hello, agent_v1 as agent};
use prost::Message as _;

use crate::plans::NOW;

/// The largest record of a controller's journal, in bytes.
const MAX_PAYLOAD: usize = (32 << 10) - 32;

/// Events of one rollout; a plan that goes on for longer is left.
const STEPS: usize = 150;

/// A plan with something of everything that waits for others.
pub(crate) const PLAN: &str = r"version: 1
plan: p
fleet:
  app: {labels: {role: app}}
  db: {labels: {role: db}}
deadline: 2h
max_failures: 1
phases:
  - name: look
    on: [app, db]
    steps: [{check.disk: {path: /, free: 1GiB}}]
  - name: ask
    steps:
      - gate.approval: {from: {dba: 1}, timeout: 30m, on_timeout: abort}
  - name: stop
    on: app
    strategy: {rolling: {batch: 1, max_failures: 1}}
    steps:
      - service.stop: {service: web}
      - exec.run: {name: x, argv: [/bin/x]}
  - name: list
    steps:
      - gate.checklist: {items: [a, b], from: qa, timeout: 10m, on_timeout: abort}
  - name: start
    on: {one_of: app}
    steps: [{service.start: {service: web}}]
signoff: [lead]
";

pub(crate) fn plan() -> Arc<SealedPlan> {
    static SEALED: OnceLock<Arc<SealedPlan>> = OnceLock::new();
    let sealed = SEALED.get_or_init(|| {
        let plan = Plan::parse("plan.yaml", PLAN).unwrap_or_else(|why| panic!("{why}"));
        let sealed = compile(&plan, &BTreeMap::new(), 7, NOW);
        Arc::new(sealed.unwrap_or_else(|why| panic!("{why}")))
    });
    Arc::clone(sealed)
}

/// One controller, and what it has written down.
struct World {
    coordinator: Coordinator,
    journal: Vec<Entry>,
    plan: Arc<SealedPlan>,
    now: Timestamp,
    sent: Vec<(HostId, Message)>,
    /// What decides where the bytes do not.
    dice: Digest,
    throws: usize,
}

fn config() -> Config {
    Config {
        epoch: Epoch { counter: 1, id: 1 },
        break_glass: Some("incident".to_owned()),
    }
}

fn rollout() -> RolloutId {
    RolloutId::from_random([9; 6])
}

fn instance() -> InstanceId {
    InstanceId::from_random([1; 8])
}

impl World {
    fn new(plan: Arc<SealedPlan>) -> Self {
        let dice = plan.digest();
        let coordinator = Coordinator::recover(config(), [], |_| None);
        let mut world = Self {
            coordinator: coordinator.expect("an empty journal"),
            journal: vec![],
            plan,
            now: NOW,
            sent: vec![],
            dice,
            throws: 0,
        };
        let effects = world.coordinator.resume(world.now);
        world.take(effects);
        world
    }

    fn throw(&mut self) -> u8 {
        self.throws += 1;
        if self.throws.is_multiple_of(32) {
            self.dice = Digest::of(&self.dice.0);
        }
        self.dice.0[self.throws % 32]
    }

    /// INV-2: whatever is to be persisted fits into the journal, and is found again as it was.
    fn take(&mut self, effects: Effects) {
        for entry in effects.persist {
            let payload = serde_json::to_vec(&entry).expect("a record can be written");
            assert!(
                payload.len() <= MAX_PAYLOAD,
                "{} bytes: {entry:.200?}",
                payload.len()
            );
            let read: Entry = serde_json::from_slice(&payload).expect("it was just written");
            assert_eq!(read, entry);
            self.journal.push(entry);
        }
        self.sent.extend(effects.send);
    }

    fn event(&mut self, event: Event) {
        let effects = self.coordinator.handle(self.now, event);
        self.take(effects);
    }

    fn up(&mut self, host: &HostId, labels: BTreeMap<String, String>) {
        self.event(Event::HostUp {
            host: host.clone(),
            instance: instance(),
            labels,
            agent_version: "1".to_owned(),
            held: None,
        });
    }

    fn submit(&mut self, dry_run: bool) {
        let plan = Arc::clone(&self.plan);
        self.call(Call::Submit {
            rollout: rollout(),
            plan,
            dry_run,
            signatures: vec![],
        });
    }

    fn call(&mut self, call: Call) {
        let groups = ["dba", "qa", "lead"].map(str::to_owned).to_vec();
        self.event(Event::Operator {
            operator: "dora".to_owned(),
            groups,
            call,
        });
    }

    fn report(&mut self, host: &HostId, body: ReportBody) {
        let number = self.coordinator.acknowledged(host, &instance()) + 1;
        let report = Report {
            number,
            body,
            head: None,
        };
        self.event(Event::Report {
            host: host.clone(),
            report,
        });
    }

    /// What an agent answers: well, mostly.
    fn answer(&mut self, host: &HostId, message: Message) {
        let body = match message {
            Message::Offer {
                rollout,
                plan,
                round,
                ..
            } => ReportBody::Consented {
                rollout,
                plan,
                round,
                state: vec![],
            },
            Message::Order(order) => {
                let outcome = match self.throw() {
                    0..12 => failed(true),
                    12..24 => failed(false),
                    24..32 => StepOutcome::Unknown {
                        why: "nobody knows".to_owned(),
                    },
                    32..40 => return,
                    throw => StepOutcome::Ok {
                        changed: throw.is_multiple_of(2),
                        summary: "done".to_owned(),
                    },
                };
                ReportBody::Finished {
                    key: order.key,
                    outcome,
                    facts: vec![],
                    took: Period::seconds(1),
                    signatures: vec![],
                }
            }
            Message::Survey { rollout, .. } => ReportBody::Surveyed {
                rollout,
                state: vec![],
            },
            Message::Acknowledged(_) | Message::Release { .. } | Message::Cancel { .. } => return,
        };
        self.report(host, body);
    }

    /// What people do when nothing else happens.
    fn lever(&mut self) {
        let rollout = rollout();
        let reason = "why not".to_owned();
        let call = match self.throw() % 8 {
            0 => Call::Pause { rollout },
            1 | 2 => Call::Resume { rollout },
            3 => Call::ResumeFailed { rollout },
            4 => Call::RollBack { rollout, reason },
            _ => Call::Decide {
                evidence: evidence(&self.coordinator, &rollout),
                rollout,
                gate: None,
                approve: true,
                items: vec![],
                comment: String::new(),
                signed: None,
            },
        };
        self.call(call);
    }

    fn play(&mut self) {
        for _ in 0..STEPS {
            if let Some((host, message)) = self.sent.pop() {
                self.answer(&host, message);
                continue;
            }
            let ended = |summary: lockstep_core::Summary| summary.ended;
            if self.coordinator.summary(&rollout()).is_none_or(ended) {
                break;
            }
            if self.throw() < 160 {
                self.lever();
                continue;
            }
            self.wait();
        }
    }

    /// Nothing happens until something is due.
    fn wait(&mut self) {
        let next = self.coordinator.next_deadline();
        self.now = next.unwrap_or(self.now).max(self.now).plus(Period(1));
        self.event(Event::Tick);
    }

    /// INV-2: what a restart finds is what there was; and all of it can be shown.
    fn check(&self) {
        let plan = |_| Some(Arc::clone(&self.plan));
        let again = Coordinator::recover(config(), self.journal.clone(), plan);
        let again = again.unwrap_or_else(|why| panic!("{why}"));
        for id in self.coordinator.rollouts() {
            let document = self.coordinator.document(id);
            let text = document.as_ref().expect("it is known").to_string();
            assert_eq!(again.document(id), document);
            lockstep::fuzzing::documents(text.as_bytes());
        }
    }
}

fn evidence(coordinator: &Coordinator, rollout: &RolloutId) -> Digest {
    let document = coordinator.document(rollout).unwrap_or_default();
    let phases = document["phases"].as_array().into_iter().flatten();
    let steps = phases.flat_map(|phase| phase["steps"].as_array().into_iter().flatten());
    let mut found = steps.filter_map(|step| step["gate"]["evidence"].as_str()?.parse().ok());
    found.next().unwrap_or(Digest([0; 32]))
}

fn failed(changed: bool) -> StepOutcome {
    StepOutcome::Failed(Failure {
        cause: Cause::Step,
        message: "it failed".to_owned(),
        hint: None,
        last_lines: vec![],
        changed,
    })
}

/// Whoever may submit a plan may not end the controller with it.
pub(crate) fn submit(plan: SealedPlan) {
    // Nobody has a fleet for such a plan: see the bounds of an agent's labels.
    let small = |labels: &BTreeMap<String, String>| {
        let bytes: usize = labels
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        labels.len() <= 64 && bytes <= 4 << 10
    };
    let fleet = plan.plan().fleet.values().map(|group| group.labels.clone());
    let mut labels: Vec<BTreeMap<String, String>> = fleet.take(3).collect();
    labels.push(
        labels
            .iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    );
    let mut world = World::new(Arc::new(plan));
    for (labels, number) in labels.into_iter().filter(small).zip(1..) {
        let host = format!("h-{number}").parse().expect("a host's name");
        world.up(&host, labels);
    }
    let dry_run = world.throw() < 32;
    world.submit(dry_run);
    world.play();
    world.check();
}

/// Records of a rollout, and its document.
pub(crate) fn seeds() -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut world = World::new(plan());
    for (host, role) in [("app-1", "app"), ("app-2", "app"), ("db-1", "db")] {
        let host = host.parse().expect("a host's name");
        world.up(&host, [("role".to_owned(), role.to_owned())].into());
    }
    world.submit(false);
    world.play();
    let document = world
        .coordinator
        .document(&rollout())
        .expect("it was submitted");
    let line = |entry| serde_json::to_vec(entry).expect("a record can be written");
    let lines = world.journal.iter().map(line).collect();
    (lines, document.to_string().into_bytes())
}

/// What agents report, as they please, while a rollout runs. Each part is a byte that says what it
/// is and from whom, and a message with its length.
pub(crate) fn session(mut bytes: &[u8]) {
    let hosts: [HostId; 2] = ["app-1", "app-2"].map(|name| name.parse().expect("a host's name"));
    let mut world = World::new(plan());
    for (host, role) in hosts.iter().zip(["app", "db"]) {
        world.up(host, [("role".to_owned(), role.to_owned())].into());
    }
    world.submit(false);
    let mut parts = 0;
    while let Some((kind, rest)) = bytes.split_first()
        && parts < STEPS
    {
        parts += 1;
        bytes = rest;
        let host = &hosts[usize::from(kind >> 7)];
        let understood = match kind & 0x7f {
            b'a' => {
                // The agent does what it is told, so that a few bytes come far.
                for (host, message) in std::mem::take(&mut world.sent) {
                    world.answer(&host, message);
                }
                true
            }
            b'l' => {
                world.lever();
                true
            }
            b'd' => {
                world.event(Event::HostDown { host: host.clone() });
                true
            }
            b't' => {
                world.wait();
                true
            }
            b'r' => hear(&mut world, host, &mut bytes).is_some(),
            b'h' => greet(&mut world, host, &mut bytes).is_some(),
            b'c' => call(&mut world, host, &mut bytes).is_some(),
            _ => false,
        };
        if !understood {
            break;
        }
    }
    world.check();
}

fn hear(world: &mut World, host: &HostId, bytes: &mut &[u8]) -> Option<()> {
    let report = agent::Report::decode_length_delimited(bytes).ok()?;
    let mut report = lockstep::fuzzing::report(host, report)?;
    if report.number == 0 {
        report.number = world.coordinator.acknowledged(host, &instance()) + 1;
    }
    let host = host.clone();
    world.event(Event::Report { host, report });
    Some(())
}

fn greet(world: &mut World, host: &HostId, bytes: &mut &[u8]) -> Option<()> {
    let hello = agent::Hello::decode_length_delimited(bytes).ok()?;
    let hello = Hello::try_from(hello).ok()?;
    world.event(Event::HostUp {
        // Its certificate says so.
        host: host.clone(),
        instance: hello.instance,
        labels: hello.labels,
        agent_version: hello.agent_version,
        held: hello.held_rollout,
    });
    Some(())
}

/// What an operator says of a host's step: two bytes for the place, one for the rest, and a text.
fn call(world: &mut World, host: &HostId, bytes: &mut &[u8]) -> Option<()> {
    let ([phase, step, how], rest) = bytes.split_first_chunk()?;
    let text = String::decode_length_delimited(&mut { rest }).ok()?;
    let reason: String = text.chars().take(MAX_TEXT / 4).collect();
    *bytes = &[];
    let rollout = rollout();
    let at = StepRef {
        phase: (*phase).into(),
        step: (*step).into(),
    };
    let call = match how % 6 {
        0 => Call::Resolve {
            signed: Some((
                StepKey {
                    rollout: rollout.clone(),
                    host: host.clone(),
                    at,
                    direction: Direction::Do,
                    attempt: 1,
                },
                reason.clone(),
            ))
            .filter(|_| how & 64 > 0),
            rollout,
            host: host.clone(),
            at,
            done: how & 128 > 0,
            reason,
        },
        1 => Call::Cancel { rollout, reason },
        2 => Call::Close { rollout, reason },
        3 => Call::SignOff {
            rollout,
            role: "lead".to_owned(),
            comment: reason,
        },
        4 => Call::Forget { host: host.clone() },
        _ => Call::Decide {
            evidence: evidence(&world.coordinator, &rollout),
            rollout,
            gate: (how & 64 > 0).then_some(at),
            approve: how & 128 > 0,
            items: vec![(*step).into()],
            comment: reason.clone(),
            signed: (how & 32 > 0).then_some((world.now, reason)),
        },
    };
    world.call(call);
    Some(())
}

/// Records of a journal, one in JSON on each line: each comes back as it was, and a journal that
/// says anything is folded, or refused.
pub(crate) fn controller_journal(bytes: &[u8]) {
    let mut entries = vec![];
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(entry) = serde_json::from_slice::<Entry>(line) else {
            break;
        };
        let payload = serde_json::to_vec(&entry).expect("a record can be written");
        let read: Entry = serde_json::from_slice(&payload).expect("it was just written");
        assert_eq!(read, entry);
        assert_eq!(
            serde_json::to_vec(&read).expect("a record can be written"),
            payload
        );
        entries.push(entry);
    }
    if entries.is_empty() {
        return;
    }
    let last = entries
        .iter()
        .map(|entry| entry.at)
        .max()
        .unwrap_or_default();
    let Ok(mut coordinator) = Coordinator::recover(config(), entries, |_| Some(plan())) else {
        return;
    };
    coordinator.resume(last.max(NOW));
    for id in coordinator.rollouts() {
        let document = coordinator.document(id).expect("it is known").to_string();
        lockstep::fuzzing::documents(document.as_bytes());
    }
}
