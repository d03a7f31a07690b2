//! What a host signs with a key of its own: that it was its step which proved a fact.
//!
//! The signature is bare: the 64 bytes of an Ed25519 signature in SSH's scheme, for [`NAMESPACE`],
//! in hexadecimal. What people say of an outcome is signed by them, for [`RESOLVE_NAMESPACE`].

use serde::Serialize;

use crate::ids::{PlanDigest, StepKey};
use crate::order::Fact;

/// What signatures of facts are for, in SSH's sense.
pub const NAMESPACE: &str = "lockstep-evidence";

/// What signatures of people's words about an outcome are for, in SSH's sense.
pub const RESOLVE_NAMESPACE: &str = "lockstep-resolve";

/// The length of a signature of a fact, in hexadecimal digits.
pub const SIGNATURE_DIGITS: usize = 128;

#[derive(Serialize)]
struct Evidence<'a> {
    statement: &'static str,
    origin: &'a StepKey,
    fact: &'a Fact,
}

/// What a host signs: canonical JSON of the step and of the fact as orders carry it.
pub fn statement(origin: &StepKey, fact: &Fact) -> Vec<u8> {
    let evidence = Evidence {
        statement: "lockstep.evidence/1",
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
