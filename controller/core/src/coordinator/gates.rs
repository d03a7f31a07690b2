//! Who may decide at a gate, upon what they have seen, and who may break its glass.

use std::collections::BTreeSet;

use lockstep_proto::action::Action;
use lockstep_proto::approval::{LONGEST_GLASS, MAX_SIGNED_BYTES, Signature};
use lockstep_proto::ids::{Digest, OperatorName, StepRef};
use lockstep_proto::seal::check_size;
use lockstep_proto::values::{Period, Timestamp};

use super::Coordinator;
use crate::event::Refused;
use crate::rollout::{Gate, Rollout};

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
    /// The gate that a decision is for.
    pub(super) fn gate_for(&self, wanted: Option<StepRef>) -> Result<StepRef, Refused> {
        let mut open = self
            .gates
            .iter()
            .filter(|(_, gate)| gate.closed.is_none())
            .map(|(at, _)| *at);
        let found = match wanted {
            Some(at) => open.find(|open| *open == at),
            None => open.next(),
        };
        found.ok_or_else(|| match wanted {
            Some(at) => Refused::NotNow(format!("no gate is open at {at} of {}", self.id)),
            None => Refused::NotNow(format!(
                "no gate of {} is open; it is {}",
                self.id,
                self.state()
            )),
        })
    }

    /// A gate, if it stands as the person saw it.
    fn gate_seen(&self, at: StepRef, evidence: Digest) -> Result<&Gate, Refused> {
        let gate = &self.gates[&at];
        if gate.evidence != evidence {
            return Err(Refused::Invalid(format!(
                "what you saw ({}) is not what is to be decided upon ({}); look again",
                evidence.short(),
                gate.evidence.short()
            )));
        }
        Ok(gate)
    }

    /// Who may decide, and upon what (INV-12). Returns the items that the decision adds: nothing
    /// that somebody has decided is decided again, so that it keeps its first name.
    pub(super) fn may_decide(
        &self,
        at: StepRef,
        operator: &str,
        groups: &[String],
        evidence: Digest,
        approve: bool,
        items: &[u32],
    ) -> Result<Vec<u32>, Refused> {
        let gate = self.gate_seen(at, evidence)?;
        match &self.placed(at).step.action {
            Action::GateApproval(approval) => {
                if approve && operator == self.requester {
                    let why =
                        format!("{operator} submitted the rollout; somebody else must approve it");
                    return Err(Refused::NotAllowed(why));
                }
                let mine: BTreeSet<&String> = approval
                    .from
                    .keys()
                    .filter(|group| groups.contains(group))
                    .collect();
                if mine.is_empty() {
                    let wanted: Vec<&str> = approval.from.keys().map(String::as_str).collect();
                    let wanted = wanted.join(", ");
                    return Err(Refused::NotAllowed(format!(
                        "{operator} is not of the group {wanted}"
                    )));
                }
                if !items.is_empty() {
                    return Err(Refused::Invalid("an approval has no items".into()));
                }
                let given = gate.approvals_of(operator).flat_map(|had| &had.groups);
                if approve && mine.is_subset(&given.collect()) {
                    return Err(Refused::NotNow(format!(
                        "{operator} has approved at {at} already; it still waits for {}",
                        self.missing(at)
                    )));
                }
                Ok(vec![])
            }
            Action::GateChecklist(list) => {
                if list
                    .from
                    .as_ref()
                    .is_some_and(|group| !groups.contains(group))
                {
                    let wanted = list.from.as_deref().unwrap_or_default();
                    return Err(Refused::NotAllowed(format!(
                        "{operator} is not of the group {wanted}"
                    )));
                }
                let all = u32::try_from(list.items.len()).unwrap_or(u32::MAX);
                if items.len() > list.items.len() {
                    return Err(Refused::Invalid("an item is named twice".into()));
                }
                if let Some(item) = items.iter().find(|item| **item >= all) {
                    return Err(Refused::Invalid(format!(
                        "the list has {all} items; there is no item {}",
                        item + 1
                    )));
                }
                if !approve {
                    return Ok(vec![]);
                }
                let asked: BTreeSet<u32> = match items {
                    [] => (0..all).collect(),
                    items => items.iter().copied().collect(),
                };
                let confirmed = |item: &u32| gate.confirmed_by(*item).is_some();
                let new: Vec<u32> = asked.iter().copied().filter(|i| !confirmed(i)).collect();
                if new.is_empty() {
                    let who = |item: &u32| {
                        let name = gate.confirmed_by(*item).unwrap_or_default();
                        format!("item {} is confirmed by {name} already", item + 1)
                    };
                    let who: Vec<String> = asked.iter().map(who).collect();
                    return Err(Refused::NotNow(who.join("; ")));
                }
                Ok(new)
            }
            other => Err(Refused::Invalid(format!(
                "nobody decides at {}",
                other.name()
            ))),
        }
    }

    /// Whether a person may break the glass of a gate, and has not already (INV-12).
    pub(super) fn may_break(
        &self,
        at: StepRef,
        operator: &str,
        evidence: Digest,
        now: Timestamp,
    ) -> Result<(), Refused> {
        let gate = self.gate_seen(at, evidence)?;
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

    /// What a person signed, if it can travel with orders. Whether it is good, the hosts say.
    pub(super) fn signature(
        &self,
        at: StepRef,
        operator: &OperatorName,
        signed: Option<(Timestamp, String)>,
        now: Timestamp,
    ) -> Result<Option<Signature>, Refused> {
        let Some((expires, signature)) = signed else {
            return Ok(None);
        };
        if !matches!(self.placed(at).step.action, Action::GateApproval(_)) {
            return Err(Refused::Invalid("only approvals are signed".into()));
        }
        check_size(&[&signature]).map_err(Refused::Invalid)?;
        if expires <= now {
            return Err(Refused::Invalid("the signed approval has expired".into()));
        }
        let signed = Signature {
            approver: operator.clone(),
            expires,
            signature,
        };
        let size = self.size_with(at, &signed);
        if size > MAX_SIGNED_BYTES {
            return Err(Refused::Invalid(format!(
                "with the names of the hosts, the signed approvals at {at} would have {size} bytes, \
                 more than {MAX_SIGNED_BYTES}: split the fleet into several plans"
            )));
        }
        Ok(Some(signed))
    }
}
