//! The document `lockstep.rollout/1` as reports and screens read it: lenient, because a newer
//! controller may say more and an older one less, and clean, because hosts wrote parts of it.

use std::collections::BTreeMap;

use lockstep_proto::ids::RolloutId;
use lockstep_proto::order::Fact;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::clean;

/// The only format that is read.
pub(crate) const FORMAT: &str = "lockstep.rollout/1";

/// Why a document cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidDocument {
    /// Not JSON, or not of the shape.
    #[error("the controller's document cannot be read")]
    Unreadable(#[from] serde_json::Error),
    /// Another format.
    #[error("the controller's document has the format `{0}`, this command reads `{FORMAT}`")]
    Format(String),
    /// Of another rollout than the one that was asked for.
    #[error(
        "asked for {asked}, the controller answers with `{got}`: find out what is wrong with it"
    )]
    Other {
        /// What was asked for.
        asked: RolloutId,
        /// What came.
        got: String,
    },
}

/// A rollout. Times are milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Document {
    format: String,
    pub(crate) rollout: String,
    pub(crate) plan: String,
    pub(crate) digest: String,
    pub(crate) inputs: BTreeMap<String, String>,
    pub(crate) requester: String,
    pub(crate) dry_run: bool,
    pub(crate) state: String,
    pub(crate) reason: String,
    pub(crate) paused: Option<Paused>,
    /// Hosts that are waited for, and whose agents are not connected.
    pub(crate) absent: Vec<String>,
    /// What a rollout that has ended left on each host.
    pub(crate) left: Vec<Left>,
    pub(crate) submitted: u64,
    pub(crate) ended: Option<u64>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) phases: Vec<Phase>,
    pub(crate) rollback: Option<Rollback>,
    pub(crate) downtime: Option<Downtime>,
    pub(crate) slo: Slo,
    pub(crate) state_compared: Vec<Compared>,
    pub(crate) notices: Vec<Notice>,
    pub(crate) closed: Option<Closed>,
    pub(crate) signoff: Vec<Signoff>,
    pub(crate) break_glass: Vec<Glass>,
}

/// A person's word that a gate is to be met without what it waits for.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Glass {
    pub(crate) gate: String,
    pub(crate) operator: String,
    pub(crate) reason: String,
    pub(crate) at: u64,
    pub(crate) until: u64,
}

impl Glass {
    /// In one line.
    pub(crate) fn say(&self) -> String {
        let Self {
            gate,
            operator,
            reason,
            ..
        } = self;
        format!("gate {gate} by {operator}: {reason}")
    }
}

/// Since when it is paused, and by whom.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Paused {
    pub(crate) at: u64,
    pub(crate) message: String,
}

/// A host and its outcome over the whole rollout (INV-5).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "named as in the document")]
pub(crate) struct Host {
    pub(crate) host: String,
    pub(crate) state: String,
    pub(crate) quarantined: bool,
    pub(crate) why: String,
}

/// Whether something still runs on a host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Left {
    pub(crate) host: String,
    /// `stopped`, `running` or `unknown`.
    pub(crate) state: String,
    pub(crate) message: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) planned: Option<Planned>,
    pub(crate) opened: Option<u64>,
    pub(crate) closed: Option<u64>,
    pub(crate) steps: Vec<Step>,
}

/// A row of the runbook's timeline, in the plan's own words (`2m`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Planned {
    pub(crate) at: String,
    pub(crate) takes: String,
    pub(crate) owner: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Step {
    /// `<phase>.<step>`, from 0.
    pub(crate) at: String,
    pub(crate) name: Option<String>,
    pub(crate) action: String,
    pub(crate) args: Value,
    pub(crate) describe: String,
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) gate: Option<Gate>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_field_names, reason = "named as in the document")]
pub(crate) struct Attempt {
    pub(crate) host: String,
    pub(crate) direction: String,
    pub(crate) attempt: u32,
    pub(crate) ordered: Option<u64>,
    pub(crate) started: Option<u64>,
    pub(crate) finished: Option<u64>,
    pub(crate) took_ms: Option<u64>,
    /// `ok`, `failed`, `unknown`, `unreachable` or `running`.
    pub(crate) outcome: String,
    pub(crate) changed: bool,
    pub(crate) cause: String,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    pub(crate) last_lines: Vec<String>,
    /// A person has accepted what this undo would lose.
    pub(crate) accepted_loss: Option<AcceptedLoss>,
    /// The hosts were free since, and it was made again: what it has seen counts no more.
    pub(crate) stale: bool,
    facts: Vec<Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AcceptedLoss {
    pub(crate) loss: String,
    pub(crate) by: String,
    pub(crate) reason: String,
    pub(crate) at: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Gate {
    pub(crate) opened: u64,
    pub(crate) until: u64,
    pub(crate) closed: Option<u64>,
    pub(crate) met: Option<bool>,
    pub(crate) why: String,
    pub(crate) missing: String,
    pub(crate) evidence: String,
    pub(crate) from: BTreeMap<String, u32>,
    pub(crate) items: Vec<String>,
    pub(crate) decisions: Vec<Decision>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Decision {
    pub(crate) operator: String,
    pub(crate) groups: Vec<String>,
    pub(crate) approve: bool,
    /// From 0; empty means all.
    pub(crate) items: Vec<usize>,
    pub(crate) comment: String,
    pub(crate) at: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Rollback {
    pub(crate) started: u64,
    pub(crate) reason: String,
    pub(crate) operator: Option<String>,
    pub(crate) ended: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Downtime {
    pub(crate) from: u64,
    pub(crate) to: Option<u64>,
    pub(crate) ms: Option<u64>,
    pub(crate) address: String,
    pub(crate) url: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Slo {
    pub(crate) total: Option<String>,
    pub(crate) downtime: Option<String>,
    pub(crate) rollback: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Compared {
    pub(crate) host: String,
    pub(crate) name: String,
    pub(crate) before: String,
    pub(crate) after: Option<String>,
    pub(crate) equal: bool,
    pub(crate) before_text: String,
    pub(crate) after_text: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Notice {
    pub(crate) when: String,
    pub(crate) action: String,
    pub(crate) at: u64,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Closed {
    pub(crate) at: u64,
    pub(crate) operator: String,
    pub(crate) reason: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Signoff {
    pub(crate) role: String,
    pub(crate) operator: Option<String>,
    pub(crate) at: Option<u64>,
    pub(crate) comment: String,
}

impl Document {
    /// Reads a document's bytes, and cleans every text in it.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, InvalidDocument> {
        let value = clean::value(serde_json::from_slice(bytes)?);
        let document: Self = serde_json::from_value(value)?;
        if document.format == FORMAT {
            Ok(document)
        } else {
            Err(InvalidDocument::Format(document.format))
        }
    }

    /// The same, if it is this rollout's. What is shown, decided or signed by it is only then what
    /// somebody meant.
    pub(crate) fn read_of(bytes: &[u8], asked: &RolloutId) -> Result<Self, InvalidDocument> {
        let document = Self::read(bytes)?;
        if document.rollout == asked.as_str() {
            Ok(document)
        } else {
            Err(InvalidDocument::Other {
                asked: asked.clone(),
                got: clean::line(&document.rollout),
            })
        }
    }

    /// Every step, with its phase.
    pub(crate) fn steps(&self) -> impl Iterator<Item = (&Phase, &Step)> {
        self.phases
            .iter()
            .flat_map(|phase| phase.steps.iter().map(move |step| (phase, step)))
    }

    /// Gates that wait for people now, with their steps.
    pub(crate) fn open_gates(&self) -> impl Iterator<Item = (&Step, &Gate)> {
        self.steps().filter_map(|(_, step)| {
            let gate = step.gate.as_ref()?;
            (gate.closed.is_none() && step.waits_for_people()).then_some((step, gate))
        })
    }

    /// Gates of any kind that wait.
    pub(crate) fn waiting_gates(&self) -> impl Iterator<Item = (&Step, &Gate)> {
        self.steps().filter_map(|(_, step)| {
            let gate = step.gate.as_ref()?;
            gate.closed.is_none().then_some((step, gate))
        })
    }

    /// Whether something went wrong on a host, as far as is known.
    pub(crate) fn has_failures(&self) -> bool {
        let bad = ["failed", "unreachable", "unknown"];
        let mut hosts = self.hosts.iter();
        hosts.any(|host| host.quarantined || bad.contains(&host.state.as_str()))
    }

    /// How long it ran; none while it does.
    pub(crate) fn total_ms(&self) -> Option<u64> {
        self.ended.map(|ended| ended.saturating_sub(self.submitted))
    }
}

impl Gate {
    /// The decision that confirmed an item of a checklist first.
    pub(crate) fn confirmed(&self, item: usize) -> Option<&Decision> {
        self.decisions.iter().find(|decision| {
            decision.approve && (decision.items.is_empty() || decision.items.contains(&item))
        })
    }
}

impl Step {
    /// Whether people decide here.
    pub(crate) fn waits_for_people(&self) -> bool {
        matches!(self.action.as_str(), "gate.approval" | "gate.checklist")
    }

    /// What the step is called on screens.
    pub(crate) fn title(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.action)
    }

    /// What it does, in one line.
    pub(crate) fn describe(&self) -> String {
        if !self.describe.is_empty() {
            return clean::line(&self.describe);
        }
        let Value::Object(args) = &self.args else {
            return String::new();
        };
        let one = |(name, value): (&String, &Value)| match value {
            Value::String(text) => format!("{name}={}", clean::line(text)),
            other => format!("{name}={other}"),
        };
        args.iter().map(one).collect::<Vec<_>>().join(" ")
    }
}

impl Attempt {
    /// What it proved, as far as this version knows the kinds.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        self.facts.iter().filter_map(read_fact).collect()
    }

    /// Everything that it reported, by kind; for those that this version does not know.
    pub(crate) fn unknown_facts(&self) -> impl Iterator<Item = &Value> {
        self.facts
            .iter()
            .filter(|fact| read_fact::<Fact>(fact).is_none())
    }

    /// `app-1 (undo, attempt 2)`.
    pub(crate) fn place(&self) -> String {
        let direction = match self.direction.as_str() {
            "do" | "" => None,
            other => Some(other.to_owned()),
        };
        let attempt = (self.attempt > 1).then(|| format!("attempt {}", self.attempt));
        let marks: Vec<String> = direction.into_iter().chain(attempt).collect();
        if marks.is_empty() {
            self.host.clone()
        } else {
            format!("{} ({})", self.host, marks.join(", "))
        }
    }
}

fn read_fact<T: DeserializeOwned>(fact: &Value) -> Option<T> {
    T::deserialize(fact).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_clean_and_says_its_format() {
        let text = r#"{"format":"lockstep.rollout/1","rollout":"ro_1","new":true,
            "phases":[{"name":"p","steps":[{"at":"0.0","attempts":[{"host":"a",
            "message":"x\u001b[2J",            "facts":[
            {"kind":"note","name":"n","value":"v"},{"kind":"later","x":1}]}]}]}]}"#;
        let document = Document::read(text.as_bytes()).unwrap();
        let attempt = &document.phases[0].steps[0].attempts[0];
        assert_eq!(attempt.message, "x\u{fffd}[2J");
        assert_eq!(
            (attempt.facts().len(), attempt.unknown_facts().count()),
            (1, 1)
        );
        assert!(matches!(
            Document::read(br#"{"format":"lockstep.rollout/2"}"#),
            Err(InvalidDocument::Format(_))
        ));
    }

    #[test]
    fn another_rollouts_document_is_no_answer() {
        let text = br#"{"format":"lockstep.rollout/1","rollout":"ro_0123456789ab"}"#;
        let read = |asked: &str| Document::read_of(text, &asked.parse().unwrap());
        assert!(read("ro_0123456789ab").is_ok());
        assert!(matches!(
            read("ro_0123456789ac"),
            Err(InvalidDocument::Other { .. })
        ));
    }
}
