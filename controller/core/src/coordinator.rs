//! All rollouts, hosts and deadlines as one value: events in, effects out.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_proto::ids::{Epoch, HostId, PlanDigest, RolloutId};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::Timestamp;

use crate::event::{Effects, Event, RolloutEvent};
use crate::record::Entry;

/// What the coordinator is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The term of this controller.
    pub epoch: Epoch,
}

/// A journal that cannot be folded.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// A plan that a record names is not in the store.
    #[error("the compiled plan {plan} of {rollout} is missing from the store")]
    PlanMissing {
        /// The rollout.
        rollout: RolloutId,
        /// Its plan.
        plan: PlanDigest,
    },
    /// A record that does not fit to those before it.
    #[error("record {number} does not fit to those before it: {why}")]
    Illegal {
        /// The record's number, from 1.
        number: u64,
        /// What is wrong.
        why: String,
    },
}

/// A host as the controller knows it.
#[derive(Debug, Clone)]
pub struct HostInfo {
    /// Whether its session is up.
    pub connected: bool,
    /// When something was last heard of it.
    pub last_seen: Timestamp,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its agent's release.
    pub agent_version: String,
    /// The newest durable report.
    pub acknowledged: u64,
}

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator {
    config: Config,
}

impl Coordinator {
    /// Folds the journal. `plan` finds a compiled plan by its digest. Afterwards, call
    /// [`Self::resume`] once.
    pub fn recover(
        config: Config,
        entries: impl IntoIterator<Item = Entry>,
        plan: impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
    ) -> Result<Self, RecoverError> {
        let _ = (entries, plan);
        Ok(Self { config })
    }

    /// The first effects after recovery: the term's record, and whatever is due.
    pub fn resume(&mut self, now: Timestamp) -> Effects {
        let _ = (now, &self.config);
        Effects::default()
    }

    /// Takes one event. `now` never goes back.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Effects {
        let _ = (now, event);
        Effects::default()
    }

    /// When [`Event::Tick`] is due at the latest; none if nothing waits for time.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        None
    }

    /// The hosts that are known.
    pub fn hosts(&self) -> impl Iterator<Item = (&HostId, &HostInfo)> {
        std::iter::empty()
    }

    /// The rollout that has a host's lock.
    pub fn locked_by(&self, host: &HostId) -> Option<&RolloutId> {
        let _ = host;
        None
    }

    /// The newest durable report of a host: what `Welcome` says.
    pub fn acknowledged(&self, host: &HostId) -> u64 {
        let _ = host;
        0
    }

    /// The ids of all rollouts, oldest first.
    pub fn rollouts(&self) -> impl Iterator<Item = &RolloutId> {
        std::iter::empty()
    }

    /// A rollout as a document (`lockstep.rollout/1`).
    pub fn document(&self, rollout: &RolloutId) -> Option<serde_json::Value> {
        let _ = rollout;
        None
    }

    /// A rollout in short.
    pub fn summary(&self, rollout: &RolloutId) -> Option<Summary> {
        let _ = rollout;
        None
    }

    /// A rollout's events after a number.
    pub fn events(&self, rollout: &RolloutId, after: u64) -> Option<&[RolloutEvent]> {
        let _ = (rollout, after);
        None
    }

    /// Whether a host may read a compiled plan: only those that the plan was offered to.
    pub fn may_read(&self, host: &HostId, plan: PlanDigest) -> bool {
        let _ = (host, plan);
        false
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
    /// Why, if it did not succeed.
    pub reason: String,
    /// Who submitted it.
    pub requester: String,
    /// Whether it only probes.
    pub dry_run: bool,
    /// When it was submitted.
    pub submitted: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
}
