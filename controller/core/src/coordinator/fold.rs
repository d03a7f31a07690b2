//! The fold over all rollouts and hosts: the running path and recovery both go through here.

use std::sync::Arc;

use lockstep_proto::seal::SealedPlan;

use super::{Coordinator, HostInfo};
use crate::record::{Entry, Record};
use crate::rollout::Rollout;

impl Coordinator {
    /// A rollout begins: its serial is used up.
    pub(super) fn begin(&mut self, entry: &Entry, plan: Arc<SealedPlan>) {
        let Record::Submitted {
            rollout,
            requester,
            dry_run,
            ..
        } = &entry.record
        else {
            unreachable!("only submissions begin a rollout");
        };
        if !dry_run {
            self.serials.insert(plan.plan().serial, rollout.clone());
        }
        let mut state = Rollout::new(rollout.clone(), plan, requester.clone(), *dry_run, entry.at);
        state.records = 1;
        self.last_at = entry.at;
        self.awake.insert(self.order.len(), Some(entry.at));
        self.places.insert(rollout.clone(), self.order.len());
        self.order.push(rollout.clone());
        self.rollouts.insert(rollout.clone(), state);
    }

    /// The fold: the running path and recovery both go through here.
    pub(super) fn apply(&mut self, entry: &Entry) -> Result<(), String> {
        self.last_at = entry.at;
        match &entry.record {
            Record::TermBegan { epoch } => self.last_epoch = Some(*epoch),
            Record::TookOver { epoch } => self.took_over = Some(*epoch),
            Record::Compacted { .. } | Record::CallsRefused(_) => {}
            Record::Archived(archived) => {
                if archived.serial != 0 {
                    let rollout = archived.rollout.clone();
                    self.serials.insert(archived.serial, rollout);
                }
                self.archived
                    .insert(archived.rollout.clone(), archived.clone());
            }
            Record::ReportsLost { host, through, .. }
            | Record::ReportsArchived { host, through } => {
                let info = self.hosts.get_mut(host);
                let info = info.ok_or("reports of a host that was never seen")?;
                info.acknowledged = *through;
                info.last_seen = entry.at;
            }
            Record::HostSeen {
                host,
                instance,
                labels,
                agent_version,
            } => {
                let earlier = self.earlier(host, instance);
                let before = self
                    .hosts
                    .get(host)
                    .filter(|info| info.instance == *instance);
                if before.is_none() {
                    let rollouts = self.rollouts.values_mut();
                    for member in rollouts.filter_map(|state| state.members.get_mut(host)) {
                        member.anew = true;
                    }
                }
                let info = HostInfo {
                    connected: self.hosts.get(host).is_some_and(|info| info.connected),
                    since: entry.at,
                    last_seen: entry.at,
                    instance: instance.clone(),
                    labels: labels.clone(),
                    agent_version: agent_version.clone(),
                    acknowledged: before.map_or(0, |info| info.acknowledged),
                    unasked: self.hosts.get(host).map_or(0, |info| info.unasked),
                    earlier,
                    forgotten: false,
                };
                self.hosts.insert(host.clone(), info);
            }
            Record::HostForgotten { host, void, .. } => {
                match self.hosts.get_mut(host) {
                    Some(info) => info.forgotten = true,
                    None if self.trust.is_enrolled(host) => {}
                    None => return Err("a host was forgotten that was never seen".to_owned()),
                }
                self.trust.forget(host, *void);
            }
            Record::Trust(record) => self.trust.apply(entry.at, record)?,
            Record::Matched { rollout, hosts } => {
                let state = self.rollouts.get_mut(rollout).ok_or("no such rollout")?;
                state.records += 1;
                for host in hosts {
                    let info = self
                        .hosts
                        .get(host)
                        .ok_or("a matched host was never seen")?;
                    state.add_member(host, &info.labels);
                }
                if state.events.is_empty() {
                    state.narrate_submitted(entry.at);
                }
            }
            Record::Reported { host, number, .. } => {
                let answers = self.apply_to_rollout(entry)?;
                let info = self
                    .hosts
                    .get_mut(host)
                    .ok_or("a host reported that was never seen")?;
                info.acknowledged = *number;
                info.last_seen = entry.at;
                info.unasked += u64::from(!answers);
            }
            _ => {
                self.apply_to_rollout(entry)?;
            }
        }
        Ok(())
    }

    /// Returns whether it changes anything.
    fn apply_to_rollout(&mut self, entry: &Entry) -> Result<bool, String> {
        let Entry { at, record } = entry;
        let id = record.rollout().ok_or("a record without a rollout")?;
        match self.rollouts.get_mut(id) {
            Some(state) => {
                state.records += 1;
                // Whatever it is, it may make something due of one that had come to rest.
                self.awake.entry(self.places[id]).or_insert(Some(*at));
                let applied = state.apply(*at, record);
                applied.map_err(|illegal| illegal.to_string())
            }
            // An agent may report on a rollout of a controller before this one.
            None if matches!(record, Record::Reported { .. }) => Ok(false),
            None => Err(format!("there is no rollout {id}")),
        }
    }
}
