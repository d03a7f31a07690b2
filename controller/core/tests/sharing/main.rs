//! Several rollouts share a fleet, and free it while they wait at gates: a seeded world in which
//! people decide at any moment, hosts are lost, and the controller restarts. The promises are held
//! against the records and an account of what hosts really are, which share nothing with the
//! coordinator. A failing case prints its seed; with `LOCKSTEP_TRACE=1` every record is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use host::Host;
use lockstep_core::{Call, Config, Coordinator, Effects, End, Entry, Event, Message, Record};
use lockstep_proto::ids::{Digest, Epoch, HostId, InstanceId, PlanDigest, RolloutId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use plans::{Dice, plan};

mod host;
mod plans;

/// What people had seen of the hosts when they decided.
type SeenStates = BTreeMap<HostId, u64>;

struct World {
    dice: Dice,
    now: u64,
    term: u64,
    coordinator: Coordinator,
    journal: Vec<Entry>,
    plans: BTreeMap<PlanDigest, Arc<SealedPlan>>,
    hosts: BTreeMap<HostId, Host>,
    inbox: Vec<(HostId, Message)>,
    // The account: from records only.
    members: BTreeMap<RolloutId, Vec<HostId>>,
    locking: BTreeSet<RolloutId>,
    /// The newest state that each host has said for a rollout.
    said: BTreeMap<RolloutId, SeenStates>,
    /// What stood there when a gate opened, or opened anew.
    shown: BTreeMap<(RolloutId, StepRef), SeenStates>,
    /// What stood there when somebody first decided at a gate, or said that its glass is to be
    /// broken, and that has counted since.
    decided: BTreeMap<(RolloutId, StepRef), SeenStates>,
    waits: BTreeMap<(RolloutId, StepRef), Digest>,
    freed: u64,
    reopened: u64,
    broken: u64,
    /// Every record is printed, to walk through a failing seed.
    trace: bool,
}

fn config(epoch: Epoch) -> Config {
    Config {
        epoch,
        break_glass: Some("incident".into()),
    }
}

fn labels(index: usize) -> BTreeMap<String, String> {
    let own = if index < 2 { "one" } else { "two" };
    [own, "all"]
        .map(|it| (it.to_owned(), "yes".to_owned()))
        .into()
}

impl World {
    fn new(seed: u64) -> Self {
        let epoch = Epoch { counter: 1, id: 1 };
        let mut world = Self {
            dice: Dice(seed),
            now: 1_000_000,
            term: 1,
            coordinator: Coordinator::recover(config(epoch), [], |_| None).unwrap(),
            journal: vec![],
            plans: BTreeMap::new(),
            hosts: BTreeMap::new(),
            inbox: vec![],
            members: BTreeMap::new(),
            locking: BTreeSet::new(),
            said: BTreeMap::new(),
            shown: BTreeMap::new(),
            decided: BTreeMap::new(),
            waits: BTreeMap::new(),
            freed: 0,
            reopened: 0,
            broken: 0,
            trace: std::env::var_os("LOCKSTEP_TRACE").is_some(),
        };
        for index in 0..4 {
            let host: HostId = format!("h-{index}").parse().unwrap();
            world.hosts.insert(host.clone(), Host::default());
            world.connect(&host);
        }
        world
    }

    fn connect(&mut self, host: &HostId) {
        let index = self.hosts.keys().position(|it| it == host).unwrap();
        let it = self.hosts.get_mut(host).unwrap();
        it.up = true;
        it.mailbox.clear();
        // What is on its way goes to the session that was.
        self.inbox.retain(|(to, _)| to != host);
        let held = it.holds.as_ref().map(|(rollout, _)| rollout.clone());
        self.event(Event::HostUp {
            host: host.clone(),
            labels: labels(index),
            instance: InstanceId::from_random([1; 8]),
            agent_version: "1".into(),
            held,
        });
    }

    fn event(&mut self, event: Event) -> bool {
        let effects = self.coordinator.handle(Timestamp(self.now), event);
        self.take(effects)
    }

    #[allow(clippy::print_stderr, reason = "it walks through a failing seed")]
    fn take(&mut self, effects: Effects) -> bool {
        for entry in effects.persist {
            if self.trace {
                let record = serde_json::to_string(&entry.record).unwrap();
                let short: String = record.chars().take(200).collect();
                eprintln!("{:6}  {short}", entry.at.0 / 1000 - 1000);
            }
            self.see(&entry.record);
            self.journal.push(entry);
        }
        self.inbox.extend(effects.send);
        matches!(effects.answer, Some(Ok(_)))
    }

    /// The promises, and the account.
    fn see(&mut self, record: &Record) {
        match record {
            Record::Submitted { rollout, .. } => {
                self.locking.insert(rollout.clone());
            }
            Record::Matched { rollout, hosts } => {
                let members = self.members.entry(rollout.clone()).or_default();
                members.extend(hosts.iter().cloned());
                self.check_apart();
            }
            Record::Reported {
                host,
                body: ReportBody::Consented { rollout, state, .. },
                ..
            } => {
                let Some(Fact::State { text, .. }) = state.first() else {
                    panic!("a host says its state")
                };
                let said = self.said.entry(rollout.clone()).or_default();
                said.insert(host.clone(), text.parse().unwrap());
            }
            Record::GateOpened {
                rollout,
                at,
                evidence,
                ..
            } => {
                let gate = (rollout.clone(), *at);
                self.decided.remove(&gate);
                self.shown.insert(gate.clone(), self.said[rollout].clone());
                self.waits.insert(gate, *evidence);
            }
            Record::GateReopened {
                rollout,
                at,
                evidence,
                ..
            } => {
                self.reopened += 1;
                let gate = (rollout.clone(), *at);
                let seen = self.decided.remove(&gate);
                assert_ne!(
                    seen.as_ref(),
                    Some(&self.said[rollout]),
                    "{rollout} asks again at {at}, and nothing has changed"
                );
                // Gates after it that were decided open anew once they are reached.
                let after = |(of, other): &(RolloutId, StepRef)| of == rollout && other > at;
                self.decided.retain(|gate, _| !after(gate));
                self.waits.retain(|gate, _| !after(gate));
                self.shown.insert(gate.clone(), self.said[rollout].clone());
                self.waits.insert(gate, *evidence);
            }
            Record::GateDecided { rollout, at, .. } | Record::GlassBroken { rollout, at, .. } => {
                let gate = (rollout.clone(), *at);
                // Hosts may have said something else meanwhile, which a gate shows once it opens anew.
                let seen = self.shown[&gate].clone();
                self.decided.entry(gate).or_insert(seen);
            }
            Record::LockReleased { rollout, .. } => {
                self.freed += 1;
                self.locking.remove(rollout);
            }
            Record::LockTaken { rollout, .. } => {
                self.locking.insert(rollout.clone());
                self.check_apart();
            }
            Record::GateClosed {
                rollout,
                at,
                met,
                why,
            } => {
                let gate = (rollout.clone(), *at);
                self.waits.remove(&gate);
                let broken = why.starts_with("BREAK-GLASS");
                self.broken += u64::from(broken);
                assert!(
                    self.decided.contains_key(&gate) || !(broken || why.starts_with("approved by")),
                    "INV-12: {rollout} goes on with decisions that are void"
                );
                let before = self.decided.iter().filter(|((of, _), _)| of == rollout);
                for ((_, other), decided) in before.filter(|_| *met) {
                    assert_eq!(
                        *decided, self.said[rollout],
                        "INV-12: {rollout} goes on at {at} with hosts that nobody has seen like \
                         this at {other}"
                    );
                }
            }
            Record::Dispatched { rollout, .. } => {
                assert!(
                    self.locking.contains(rollout),
                    "{rollout} orders without its lock"
                );
                let waits = self.waits.keys().any(|(of, _)| of == rollout);
                assert!(!waits || !self.changes(record), "INV-12");
            }
            Record::Ended { rollout, end, .. } => {
                // A halted one keeps its lock.
                if *end != End::Halted {
                    self.locking.remove(rollout);
                }
                self.waits.retain(|(of, _), _| of != rollout);
            }
            _ => {}
        }
    }

    fn changes(&self, record: &Record) -> bool {
        let Record::Dispatched { rollout, at, .. } = record else {
            return false;
        };
        let digest = self.coordinator.summary(rollout).unwrap().digest;
        self.plans[&digest]
            .plan()
            .step(*at)
            .unwrap()
            .step
            .action
            .changes()
    }

    /// No host is locked by two.
    fn check_apart(&self) {
        let mut taken: BTreeMap<&HostId, &RolloutId> = BTreeMap::new();
        for rollout in &self.locking {
            for host in self.members.get(rollout).into_iter().flatten() {
                let other = taken.insert(host, rollout);
                assert!(
                    other.is_none(),
                    "{host} is locked by {rollout} and {other:?}"
                );
            }
        }
    }

    fn deliver(&mut self) {
        for (host, message) in std::mem::take(&mut self.inbox) {
            let it = self.hosts.get_mut(&host).unwrap();
            if it.up {
                it.mailbox.push_back(message);
            }
        }
        for (host, it) in &mut self.hosts {
            while let Some(message) = it.mailbox.pop_front() {
                it.receive(host, message, &mut self.dice, &self.plans);
            }
        }
    }

    fn report(&mut self) {
        let instance = InstanceId::from_random([1; 8]);
        let hosts: Vec<HostId> = self.hosts.keys().cloned().collect();
        for host in hosts {
            let acknowledged = self.coordinator.acknowledged(&host, &instance);
            let it = &self.hosts[&host];
            let next = it.reports.get(usize::try_from(acknowledged).unwrap());
            if let Some(body) = next.cloned().filter(|_| it.up) {
                let report = Report {
                    number: acknowledged + 1,
                    body,
                    head: None,
                };
                self.event(Event::Report { host, report });
            }
        }
    }

    fn restart(&mut self) {
        self.inbox.clear();
        self.term += 1;
        let epoch = Epoch {
            counter: self.term,
            id: self.term,
        };
        let plans = self.plans.clone();
        let before: Vec<_> = self.documents();
        let found = move |digest| plans.get(&digest).cloned();
        let entries = self.journal.clone();
        self.coordinator = Coordinator::recover(config(epoch), entries, found).unwrap();
        assert_eq!(before, self.documents(), "INV-2: the fold is the state");
        let effects = self.coordinator.resume(Timestamp(self.now));
        self.take(effects);
        let up: Vec<HostId> = self
            .hosts
            .iter()
            .filter(|(_, it)| it.up)
            .map(|(host, _)| host.clone())
            .collect();
        for host in up {
            self.connect(&host);
        }
    }

    fn documents(&self) -> Vec<Option<serde_json::Value>> {
        let rollouts = self.coordinator.rollouts();
        rollouts.map(|it| self.coordinator.document(it)).collect()
    }

    fn call(&mut self, operator: &str, call: Call) -> bool {
        self.event(Event::Operator {
            operator: operator.into(),
            groups: vec!["dba".into(), "incident".into()],
            call,
        })
    }

    fn people(&mut self, next: &mut u64) {
        if self.dice.percent(4) && *next < 8 {
            *next += 1;
            let plan = Arc::new(seal(plan(&mut self.dice, *next)).unwrap());
            self.plans.insert(plan.digest(), plan.clone());
            let rollout = RolloutId::from_random([u8::try_from(*next).unwrap(); 6]);
            let call = Call::Submit {
                rollout,
                plan,
                dry_run: false,
                signatures: vec![],
            };
            self.call("olga", call);
        }
        if self.dice.percent(8) && !self.waits.is_empty() {
            let index = usize::try_from(self.dice.roll(self.waits.len() as u64)).unwrap();
            let ((rollout, at), evidence) = self.waits.iter().nth(index).unwrap();
            let (rollout, gate, evidence) = (rollout.clone(), Some(*at), *evidence);
            let call = if self.dice.percent(25) {
                Call::BreakGlass {
                    rollout,
                    gate,
                    evidence,
                    reason: "the shop is down".into(),
                    life: Period::seconds(30 + self.dice.roll(300)),
                    signature: None,
                }
            } else {
                Call::Decide {
                    rollout,
                    gate,
                    evidence,
                    approve: !self.dice.percent(5),
                    items: vec![],
                    comment: String::new(),
                    signed: None,
                }
            };
            let who = ["dana", "ben", "carl"][usize::try_from(self.dice.roll(3)).unwrap()];
            self.call(who, call);
        }
        if self.dice.percent(1) {
            let rollouts: Vec<RolloutId> = self.coordinator.rollouts().cloned().collect();
            if let Some(rollout) = rollouts.last().cloned() {
                let call = match self.dice.roll(3) {
                    0 => Call::Pause { rollout },
                    1 => Call::Resume { rollout },
                    _ => Call::Cancel {
                        rollout,
                        reason: "no".into(),
                    },
                };
                self.call("olga", call);
            }
        }
    }

    fn chaos(&mut self) {
        if self.dice.percent(3) {
            let index = usize::try_from(self.dice.roll(4)).unwrap();
            let host = self.hosts.keys().nth(index).unwrap().clone();
            if self.hosts[&host].up {
                self.hosts.get_mut(&host).unwrap().up = false;
                self.event(Event::HostDown { host });
            } else {
                self.connect(&host);
            }
        }
        if self.dice.percent(2) {
            self.restart();
        }
    }

    /// Everything has come to its end; how often hosts were freed, people asked again, and the
    /// glass broken.
    fn run(&mut self) -> [u64; 3] {
        let mut next = 0;
        for second in 0..20_000 {
            self.deliver();
            self.report();
            if second < 3000 {
                self.people(&mut next);
                self.chaos();
            } else {
                let down = self.hosts.iter().find(|(_, it)| !it.up);
                if let Some(host) = down.map(|(host, _)| host.clone()) {
                    self.connect(&host);
                }
                let rollouts: Vec<RolloutId> = self.coordinator.rollouts().cloned().collect();
                for rollout in rollouts {
                    if self.coordinator.summary(&rollout).unwrap().state == "paused" {
                        self.call("olga", Call::Resume { rollout });
                    }
                }
            }
            self.now += 1000;
            self.event(Event::Tick);
            let due = self.coordinator.next_deadline();
            assert!(
                due.is_none_or(|due| due.0 > self.now),
                "what is due is done"
            );
            let open = self
                .coordinator
                .rollouts()
                .any(|it| !self.coordinator.summary(it).unwrap().ended);
            if second > 3000 && !open {
                break;
            }
        }
        for rollout in self.coordinator.rollouts() {
            let summary = self.coordinator.summary(rollout).unwrap();
            assert!(summary.ended, "INV-8: {rollout} is {}", summary.state);
        }
        [self.freed, self.reopened, self.broken]
    }
}

#[test]
fn rollouts_share_a_fleet_and_go_on_only_with_what_people_have_seen() {
    let range = std::env::var("LOCKSTEP_SHARED_SEEDS").unwrap_or_else(|_| "0..30".into());
    let (from, to) = range.split_once("..").expect("a range such as 0..30");
    let mut sums = [0; 3];
    for seed in from.parse().unwrap()..to.parse().unwrap() {
        let run = std::panic::AssertUnwindSafe(|| World::new(seed).run());
        let Ok(counts) = std::panic::catch_unwind(run) else {
            panic!(
                "to see it again: LOCKSTEP_SHARED_SEEDS={seed}..{}",
                seed + 1
            );
        };
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    let [freed, reopened, broken] = sums;
    assert!(
        freed > 10 && reopened > 0 && broken > 0,
        "{freed} freed, {reopened} reopened, {broken} broken"
    );
}
