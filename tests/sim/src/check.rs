//! What must hold: one checker over the controllers' journals, the agents' journals and the ledger
//! of effects, which knows nothing of either.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_agent::simulation::Account;
use lockstep_core::{Entry, Record};
use lockstep_proto::action::Class;
use lockstep_proto::ids::{Direction, Epoch, HostId, RolloutId, StepKey, StepRef};
use lockstep_proto::order::Order;
use lockstep_proto::plan::Target;
use lockstep_proto::report::{Cause, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;

/// How much later than it is worth an order may begin, in milliseconds: a host learns the
/// controller's time from a message that may have stood still on its way.
const LATE: u64 = 35_000;

/// What is durable at one controller.
#[derive(Debug, Clone, Default)]
pub(crate) struct Index {
    plans: BTreeMap<RolloutId, Arc<SealedPlan>>,
    /// Reports by host, as they were journalled.
    pub(crate) reports: BTreeMap<HostId, BTreeMap<u64, ReportBody>>,
    outcomes: BTreeMap<StepKey, StepOutcome>,
    /// Attempts that were ordered, and until when they are worth anything, in world time.
    ordered: BTreeMap<StepKey, u64>,
    /// The same in the order in which they were first ordered.
    order: Vec<StepKey>,
    resolved: BTreeMap<StepKey, bool>,
    quarantined: BTreeSet<(RolloutId, HostId)>,
    elected: BTreeMap<(RolloutId, Vec<String>), HostId>,
    /// Undone or being undone.
    back: BTreeSet<RolloutId>,
    /// Resumed by a person: what failed may be tried again.
    resumed: BTreeSet<RolloutId>,
}

impl Index {
    /// Knows the plan of a rollout that is about to be submitted.
    pub(crate) fn plan(&mut self, rollout: &RolloutId, plan: Arc<SealedPlan>) {
        self.plans.insert(rollout.clone(), plan);
    }

    /// Adds a durable record; answers with what it breaks.
    pub(crate) fn add(&mut self, entry: &Entry, now: u64) -> Vec<String> {
        let mut broken = vec![];
        match &entry.record {
            Record::Reported { host, number, body } => {
                let reports = self.reports.entry(host.clone()).or_default();
                let last = reports.last_key_value().map_or(0, |(number, _)| *number);
                if *number != last + 1 {
                    broken.push(format!("INV-2: {host}'s report {number} follows {last}"));
                }
                reports.insert(*number, body.clone());
                if let ReportBody::Finished { key, outcome, .. } = body {
                    // The first counts: a host that has let go of a rollout knows nothing of it.
                    let outcomes = self.outcomes.entry(key.clone());
                    outcomes.or_insert_with(|| outcome.clone());
                }
            }
            Record::Dispatched {
                rollout,
                at,
                direction,
                attempt,
                hosts,
                not_after,
            } => {
                for host in hosts {
                    let key = StepKey {
                        rollout: rollout.clone(),
                        host: host.clone(),
                        at: *at,
                        direction: *direction,
                        attempt: *attempt,
                    };
                    broken.extend(self.check_dispatch(&key));
                    let until = now + not_after.since(entry.at).0;
                    if self.ordered.insert(key.clone(), until).is_none() {
                        self.order.push(key);
                    }
                }
            }
            Record::Resolved {
                rollout,
                at,
                direction,
                attempt,
                host,
                done,
                ..
            } => {
                let key = StepKey {
                    rollout: rollout.clone(),
                    host: host.clone(),
                    at: *at,
                    direction: *direction,
                    attempt: *attempt,
                };
                self.resolved.insert(key, *done);
            }
            Record::Quarantined { rollout, host, .. } => {
                self.quarantined.insert((rollout.clone(), host.clone()));
                broken.extend(self.check_budget(rollout));
            }
            Record::Elected {
                rollout,
                groups,
                host,
            } => {
                let elected = (rollout.clone(), groups.clone());
                let before = self.elected.insert(elected, host.clone());
                let ordered = |other: &HostId| {
                    let mut keys = self.ordered.keys();
                    keys.any(|key| {
                        key.rollout == *rollout && key.host == *other && self.is_one_of(key)
                    })
                };
                if before.is_some_and(|other| other != *host && ordered(&other)) {
                    broken.push(format!("INV-7: {host} was elected after an order"));
                }
            }
            Record::Resumed { rollout, .. } => {
                self.resumed.insert(rollout.clone());
            }
            Record::RollbackStarted { rollout, .. } => {
                self.back.insert(rollout.clone());
            }
            _ => {}
        }
        broken
    }

    fn is_one_of(&self, key: &StepKey) -> bool {
        let placed = self.plans[&key.rollout].plan().step(key.at);
        placed.is_some_and(|placed| matches!(placed.target, Target::OneOf(_)))
    }

    /// INV-1, INV-3 and INV-6 of an order that becomes durable.
    fn check_dispatch(&self, key: &StepKey) -> Vec<String> {
        let mut broken = vec![];
        if key.attempt > 1 {
            let before = StepKey {
                attempt: key.attempt - 1,
                ..key.clone()
            };
            let resolved = self.resolved.contains_key(&before);
            match self.outcomes.get(&before) {
                Some(StepOutcome::Ok { .. }) if !resolved && !self.is_turned(&before) => {
                    broken.push(format!("INV-1: {key} follows an attempt that is done"));
                }
                Some(StepOutcome::Unknown { .. }) if !resolved => {
                    broken.push(format!("INV-1: {key} retries what is unknown"));
                }
                None if !resolved => {
                    broken.push(format!("INV-1: {key} follows an attempt without a report"));
                }
                _ => {}
            }
        }
        let undoes = self.back.contains(&key.rollout);
        if key.direction == Direction::Do && undoes {
            broken.push(format!("INV-6: {key} goes forward in a rollback"));
        }
        broken
    }

    /// INV-5: no more hosts are left behind than the plan allows in all.
    fn check_budget(&self, rollout: &RolloutId) -> Option<String> {
        let plan = self.plans.get(rollout)?.plan();
        let stages = plan.phases.iter().flat_map(|phase| &phase.stages);
        let in_stages = stages.map(|stage| stage.strategy.max_failures()).max();
        let most = in_stages
            .unwrap_or(0)
            .min(plan.max_failures.unwrap_or(u32::MAX));
        let mut left = self.quarantined.iter();
        let left = left.by_ref().filter(|(it, _)| it == rollout).count();
        // Stages count by themselves, so that hosts of different ones may add up.
        let forward = !self.back.contains(rollout);
        let allowed = (most as usize) * plan.phases.iter().map(|it| it.stages.len()).sum::<usize>();
        (forward && left > allowed)
            .then(|| format!("INV-5: {left} hosts of {rollout} are left behind"))
    }

    /// Whether the step went the other way after this attempt.
    fn is_turned(&self, key: &StepKey) -> bool {
        let mut later = self.order.iter().rev().take_while(|other| *other != key);
        later.any(|other| {
            (&other.rollout, &other.host, other.at) == (&key.rollout, &key.host, key.at)
                && other.direction != key.direction
        })
    }

    fn is_done(&self, rollout: &RolloutId, host: &HostId, at: StepRef) -> bool {
        let of = |key: &StepKey| {
            key.rollout == *rollout
                && key.host == *host
                && key.at == at
                && key.direction == Direction::Do
        };
        let ok = |(key, outcome): (&StepKey, &StepOutcome)| {
            of(key) && matches!(outcome, StepOutcome::Ok { .. })
        };
        self.outcomes.iter().any(ok) || self.resolved.iter().any(|(key, done)| of(key) && *done)
    }

    fn required(&self, rollout: &RolloutId, target: &Target, labels: &Hosts) -> Vec<HostId> {
        match target {
            Target::Controller => vec![],
            Target::OneOf(groups) => {
                let elected = self.elected.get(&(rollout.clone(), groups.clone()));
                elected.cloned().into_iter().collect()
            }
            Target::Groups(groups) => {
                let means = |(_, role): &&(HostId, &'static str)| groups.iter().any(|g| g == role);
                let hosts = labels.iter().filter(means);
                hosts.map(|(host, _)| host.clone()).collect()
            }
        }
    }

    /// INV-3: whether every stage before the one of `key` is closed.
    fn barrier(&self, key: &StepKey, labels: &Hosts) -> Option<String> {
        let plan = self.plans.get(&key.rollout)?.plan();
        let mine = plan.step(key.at)?;
        for placed in plan.steps() {
            if (placed.at.phase, placed.stage) >= (key.at.phase, mine.stage) {
                continue;
            }
            for host in self.required(&key.rollout, placed.target, labels) {
                let left = self
                    .quarantined
                    .contains(&(key.rollout.clone(), host.clone()));
                if !left && !self.is_done(&key.rollout, &host, placed.at) {
                    let at = placed.at;
                    return Some(format!("INV-3: {key} acts before {host} has done {at}"));
                }
            }
        }
        None
    }

    /// What the end of a rollout must have left (INV-5, INV-6).
    pub(crate) fn check_end(
        &self,
        rollout: &RolloutId,
        state: &str,
        hosts: &[HostState<'_>],
    ) -> Vec<String> {
        let mut broken = vec![];
        let labels: Hosts = hosts.iter().map(|it| (it.host.clone(), it.role)).collect();
        let plan = self.plans[rollout].plan();
        let left = |host: &HostId| self.quarantined.contains(&(rollout.clone(), host.clone()));
        match state {
            "succeeded" => {
                for placed in plan.steps() {
                    for host in self.required(rollout, placed.target, &labels) {
                        if !self.is_done(rollout, &host, placed.at) {
                            let at = placed.at;
                            broken.push(format!("INV-5: succeeded, but {host} has not done {at}"));
                        }
                    }
                }
            }
            "partial" if !hosts.iter().any(|it| left(it.host)) => {
                broken.push("INV-8: partial, but nobody is left behind".into());
            }
            "rolled_back" => {
                for it in hosts {
                    // What a person resolved is a person's word.
                    let told = self.resolved.keys().any(|key| key.rollout == *rollout);
                    if it.now != it.before && !told {
                        broken.push(format!(
                            "INV-6: rolled back, but {} has {:?} and had {:?}",
                            it.host, it.now, it.before
                        ));
                    }
                }
            }
            _ => {}
        }
        broken
    }

    /// INV-2: whether an agent's reports are here, each once, as it wrote them.
    pub(crate) fn check_reports(&self, host: &HostId, account: &Account) -> Vec<String> {
        let nothing = BTreeMap::new();
        let here = self.reports.get(host).unwrap_or(&nothing);
        let mut broken = vec![];
        for (number, body) in &account.reports {
            match here.get(number) {
                None if *number <= account.acknowledged => {
                    broken.push(format!(
                        "INV-2: {host}'s report {number} was acknowledged and is lost"
                    ));
                }
                None => broken.push(format!("INV-2: {host}'s report {number} does not arrive")),
                Some(there) if there != body => {
                    broken.push(format!(
                        "INV-2: {host}'s report {number} is another one here"
                    ));
                }
                Some(_) => {}
            }
        }
        if here.len() > account.reports.len() {
            broken.push(format!("INV-2: {host} has lost reports that are here"));
        }
        broken
    }

    /// The actions whose outcome was unknown.
    pub(crate) fn unknown(&self) -> Vec<(StepKey, &'static str, Class)> {
        let unknown = self.outcomes.iter();
        let unknown = unknown.filter(|(_, outcome)| matches!(outcome, StepOutcome::Unknown { .. }));
        let named = unknown.filter_map(|(key, _)| {
            let placed = self.plans.get(&key.rollout)?.plan().step(key.at)?;
            let info = placed.step.action.info();
            Some((key.clone(), info.name, info.class))
        });
        named.collect()
    }
}

type Hosts = Vec<(HostId, &'static str)>;

/// A host at the end of a rollout.
pub(crate) struct HostState<'a> {
    pub(crate) host: &'a HostId,
    pub(crate) role: &'static str,
    pub(crate) before: BTreeMap<String, String>,
    pub(crate) now: BTreeMap<String, String>,
}

/// What really happened, and what hosts were told.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    effects: RefCell<BTreeMap<StepKey, u32>>,
    /// The newest term that each host was welcomed with.
    terms: RefCell<BTreeMap<HostId, Epoch>>,
    /// The term of each controller, by its process.
    controllers: RefCell<BTreeMap<i32, u64>>,
    /// Orders that came in time, from a term that was the newest then.
    good: RefCell<BTreeSet<StepKey>>,
    /// When each attempt was last ordered, in world time.
    orders: RefCell<BTreeMap<StepKey, u64>>,
    /// Attempts whose step process left its outcome.
    completed: RefCell<BTreeSet<StepKey>>,
    /// What was found to be broken.
    pub(crate) violations: RefCell<Vec<String>>,
}

impl Ledger {
    /// A host is welcomed.
    pub(crate) fn welcome(&self, host: &HostId, epoch: Epoch) {
        let mut terms = self.terms.borrow_mut();
        let newest = terms.entry(host.clone()).or_insert(epoch);
        if epoch.counter > newest.counter {
            *newest = epoch;
        }
    }

    /// A controller's term begins.
    pub(crate) fn term_began(&self, controller: i32, epoch: Epoch) {
        self.controllers
            .borrow_mut()
            .insert(controller, epoch.counter);
    }

    /// The counter of a controller's term.
    pub(crate) fn term_of(&self, controller: i32) -> u64 {
        self.controllers
            .borrow()
            .get(&controller)
            .copied()
            .unwrap_or_default()
    }

    /// An order is handed to a host.
    pub(crate) fn order(&self, order: &Order, now: u64, term: u64) -> Option<String> {
        let terms = self.terms.borrow();
        let newest = terms.get(&order.key.host);
        let mut orders = self.orders.borrow_mut();
        orders.insert(order.key.clone(), now);
        // A welcome counts once the host has written it down.
        let unwritten = order.epoch.counter >= term && newest.is_some_and(|it| it.counter > term);
        if unwritten || newest.is_none_or(|newest| *newest == order.epoch) {
            let mut good = self.good.borrow_mut();
            good.insert(order.key.clone());
            return None;
        }
        Some(format!("{} comes from a term that has ended", order.key))
    }

    /// An effect is made; answers with what it breaks.
    pub(crate) fn effect(&self, key: &StepKey, indexes: &[Index], labels: &Hosts) -> Vec<String> {
        let mut broken = vec![];
        let mut effects = self.effects.borrow_mut();
        let count = effects.entry(key.clone()).or_default();
        *count += 1;
        if *count > 1 {
            broken.push(format!("INV-1: {key} has its effect {count} times"));
        }
        if indexes.iter().any(|index| index.outcomes.contains_key(key)) {
            broken.push(format!("INV-1: {key} acts after its outcome was reported"));
        }
        if !self.good.borrow().contains(key) {
            broken.push(format!(
                "INV-4: {key} acts on the word of a term that has ended"
            ));
        }
        let ordered: Vec<&Index> = indexes
            .iter()
            .filter(|index| index.ordered.contains_key(key))
            .collect();
        if ordered.is_empty() {
            broken.push(format!("INV-2: {key} acts, and no journal has its order"));
            return broken;
        }
        if key.direction == Direction::Do {
            let barriers = ordered.iter().map(|index| index.barrier(key, labels));
            let barriers: Vec<Option<String>> = barriers.collect();
            if barriers.iter().all(Option::is_some) {
                broken.extend(barriers.into_iter().flatten().next());
            }
        }
        let came = self.orders.borrow().get(key).copied().unwrap_or_default();
        let until = ordered.iter().map(|index| index.ordered[key]).max();
        if until.is_some_and(|until| came > until + LATE) {
            broken.push(format!(
                "INV-8: {key} begins although its order came too late"
            ));
        }
        broken
    }

    /// A step process has left its outcome, and ended by itself.
    pub(crate) fn completed(&self, key: &StepKey) {
        self.completed.borrow_mut().insert(key.clone());
    }

    /// INV-1 and INV-2 of what was reported: nothing that was known is forgotten, and who says that
    /// nothing was changed has changed nothing.
    pub(crate) fn check_outcomes(&self, index: &Index) -> Vec<String> {
        let (effects, completed) = (self.effects.borrow(), self.completed.borrow());
        let mut broken = vec![];
        for (key, outcome) in &index.outcomes {
            let forgotten = match outcome {
                StepOutcome::Ok { .. } => false,
                StepOutcome::Failed(failure) => failure.cause == Cause::Interrupted,
                StepOutcome::Unknown { .. } => true,
            };
            if forgotten && completed.contains(key) {
                broken.push(format!("INV-2: the outcome of {key} was there and is lost"));
            }
            let unchanged = match outcome {
                StepOutcome::Failed(failure) => !failure.changed,
                _ => false,
            };
            if unchanged && effects.contains_key(key) {
                broken.push(format!(
                    "INV-1: {key} says that it changed nothing, and it has"
                ));
            }
        }
        broken
    }

    /// A blind action may have one effect for all its attempts, unless people said otherwise.
    pub(crate) fn check_blind(&self, index: &Index) -> Vec<String> {
        let effects = self.effects.borrow();
        let mut by_step: BTreeMap<(RolloutId, HostId, StepRef), u32> = BTreeMap::new();
        for (key, count) in effects.iter() {
            let Some(plan) = index.plans.get(&key.rollout) else {
                continue;
            };
            let placed = plan.plan().step(key.at).expect("a step of the plan");
            let blind = placed.step.action.info().class == Class::Blind;
            if !blind || key.direction != Direction::Do {
                continue;
            }
            let step = (key.rollout.clone(), key.host.clone(), key.at);
            let resolved = index.resolved.keys();
            let told =
                resolved.filter(|it| it.rollout == step.0 && it.host == step.1 && it.at == step.2);
            // An attempt that failed after its effect may be tried again: it said that it changed
            // something, and who orders another one knows.
            let failed = index.outcomes.iter().filter(|(it, outcome)| {
                it.rollout == step.0
                    && it.host == step.1
                    && it.at == step.2
                    && matches!(outcome, StepOutcome::Failed(failure) if failure.changed)
            });
            if told.count() + failed.count() == 0 {
                *by_step.entry(step).or_default() += count;
            }
        }
        let twice = by_step.into_iter().filter(|(_, count)| *count > 1);
        let twice = twice.map(|((rollout, host, at), _)| {
            format!("INV-1: the blind step {at} of {rollout} acts twice on {host}")
        });
        twice.collect()
    }
}
