//! Breaking the glass: two people let a gate be met without what it waits for. Neither may be who
//! submitted the rollout; each word holds for an hour at most; and everybody reads of it.

use lockstep_proto::ids::{OperatorName, StepRef};
use lockstep_proto::values::Timestamp;
use serde_json::{Value, json};

use super::notices::Clean;
use super::state::Glass;
use super::{Gate, Rollout};

/// How what is said of it begins, wherever people read.
pub const LOUD: &str = "BREAK-GLASS";

impl Gate {
    /// The two words that hold now, of two people; none if there are fewer.
    pub(crate) fn broken(&self, now: Timestamp) -> Option<[&Glass; 2]> {
        let mut holding = self.holding(now);
        let first = holding.next()?;
        let second = holding.find(|word| word.operator != first.operator)?;
        Some([first, second])
    }

    /// The words that hold now.
    pub(crate) fn holding(&self, now: Timestamp) -> impl Iterator<Item = &Glass> {
        self.glass.iter().filter(move |word| now < word.until)
    }

    /// When the next word ends that holds now.
    pub(super) fn glass_ends(&self, now: Timestamp) -> Option<Timestamp> {
        self.holding(now).map(|word| word.until).min()
    }
}

/// Why a gate is met by two words.
pub(super) fn say([one, other]: [&Glass; 2], missing: &str) -> String {
    let missing = if missing.is_empty() {
        String::new()
    } else {
        format!(", without {missing}")
    };
    format!(
        "{LOUD} by {} and {}{missing}: {}; {}",
        one.operator, other.operator, one.reason, other.reason
    )
}

impl Rollout {
    /// What is said of a word that was just given.
    pub(super) fn say_glass(
        &self,
        at: StepRef,
        operator: &OperatorName,
        group: &str,
        reason: &str,
    ) -> String {
        let words = self.gates.get(&at).map_or(&[][..], |gate| &gate.glass);
        // Another's word that has ended meanwhile stands for nothing.
        let now = words.last().map_or(self.submitted, |given| given.at);
        let holds = |word: &Glass| word.operator != *operator && now < word.until;
        let next = if words.iter().any(holds) {
            String::new()
        } else {
            format!("; a second person of {group} has to say so too")
        };
        format!("{LOUD} at gate {at} by {operator}: {reason}{next}")
    }

    /// Every word, for reports.
    pub(super) fn glass_documents(&self) -> Vec<Value> {
        let words = self.gates.iter().flat_map(|(at, gate)| {
            gate.glass.iter().map(move |word| {
                json!({
                    "gate": at.to_string(),
                    "operator": word.operator,
                    "reason": word.reason,
                    "at": word.at,
                    "until": word.until,
                })
            })
        });
        words.collect()
    }

    /// What messages to people end with; empty if no glass was broken.
    pub(super) fn glass_in_notices(&self, clean: Clean) -> String {
        let words = self.gates.iter().flat_map(|(at, gate)| {
            let word = move |it: &Glass| {
                let said = format!("{LOUD} at gate {at} by {}: {}", it.operator, it.reason);
                format!("\n{}", clean(&said))
            };
            gate.glass.iter().map(word)
        });
        words.collect()
    }
}
