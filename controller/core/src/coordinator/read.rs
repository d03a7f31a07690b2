//! What everyone may ask a coordinator. Reading changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_proto::ids::{HostId, InstanceId, PlanDigest, RolloutId, StepKey};
use lockstep_proto::values::Timestamp;

use super::{Coordinator, HostInfo};
use crate::event::RolloutEvent;
use crate::faults::planted;
use crate::rollout::{Left, Rollout};

impl Coordinator {
    /// When [`crate::Event::Tick`] is due at the latest; none if nothing waits for time.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        if planted!(IgnoreDeadlines) {
            return None;
        }
        debug_assert!(
            self.wakes_in_time(),
            "something is due before it is looked at"
        );
        self.next_wake()
    }

    /// A host, if it is known.
    pub fn host(&self, host: &HostId) -> Option<&HostInfo> {
        self.hosts.get(host).filter(|info| !info.forgotten)
    }

    /// The hosts that are known.
    pub fn hosts(&self) -> impl Iterator<Item = (&HostId, &HostInfo)> {
        self.hosts.iter().filter(|(_, info)| !info.forgotten)
    }

    /// The hosts that were ever seen, forgotten ones too.
    pub fn all_hosts(&self) -> impl Iterator<Item = (&HostId, &HostInfo)> {
        self.hosts.iter()
    }

    /// The serials that are used up, and by which rollout.
    pub fn serials(&self) -> &BTreeMap<u64, RolloutId> {
        &self.serials
    }

    /// The rollout that has a host's lock.
    pub fn locked_by(&self, host: &HostId) -> Option<&RolloutId> {
        let holds = |rollout: &&Rollout| rollout.is_locking() && rollout.members.contains_key(host);
        self.rollouts
            .values()
            .find(holds)
            .map(|rollout| &rollout.id)
    }

    /// The newest durable report of an agent's installation: what `Welcome` says. 0 for one that
    /// is not known.
    pub fn acknowledged(&self, host: &HostId, instance: &InstanceId) -> u64 {
        let known = self
            .hosts
            .get(host)
            .filter(|info| info.instance == *instance);
        known.map_or(0, |info| info.acknowledged)
    }

    /// The newest durable report of installations before this one, as `Welcome` says it: 0 if there
    /// are none, if people said that the host is gone, or if this one has reported itself.
    pub fn earlier(&self, host: &HostId, instance: &InstanceId) -> u64 {
        match self.hosts.get(host) {
            Some(info) if info.instance != *instance && !info.forgotten => {
                info.acknowledged.max(info.earlier)
            }
            Some(info) if info.acknowledged == 0 && !info.forgotten => info.earlier,
            _ => 0,
        }
    }

    /// Whether a host was ordered an attempt.
    pub fn was_ordered(&self, key: &StepKey) -> bool {
        let rollout = self.rollouts.get(&key.rollout);
        rollout.is_some_and(|rollout| {
            let mut attempts = rollout.attempts_at(key.at, key.direction, &key.host).iter();
            attempts.any(|attempt| attempt.number == key.attempt)
        })
    }

    /// The ids of all rollouts, oldest first.
    pub fn rollouts(&self) -> impl Iterator<Item = &RolloutId> {
        self.order.iter()
    }

    /// A rollout as a document (`lockstep.rollout/1`).
    pub fn document(&self, rollout: &RolloutId) -> Option<serde_json::Value> {
        self.rollouts.get(rollout).map(Rollout::document)
    }

    /// A rollout in short.
    pub fn summary(&self, rollout: &RolloutId) -> Option<Summary> {
        let state = self.rollouts.get(rollout)?;
        Some(Summary {
            rollout: rollout.clone(),
            plan: state.compiled().plan.clone(),
            digest: state.plan.digest(),
            state: state.state(),
            ended: state.ended.is_some(),
            open: state.ended.is_none() || state.is_locking(),
            reason: state
                .ended
                .as_ref()
                .map(|ending| ending.reason.clone())
                .unwrap_or_default(),
            requester: state.requester.clone(),
            dry_run: state.dry_run,
            waits_for: state.waits_for(),
            submitted: state.submitted,
            ended_at: state.ended.as_ref().map(|ending| ending.at),
        })
    }

    /// What a rollout that has ended left on each of its hosts; empty while it goes on. What hosts
    /// say later counts.
    pub fn left(&self, rollout: &RolloutId) -> Vec<Left> {
        let state = self.rollouts.get(rollout);
        let up = |host: &HostId| self.is_up(host);
        state.map(|state| state.left(&up)).unwrap_or_default()
    }

    /// The hosts that a rollout waits for, and whose agents are not connected.
    pub fn absent(&self, rollout: &RolloutId) -> Vec<&HostId> {
        let state = self.rollouts.get(rollout);
        let awaited = state.map(Rollout::awaited).unwrap_or_default();
        awaited
            .into_iter()
            .filter(|host| !self.is_up(host))
            .collect()
    }

    /// A rollout's events after a number.
    pub fn events(&self, rollout: &RolloutId, after: u64) -> Option<&[Arc<RolloutEvent>]> {
        let events = &self.rollouts.get(rollout)?.events;
        let from = events.partition_point(|event| event.number <= after);
        events.get(from..)
    }

    /// Whether a host may read a compiled plan: only those that the plan was offered to.
    pub fn may_read(&self, host: &HostId, plan: PlanDigest) -> bool {
        self.rollouts
            .values()
            .any(|rollout| rollout.plan.digest() == plan && rollout.members.contains_key(host))
    }
}

/// A rollout in short.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Its id.
    pub rollout: RolloutId,
    /// The plan's name.
    pub plan: String,
    /// The plan's digest.
    pub digest: PlanDigest,
    /// `running`, `paused`, `rolling_back`, or how it ended.
    pub state: &'static str,
    /// Whether it has ended; a halted one has.
    pub ended: bool,
    /// Whether it goes on, or waits for a person: halted, and not closed.
    pub open: bool,
    /// Why, if it did not succeed.
    pub reason: String,
    /// Who submitted it.
    pub requester: String,
    /// Whether it only probes.
    pub dry_run: bool,
    /// What people have to bring before it goes on; empty if it waits for nobody.
    pub waits_for: String,
    /// When it was submitted.
    pub submitted: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}
