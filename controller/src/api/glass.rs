//! What is asked for when somebody breaks the glass of a gate.

use lockstep_core::Call;
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::control_v1 as wire;
use tonic::Status;

use super::{convert, rollout_id, text};

/// Reads the request. A word without a reason is none.
pub(super) fn call(request: wire::BreakGlassRequest) -> Result<Call, Status> {
    let invalid = |why: String| Status::invalid_argument(why);
    let gate = request.place();
    let gate = gate.map_err(|error| invalid(error.to_string()))?;
    let wire::BreakGlassRequest {
        rollout,
        gate: _,
        evidence,
        reason,
        holds_ms,
        signature,
        expires_ms,
    } = request;
    let reason = text("reason", reason)?;
    if reason.trim().is_empty() {
        return Err(invalid("`reason` says why that has to be".to_owned()));
    }
    let evidence = evidence.parse();
    let signature = convert::one_signature(signature)?;
    Ok(Call::BreakGlass {
        rollout: rollout_id(&rollout)?,
        gate,
        evidence: evidence.map_err(|error| invalid(format!("evidence: {error}")))?,
        reason,
        life: Period(holds_ms),
        signature: signature.map(|signature| (Timestamp(expires_ms), signature)),
    })
}
