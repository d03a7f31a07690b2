//! The lock while a gate waits. A gate may free it where nothing was changed before: other rollouts
//! take the hosts meanwhile, and so nothing that was seen before the gate is true by itself after
//! it.
//!
//! ```text
//! gate waits -> LockReleased -> decided, every host free -> LockTaken
//!   -> consent anew -> the steps before the gate again, which only look -> the gate:
//!        all as it was     -> GateClosed
//!        something changed -> GateReopened: decisions are void (INV-12), people are asked again
//! ```

use std::collections::BTreeSet;

use lockstep_proto::action::Action;
use lockstep_proto::approval;
use lockstep_proto::ids::{Digest, Direction, StepRef};
use lockstep_proto::values::Timestamp;

use super::state::{Lock, States};
use super::{Cursor, Mode, Rollout};
use crate::record::Record;

/// So many changes are named when people are asked again: the report has each host's state.
const MOST_NAMED: usize = 20;

impl Rollout {
    /// What is due of the lock at a gate that waits, or is `met`; none if the gate may close.
    pub(super) fn advance_lock(
        &self,
        at: StepRef,
        action: &Action,
        met: bool,
        now: Timestamp,
    ) -> Option<Vec<Record>> {
        if !action.releases_lock() {
            return None;
        }
        match (met, self.lock.released) {
            // The coordinator takes the lock, once every host is free.
            (_, true) if self.gates[&at].released == Some(self.lock.round) => Some(vec![]),
            // One that was opened anew while the lock was free goes on with it.
            (_, true) => Some(self.release(at)),
            // Also one that is met no more: what people have seen is asked of the hosts as they
            // were when they decided, not as they are when they are taken the next time.
            (_, false) => {
                let changed = self.changed_meanwhile(at);
                if !changed.is_empty() {
                    return Some(self.reopen(at, &changed, now));
                }
                (!met).then(|| self.release(at))
            }
        }
    }

    fn release(&self, at: StepRef) -> Vec<Record> {
        let rollout = self.id.clone();
        vec![Record::LockReleased { rollout, at }]
    }

    /// The gate at which the rollout waits for nothing but its lock.
    pub(crate) fn wants_lock(&self, now: Timestamp) -> Option<StepRef> {
        if !self.lock.released || self.ended.is_some() || self.paused {
            return None;
        }
        let mut gates = self.gates.iter().filter(|(_, gate)| gate.closed.is_none());
        let (at, _) = gates.find(|(_, gate)| gate.released == Some(self.lock.round))?;
        self.is_met(*at, now).then_some(*at)
    }

    /// What is no longer as it was when the lock was freed, in words, as far as it was seen before
    /// the gate.
    fn changed_meanwhile(&self, at: StepRef) -> Vec<String> {
        let Some(shown) = &self.lock.shown else {
            return vec![];
        };
        let sound = self
            .members
            .iter()
            .filter(|(_, it)| it.quarantined.is_none());
        let hosts = sound.flat_map(|(host, member)| {
            differences(&member.approved, &member.before)
                .into_iter()
                .map(move |what| format!("{host}: {what}"))
        });
        let other_sql = *shown != self.sql_shown(Some(at));
        let sql = other_sql.then(|| "the SQL that was shown is another".to_owned());
        hosts.chain(sql).collect()
    }

    /// Everybody who has decided so far is asked again, also where the glass was broken: first at the
    /// first of these gates, and at the others once they are reached.
    fn reopen(&self, at: StepRef, changed: &[String], now: Timestamp) -> Vec<Record> {
        let named = &changed[..changed.len().min(MOST_NAMED)];
        let mut why = format!(
            "what was decided is no longer true, since the hosts were free: {}",
            named.join("; ")
        );
        if changed.len() > MOST_NAMED {
            why = format!("{why}; and {} more", changed.len() - MOST_NAMED);
        }
        let mut decided = self.gates.range(..at).filter(|(_, gate)| gate.is_decided());
        let first = decided.next().map_or(at, |(first, _)| *first);
        let until = self.gate_until(&self.placed(first).step.action, now);
        vec![Record::GateReopened {
            rollout: self.id.clone(),
            at: first,
            evidence: self.evidence_at(first),
            until: until.expect("it is a gate"),
            why,
        }]
    }

    /// What people decide upon at a gate, whatever was shown after it.
    fn evidence_at(&self, at: StepRef) -> Digest {
        let shown = self.sql_shown(Some(at));
        approval::evidence(self.plan.digest(), self.members.keys(), &shown)
    }

    pub(super) fn fold_released(&mut self, at: StepRef) -> bool {
        let round = self.lock.round;
        let forward = matches!(self.mode, Mode::Forward(_));
        let Some(gate) = self.gates.get_mut(&at).filter(|_| forward) else {
            return false;
        };
        gate.released = Some(round);
        self.lock.released = true;
        true
    }

    /// Hosts are asked anew, and the rollout begins again from its first phase: what it has done
    /// before only looked.
    pub(super) fn fold_taken(&mut self, now: Timestamp, at: StepRef, round: u32) -> bool {
        if !self.lock.released || round != self.lock.round + 1 {
            return false;
        }
        self.lock = Lock {
            released: false,
            round,
            taken: Some(now),
            shown: Some(self.sql_shown(Some(at))),
        };
        self.mode = Mode::Consenting;
        let sound = self.members.values_mut();
        for member in sound.filter(|member| member.quarantined.is_none()) {
            member.consent = None;
            member.declined = None;
            member.approved = std::mem::take(&mut member.before);
        }
        let silent = self.members.iter();
        let silent = silent.filter(|(_, member)| member.consent.is_none());
        self.silent = silent.map(|(host, _)| host.clone()).collect();
        for ((_, direction), hosts) in &mut self.attempts {
            let last = hosts
                .values_mut()
                .filter_map(|attempts| attempts.last_mut());
            for attempt in last.filter(|_| *direction == Direction::Do) {
                attempt.stale = true;
            }
        }
        true
    }

    pub(super) fn fold_reopened(
        &mut self,
        now: Timestamp,
        at: StepRef,
        evidence: Digest,
        until: Timestamp,
    ) -> bool {
        let Some(gate) = self.gates.get_mut(&at) else {
            return false;
        };
        gate.opened = now;
        gate.until = until;
        gate.evidence = evidence;
        gate.decisions.clear();
        gate.glass.clear();
        gate.closed = None;
        // What was decided after it goes by what was decided here, and is no truer.
        self.gates
            .retain(|other, gate| *other <= at || (gate.closed.is_some() && !gate.is_decided()));
        // From here on what is true now is what people decide upon.
        self.lock.shown = None;
        if let Mode::Forward(cursor) = &mut self.mode {
            *cursor = Cursor::default();
        }
        true
    }
}

/// The parts of a state that differ.
fn differences(before: &States, after: &States) -> Vec<String> {
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let word =
        |state: Option<&(Digest, String)>| state.map_or("absent", |(_, text)| text).to_owned();
    let differs = |name: &&String| {
        let digest = |states: &States| states.get(*name).map(|(digest, _)| *digest);
        digest(before) != digest(after)
    };
    names
        .into_iter()
        .filter(differs)
        .map(|name| {
            let (was, is) = (word(before.get(name)), word(after.get(name)));
            format!("{name} was {was} and is {is}")
        })
        .collect()
}
