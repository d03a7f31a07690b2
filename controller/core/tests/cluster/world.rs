//! One controller, its agents, and a clock that goes by seconds.

use super::*;

/// How often things go wrong, in percent for each second or step.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) fail: u64,
    pub(super) unknown: u64,
    pub(super) lose_host: u64,
    pub(super) restart: u64,
    pub(super) stall: u64,
    /// How often somebody calls.
    pub(super) lever: u64,
}

pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) faults: Faults,
    pub(super) now: u64,
    pub(super) coordinator: Coordinator,
    pub(super) journal: Vec<Entry>,
    pub(super) plan: Arc<SealedPlan>,
    pub(super) rollout: RolloutId,
    pub(super) agents: BTreeMap<HostId, Agent>,
    inbox: VecDeque<(HostId, Message)>,
    /// The independent ledger of effects.
    pub(super) ledger: Vec<Deed>,
    pub(super) seen: Seen,
    term: u64,
    /// Every record is printed, to walk through a failing seed.
    trace: bool,
    /// INV-8: it has ended by then.
    pub(super) ends_by: u64,
    pub(super) calls: u32,
    /// How much hosts had done when they were first said to have stopped.
    pub(super) stopped_at: BTreeMap<HostId, usize>,
}

pub(super) fn labels(host: &HostId) -> BTreeMap<String, String> {
    let role = if host.as_str() == "h-0" { "db" } else { "app" };
    BTreeMap::from([("role".into(), role.into())])
}

impl World {
    pub(super) fn new(seed: u64, faults: Faults) -> Self {
        let mut dice = Dice(seed);
        let plan = Arc::new(seal(plan(&mut dice)).expect("a generated plan is small"));
        let hosts = 2 + dice.roll(8);
        let epoch = Epoch { counter: 1, id: 1 };
        let none = |_| None;
        let coordinator = Coordinator::recover(
            Config {
                epoch,
                break_glass: None,
            },
            [],
            none,
        )
        .expect("an empty journal");
        let now = 1_000_000;
        let mut world = Self {
            dice,
            faults,
            now,
            coordinator,
            journal: vec![],
            ends_by: now + plan.plan().deadline.0 + 10_000,
            plan,
            rollout: RolloutId::from_random([9; 6]),
            agents: BTreeMap::new(),
            inbox: VecDeque::new(),
            ledger: vec![],
            seen: Seen::default(),
            term: 1,
            trace: std::env::var_os("LOCKSTEP_TRACE").is_some(),
            calls: 0,
            stopped_at: BTreeMap::new(),
        };
        let effects = world.coordinator.resume(Timestamp(world.now));
        world.take(effects);
        for index in 0..hosts {
            let host: HostId = format!("h-{index}").parse().unwrap();
            world.agents.insert(host.clone(), Agent::new());
            world.connect(&host);
        }
        let call = Call::Submit {
            rollout: world.rollout.clone(),
            plan: world.plan.clone(),
            dry_run: false,
            signatures: vec![],
        };
        world.call(call).expect("the fleet is free");
        world.calls = 0;
        world
    }

    pub(super) fn connect(&mut self, host: &HostId) {
        let held = self.agents[host].holds.then(|| self.rollout.clone());
        self.agents.get_mut(host).unwrap().mailbox.clear();
        self.event(Event::HostUp {
            host: host.clone(),
            labels: labels(host),
            instance: InstanceId::from_random([1; 8]),
            agent_version: "1".into(),
            held,
        });
    }

    fn event(&mut self, event: Event) {
        let effects = self.coordinator.handle(Timestamp(self.now), event);
        self.take(effects);
    }

    #[allow(clippy::print_stderr, reason = "it walks through a failing seed")]
    pub(super) fn take(&mut self, effects: Effects) {
        let retried = effects
            .persist
            .iter()
            .any(|entry| matches!(entry.record, Record::Resumed { failed: true, .. }));
        let back = if retried {
            self.quarantined()
        } else {
            BTreeSet::new()
        };
        for entry in effects.persist {
            let size = serde_json::to_vec(&entry).unwrap().len();
            assert!(
                size < 32_000,
                "INV-2: the journal would refuse {size} bytes"
            );
            if self.trace {
                let record = serde_json::to_string(&entry.record).unwrap();
                let short: String = record.chars().take(300).collect();
                eprintln!("{:6}  {short}", entry.at.0 / 1000 - 1000);
            }
            self.see(&entry.record, &back);
            self.journal.push(entry);
        }
        for (host, message) in effects.send {
            if let Message::Order(order) = &message {
                self.check_sent(order);
            }
            self.inbox.push_back((host, message));
        }
    }

    fn quarantined(&self) -> BTreeSet<HostId> {
        let document = self.coordinator.document(&self.rollout).unwrap();
        let hosts = document["hosts"].as_array().unwrap().iter();
        hosts
            .filter(|host| host["quarantined"] == true)
            .map(|host| host["host"].as_str().unwrap().parse().unwrap())
            .collect()
    }

    fn acknowledged(&self, host: &HostId) -> u64 {
        let instance = InstanceId::from_random([1; 8]);
        self.coordinator.acknowledged(host, &instance)
    }

    /// Messages to agents that are down are lost.
    fn deliver(&mut self) {
        for (host, message) in std::mem::take(&mut self.inbox) {
            let agent = self.agents.get_mut(&host).unwrap();
            if agent.up {
                agent.mailbox.push_back(message);
            }
        }
        let hosts: Vec<HostId> = self.agents.keys().cloned().collect();
        for host in hosts {
            let acknowledged = self.acknowledged(&host);
            let agent = self.agents.get_mut(&host).unwrap();
            if agent.stalled > self.now {
                continue;
            }
            while let Some(message) = agent.mailbox.pop_front() {
                agent.receive(self.now, message, acknowledged, &mut self.dice);
            }
        }
    }

    /// Reports go up in order; an agent repeats from what was acknowledged.
    fn report(&mut self) {
        let hosts: Vec<HostId> = self.agents.keys().cloned().collect();
        for host in hosts {
            let acknowledged = self.acknowledged(&host);
            let agent = &self.agents[&host];
            let silent = !agent.up || agent.stalled > self.now;
            if silent || agent.reports.len() as u64 <= acknowledged || self.dice.percent(30) {
                continue;
            }
            let number = acknowledged + 1;
            let body = agent.reports[usize::try_from(acknowledged).unwrap()].clone();
            let head = None;
            let report = Report { number, body, head };
            self.event(Event::Report {
                host: host.clone(),
                report: report.clone(),
            });
            // A duplicate changes nothing.
            if self.dice.percent(10) {
                let before = self.journal.len();
                self.event(Event::Report { host, report });
                assert_eq!(
                    self.journal.len(),
                    before,
                    "INV-1: a repeated report is no news"
                );
            }
        }
    }

    fn chaos(&mut self, faults: Faults) {
        if self.dice.percent(faults.lose_host) {
            let host = self.some_host();
            let agent = self.agents.get_mut(&host).unwrap();
            agent.up = !agent.up;
            if agent.up {
                self.connect(&host);
            } else {
                agent.mailbox.clear();
                self.event(Event::HostDown { host });
            }
        }
        if self.dice.percent(faults.stall) {
            let host = self.some_host();
            let until = self.now + self.dice.roll(300) * 1000;
            self.agents.get_mut(&host).unwrap().stalled = until;
        }
        if self.dice.percent(faults.restart) {
            self.restart();
        }
    }

    fn some_host(&mut self) -> HostId {
        let index = usize::try_from(self.dice.roll(self.agents.len() as u64)).unwrap();
        self.agents.keys().nth(index).unwrap().clone()
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
            break_glass: None,
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

    /// One second.
    pub(super) fn second(&mut self, faults: Faults) {
        self.deliver();
        for agent in self.agents.values_mut() {
            agent.work(self.now, faults, &mut self.dice, &mut self.ledger);
        }
        self.report();
        self.chaos(faults);
        self.now += 1000;
        self.event(Event::Tick);
        let next = self.coordinator.next_deadline();
        assert!(
            next.is_none_or(|due| due.0 > self.now),
            "what is due is done at once"
        );
    }

    /// To the end, and beyond it: a halted rollout waits for people if there are any.
    pub(super) fn run(&mut self) -> String {
        let mut patience = 60;
        loop {
            let summary = self.coordinator.summary(&self.rollout).unwrap();
            if summary.ended {
                self.check_end();
                self.check_left();
            } else {
                self.stopped_at.clear();
            }
            let waits = summary.ended && summary.open && self.faults.lever > 0 && patience > 0;
            if summary.ended && !waits {
                if summary.state == "cancelled" {
                    self.check_let_go();
                }
                return summary.state.to_owned();
            }
            if waits {
                patience -= 1;
            } else {
                assert!(
                    self.now <= self.ends_by,
                    "INV-8: not ended by its deadline and 10 s"
                );
            }
            if self.faults.lever > 0 {
                self.people();
            }
            self.second(self.faults);
        }
    }
}
