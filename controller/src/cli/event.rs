//! A rollout's event as the command line shows it: from the wire, cleaned.

use lockstep_proto::wire::control_v1 as wire;
pub(crate) use lockstep_proto::wire::control_v1::EventKind;
use serde_json::{Value, json};

use super::clean;

/// Something that happened in a rollout. All texts are clean; which fields are set depends on
/// `kind`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Event {
    /// Grows from event to event; 0 for those that are not kept.
    pub(crate) number: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z on the controller's clock; 0 if not said.
    pub(crate) at_ms: u64,
    pub(crate) kind: EventKind,
    /// The rollout's state afterwards.
    pub(crate) state: String,
    pub(crate) phase: String,
    /// `<phase>.<step>`, from 0.
    pub(crate) step: String,
    pub(crate) action: String,
    pub(crate) host: String,
    /// `do`, `undo` or `probe`.
    pub(crate) direction: String,
    pub(crate) attempt: u32,
    pub(crate) message: String,
    pub(crate) detail: Vec<String>,
    pub(crate) took_ms: u64,
    /// From 0 to 1000.
    pub(crate) progress: Option<u32>,
}

impl From<wire::RolloutEvent> for Event {
    fn from(event: wire::RolloutEvent) -> Self {
        let kind = event.kind();
        let wire::RolloutEvent {
            number,
            at_ms,
            kind: _,
            state,
            phase,
            step,
            action,
            host,
            direction,
            attempt,
            message,
            detail,
            took_ms,
            progress_permille,
        } = event;
        Self {
            number,
            at_ms,
            kind,
            state: clean::line(&state),
            phase: clean::line(&phase),
            step: clean::line(&step),
            action: clean::line(&action),
            host: clean::line(&host),
            direction: clean::line(&direction),
            attempt,
            message: clean::line(&message),
            detail: detail.iter().map(|text| clean::line(text)).collect(),
            took_ms,
            progress: progress_permille.map(|permille| permille.min(1000)),
        }
    }
}

impl Event {
    /// For programs: `lockstep.event/1`. Fields that say nothing are left out.
    pub(crate) fn to_json(&self, rollout: &str) -> Value {
        let mut value = json!({
            "format": "lockstep.event/1",
            "rollout": rollout,
            "number": self.number,
            "at_ms": self.at_ms,
            "kind": kind_word(self.kind),
            "state": self.state,
            "message": self.message,
        });
        let texts = [
            ("phase", &self.phase),
            ("step", &self.step),
            ("action", &self.action),
            ("host", &self.host),
            ("direction", &self.direction),
        ];
        for (name, text) in texts {
            if !text.is_empty() {
                value[name] = json!(text);
            }
        }
        if self.attempt > 0 {
            value["attempt"] = json!(self.attempt);
        }
        if self.took_ms > 0 {
            value["took_ms"] = json!(self.took_ms);
        }
        if !self.detail.is_empty() {
            value["detail"] = json!(self.detail);
        }
        if let Some(progress) = self.progress {
            value["progress_permille"] = json!(progress);
        }
        value
    }
}

/// `step_ok` for `EVENT_KIND_STEP_OK`.
fn kind_word(kind: EventKind) -> String {
    let name = kind.as_str_name();
    name.strip_prefix("EVENT_KIND_")
        .unwrap_or(name)
        .to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hosts_wrote_is_cleaned_on_the_way_in() {
        let event = Event::from(wire::RolloutEvent {
            number: 7,
            kind: EventKind::StepFailed.into(),
            message: "gone\u{1b}[1A".into(),
            detail: vec!["\u{1b}]0;title\u{7}".into()],
            progress_permille: Some(4000),
            ..wire::RolloutEvent::default()
        });
        assert_eq!(event.message, "gone\u{fffd}[1A");
        assert_eq!(event.detail, ["\u{fffd}]0;title\u{fffd}"]);
        assert_eq!(event.progress, Some(1000));
        assert_eq!(event.to_json("ro_1")["kind"], "step_failed");
    }
}
