//! Who may break the glass of a gate.

use lockstep_proto::approval::LONGEST_GLASS;
use lockstep_proto::ids::{Digest, StepRef};
use lockstep_proto::values::{Period, Timestamp};

use super::Coordinator;
use crate::event::Refused;
use crate::rollout::Rollout;

impl Coordinator {
    /// The group for which a person may break the glass of a gate.
    pub(super) fn may_break_glass(
        &self,
        operator: &str,
        groups: &[String],
        life: Period,
    ) -> Result<String, Refused> {
        let group = self.config.break_glass.as_ref().ok_or_else(|| {
            Refused::NotNow(
                "nobody may break the glass here: the controller's configuration has no \
                 `[break_glass]`"
                    .to_owned(),
            )
        })?;
        if !groups.contains(group) {
            let why = format!("{operator} is not of the group {group}");
            return Err(Refused::NotAllowed(why));
        }
        if life == Period(0) || life > LONGEST_GLASS {
            let why = format!("a word holds for {LONGEST_GLASS} at most");
            return Err(Refused::Invalid(why));
        }
        Ok(group.clone())
    }
}

impl Rollout {
    /// Whether a person may break the glass of a gate, and has not already (INV-12).
    pub(super) fn may_break(
        &self,
        at: StepRef,
        operator: &str,
        evidence: Digest,
        now: Timestamp,
    ) -> Result<(), Refused> {
        let gate = &self.gates[&at];
        if gate.evidence != evidence {
            return Err(Refused::Invalid(format!(
                "what you saw ({}) is not what is to be decided upon ({}); look again",
                evidence.short(),
                gate.evidence.short()
            )));
        }
        // Who wants the rollout is neither of the two.
        if operator == self.requester {
            let why = format!("{operator} submitted the rollout; two others must break the glass");
            return Err(Refused::NotAllowed(why));
        }
        if gate.holding(now).any(|word| word.operator == operator) {
            return Err(Refused::NotNow(format!(
                "{operator} has said so already; a second person has to"
            )));
        }
        Ok(())
    }
}
