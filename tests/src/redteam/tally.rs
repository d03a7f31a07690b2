//! What was played, and what came of it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// Everything that a thief of the controller has tried, and what the agent answered.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// The hostile orders and offers, by name.
    orders: BTreeSet<String>,
    /// How many of each kind.
    kinds: BTreeMap<String, u64>,
    /// Those that were refused, and the numbers of the reports that say so.
    pub(super) refused: BTreeMap<String, u64>,
    /// Those that ended the session, and what has to stand in the records.
    pub(super) ended: BTreeMap<String, String>,
    /// Those that were answered, without a refusal and without an effect.
    answered: BTreeSet<String>,
    /// What changed on the host that nobody had licensed.
    pub(super) effects: Vec<String>,
    /// What the agent took that it should not have taken, and answers that say something else.
    pub(super) wrong: Vec<String>,
    /// Orders that were licensed, each with its effect once.
    pub(super) licensed: u64,
    /// Lines about refused orders in the agent's own records.
    pub(super) audit_lines: u64,
}

impl Tally {
    /// Notes a hostile order before it is played.
    pub(super) fn play(&mut self, kind: &str, name: &str) {
        let new = self.orders.insert(format!("{kind}: {name}"));
        assert!(new, "{kind}: {name} is played twice");
        *self.kinds.entry(kind.to_owned()).or_default() += 1;
    }

    pub(super) fn answered(&mut self, kind: &str, name: &str) {
        self.answered.insert(format!("{kind}: {name}"));
    }

    /// The figures.
    pub(super) fn report(&self) -> Value {
        json!({
            "orders": self.orders.len(),
            "kinds": self.kinds,
            "effects": self.effects.len(),
            "refused": self.refused.len() + self.ended.len(),
            "answered_without_effect": self.answered.len(),
            "licensed": self.licensed,
            "audit_lines": self.audit_lines,
            "what_happened": self.effects,
            "wrong": self.wrong,
        })
    }

    /// Whether nothing happened that nobody licensed, and every refusal is on record.
    pub(super) fn judge(&self) -> Result<()> {
        ensure!(self.effects.is_empty(), "effects: {:#?}", self.effects);
        ensure!(self.wrong.is_empty(), "wrong: {:#?}", self.wrong);
        let (orders, refused) = (self.orders.len(), self.refused.len() + self.ended.len());
        ensure!(
            orders == refused + self.answered.len(),
            "{orders} orders, and {refused} refused, {} answered otherwise",
            self.answered.len()
        );
        ensure!(orders >= 200, "only {orders} orders were played");
        ensure!(self.licensed >= 10, "only {} were licensed", self.licensed);
        let lines = self.audit_lines;
        ensure!(
            lines >= refused as u64,
            "{refused} were refused, and {lines} are on record"
        );
        Ok(())
    }
}
