//! What people sign when they approve at a gate, and who has to.
//!
//! The statement names everything that the approval is for: rollout, plan, matched hosts, gate, and
//! the digest of what was shown (INV-12). It is signed for [`NAMESPACE`], over its canonical bytes.
//! It does not travel: whoever holds the signature against it makes it again from what it knows.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{Digest, HostId, PlanDigest, RolloutId, StepRef};
use crate::values::{Period, Timestamp};

/// What signatures of approvals are for, in SSH's sense.
pub const NAMESPACE: &str = "lockstep-approval";

/// The statement's name and version.
pub const STATEMENT: &str = "lockstep.approval/1";

/// What signatures of people who break the glass of a gate are for.
pub const GLASS_NAMESPACE: &str = "lockstep-break-glass";

/// The name and version of what they sign, which is otherwise what approvers sign.
pub const GLASS_STATEMENT: &str = "lockstep.break-glass/1";

/// The longest time for which their word holds.
pub const LONGEST_GLASS: Period = Period::seconds(3600);

/// The largest [`Signed`] in its JSON form, in bytes: it fits into a fact with room for the rest,
/// and travels with each order after the gate.
pub const MAX_SIGNED_BYTES: usize = 20 << 10;

/// The statement. Its canonical form is JSON without white space, fields in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Approval<'a> {
    /// [`STATEMENT`], or [`GLASS_STATEMENT`].
    pub statement: &'static str,
    /// The rollout.
    pub rollout: &'a RolloutId,
    /// Its plan.
    pub plan: PlanDigest,
    /// The hosts that the plan meant when it was submitted, by name.
    pub hosts: &'a [HostId],
    /// The gate's place in the plan.
    pub gate: StepRef,
    /// Digest of what was shown: see [`evidence`].
    pub evidence: Digest,
    /// Who submitted the rollout.
    pub requester: &'a str,
    /// Who approves.
    pub approver: &'a str,
    /// The approval is good for the first step after the gate until then.
    pub expires: Timestamp,
}

impl Approval<'_> {
    /// The canonical bytes: what is signed.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a statement has no maps")
    }
}

/// A signed approval, without what others know anyway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Who approves.
    pub approver: String,
    /// Until when.
    pub expires: Timestamp,
    /// Armoured.
    pub signature: String,
}

/// The signed approvals at one gate, with what their statements have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The matched hosts, by name.
    pub hosts: Vec<HostId>,
    /// Digests of the SQL that was shown.
    pub sql: Vec<Digest>,
    /// Who submitted the rollout.
    pub requester: String,
    /// What people signed.
    pub signatures: Vec<Signature>,
    /// What people signed who broke the glass of the gate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub broken: Vec<Signature>,
}

/// What people decide upon: the plan, the matched hosts, and the SQL that was shown (INV-12).
pub fn evidence<'a>(
    plan: PlanDigest,
    hosts: impl IntoIterator<Item = &'a HostId>,
    sql: &[Digest],
) -> Digest {
    let hosts: Vec<&str> = hosts.into_iter().map(HostId::as_str).collect();
    let sql: Vec<String> = sql.iter().map(ToString::to_string).collect();
    let text = serde_json::json!({"plan": plan.to_string(), "hosts": hosts, "sql": sql});
    Digest::of(text.to_string().as_bytes())
}

/// Which places cannot be filled with these people, each of them in one place only: a maximum
/// matching by augmenting paths.
pub fn unfilled(
    wanted: &BTreeMap<String, u32>,
    people: &BTreeMap<&str, BTreeSet<&str>>,
) -> BTreeMap<String, u32> {
    fn place<'a>(
        slot: usize,
        slots: &[&'a str],
        people: &BTreeMap<&'a str, BTreeSet<&'a str>>,
        seat: &mut BTreeMap<&'a str, usize>,
        seen: &mut BTreeSet<&'a str>,
    ) -> bool {
        for (person, groups) in people {
            if !groups.contains(slots[slot]) || !seen.insert(person) {
                continue;
            }
            let free = match seat.get(person).copied() {
                None => true,
                Some(other) => place(other, slots, people, seat, seen),
            };
            if free {
                seat.insert(person, slot);
                return true;
            }
        }
        false
    }

    let slots: Vec<&str> = wanted
        .iter()
        .flat_map(|(group, count)| std::iter::repeat_n(group.as_str(), *count as usize))
        .collect();
    let mut seat = BTreeMap::new();
    let mut missing = BTreeMap::new();
    for slot in 0..slots.len() {
        if !place(slot, &slots, people, &mut seat, &mut BTreeSet::new()) {
            *missing.entry(slots[slot].to_owned()).or_default() += 1;
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn people(
        list: &'static [(&'static str, &'static [&'static str])],
    ) -> BTreeMap<&'static str, BTreeSet<&'static str>> {
        list.iter()
            .map(|(name, groups)| (*name, groups.iter().copied().collect()))
            .collect()
    }

    #[test]
    fn one_person_fills_one_place_only() {
        let wanted = BTreeMap::from([("dba".to_owned(), 1), ("qa".to_owned(), 1)]);
        assert_eq!(
            unfilled(&wanted, &people(&[("ann", &["dba", "qa"])])).len(),
            1
        );
        // Ann must take qa, since Ben can only be dba, whoever is asked first.
        assert!(
            unfilled(
                &wanted,
                &people(&[("ann", &["dba", "qa"]), ("ben", &["dba"])])
            )
            .is_empty()
        );
    }
}
