//! The seal of a compiled plan: its canonical bytes, their digest, and what people sign.
//!
//! People sign the line `<digest>` with SSH keys, for [`NAMESPACE`]; `trust` holds such signatures
//! against keys.

use crate::ids::PlanDigest;
use crate::json;
use crate::plan::{CompiledPlan, FORMAT, MAX_PLAN_BYTES};

/// What signatures of plans are for, in SSH's sense.
pub const NAMESPACE: &str = "lockstep-plan";

/// The greatest number of signatures on one plan.
pub const MAX_SIGNATURES: usize = 16;

/// The largest armoured signature, in bytes. One of a hardware token has about 500.
pub const MAX_SIGNATURE_BYTES: usize = 2 << 10;

/// What people sign to seal the plan with this digest.
pub fn message(digest: PlanDigest) -> String {
    format!("{digest}\n")
}

/// Refuses more signatures, or larger ones, than anybody would send.
pub fn check_size(signatures: &[impl AsRef<[u8]>]) -> Result<(), String> {
    if signatures.len() > MAX_SIGNATURES {
        return Err(format!("a plan has at most {MAX_SIGNATURES} signatures"));
    }
    let large = |signature: &&_| AsRef::<[u8]>::as_ref(*signature).len() > MAX_SIGNATURE_BYTES;
    if signatures.iter().any(|signature| large(&signature)) {
        return Err(format!(
            "a signature has at most {MAX_SIGNATURE_BYTES} bytes"
        ));
    }
    Ok(())
}

/// A compiled plan together with the bytes that its digest is of. There is no other way to have
/// one than [`seal`] and [`open`], so the three always agree.
#[derive(Debug, Clone, PartialEq)]
pub struct SealedPlan {
    plan: CompiledPlan,
    bytes: Vec<u8>,
    digest: PlanDigest,
}

impl SealedPlan {
    /// The plan.
    pub fn plan(&self) -> &CompiledPlan {
        &self.plan
    }

    /// The canonical bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Their digest.
    pub fn digest(&self) -> PlanDigest {
        self.digest
    }
}

/// Bytes that are no compiled plan.
#[derive(Debug, thiserror::Error)]
pub enum InvalidPlan {
    /// Larger than [`MAX_PLAN_BYTES`].
    #[error("a compiled plan has at most {MAX_PLAN_BYTES} bytes, this one has {0}")]
    TooLarge(usize),
    /// Not readable, or with something this version does not know.
    #[error("the compiled plan cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// Readable, but not in its canonical encoding.
    #[error("the compiled plan is not in its canonical encoding")]
    NotCanonical,
    /// Of a version this one does not know.
    #[error("the compiled plan has format {0}, this version reads format {FORMAT}")]
    Format(u32),
    /// Readable, but not a plan that could run.
    #[error("the compiled plan does not hold together: {0}")]
    Incoherent(String),
    /// Other bytes than those that were asked for.
    #[error("the compiled plan has digest {found}, not {expected}")]
    OtherDigest {
        /// The digest that was asked for.
        expected: PlanDigest,
        /// The digest of the bytes.
        found: PlanDigest,
    },
}

/// Encodes a plan and takes its digest.
pub fn seal(plan: CompiledPlan) -> Result<SealedPlan, InvalidPlan> {
    let bytes = serde_json::to_vec(&plan).map_err(InvalidPlan::Unreadable)?;
    if bytes.len() > MAX_PLAN_BYTES {
        return Err(InvalidPlan::TooLarge(bytes.len()));
    }
    let digest = PlanDigest::of(&bytes);
    Ok(SealedPlan {
        plan,
        bytes,
        digest,
    })
}

/// Reads a compiled plan that comes from people, and refuses any encoding of it but the canonical
/// one.
pub fn open(bytes: &[u8]) -> Result<SealedPlan, InvalidPlan> {
    let sealed = read(bytes)?;
    let names = sealed.plan.check_names();
    names.map_err(InvalidPlan::Incoherent)?;
    Ok(sealed)
}

fn read(bytes: &[u8]) -> Result<SealedPlan, InvalidPlan> {
    if bytes.len() > MAX_PLAN_BYTES {
        return Err(InvalidPlan::TooLarge(bytes.len()));
    }
    let plan: CompiledPlan = json::read(bytes).map_err(InvalidPlan::Unreadable)?;
    if plan.format != FORMAT {
        return Err(InvalidPlan::Format(plan.format));
    }
    plan.check().map_err(InvalidPlan::Incoherent)?;
    let sealed = seal(plan)?;
    if sealed.bytes == bytes {
        Ok(sealed)
    } else {
        Err(InvalidPlan::NotCanonical)
    }
}

/// Reads the compiled plan with a given digest, which was taken once: perhaps by an earlier release,
/// which was less strict about names.
pub fn open_expecting(bytes: &[u8], expected: PlanDigest) -> Result<SealedPlan, InvalidPlan> {
    let found = PlanDigest::of(bytes);
    if found != expected {
        return Err(InvalidPlan::OtherDigest { expected, found });
    }
    read(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Slo;
    use crate::values::{Period, Timestamp};
    use std::collections::BTreeMap;

    fn plan() -> CompiledPlan {
        CompiledPlan {
            format: FORMAT,
            plan: "p".into(),
            serial: 1,
            fleet_name: String::new(),
            not_before: Timestamp(0),
            expires: Timestamp(9),
            deadline: Period::seconds(60),
            inputs: BTreeMap::new(),
            fleet: BTreeMap::new(),
            phases: vec![],
            after_rollback: None,
            max_failures: None,
            notices: vec![],
            slo: Slo::default(),
            signoff: vec![],
        }
    }

    #[test]
    fn a_plan_that_could_not_run_is_not_opened() {
        let phase = |target: &str, step: &str| {
            format!(r#"[{{"name":"p","stages":[{{"target":{target},"steps":[{step}]}}]}}]"#)
        };
        let gate = |people: u64| {
            format!(
                r#"{{"action":{{"gate.approval":{{"from":{{"dba":{people}}},"timeout":"1m"}}}},"timeout":"1m","line":1}}"#
            )
        };
        let sealed = seal(plan()).unwrap();
        let text = String::from_utf8(sealed.bytes().to_vec()).unwrap();
        let open_with = |phases: String| {
            let text = text.replace(r#""phases":[]"#, &format!(r#""phases":{phases}"#));
            open(text.as_bytes()).map(|_| ())
        };
        open_with(phase(r#""controller""#, &gate(1))).unwrap();
        for (phases, words) in [
            (phase(r#"{"groups":["ghost"]}"#, &gate(1)), "`ghost`"),
            (phase(r#""controller""#, ""), "without a step"),
            (phase(r#""controller""#, &gate(4_000_000_000)), "approvals"),
            (
                phase(
                    r#""controller""#,
                    r#"{"action":{"check.disk":{"path":"/","free":"1B"}},"timeout":"1m","line":1}"#,
                ),
                "cannot run",
            ),
        ] {
            match open_with(phases) {
                Err(InvalidPlan::Incoherent(why)) => assert!(why.contains(words), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_plan_has_one_encoding() {
        let sealed = seal(plan()).unwrap();
        assert_eq!(open(sealed.bytes()).unwrap(), sealed);
        let text = String::from_utf8(sealed.bytes().to_vec()).unwrap();
        for other in [text.replace(':', ": "), text.replace("\"1m\"", "\"60s\"")] {
            assert!(
                matches!(open(other.as_bytes()), Err(InvalidPlan::NotCanonical)),
                "{other}"
            );
        }
        let unknown = text.replace("{\"format\"", "{\"x\":1,\"format\"");
        assert!(matches!(
            open(unknown.as_bytes()),
            Err(InvalidPlan::Unreadable(_))
        ));
    }

    /// Names that a plan's author chose are shown to those who sign. What was taken once stays.
    #[test]
    fn names_have_no_control_characters() {
        let sealed = seal(CompiledPlan {
            plan: "p\u{1b}[2J\ndigest    sha256:00".into(),
            ..plan()
        });
        let sealed = sealed.unwrap();
        match open(sealed.bytes()) {
            Err(InvalidPlan::Incoherent(why)) => assert!(why.contains("control"), "{why}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(
            open_expecting(sealed.bytes(), sealed.digest()).unwrap(),
            sealed
        );
    }

    #[test]
    fn a_changed_byte_is_another_plan() {
        let sealed = seal(plan()).unwrap();
        let mut bytes = sealed.bytes().to_vec();
        bytes[20] ^= 1;
        assert!(matches!(
            open_expecting(&bytes, sealed.digest()),
            Err(InvalidPlan::OtherDigest { .. })
        ));
    }
}
