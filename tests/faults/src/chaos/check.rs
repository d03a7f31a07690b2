//! What a rollout that was killed and resumed must have kept: judged from the ledger of effects and
//! from the controller's journal, by rules of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context as _, Result};
use lockstep_core::Record;
use lockstep_core::record::Entry;
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::plan::{CompiledPlan, Strategy, Target};
use lockstep_proto::report::{ReportBody, StepOutcome};

use super::simulated::{Effect, World};

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// Which kind.
    pub kind: Kind,
    /// What happened, with hosts and steps by name.
    pub what: String,
}

/// Kinds of broken promises; figures count them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// INV-1: something was done twice.
    Double,
    /// INV-2: a report is missing, or came twice, or out of order.
    Lost,
    /// INV-3: something was done before what comes first was closed.
    Barrier,
    /// INV-4: a term that had ended was obeyed, or its controller went on.
    Fenced,
    /// INV-6: a rollback left something behind.
    Undo,
    /// INV-8: no end, another end, or too late.
    Stuck,
    /// The outcome of a step is not known.
    Unknown,
    /// The journal is not whole, or a process ended without being asked to.
    Broken,
}

impl Violation {
    pub(super) fn new(kind: Kind, what: impl fmt::Display) -> Self {
        let what = what.to_string();
        Self { kind, what }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.what)
    }
}

/// The records of an exported journal.
pub fn records(export: &str) -> Result<Vec<Record>> {
    let lines = export.lines().skip(1);
    let record = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let payload = line["payload"].as_str().context("a line without payload")?;
        let entry: Entry = serde_json::from_str(payload)?;
        anyhow::Ok(entry.record)
    };
    lines.map(record).collect()
}

/// Everything that is wrong with a rollout that has ended.
pub fn violations(world: &World, records: &[Record], plan: &CompiledPlan) -> Vec<Violation> {
    let mut found = vec![];
    let broken = world.broken.iter().cloned();
    found.extend(broken.map(|what| Violation::new(Kind::Double, what)));
    let lost = world.lost.iter().cloned();
    found.extend(lost.map(|what| Violation::new(Kind::Lost, what)));
    let fenced = world.fenced.iter().cloned();
    found.extend(fenced.map(|what| Violation::new(Kind::Fenced, what)));
    once(&world.ledger, &mut found);
    reports(world, records, &mut found);
    barriers(world, plan, &mut found);
    obeyed(&world.ledger, &mut found);
    found
}

/// INV-1: no host does a step twice in one direction. No step process dies here, so there is no
/// second attempt either.
fn once(ledger: &[Effect], found: &mut Vec<Violation>) {
    let mut seen = BTreeSet::new();
    for effect in ledger {
        let key = &effect.key;
        if !seen.insert((&key.host, key.at, key.direction)) {
            found.push(Violation::new(
                Kind::Double,
                format!("{key} was done again"),
            ));
        }
    }
}

/// INV-2: each report of each agent is in the journal, once and in order, as the agent made it.
fn reports(world: &World, records: &[Record], found: &mut Vec<Violation>) {
    let mut kept: BTreeMap<&HostId, Vec<(u64, &ReportBody)>> = BTreeMap::new();
    for record in records {
        if let Record::Reported {
            host, number, body, ..
        } = record
        {
            kept.entry(host).or_default().push((*number, body));
            let unknown = matches!(
                body,
                ReportBody::Finished {
                    outcome: StepOutcome::Unknown { .. },
                    ..
                }
            );
            if unknown {
                found.push(Violation::new(Kind::Unknown, format!("{host}: {body:?}")));
            }
        }
        if let Record::GivenUp { host, at, why, .. } = record {
            let what = format!("{host}: step {at} was given up: {why:?}");
            found.push(Violation::new(Kind::Unknown, what));
        }
    }
    for agent in &world.agents {
        let kept = kept.remove(&agent.host).unwrap_or_default();
        let numbers: Vec<u64> = kept.iter().map(|(number, _)| *number).collect();
        let all: Vec<u64> = (1..=agent.reports.len() as u64).collect();
        if numbers != all {
            let (host, made) = (&agent.host, all.len());
            let what = format!("{host} made {made} reports, the journal has {numbers:?}");
            found.push(Violation::new(Kind::Lost, what));
            continue;
        }
        for (made, (number, kept)) in agent.reports.iter().zip(kept) {
            if made != kept {
                let what = format!("{}: report {number} is another one", agent.host);
                found.push(Violation::new(Kind::Lost, what));
            }
        }
    }
}

/// INV-3: whatever comes first is done on every host that it requires: phases, stages, waves.
fn barriers(world: &World, plan: &CompiledPlan, found: &mut Vec<Violation>) {
    let mut done: BTreeSet<(StepRef, &HostId)> = BTreeSet::new();
    let mut undone: BTreeSet<(StepRef, &HostId)> = BTreeSet::new();
    for effect in &world.ledger {
        let key = &effect.key;
        if key.direction == Direction::Undo {
            undone.insert((key.at, &key.host));
            let later = done.iter().find(|(at, host)| {
                let undo = plan
                    .step(*at)
                    .is_some_and(|placed| placed.step.action.info().undo);
                *host == &key.host && *at > key.at && undo && !undone.contains(&(*at, host))
            });
            if let Some((later, host)) = later {
                let what = format!("{key} was undone before step {later} of {host}");
                found.push(Violation::new(Kind::Undo, what));
            }
            continue;
        }
        if !undone.is_empty() {
            let what = format!("{key} was done after the rollback began");
            found.push(Violation::new(Kind::Barrier, what));
        }
        let Some(mine) = plan.step(key.at) else {
            found.push(Violation::new(
                Kind::Barrier,
                format!("{key} is not in the plan"),
            ));
            continue;
        };
        let first = |at: StepRef, stage: usize| (at.phase, stage) < (key.at.phase, mine.stage);
        for placed in plan.steps().filter(|placed| first(placed.at, placed.stage)) {
            let hosts = hosts(world, plan, placed.target);
            let enough = match placed.target {
                Target::OneOf(_) => hosts.iter().any(|host| done.contains(&(placed.at, host))),
                _ => hosts.iter().all(|host| done.contains(&(placed.at, host))),
            };
            if !enough {
                let what = format!("{key} was done before step {} was closed", placed.at);
                found.push(Violation::new(Kind::Barrier, what));
                break;
            }
        }
        waves(world, plan, effect, &done, found);
        done.insert((key.at, &key.host));
        if let Target::OneOf(_) = mine.target {
            let hosts: BTreeSet<_> = done.iter().filter(|(at, _)| *at == key.at).collect();
            if hosts.len() > 1 {
                let what = format!("step {} ran on {} hosts, not on one", key.at, hosts.len());
                found.push(Violation::new(Kind::Double, what));
            }
        }
    }
}

/// The waves before a host's own are done.
fn waves(
    world: &World,
    plan: &CompiledPlan,
    effect: &Effect,
    done: &BTreeSet<(StepRef, &HostId)>,
    found: &mut Vec<Violation>,
) {
    let key = &effect.key;
    let placed = plan.step(key.at).expect("it was looked up before");
    let hosts = hosts(world, plan, placed.target);
    let Some(mine) = hosts.iter().position(|host| **host == key.host) else {
        let what = format!("{key} is not meant for that host");
        found.push(Violation::new(Kind::Barrier, what));
        return;
    };
    let before = match placed.phase.stages[placed.stage].strategy {
        Strategy::All => 0,
        Strategy::Canary { first, .. } => {
            let first = first.of(hosts.len());
            if mine < first { 0 } else { first }
        }
        Strategy::Rolling { batch, .. } => {
            let batch = batch.of(hosts.len());
            mine / batch * batch
        }
    };
    let open = hosts[..before]
        .iter()
        .find(|host| !done.contains(&(key.at, **host)));
    if let Some(open) = open {
        let what = format!("{key} was done before {open}, which is in an earlier wave");
        found.push(Violation::new(Kind::Barrier, what));
    }
}

fn hosts<'a>(world: &'a World, plan: &CompiledPlan, target: &Target) -> Vec<&'a HostId> {
    let meant = world
        .agents
        .iter()
        .filter(|agent| plan.targets(target, &agent.labels));
    let mut hosts: Vec<&HostId> = meant.map(|agent| &agent.host).collect();
    hosts.sort();
    hosts
}

/// INV-4: what was obeyed was the highest term that the agent had seen.
fn obeyed(ledger: &[Effect], found: &mut Vec<Violation>) {
    for effect in ledger
        .iter()
        .filter(|effect| effect.epoch != effect.highest)
    {
        let Effect {
            key,
            epoch,
            highest,
        } = effect;
        let what = format!("{key} was done under {epoch}, after {highest} had been seen");
        found.push(Violation::new(Kind::Fenced, what));
    }
}

/// INV-6: every host is as it was before.
pub fn back(before: &World, after: &World) -> Vec<Violation> {
    let pairs = before.agents.iter().zip(&after.agents);
    let different = pairs.filter(|(before, after)| before.state != after.state);
    different
        .map(|(before, after)| {
            let (host, was, is) = (&before.host, &before.state, &after.state);
            Violation::new(Kind::Undo, format!("{host} was {was:?}, is {is:?}"))
        })
        .collect()
}
