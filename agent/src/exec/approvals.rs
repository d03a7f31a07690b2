//! Approvals that people have signed: where the policy asks for them, no step after a gate is taken
//! without. What people approved is made again from what the host knows, so that a controller can
//! neither forge an approval nor use one for something else (INV-12). Pure.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::action::{Action, Class};
use lockstep_proto::approval::{
    self, Approval, GLASS_STATEMENT, LONGEST_GLASS, STATEMENT, Signature, Signed, unfilled,
};
use lockstep_proto::ids::{HostId, StepRef};
use lockstep_proto::order::{Binding, Fact, Order, controller_host};
use lockstep_proto::plan::{CLOCK_TOLERANCE, CompiledPlan};
use lockstep_proto::sshsig;
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::policy::trust::{Approver, Breaker};

/// The gates of a plan, as far as they decide what a host may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gates {
    /// Where people approve, in the order of the plan.
    approvals: Vec<Gate>,
    /// Where SQL is shown, and of which database.
    shown: Vec<(StepRef, String)>,
    /// The number of the phase with the checks after a rollback: no gate needs to be met for them.
    after_rollback: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Gate {
    at: StepRef,
    from: BTreeMap<String, u32>,
}

impl Gates {
    /// Those of a plan.
    pub(super) fn of(plan: &CompiledPlan) -> Self {
        let approvals = plan.steps().filter_map(|placed| match &placed.step.action {
            Action::GateApproval(approval) => Some(Gate {
                at: placed.at,
                from: approval.from.clone(),
            }),
            _ => None,
        });
        let shown = plan.steps().filter_map(|placed| match &placed.step.action {
            Action::MigrationPlan(args) => Some((placed.at, args.database.clone())),
            _ => None,
        });
        Self {
            approvals: approvals.collect(),
            shown: shown.collect(),
            after_rollback: plan.after_rollback_index(),
        }
    }
}

/// Whose signatures count.
#[derive(Clone, Copy)]
pub(super) struct People<'a> {
    /// Who approves.
    pub(super) approvers: &'a [Approver],
    /// Who may, two together, let a gate be met without approvals.
    pub(super) breakers: &'a [Breaker],
}

/// What an order is held against.
pub(super) struct Asked<'a> {
    /// The host that was ordered.
    pub(super) host: &'a HostId,
    pub(super) order: &'a Order,
    /// The step.
    pub(super) action: &'a Action,
    /// By the host's own clock.
    pub(super) now: Timestamp,
    /// Whether a step after this gate has begun on the host: then its approvals need not be fresh.
    pub(super) begun_after: &'a dyn Fn(StepRef) -> bool,
}

/// Refuses a step that people have not approved, where they have to.
pub(super) fn check(
    gates: Option<&Gates>,
    people: People<'_>,
    asked: &Asked<'_>,
) -> Result<(), String> {
    let gates = gates.ok_or(
        "this host asks for signed approvals, and has consented to the plan before it could tell \
         which gates it has",
    )?;
    let at = asked.order.key.at;
    let only_looks = asked.action.info().class == Class::Observing;
    if at.phase == gates.after_rollback && only_looks {
        return Ok(());
    }
    for gate in gates.approvals.iter().filter(|gate| gate.at < at) {
        let signed = check_gate(gate, people, asked).map_err(|why| {
            format!(
                "this host asks for signed approvals, and gate {} has too few: {why}; see \
                 `lockstep approve --sign`",
                gate.at
            )
        })?;
        check_sql(gates, gate.at, asked, signed)?;
    }
    Ok(())
}

/// The approvals at a gate, if they are enough.
fn check_gate<'a>(
    gate: &Gate,
    people: People<'_>,
    asked: &Asked<'a>,
) -> Result<&'a Signed, String> {
    let People {
        approvers,
        breakers,
    } = people;
    let order = asked.order;
    let of_gate = |binding: &&Binding| {
        binding.origin.at == gate.at && binding.origin.host == controller_host()
    };
    let mut bindings = order.bindings.iter().filter(of_gate);
    let found = bindings.find_map(|binding| match &binding.fact {
        Fact::Approved {
            evidence,
            signed: Some(signed),
            ..
        } => Some((*evidence, signed.as_ref())),
        _ => None,
    });
    let (evidence, signed) = found.ok_or("nobody has signed")?;
    if !signed.hosts.contains(asked.host) {
        return Err(format!("{} is not among the hosts approved", asked.host));
    }
    if approval::evidence(order.plan, &signed.hosts, &signed.sql) != evidence {
        return Err("what was shown is not this plan on these hosts".to_owned());
    }
    let mut people: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut not_counted = Vec::new();
    let statement = |statement, one: &'a Signature| Approval {
        statement,
        rollout: &order.key.rollout,
        plan: order.plan,
        hosts: &signed.hosts,
        gate: gate.at,
        evidence,
        requester: &signed.requester,
        approver: &one.approver,
        expires: one.expires,
    };
    for one in signed.signatures.iter().take(MOST_SIGNATURES) {
        match check_one(one, &statement(STATEMENT, one), approvers, asked) {
            Ok(approver) => {
                let groups = approver.groups.iter().map(String::as_str);
                people.entry(&approver.name).or_default().extend(groups);
            }
            Err(why) => not_counted.push(format!("{}: {why}", one.approver.escape_debug())),
        }
    }
    let missing = unfilled(&gate.from, &people);
    if missing.is_empty() {
        return Ok(signed);
    }
    let mut broke: BTreeSet<&str> = BTreeSet::new();
    for one in signed.broken.iter().take(MOST_SIGNATURES) {
        match check_broken(one, &statement(GLASS_STATEMENT, one), breakers, asked) {
            Ok(name) => _ = broke.insert(name),
            Err(why) => not_counted.push(format!("{}: {why}", one.approver.escape_debug())),
        }
    }
    if broke.len() >= BREAK_TOGETHER {
        return Ok(signed);
    }
    let missing: Vec<String> = missing
        .iter()
        .map(|(group, count)| format!("{count} of {group}"))
        .collect();
    let mut why = format!("{} missing", missing.join(", "));
    if !not_counted.is_empty() {
        why = format!("{why}; not counted: {}", not_counted.join("; "));
    }
    Err(why)
}

/// Signatures at one gate that are looked at.
const MOST_SIGNATURES: usize = 64;

/// Who has signed a statement, if that counts.
fn check_one<'a>(
    one: &Signature,
    statement: &Approval<'_>,
    approvers: &'a [Approver],
    asked: &Asked<'_>,
) -> Result<&'a Approver, String> {
    let signature = one.signature.as_bytes();
    let key = sshsig::verify(signature, approval::NAMESPACE, &statement.encode())
        .map_err(|error| error.to_string())?;
    let known = approvers.iter().find(|approver| approver.key == key);
    let approver =
        known.ok_or_else(|| format!("the key {} is no approver's", key.fingerprint()))?;
    if approver.name != one.approver {
        return Err(format!("it is {}'s key", approver.name));
    }
    if approver.name == statement.requester {
        return Err("has submitted the rollout".to_owned());
    }
    let late = asked.now > one.expires.plus(CLOCK_TOLERANCE);
    if late && !(asked.begun_after)(statement.gate) {
        return Err("the approval has expired".to_owned());
    }
    Ok(approver)
}

/// So many people break the glass of a gate together.
const BREAK_TOGETHER: usize = 2;

/// Who has signed that the glass of a gate is to be broken, if that counts: a word for an hour, of
/// somebody whom this host's own policy names, and who did not submit the rollout.
fn check_broken<'a>(
    one: &Signature,
    statement: &Approval<'_>,
    breakers: &'a [Breaker],
    asked: &Asked<'_>,
) -> Result<&'a str, String> {
    let signature = one.signature.as_bytes();
    let key = sshsig::verify(signature, approval::GLASS_NAMESPACE, &statement.encode())
        .map_err(|error| error.to_string())?;
    let known = breakers.iter().find(|breaker| breaker.key == key);
    let breaker = known.ok_or_else(|| {
        let key = key.fingerprint();
        format!("the key {key} may break no glass on this host")
    })?;
    if breaker.name != one.approver {
        return Err(format!("it is {}'s key", breaker.name));
    }
    if breaker.name == statement.requester {
        return Err("has submitted the rollout".to_owned());
    }
    if one.expires > asked.now.plus(LONGEST_GLASS).plus(CLOCK_TOLERANCE) {
        return Err(format!("the word would hold for more than {LONGEST_GLASS}"));
    }
    let late = asked.now > one.expires.plus(CLOCK_TOLERANCE);
    if late && !(asked.begun_after)(statement.gate) {
        return Err("the word has ended".to_owned());
    }
    Ok(&breaker.name)
}

/// SQL that was shown before a gate is what was approved there.
fn check_sql(
    gates: &Gates,
    gate: StepRef,
    asked: &Asked<'_>,
    signed: &Signed,
) -> Result<(), String> {
    let Action::MigrationApply(args) = asked.action else {
        return Ok(());
    };
    let shown = |(at, database): &(StepRef, String)| *at < gate && *database == args.database;
    if !gates.shown.iter().any(shown) {
        return Ok(());
    }
    let bound = asked.order.bindings.iter().filter_map(|it| match &it.fact {
        Fact::SqlPlan {
            database, digest, ..
        } if *database == args.database => Some(digest),
        _ => None,
    });
    let bound: Vec<_> = bound.collect();
    if bound.is_empty() || bound.iter().any(|digest| !signed.sql.contains(digest)) {
        return Err(format!(
            "the SQL for `{}` is not what was approved at gate {gate}",
            args.database
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
