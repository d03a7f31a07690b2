//! Conversions of `lockstep.control.v1`.

use super::control_v1 as wire;
use crate::ids::StepRef;

impl wire::DecideRequest {
    /// The gate's place; `None` if the request names none, an error if it names none rightly.
    pub fn place(&self) -> Result<Option<StepRef>, super::InvalidMessage> {
        if self.gate.is_empty() {
            return Ok(None);
        }
        let invalid = || super::InvalidMessage::Field("gate");
        let (phase, step) = self.gate.split_once('.').ok_or_else(invalid)?;
        let number = |text: &str| text.parse().map_err(|_| invalid());
        Ok(Some(StepRef {
            phase: number(phase)?,
            step: number(step)?,
        }))
    }
}
