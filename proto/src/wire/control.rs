//! Conversions of `lockstep.control.v1`.

use super::control_v1 as wire;
use crate::ids::StepRef;

impl wire::DecideRequest {
    /// The gate's place; `None` if the request names none, an error if it names none rightly.
    pub fn place(&self) -> Result<Option<StepRef>, super::InvalidMessage> {
        if self.gate.is_empty() {
            return Ok(None);
        }
        place(&self.gate, "gate").map(Some)
    }
}

impl wire::BreakGlassRequest {
    /// The gate's place; `None` if the request names none, an error if it names none rightly.
    pub fn place(&self) -> Result<Option<StepRef>, super::InvalidMessage> {
        if self.gate.is_empty() {
            return Ok(None);
        }
        place(&self.gate, "gate").map(Some)
    }
}

impl wire::ResolveRequest {
    /// The step's place.
    pub fn place(&self) -> Result<StepRef, super::InvalidMessage> {
        place(&self.step, "step")
    }
}

impl wire::AcceptLossRequest {
    /// The step's place.
    pub fn place(&self) -> Result<StepRef, super::InvalidMessage> {
        place(&self.step, "step")
    }
}

fn place(text: &str, field: &'static str) -> Result<StepRef, super::InvalidMessage> {
    let invalid = || super::InvalidMessage::Field(field);
    let (phase, step) = text.split_once('.').ok_or_else(invalid)?;
    let number = |text: &str| text.parse().map_err(|_| invalid());
    let place = StepRef {
        phase: number(phase)?,
        step: number(step)?,
    };
    // As it is shown, and no other way.
    if place.to_string() != text {
        return Err(invalid());
    }
    Ok(place)
}
