//! Rollouts that have ended go out of a journal, into an archive: which, and what is known of them
//! afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_proto::ids::{PlanDigest, RolloutId};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

use super::{Coordinator, HostInfo};
use crate::record::Archived;
use crate::rollout::{Left, LeftState, Rollout};

/// A host that has not said what became of a step may still do so, for this long after the end of
/// its rollout; what it says later is in the journal, and changes nothing.
const MAY_STILL_SPEAK: Period = Period::seconds(24 * 60 * 60);

/// People who have not signed a rollout off may still do so, for this long after its end.
const MAY_STILL_SIGN: Period = Period::seconds(30 * 24 * 60 * 60);

impl Coordinator {
    /// The rollouts that may go out, in the order in which they were over: they have ended, wait for
    /// no decision, and no message of theirs is on its way.
    pub fn over(&self) -> Vec<(Timestamp, &RolloutId)> {
        let over = self.rollouts.values().filter(|rollout| {
            let unsent = rollout.notices.values().any(|state| state.sent.is_none());
            !rollout.is_locking() && !unsent
        });
        let mut over: Vec<_> = over
            .filter_map(|rollout| {
                let ended = rollout.ended.as_ref()?.at;
                let closed = rollout.closed.as_ref().map_or(ended, |(at, ..)| *at);
                Some((ended.max(closed), &rollout.id))
            })
            .collect();
        over.sort();
        over
    }

    /// Those of them that people look for no longer, in the order of their submission: all but the newest
    /// one, and but for as many before it as have up to this many records together. One that a host or
    /// a person may still say something of stays.
    pub fn outgrown(&self, now: Timestamp, records: u64) -> Vec<RolloutId> {
        let over = self.over();
        let mut left = records;
        let outgrown: BTreeSet<&RolloutId> = over
            .iter()
            .rev()
            .enumerate()
            .filter(|(place, (over_at, id))| {
                let rollout = &self.rollouts[*id];
                let fits = rollout.records <= left;
                left = if fits { left - rollout.records } else { 0 };
                *place > 0 && !fits && !rollout.may_be_spoken_of(now.since(*over_at))
            })
            .map(|(_, (_, id))| *id)
            .collect();
        let in_order = self.order.iter().filter(|id| outgrown.contains(id));
        in_order.cloned().collect()
    }

    /// How many records of the journal are of rollouts, but for these.
    pub fn records_but_of(&self, rollouts: &[RolloutId]) -> u64 {
        let rollouts: BTreeSet<&RolloutId> = rollouts.iter().collect();
        let others = self.rollouts.values();
        let others = others.filter(|rollout| !rollouts.contains(&rollout.id));
        others.map(|rollout| rollout.records).sum()
    }

    /// The compiled plans of all rollouts.
    pub fn plans(&self) -> BTreeMap<PlanDigest, Arc<SealedPlan>> {
        let plans = self.rollouts.values().map(|rollout| &rollout.plan);
        plans
            .map(|plan| (plan.digest(), Arc::clone(plan)))
            .collect()
    }

    /// Whether another coordinator knows the same of a rollout.
    pub fn agrees_with(&self, other: &Self, rollout: &RolloutId) -> bool {
        self.rollouts.get(rollout) == other.rollouts.get(rollout)
    }

    /// What is known of all rollouts that are in archives.
    pub fn all_archived(&self) -> impl Iterator<Item = &Archived> {
        self.archived.values()
    }

    /// What a journal says of a rollout whose records are in this archive; none if it goes on, or is
    /// not known.
    pub fn as_archived(&self, id: &RolloutId, archive: &str) -> Option<Archived> {
        let rollout = self.rollouts.get(id)?;
        let ending = rollout.ended.as_ref()?;
        let plan = rollout.compiled();
        Some(Archived {
            rollout: id.clone(),
            serial: if rollout.dry_run { 0 } else { plan.serial },
            plan: rollout.plan.digest(),
            name: plan.plan.clone(),
            end: ending.end,
            submitted: rollout.submitted,
            ended: ending.at,
            archive: archive.to_owned(),
        })
    }

    /// Lets go of rollouts whose records are in an archive now: this coordinator is then the one
    /// that [`Self::recover`] makes of the journal without them.
    pub fn archive(&mut self, archived: Vec<Archived>) {
        for archived in archived {
            self.rollouts.remove(&archived.rollout);
            self.archived.insert(archived.rollout.clone(), archived);
        }
        let rollouts = &self.rollouts;
        let mut awake = std::mem::take(&mut self.awake);
        self.places.clear();
        let order = std::mem::take(&mut self.order).into_iter().enumerate();
        for (former, id) in order.filter(|(_, id)| rollouts.contains_key(id)) {
            let place = self.order.len();
            if let Some(wake) = awake.remove(&former) {
                self.awake.insert(place, wake);
            }
            self.places.insert(id.clone(), place);
            self.order.push(id);
        }
        self.surveyed.retain(|(id, _)| rollouts.contains_key(id));
    }
}

impl HostInfo {
    /// What the journal alone says of it, but for reports that answer nothing.
    #[must_use]
    pub fn as_recorded(&self) -> Self {
        Self {
            connected: false,
            last_seen: Timestamp::default(),
            since: Timestamp::default(),
            unasked: 0,
            ..self.clone()
        }
    }
}

impl Rollout {
    /// Whether somebody may still say something of it, so long after it was over.
    fn may_be_spoken_of(&self, over_for: Period) -> bool {
        let unsigned = |role: &String| !self.signoffs.iter().any(|signed| signed.role == *role);
        let open = |left: &Left| left.state != LeftState::Stopped;
        (over_for < MAY_STILL_SIGN && self.compiled().signoff.iter().any(unsigned))
            || (over_for < MAY_STILL_SPEAK && self.left(&|_| false).iter().any(open))
    }
}
