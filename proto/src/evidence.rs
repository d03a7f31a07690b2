//! What a host signs with a key of its own: that it was its step which proved a fact.
//!
//! The signature is bare: the 64 bytes of an Ed25519 signature in SSH's scheme, for [`NAMESPACE`],
//! in hexadecimal. What people say of an outcome is signed by them, for [`RESOLVE_NAMESPACE`], and
//! what they accept to lose for [`LOSS_NAMESPACE`].

use serde::Serialize;

use crate::ids::{LossId, PlanDigest, StepKey};
use crate::order::Fact;

/// What signatures of facts are for, in SSH's sense.
pub const NAMESPACE: &str = "lockstep-evidence";

/// What signatures of people's words about an outcome are for, in SSH's sense.
pub const RESOLVE_NAMESPACE: &str = "lockstep-resolve";

/// What signatures of an acceptance of a loss are for, in SSH's sense.
pub const LOSS_NAMESPACE: &str = "lockstep-accept-loss";

/// The length of a signature of a fact, in hexadecimal digits.
pub const SIGNATURE_DIGITS: usize = 128;

#[derive(Serialize)]
struct Evidence<'a> {
    statement: &'static str,
    plan: PlanDigest,
    origin: &'a StepKey,
    fact: &'a Fact,
}

/// What a host signs: canonical JSON of the plan, the step and the fact as orders carry it. A
/// controller chooses the ids of rollouts, so that an id alone would not say which plan it was.
pub fn statement(plan: PlanDigest, origin: &StepKey, fact: &Fact) -> Vec<u8> {
    let evidence = Evidence {
        statement: "lockstep.evidence/2",
        plan,
        origin,
        fact: &fact.as_bound(),
    };
    serde_json::to_vec(&evidence).expect("a fact has no map with other keys than text")
}

#[derive(Serialize)]
struct Resolution<'a> {
    statement: &'static str,
    plan: PlanDigest,
    origin: &'a StepKey,
    done: bool,
    by: &'a str,
}

/// What a person signs who says what an attempt did.
pub fn resolution(plan: PlanDigest, origin: &StepKey, done: bool, by: &str) -> Vec<u8> {
    let resolution = Resolution {
        statement: "lockstep.resolve/1",
        plan,
        origin,
        done,
        by,
    };
    serde_json::to_vec(&resolution).expect("a resolution has no maps")
}

#[derive(Serialize)]
struct Acceptance<'a> {
    statement: &'static str,
    plan: PlanDigest,
    origin: &'a StepKey,
    loss: &'a LossId,
    by: &'a str,
}

/// What a person signs who accepts what an undo would lose.
pub fn acceptance(plan: PlanDigest, origin: &StepKey, loss: &LossId, by: &str) -> Vec<u8> {
    let acceptance = Acceptance {
        statement: "lockstep.accept-loss/1",
        plan,
        origin,
        loss,
        by,
    };
    serde_json::to_vec(&acceptance).expect("an acceptance has no maps")
}
