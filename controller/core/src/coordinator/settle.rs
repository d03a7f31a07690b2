//! What is due, and when something will be.
//!
//! A rollout that nothing is due of is looked at again when something of it changes, or at the time
//! that it has said. Most of what changes is one host's report while others still work: then only
//! that host is looked at, so that a phase of many hosts costs as much as its hosts.

use lockstep_proto::ids::{HostId, RolloutId};
use lockstep_proto::values::Timestamp;

use super::Coordinator;
use crate::event::{Effects, Message};
use crate::record::Record;
use crate::rollout::{Follows, Mode};

impl Coordinator {
    /// Everything that is due, until nothing is.
    pub(super) fn settle(&mut self, now: Timestamp, effects: &mut Effects) {
        self.unsettled = false;
        loop {
            let awake: Vec<usize> = self.awake.keys().copied().collect();
            for place in awake {
                self.settle_one(now, place, effects);
            }
            // A rollout that has ended, or waits, may have freed what another one waits for. Those
            // that have waited longest come first.
            let mut waiting = self.awake.keys().map(|place| &self.order[*place]);
            let Some(taken) = waiting.find_map(|id| self.lock_for(now, id)) else {
                return;
            };
            self.commit(now, taken, effects);
        }
    }

    fn settle_one(&mut self, now: Timestamp, place: usize, effects: &mut Effects) {
        let id = self.order[place].clone();
        loop {
            let rollout = &self.rollouts[&id];
            let since = |host: &HostId| self.since(host);
            let due = rollout.advance(now, self.floor, &since);
            if due.is_empty() {
                break;
            }
            for record in due {
                self.commit(now, record, effects);
            }
        }
        self.ask_for_states(&id, effects);
        let rollout = &self.rollouts[&id];
        if rollout.ended.is_some() && rollout.unsurveyed().is_empty() {
            self.awake.remove(&place);
        } else {
            let since = |host: &HostId| self.since(host);
            let next = rollout.next_deadline(now, self.floor, &since);
            self.awake.insert(place, next);
        }
    }

    /// What follows from a report that was just folded, and for which rollout.
    pub(super) fn follows(
        &self,
        now: Timestamp,
        host: &HostId,
        record: &Record,
    ) -> Option<(RolloutId, Follows)> {
        let Record::Reported { body, .. } = record else {
            return None;
        };
        let rollout = self.rollouts.get(record.rollout()?)?;
        // What time has made due, and what follows from other reports, comes first.
        let wake = self.awake.get(&self.places[&rollout.id]).copied().flatten();
        let follows = if self.unsettled || wake.is_some_and(|wake| now >= wake) {
            Follows::Anything
        } else {
            rollout.follows(now, host, body)
        };
        Some((rollout.id.clone(), follows))
    }

    pub(super) fn settle_report(
        &mut self,
        now: Timestamp,
        host: &HostId,
        id: &RolloutId,
        follows: Follows,
        effects: &mut Effects,
    ) {
        match follows {
            Follows::Nothing(next) => self.wake_by(id, next),
            Follows::These(records) => {
                for record in records {
                    self.commit(now, record, effects);
                }
                let rollout = &self.rollouts[id];
                let open = rollout.outstanding_of(host);
                let next = open
                    .map(|(at, _, attempt)| attempt.give_up_at(rollout.placed(at).step.timeout))
                    .min();
                self.wake_by(id, next);
            }
            Follows::Anything => self.unsettled = true,
        }
    }

    /// Whether a host that has come back makes something due: it is asked for its state, and a rollback
    /// that waits for what it never began waits no longer than that.
    pub(super) fn is_awaited_back(&self, host: &HostId) -> bool {
        let mut awake = self.awake.keys();
        awake.any(|place| {
            let rollout = &self.rollouts[&self.order[*place]];
            let asks = rollout.ended.is_some() || matches!(rollout.mode, Mode::Backward(_));
            asks && rollout.members.contains_key(host)
        })
    }

    /// A rollout is looked at by then.
    fn wake_by(&mut self, id: &RolloutId, next: Option<Timestamp>) {
        let Some(place) = self.places.get(id) else {
            return;
        };
        if let (Some(next), Some(wake)) = (next, self.awake.get_mut(place)) {
            *wake = Some(wake.map_or(next, |wake| wake.min(next)));
        }
    }

    /// Whether no rollout sleeps past what is due of it.
    pub(super) fn wakes_in_time(&self) -> bool {
        let since = |host: &HostId| self.since(host);
        self.unsettled
            || self.awake.iter().all(|(place, wake)| {
                let rollout = &self.rollouts[&self.order[*place]];
                let due = rollout.next_deadline(self.now, self.floor, &since);
                due.is_none_or(|due| wake.is_some_and(|wake| wake <= due))
            })
    }

    /// When a rollout may have something due without an event.
    pub(super) fn next_wake(&self) -> Option<Timestamp> {
        self.awake.values().flatten().min().copied()
    }

    /// The lock for a rollout that waits for nothing else, if every host of it is free.
    fn lock_for(&self, now: Timestamp, id: &RolloutId) -> Option<Record> {
        let rollout = &self.rollouts[id];
        let at = rollout.wants_lock(now)?;
        let mut hosts = rollout.members.keys();
        hosts.all(|host| self.locked_by(host).is_none()).then(|| {
            let round = rollout.lock.round + 1;
            let rollout = id.clone();
            Record::LockTaken { rollout, at, round }
        })
    }

    fn ask_for_states(&mut self, id: &RolloutId, effects: &mut Effects) {
        let rollout = &self.rollouts[id];
        for host in rollout.unsurveyed() {
            if self.is_up(host) && self.surveyed.insert((id.clone(), host.clone())) {
                let survey = Message::Survey {
                    rollout: id.clone(),
                    epoch: self.config.epoch,
                };
                effects.send.push((host.clone(), survey));
            }
        }
    }
}
