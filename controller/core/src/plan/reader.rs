//! [`Reader`]: reads values of one tree, and keeps what is wrong with it.
//!
//! serde stops at its first error. So [`Reader::read`] notes the error at the node it belongs to,
//! takes that node out, and reads again, until it gets a value or the node that was asked for is
//! itself out. What only follows from a node that is out (a key that is now missing) is not
//! reported. Unknown keys never get as far as serde: a struct names its keys before it reads.

use std::cell::RefCell;
use std::collections::HashSet;

use serde::de;

use super::Severity;
use super::de::{De, Fault, FaultKind};
use super::finding::{Code, Finding, MOST, Source, did_you_mean, list, nearest};
use super::node::{Kind, NodeId, Step, Tree};
use super::words;
use crate::schema;

/// So many readings of one value: more mistakes than anybody reads, and reading is not free.
const MAX_ROUNDS: usize = 200;

/// Reads values of one tree.
pub(crate) struct Reader<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) source: &'a Source,
    findings: RefCell<Vec<Finding>>,
    /// Nodes that cannot be read, and are no longer looked at.
    out: RefCell<HashSet<NodeId>>,
    /// Keys that were reported, because a value is read more than once.
    reported: RefCell<HashSet<NodeId>>,
    /// Mappings with keys that unknown ones were probably meant to be: not missing, too.
    meant: RefCell<HashSet<(NodeId, String)>>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tree: &'a Tree, source: &'a Source) -> Self {
        Self {
            tree,
            source,
            findings: RefCell::default(),
            out: RefCell::default(),
            reported: RefCell::default(),
            meant: RefCell::default(),
        }
    }

    pub(crate) fn into_findings(self) -> Vec<Finding> {
        self.findings.into_inner()
    }

    /// Adds a finding at a node.
    pub(crate) fn report(
        &self,
        code: Code,
        at: NodeId,
        message: impl Into<String>,
        hint: Option<String>,
    ) {
        if self.findings.borrow().len() >= MOST {
            return;
        }
        let finding = self.source.finding(code, self.tree.span(at), message, hint);
        self.findings.borrow_mut().push(finding);
    }

    /// Adds a finding that does not keep the plan from running.
    pub(crate) fn warn(&self, code: Code, at: NodeId, message: impl Into<String>, hint: &str) {
        if self.findings.borrow().len() >= MOST {
            return;
        }
        let mut finding =
            self.source
                .finding(code, self.tree.span(at), message, Some(hint.to_owned()));
        finding.severity = Severity::Warning;
        self.findings.borrow_mut().push(finding);
    }

    /// Whether something was found that keeps the plan from running.
    pub(crate) fn has_errors(&self) -> bool {
        let findings = self.findings.borrow();
        findings
            .iter()
            .any(|found| found.severity == Severity::Error)
    }

    /// Reads the value at a node; `None` if it cannot be, which then is reported.
    pub(crate) fn read<T: de::DeserializeOwned>(&self, node: NodeId) -> Option<T> {
        self.read_with(node, |de| T::deserialize(de))
    }

    /// Like [`Self::read`], for what is not simply `Deserialize`.
    pub(crate) fn read_with<T>(
        &self,
        node: NodeId,
        mut read: impl FnMut(De<'_>) -> Result<T, Fault>,
    ) -> Option<T> {
        for _ in 0..MAX_ROUNDS {
            let fault = match read(De::new(self, node)) {
                Ok(value) => return Some(value),
                Err(fault) => fault,
            };
            let at = fault.node.unwrap_or(node);
            self.report_fault(&fault, at);
            let is_new = self.out.borrow_mut().insert(at);
            if at == node || !is_new {
                return None;
            }
        }
        None
    }

    /// Whether a mapping has no such key, and no other that was meant to be it.
    pub(crate) fn lacks(&self, mapping: NodeId, key: &str) -> bool {
        let is_meant = || self.meant.borrow().contains(&(mapping, key.to_owned()));
        self.tree.get(mapping, key).is_none() && !is_meant()
    }

    /// Follows keys and list positions down from `id`, as far as there is something. Positions
    /// count what could be read, like those of the typed value.
    pub(crate) fn at(&self, id: NodeId, path: &[Step<'_>]) -> NodeId {
        let mut here = id;
        for step in path {
            let next = match step {
                Step::Key(key) => self.tree.get(here, key),
                Step::Item(index) => {
                    let items = self.tree.items(here).iter();
                    items
                        .filter(|item| !self.is_out(**item))
                        .nth(*index)
                        .copied()
                }
            };
            match next {
                Some(next) => here = next,
                None => break,
            }
        }
        here
    }

    pub(super) fn is_out(&self, node: NodeId) -> bool {
        self.out.borrow().contains(&node)
    }

    /// Whether a value is read from an entry of this mapping that is out.
    fn lost_a_child(&self, node: NodeId) -> bool {
        let out = self.out.borrow();
        let mut values = self.tree.entries(node).iter().map(|(_, value)| value);
        values.any(|value| out.contains(value))
            || self.tree.items(node).iter().any(|item| out.contains(item))
    }

    fn report_fault(&self, fault: &Fault, at: NodeId) {
        let open = self.tree.scalar(at).is_some_and(|scalar| scalar.open);
        let broken = matches!(self.tree.node(at).kind, Kind::Broken);
        if open || broken {
            return;
        }
        let label = |message: &str| match self.tree.key_of(at) {
            Some(key) => format!("`{key}`: {message}"),
            None => message.to_owned(),
        };
        match &fault.kind {
            FaultKind::Missing(field) => self.report_missing(at, field, fault.fields),
            _ if self.lost_a_child(at) => {}
            FaultKind::Type { expected, found } => {
                let message = label(&format!("expected {expected}, found {found}"));
                self.report(Code::WrongValue, at, message, None);
            }
            FaultKind::Variant { given, known, of } => {
                if words::is_for_later(of, given) {
                    let message = label(&format!("`{given}` is not in this version"));
                    let hint = format!("this version has {}", list(known, "and"));
                    self.report(Code::NotInThisVersion, at, message, Some(hint));
                } else {
                    let message = label(&format!("there is no `{given}` here"));
                    self.report(Code::WrongValue, at, message, did_you_mean(given, known));
                }
            }
            FaultKind::Custom(message) => {
                self.report(Code::WrongValue, at, label(message), None);
            }
        }
    }

    /// Reports the keys that a mapping lacks: serde names the first only, the schema all.
    fn report_missing(&self, at: NodeId, field: &str, fields: &'static [&'static str]) {
        let required = schema::required(fields);
        let mut missing: Vec<&str> = required.iter().map(String::as_str).collect();
        if !missing.contains(&field) {
            missing.push(field);
        }
        missing.retain(|name| self.lacks(at, name));
        if missing.is_empty() {
            return;
        }
        let holder = self
            .tree
            .key_of(at)
            .map_or_else(|| "this mapping".to_owned(), |key| format!("`{key}`"));
        let message = format!("{holder} lacks {}", list(&missing, "and"));
        self.report(Code::MissingKey, at, message, None);
    }

    /// Somebody else reads the value under this key: it is not unknown.
    pub(crate) fn set_aside(&self, mapping: NodeId, key: &str) {
        let mut entries = self.tree.entries(mapping).iter();
        if let Some((key, _)) = entries.find(|(name, _)| self.tree.text(*name) == key) {
            self.reported.borrow_mut().insert(*key);
        }
    }

    /// Reports a key that a mapping of the language does not have, once.
    pub(crate) fn report_unknown_key(&self, key: NodeId, known: &[&str]) {
        if !self.reported.borrow_mut().insert(key) {
            return;
        }
        let name = self.tree.text(key);
        if words::KEYS_FOR_LATER.contains(&name) {
            let message = format!("`{name}` is not in this version");
            let hint = "take it out of the plan, or put `x-` before it to keep it as a note";
            self.report(Code::NotInThisVersion, key, message, Some(hint.to_owned()));
        } else {
            let near = nearest(name, known.iter().copied());
            if let (Some(near), Some(holder)) = (near, self.tree.holder(key)) {
                self.meant.borrow_mut().insert((holder, near.to_owned()));
            }
            let message = format!("unknown key `{name}`");
            self.report(Code::UnknownKey, key, message, did_you_mean(name, known));
        }
    }
}
