//! What must hold: one checker over the controllers' journals, the agents' journals and the ledger
//! of effects, which knows nothing of either.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_agent::simulation::Account;
use lockstep_core::{Entry, Record};
use lockstep_proto::action::{Action, Class};
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
    /// The stage that each rollout has come to.
    stages: BTreeMap<RolloutId, (u16, u16)>,
    /// The newest report of a host that an earlier controller had, and this one never gets.
    skipped: BTreeMap<HostId, u64>,
}

impl Index {
    /// Knows the plan of a rollout that is about to be submitted.
    pub(crate) fn plan(&mut self, rollout: &RolloutId, plan: Arc<SealedPlan>) {
        self.plans.insert(rollout.clone(), plan);
    }

    /// Adds a durable record; answers with what it breaks.
    pub(crate) fn add(&mut self, entry: &Entry, now: u64, labels: &Hosts) -> Vec<String> {
        let mut broken = vec![];
        match &entry.record {
            Record::Reported {
                host, number, body, ..
            } => {
                let reports = self.reports.entry(host.clone()).or_default();
                let last = reports.last_key_value().map_or(0, |(number, _)| *number);
                let last = last.max(self.skipped.get(host).copied().unwrap_or(0));
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
                broken.extend(self.check_budget(rollout, labels));
            }
            Record::WaveOpened {
                rollout,
                phase,
                stage,
                ..
            } => {
                self.stages.insert(rollout.clone(), (*phase, *stage));
            }
            Record::ReportsLost { host, through, .. } => {
                self.skipped.insert(host.clone(), *through);
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

    /// INV-5: no more hosts are left behind than the stage allows, and the plan in all.
    fn check_budget(&self, rollout: &RolloutId, labels: &Hosts) -> Option<String> {
        let plan = self.plans.get(rollout)?.plan();
        let left = |host: &HostId| self.quarantined.contains(&(rollout.clone(), host.clone()));
        let all = labels.iter().filter(|(host, _)| left(host)).count();
        let most = plan.max_failures.map_or(usize::MAX, |most| most as usize);
        if all > most {
            return Some(format!("INV-5: {all} hosts of {rollout} are left behind"));
        }
        let (phase, stage) = *self.stages.get(rollout)?;
        let phase = &plan.phases[usize::from(phase)];
        let stage = &phase.stages[usize::from(stage)];
        let required = self.required(rollout, &stage.target, labels);
        let here = required.unwrap_or_default();
        let here = here.iter().filter(|host| left(host)).count();
        let most = match stage.target {
            Target::OneOf(_) => 0,
            _ => stage.strategy.max_failures() as usize,
        };
        (here > most).then(|| {
            let name = &phase.name;
            format!("INV-5: {here} hosts of {rollout} are left behind in a stage of `{name}`")
        })
    }

    /// Whether the step went the other way after this attempt.
    fn is_turned(&self, key: &StepKey) -> bool {
        let mut later = self.order.iter().rev().take_while(|other| *other != key);
        later.any(|other| {
            (&other.rollout, &other.host, other.at) == (&key.rollout, &key.host, key.at)
                && other.direction != key.direction
        })
    }

    /// Where a step stands in a rollback; what stands higher is undone before. A service is
    /// restarted once everything that it should find is back.
    fn undo_place(&self, key: &StepKey) -> (bool, StepRef) {
        let placed = self.plans[&key.rollout].plan().step(key.at);
        let action = placed.map(|placed| &placed.step.action);
        (!matches!(action, Some(Action::ServiceRestart(_))), key.at)
    }

    /// Whether what an attempt did is undone, or cannot be.
    fn is_back(&self, key: &StepKey) -> bool {
        let placed = self.plans[&key.rollout].plan().step(key.at);
        let undone = self.outcomes.iter().any(|(other, outcome)| {
            (&other.rollout, &other.host, other.at) == (&key.rollout, &key.host, key.at)
                && other.direction == Direction::Undo
                && matches!(outcome, StepOutcome::Ok { .. })
        });
        undone || placed.is_none_or(|placed| !placed.step.action.info().undo)
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

    /// Who has to do what has this target; none if nobody was elected yet.
    fn required(
        &self,
        rollout: &RolloutId,
        target: &Target,
        labels: &Hosts,
    ) -> Option<Vec<HostId>> {
        match target {
            Target::Controller => Some(vec![]),
            Target::OneOf(groups) => {
                let elected = self.elected.get(&(rollout.clone(), groups.clone()));
                Some(vec![elected?.clone()])
            }
            Target::Groups(groups) => {
                let means = |(_, role): &&(HostId, &'static str)| groups.iter().any(|g| g == role);
                let hosts = labels.iter().filter(means);
                Some(hosts.map(|(host, _)| host.clone()).collect())
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
            let at = placed.at;
            let Some(hosts) = self.required(&key.rollout, placed.target, labels) else {
                return Some(format!(
                    "INV-3: {key} acts before anybody is elected for {at}"
                ));
            };
            for host in hosts {
                let left = self
                    .quarantined
                    .contains(&(key.rollout.clone(), host.clone()));
                if !left && !self.is_done(&key.rollout, &host, at) {
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
                    let at = placed.at;
                    let hosts = self.required(rollout, placed.target, &labels);
                    if hosts.is_none() {
                        broken.push(format!("INV-5: succeeded, but nobody was elected for {at}"));
                    }
                    for host in hosts.unwrap_or_default() {
                        if !self.is_done(rollout, &host, at) {
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
                    if it.now != it.before {
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
        // An earlier controller had them: see `check_skipped`.
        let skipped = self.skipped.get(host).copied().unwrap_or(0);
        for (number, body) in &account.reports {
            match here.get(number) {
                None if *number <= skipped => {}
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
        let newest = account.reports.keys().last().copied().unwrap_or(0);
        if here
            .last_key_value()
            .is_some_and(|(number, _)| *number > newest)
        {
            broken.push(format!("INV-2: {host} has lost reports that are here"));
        }
        broken
    }

    /// INV-2: whoever takes over from a copy may lack only what the original has.
    pub(crate) fn check_skipped(&self, others: &[Self]) -> Vec<String> {
        let mut broken = vec![];
        for (host, through) in &self.skipped {
            let has = |other: &Self| other.reports.get(host)?.last_key_value().map(|it| *it.0);
            if others
                .iter()
                .filter_map(has)
                .all(|newest| newest < *through)
            {
                broken.push(format!(
                    "INV-2: no controller has {host}'s report {through}"
                ));
            }
        }
        broken
    }

    /// An attempt of a rollout whose outcome is unknown, and of which nobody has said what it was.
    pub(crate) fn unsettled(&self, rollout: &RolloutId) -> Option<StepKey> {
        let open = self.outcomes.iter().find(|(key, outcome)| {
            key.rollout == *rollout
                && matches!(outcome, StepOutcome::Unknown { .. })
                && !self.resolved.contains_key(key)
        });
        open.map(|(key, _)| key.clone())
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
    /// The newest term that each host has reported to, or acted under. What it was only welcomed
    /// with it may have had no time to write down.
    terms: RefCell<BTreeMap<HostId, Epoch>>,
    /// The term of each controller, by its process.
    controllers: RefCell<BTreeMap<i32, Epoch>>,
    /// Orders from a term that was the newest when they came, with the first such term.
    good: RefCell<BTreeMap<StepKey, Epoch>>,
    /// When each attempt was last ordered, in world time.
    orders: RefCell<BTreeMap<StepKey, u64>>,
    /// Attempts whose step process left its outcome.
    completed: RefCell<BTreeSet<StepKey>>,
    /// What was found to be broken.
    pub(crate) violations: RefCell<Vec<String>>,
}

impl Ledger {
    /// A host has shown that it knows a term.
    fn shows(&self, host: &HostId, epoch: Epoch) {
        let mut terms = self.terms.borrow_mut();
        let newest = terms.entry(host.clone()).or_insert(epoch);
        if epoch.counter > newest.counter {
            *newest = epoch;
        }
    }

    /// A controller's term begins.
    pub(crate) fn term_began(&self, controller: i32, epoch: Epoch) {
        self.controllers.borrow_mut().insert(controller, epoch);
    }

    /// A host's report has come to a controller.
    pub(crate) fn reports_to(&self, host: &HostId, controller: i32) {
        let epoch = self.controllers.borrow().get(&controller).copied();
        self.shows(host, epoch.expect("a controller begins with its term"));
    }

    /// Whether a host has shown that it knows a newer term than that of a controller.
    pub(crate) fn has_left(&self, host: &HostId, controller: i32) -> bool {
        let counter = |epoch: Option<&Epoch>| epoch.map_or(0, |epoch| epoch.counter);
        let newest = counter(self.terms.borrow().get(host));
        newest > counter(self.controllers.borrow().get(&controller))
    }

    /// An order is handed to a host.
    pub(crate) fn order(&self, order: &Order, now: u64) -> Option<String> {
        let terms = self.terms.borrow();
        let newest = terms.get(&order.key.host);
        let mut orders = self.orders.borrow_mut();
        orders.insert(order.key.clone(), now);
        let newer = |newest: &Epoch| order.epoch.counter > newest.counter;
        if newest.is_none_or(|newest| *newest == order.epoch || newer(newest)) {
            let mut good = self.good.borrow_mut();
            good.entry(order.key.clone()).or_insert(order.epoch);
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
        match self.good.borrow().get(key) {
            Some(epoch) => self.shows(&key.host, *epoch),
            None => broken.push(format!(
                "INV-4: {key} acts on the word of a term that has ended"
            )),
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
        if key.direction == Direction::Undo {
            let first = effects.keys().filter(|other| {
                (&other.rollout, &other.host) == (&key.rollout, &key.host)
                    && other.direction == Direction::Do
                    && ordered[0].undo_place(other) > ordered[0].undo_place(key)
            });
            let open = first.filter(|other| ordered.iter().all(|index| !index.is_back(other)));
            for other in open {
                broken.push(format!("INV-6: {key} undoes before {other} is undone"));
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

    /// Whether an attempt has had its effect.
    pub(crate) fn has_effect(&self, key: &StepKey) -> bool {
        self.effects.borrow().contains_key(key)
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

    /// A blind action may have one effect for all its attempts.
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
            // An attempt that failed after its effect may be tried again: it said that it changed
            // something, and who orders another one knows.
            let failed = index.outcomes.iter().filter(|(it, outcome)| {
                it.rollout == step.0
                    && it.host == step.1
                    && it.at == step.2
                    && matches!(outcome, StepOutcome::Failed(failure) if failure.changed)
            });
            // People say what they saw: that it was done, and then it is not done again.
            if failed.count() == 0 {
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
