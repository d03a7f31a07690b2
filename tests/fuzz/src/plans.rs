//! Plans, before and after they are compiled.

use std::collections::BTreeMap;

use lockstep_core::compile::compile;
use lockstep_core::plan::{Input, Plan};
use lockstep_proto::ids::PlanDigest;
use lockstep_proto::seal::{self, InvalidPlan};
use lockstep_proto::values::Timestamp;

use crate::rollouts;

/// When plans are compiled.
pub(crate) const NOW: Timestamp = Timestamp(1_800_000_000_000);

/// A plan file: all that is wrong is said of it, or it compiles to a plan that agents open.
pub(crate) fn plan(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let plan = match Plan::parse("plan.yaml", text) {
        Ok(plan) => plan,
        Err(findings) => return lockstep::fuzzing::findings(&findings),
    };
    lockstep::fuzzing::findings(plan.warnings());
    let given: BTreeMap<String, String> = plan.inputs().iter().map(given).collect();
    let sealed = match compile(&plan, &given, 7, NOW) {
        Ok(sealed) => sealed,
        Err(findings) => return lockstep::fuzzing::findings(&findings),
    };
    // INV-12: one plan, one digest; and what was compiled is what agents open.
    let again = compile(&plan, &given, 7, NOW).expect("it was compiled before");
    assert_eq!(again, sealed);
    let opened = seal::open_expecting(sealed.bytes(), sealed.digest());
    assert_eq!(opened.expect("a compiled plan is one"), sealed);
}

pub(crate) fn given(input: &Input) -> (String, String) {
    let known = input
        .default
        .clone()
        .or_else(|| input.one_of.first().cloned());
    // What the examples ask for.
    let usual = ["v1.2.3", "1", "main", "a"].into_iter().map(str::to_owned);
    let mut values = known.into_iter().chain(usual);
    let value = values.find(|value| input.refuse(value).is_none());
    (input.name.clone(), value.unwrap_or_default())
}

/// A compiled plan: it has one encoding, and whoever handles it may rely on what was checked.
pub(crate) fn compiled_plan(bytes: &[u8]) {
    let sealed = match seal::open(bytes) {
        Ok(sealed) => sealed,
        Err(error) => {
            assert!(!matches!(error, InvalidPlan::OtherDigest { .. }));
            return;
        }
    };
    assert_eq!(sealed.bytes(), bytes);
    assert_eq!(sealed.digest(), PlanDigest::of(bytes));
    let again = seal::seal(sealed.plan().clone()).expect("it can be encoded");
    assert_eq!(again, sealed);
    let plan = sealed.plan();
    for placed in plan.steps() {
        let found = plan.step(placed.at).expect("a step is at its place");
        assert!(std::ptr::eq(found.step, placed.step));
    }
    lockstep::fuzzing::plan_summary(&sealed);
    rollouts::submit(sealed);
}
