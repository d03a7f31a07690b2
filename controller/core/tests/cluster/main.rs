//! The coordinator against simulated agents: generated fleets and plans, and a seeded world that
//! fails steps, loses hosts, delays reports and restarts the controller. Invariants carry the
//! names of the promises. A failing case prints its seed; the same seed gives the same run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use lockstep_core::{Call, Config, Coordinator, Effects, Entry, Event, Message, Record};
use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, Epoch, HostId, InstanceId, RolloutId, StepKey, StepRef};
use lockstep_proto::order::Order;
use lockstep_proto::plan::{
    Batch, CompiledPlan, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Cause, Failure, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use proptest::prelude::*;

use generate::{Dice, plan};

mod generate;

/// A simulated agent: it does what it is told once, and remembers what it reported.
#[derive(Default)]
struct Agent {
    up: bool,
    reports: Vec<ReportBody>,
    sent: u64,
    seen: BTreeSet<StepKey>,
    running: VecDeque<(u64, StepKey)>,
}

/// How often things go wrong, in percent.
#[derive(Debug, Clone, Copy)]
struct Faults {
    fail: u64,
    unknown: u64,
    lose_host: u64,
    restart: u64,
}

struct World {
    dice: Dice,
    faults: Faults,
    now: u64,
    coordinator: Coordinator,
    journal: Vec<Entry>,
    plan: Arc<SealedPlan>,
    rollout: RolloutId,
    agents: BTreeMap<HostId, Agent>,
    inbox: VecDeque<(HostId, Message)>,
    /// What agents really did: the independent ledger of effects.
    ledger: Vec<(StepKey, bool)>,
    /// Undo orders in the order in which they were given.
    undos: Vec<(HostId, StepRef)>,
    term: u64,
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut dice = Dice(seed);
        let plan = Arc::new(seal(plan(&mut dice)).expect("a generated plan is small"));
        let hosts = 2 + dice.roll(8);
        let epoch = Epoch { counter: 1, id: 1 };
        let none = |_| None;
        let coordinator =
            Coordinator::recover(Config { epoch }, [], none).expect("an empty journal");
        let mut world = Self {
            dice,
            faults,
            now: 1_000_000,
            coordinator,
            journal: vec![],
            plan,
            rollout: RolloutId::from_random([9; 6]),
            agents: BTreeMap::new(),
            inbox: VecDeque::new(),
            ledger: vec![],
            undos: vec![],
            term: 1,
        };
        let effects = world.coordinator.resume(Timestamp(world.now));
        world.take(effects);
        for index in 0..hosts {
            let host: HostId = format!("h-{index}").parse().unwrap();
            world.agents.insert(
                host.clone(),
                Agent {
                    up: true,
                    ..Agent::default()
                },
            );
            world.connect(&host);
        }
        let call = Call::Submit {
            rollout: world.rollout.clone(),
            plan: world.plan.clone(),
            dry_run: false,
        };
        world.event(Event::Operator {
            operator: "olga".into(),
            groups: vec![],
            call,
        });
        world
    }

    fn labels(host: &HostId) -> BTreeMap<String, String> {
        let role = if host.as_str() == "h-0" { "db" } else { "app" };
        BTreeMap::from([("role".into(), role.into())])
    }

    fn connect(&mut self, host: &HostId) {
        self.event(Event::HostUp {
            host: host.clone(),
            labels: Self::labels(host),
            instance: InstanceId::from_random([1; 8]),
            agent_version: "1".into(),
            held: None,
        });
        let acknowledged = self
            .coordinator
            .acknowledged(host, &InstanceId::from_random([1; 8]));
        self.agents.get_mut(host).unwrap().sent = acknowledged;
    }

    fn event(&mut self, event: Event) {
        let effects = self.coordinator.handle(Timestamp(self.now), event);
        self.take(effects);
    }

    fn take(&mut self, effects: Effects) {
        if let Some(Err(refused)) = &effects.answer {
            panic!("a call of the world was refused: {refused}");
        }
        for entry in effects.persist {
            let size = serde_json::to_vec(&entry).unwrap().len();
            assert!(
                size < 32_000,
                "INV-2: the journal would refuse {size} bytes"
            );
            self.journal.push(entry);
        }
        for (host, message) in effects.send {
            if let Message::Order(order) = &message {
                self.check_order(order);
            }
            self.inbox.push_back((host, message));
        }
    }

    /// INV-3 and INV-6 at the moment an order is given.
    fn check_order(&mut self, order: &Order) {
        let key = &order.key;
        if key.attempt > 1 {
            let before = StepKey {
                attempt: key.attempt - 1,
                ..key.clone()
            };
            assert!(
                self.interrupted(&before),
                "INV-1: {key} is retried without proof"
            );
        }
        let plan = self.plan.plan();
        let quarantined: BTreeSet<&HostId> = self
            .journal
            .iter()
            .filter_map(|entry| match &entry.record {
                Record::Quarantined { host, .. } => Some(host),
                _ => None,
            })
            .collect();
        match key.direction {
            Direction::Do => {
                let mine = plan.step(key.at).unwrap();
                let earlier = plan
                    .steps()
                    .filter(|placed| (placed.at.phase, placed.stage) < (key.at.phase, mine.stage));
                for placed in earlier {
                    for host in self.required(placed.target) {
                        let done = self.ok(&host, placed.at);
                        assert!(
                            done || quarantined.contains(&host),
                            "INV-3: {key} was ordered before {host} closed {}",
                            placed.at
                        );
                    }
                }
                assert!(
                    self.undos.is_empty(),
                    "INV-6: forward again after a rollback began"
                );
            }
            Direction::Undo => {
                let repeated = self.undos.contains(&(key.host.clone(), key.at));
                if !repeated {
                    // Restarts are undone at the very end.
                    let last = |at: StepRef| {
                        let action = &plan.step(at).unwrap().step.action;
                        matches!(action, Action::ServiceRestart(_))
                    };
                    let on_host = |at: StepRef| (last(at), std::cmp::Reverse(at));
                    let before = self.undos.iter().rev().find(|(host, _)| *host == key.host);
                    assert!(
                        before.is_none_or(|(_, at)| on_host(*at) < on_host(key.at)),
                        "INV-6: undo goes in reverse"
                    );
                    let stage = |at: StepRef| {
                        (
                            last(at),
                            std::cmp::Reverse((at.phase, plan.step(at).unwrap().stage)),
                        )
                    };
                    assert!(
                        self.undos
                            .last()
                            .is_none_or(|(_, at)| stage(*at) <= stage(key.at)),
                        "INV-6: a stage is undone on all hosts before the one before it"
                    );
                    self.undos.push((key.host.clone(), key.at));
                }
                let ordered = self.journal.iter().any(|entry| match &entry.record {
                    Record::Dispatched {
                        at,
                        direction: Direction::Do,
                        hosts,
                        ..
                    } => *at == key.at && hosts.contains(&key.host),
                    _ => false,
                });
                assert!(ordered, "INV-6: only touched hosts are undone");
            }
            Direction::Probe => panic!("a probe in a real rollout"),
        }
    }

    fn required(&self, target: &Target) -> Vec<HostId> {
        match target {
            Target::Controller => vec![],
            Target::OneOf(groups) => self
                .journal
                .iter()
                .filter_map(|entry| match &entry.record {
                    Record::Elected {
                        groups: elected,
                        host,
                        ..
                    } if elected == groups => Some(host.clone()),
                    _ => None,
                })
                .collect(),
            Target::Groups(_) => {
                let means = |host: &&HostId| self.plan.plan().targets(target, &Self::labels(host));
                self.agents.keys().filter(means).cloned().collect()
            }
        }
    }

    fn ok(&self, host: &HostId, at: StepRef) -> bool {
        self.journal.iter().any(|entry| match &entry.record {
            Record::Reported {
                body:
                    ReportBody::Finished {
                        key,
                        outcome: StepOutcome::Ok { .. },
                        ..
                    },
                ..
            } => key.host == *host && key.at == at && key.direction == Direction::Do,
            _ => false,
        })
    }

    /// Whether a host has proven what an attempt left when it was cut off.
    fn interrupted(&self, wanted: &StepKey) -> bool {
        self.journal.iter().any(|entry| match &entry.record {
            Record::Reported {
                body:
                    ReportBody::Finished {
                        key,
                        outcome: StepOutcome::Failed(failure),
                        ..
                    },
                ..
            } => key == wanted && failure.cause == Cause::Interrupted,
            _ => false,
        })
    }

    /// An agent gets a message.
    fn deliver(&mut self, host: &HostId, message: Message) {
        let agent = self.agents.get_mut(host).unwrap();
        if !agent.up {
            return;
        }
        match message {
            Message::Offer { rollout, plan, .. } => {
                let known = agent
                    .reports
                    .iter()
                    .any(|body| matches!(body, ReportBody::Consented { .. }));
                if !known {
                    agent.reports.push(ReportBody::Consented {
                        rollout,
                        plan,
                        state: vec![],
                    });
                }
            }
            Message::Order(order) => {
                if order.not_after.0 >= self.now && agent.seen.insert(order.key.clone()) {
                    agent.reports.push(ReportBody::Started {
                        key: order.key.clone(),
                    });
                    let takes = 1 + self.dice.roll(20);
                    agent
                        .running
                        .push_back((self.now + takes * 1000, order.key));
                }
            }
            Message::Survey { rollout, .. } => {
                agent.reports.push(ReportBody::Surveyed {
                    rollout,
                    state: vec![],
                });
            }
            Message::Acknowledged(_) | Message::Release { .. } | Message::Cancel { .. } => {}
        }
    }

    /// Steps that are done are in the ledger, whether or not anybody hears of it.
    fn work(&mut self) {
        for agent in self.agents.values_mut() {
            while agent
                .running
                .front()
                .is_some_and(|(end, _)| *end <= self.now)
            {
                let (_, key) = agent.running.pop_front().unwrap();
                let undo = key.direction == Direction::Undo;
                let roll = self.dice.roll(100);
                let outcome = if roll < self.faults.fail / if undo { 4 } else { 1 } {
                    StepOutcome::Failed(Failure {
                        cause: if self.dice.percent(50) {
                            Cause::Step
                        } else {
                            Cause::Interrupted
                        },
                        message: "no".repeat(1 + usize::try_from(self.dice.roll(5000)).unwrap()),
                        hint: None,
                        last_lines: vec![],
                        changed: self.dice.percent(50),
                    })
                } else if roll < self.faults.fail + self.faults.unknown {
                    StepOutcome::Unknown {
                        why: "no proof".into(),
                    }
                } else {
                    StepOutcome::Ok {
                        changed: self.dice.percent(80),
                        summary: "done".into(),
                    }
                };
                let effect = !matches!(outcome, StepOutcome::Ok { changed: false, .. });
                self.ledger.push((key.clone(), effect));
                agent.reports.push(ReportBody::Finished {
                    key,
                    outcome,
                    facts: vec![],
                    took: Period::seconds(1),
                });
            }
        }
    }

    /// Reports go up in order; an agent repeats from what was acknowledged.
    fn report(&mut self) {
        let hosts: Vec<HostId> = self.agents.keys().cloned().collect();
        for host in hosts {
            let acknowledged = self
                .coordinator
                .acknowledged(&host, &InstanceId::from_random([1; 8]));
            let agent = &self.agents[&host];
            if !agent.up || agent.reports.len() as u64 <= acknowledged || self.dice.percent(30) {
                continue;
            }
            let number = acknowledged + 1;
            let body = agent.reports[usize::try_from(acknowledged).unwrap()].clone();
            self.event(Event::Report {
                host: host.clone(),
                report: Report {
                    number,
                    body: body.clone(),
                },
            });
            // A duplicate changes nothing.
            if self.dice.percent(10) {
                let before = self.journal.len();
                self.event(Event::Report {
                    host,
                    report: Report { number, body },
                });
                assert_eq!(
                    self.journal.len(),
                    before,
                    "INV-1: a repeated report is no news"
                );
            }
        }
    }

    fn chaos(&mut self) {
        if self.dice.percent(self.faults.lose_host) {
            let index = usize::try_from(self.dice.roll(self.agents.len() as u64)).unwrap();
            let host = self.agents.keys().nth(index).unwrap().clone();
            let agent = self.agents.get_mut(&host).unwrap();
            agent.up = !agent.up;
            if agent.up {
                self.connect(&host);
            } else {
                self.event(Event::HostDown { host });
            }
        }
        if self.dice.percent(self.faults.restart) {
            self.restart();
        }
    }

    /// kill -9 and a start: what was sent is lost, what was persisted is not.
    fn restart(&mut self) {
        let before = self.coordinator.document(&self.rollout);
        self.inbox.clear();
        self.term += 1;
        let plan = self.plan.clone();
        let config = Config {
            epoch: Epoch {
                counter: self.term,
                id: self.term,
            },
        };
        let found = move |digest| (digest == plan.digest()).then(|| plan.clone());
        self.coordinator =
            Coordinator::recover(config, self.journal.clone(), found).expect("INV-2");
        assert_eq!(
            self.coordinator.document(&self.rollout),
            before,
            "INV-2: the fold is the state"
        );
        let effects = self.coordinator.resume(Timestamp(self.now));
        self.take(effects);
        let up: Vec<HostId> = self
            .agents
            .iter()
            .filter(|(_, agent)| agent.up)
            .map(|(host, _)| host.clone())
            .collect();
        for host in up {
            self.connect(&host);
        }
    }

    fn run(&mut self) -> String {
        let end = self.now + self.plan.plan().deadline.0 + 10_000;
        while !self.coordinator.summary(&self.rollout).unwrap().ended {
            assert!(self.now <= end, "INV-8: not ended by its deadline and 10 s");
            for _ in 0..self.inbox.len() {
                if let Some((host, message)) = self.inbox.pop_front() {
                    self.deliver(&host, message);
                }
            }
            self.work();
            self.report();
            self.chaos();
            self.now += 1000;
            self.event(Event::Tick);
            let next = self.coordinator.next_deadline();
            assert!(
                next.is_none_or(|due| due.0 > self.now),
                "what is due is done at once"
            );
        }
        self.check_end()
    }

    fn check_end(&self) -> String {
        let summary = self.coordinator.summary(&self.rollout).unwrap();
        let keys: BTreeSet<&StepKey> = self.ledger.iter().map(|(key, _)| key).collect();
        assert_eq!(
            keys.len(),
            self.ledger.len(),
            "INV-1: one effect for each key"
        );
        let quarantined = self
            .journal
            .iter()
            .filter(|entry| matches!(entry.record, Record::Quarantined { .. }))
            .count();
        match summary.state {
            "succeeded" => {
                assert_eq!(quarantined, 0, "INV-5: nobody leaves the denominator");
                for placed in self.plan.plan().steps() {
                    for host in self.required(placed.target) {
                        assert!(self.ok(&host, placed.at), "INV-5: {host} {}", placed.at);
                    }
                }
            }
            "partial" => {
                assert!(
                    quarantined > 0 && !summary.reason.is_empty(),
                    "INV-8: names who stays behind"
                );
                let most = self
                    .plan
                    .plan()
                    .max_failures
                    .map_or(usize::MAX, |most| most as usize);
                assert!(quarantined <= most, "INV-5: the fleet's budget");
            }
            "rolled_back" => self.check_rolled_back(),
            "halted" | "cancelled" => {
                assert!(!summary.reason.is_empty(), "INV-8: names what blocked it");
            }
            other => panic!("INV-8: {other} is no end"),
        }
        summary.state.to_owned()
    }

    /// Every effect that can be undone was undone, on every host.
    fn check_rolled_back(&self) {
        for (key, effect) in &self.ledger {
            let step = self.plan.plan().step(key.at).unwrap().step;
            let undoable = key.direction == Direction::Do && step.action.info().undo;
            if undoable && *effect {
                let done = key;
                let undone = self.journal.iter().any(|entry| match &entry.record {
                    Record::Reported {
                        body:
                            ReportBody::Finished {
                                key,
                                outcome: StepOutcome::Ok { .. },
                                ..
                            },
                        ..
                    } => {
                        key.direction == Direction::Undo
                            && key.at == done.at
                            && key.host == done.host
                    }
                    _ => false,
                });
                assert!(
                    undone,
                    "INV-6: {key} stays, and the rollout says rolled_back"
                );
            }
        }
    }
}

fn simulate(seed: u64, faults: Faults) -> (String, usize) {
    let mut world = World::new(seed, faults);
    let end = world.run();
    (end, world.journal.len())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn promises_hold_for_generated_fleets(
        seed in any::<u64>(),
        fail in 0_u64..8,
        unknown in 0_u64..4,
        lose_host in 0_u64..6,
        restart in 0_u64..6,
    ) {
        simulate(seed, Faults { fail, unknown, lose_host, restart });
    }

    #[test]
    fn the_same_seed_gives_the_same_run(seed in any::<u64>()) {
        let faults = Faults { fail: 4, unknown: 1, lose_host: 3, restart: 3 };
        prop_assert_eq!(simulate(seed, faults), simulate(seed, faults));
    }
}

/// `LOCKSTEP_SEEDS=FROM..TO` runs that range in place of a small one, and `FROM..=FROM` one again.
#[test]
#[allow(clippy::print_stderr, reason = "it says how to see a failure again")]
fn promises_hold_over_a_range_of_seeds() {
    let range = std::env::var("LOCKSTEP_SEEDS").unwrap_or_else(|_| "0..200".into());
    let (from, to) = range.split_once("..").expect("a range such as 0..200");
    let from: u64 = from.parse().expect("a number");
    let to = match to.strip_prefix('=') {
        Some(last) => last.parse::<u64>().expect("a number") + 1,
        None => to.parse().expect("a number"),
    };
    for seed in from..to {
        let faults = Faults {
            fail: seed % 8,
            unknown: seed / 8 % 4,
            lose_host: seed / 32 % 6,
            restart: seed / 192 % 6,
        };
        let run = std::panic::AssertUnwindSafe(|| simulate(seed, faults));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("to see it again: LOCKSTEP_SEEDS={seed}..={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// The generator reaches every end, so that no branch above is idle.
#[test]
fn generated_fleets_end_in_every_way() {
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for seed in 0..600 {
        let faults = Faults {
            fail: seed % 6,
            unknown: seed % 2,
            lose_host: seed % 4,
            restart: seed % 3,
        };
        *ends.entry(simulate(seed, faults).0).or_default() += 1;
    }
    for end in ["succeeded", "partial", "rolled_back", "halted"] {
        assert!(
            ends.get(end).is_some_and(|count| *count > 5),
            "{end}: {ends:?}"
        );
    }
}
