//! What records name. A journal's chain shows that nobody has changed it since it was written; it
//! does not show that a controller wrote it.

use lockstep_proto::action::Site;
use lockstep_proto::ids::{HostId, StepRef};

use super::Rollout;
use crate::ascending::Ascending;
use crate::record::{NoticeRef, Record};

impl Rollout {
    /// Whether what a record names is there: phases and steps in the plan, hosts in the rollout.
    /// What refers to what an earlier record made finds that out by itself.
    pub(super) fn has_what_is_named_by(&self, record: &Record) -> bool {
        let plan = self.compiled();
        let member = |host: &HostId| self.members.contains_key(host);
        let runs = |at: &StepRef, site| {
            let placed = plan.step(*at);
            placed.is_some_and(|placed| placed.step.action.info().site == site)
        };
        match record {
            Record::PhaseOpened { phase, .. } | Record::PhaseClosed { phase, .. } => {
                // A plan without checks after a rollback goes on to the end of its phases.
                *phase <= plan.after_rollback_index()
            }
            Record::Elected { host, .. } => member(host),
            Record::WaveOpened { phase, stage, .. } => self.stage_of(*phase, *stage).is_some(),
            Record::Dispatched { at, hosts, .. } => {
                let mut members = Ascending::new(Some(&self.members));
                runs(at, Site::Host) && hosts.iter().all(|host| members.get(host).is_some())
            }
            Record::GateOpened { at, .. }
            | Record::GateReopened { at, .. }
            | Record::GlassBroken { at, .. }
            | Record::LockReleased { at, .. }
            | Record::LockTaken { at, .. } => runs(at, Site::Controller),
            Record::NoticeOrdered { which, .. } => match which {
                NoticeRef::Step(at) => runs(at, Site::Controller),
                NoticeRef::Plan { index, .. } => plan.notices.len() > usize::from(*index),
            },
            Record::LossAccepted { at, host, .. } => runs(at, Site::Host) && member(host),
            _ => true,
        }
    }
}
