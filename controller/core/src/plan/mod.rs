//! The plan language: from a file to a [`Plan`], or to everything that is wrong with the file.
//!
//! ```text
//! text --yaml--> Tree --inputs--> Tree --de, draft--> Draft --check, args--> Findings
//!                                                       `--- crate::compile --> SealedPlan
//! ```
//!
//! Reading happens twice with the same code: [`Plan::parse`] puts stand-ins in for inputs and
//! leaves out what depends on values that nobody knows yet; [`crate::compile::compile`] puts in
//! the values that were given, and then everything is checked.

mod args;
mod backup;
pub(crate) mod check;
mod command;
mod database;
mod de;
pub(crate) mod draft;
mod finding;
mod http;
mod inputs;
mod locks;
mod node;
pub(crate) mod raw;
mod reader;
mod words;
mod yaml;

use std::collections::BTreeMap;

use draft::Draft;
use finding::Source;
use node::Tree;
use reader::Reader;

pub use finding::{Code, Finding, Findings, Severity};
pub use inputs::Input;
pub(crate) use node::{NodeId, Span};

/// A plan file without a mistake, as far as one can tell without the values of its inputs.
#[derive(Debug, Clone)]
pub struct Plan {
    source: Source,
    tree: Tree,
    inputs: Vec<Input>,
    name: String,
    warnings: Findings,
}

impl Plan {
    /// Reads a plan file. `file_name` is only for the findings, which are all of the file, in one
    /// pass.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, Findings> {
        let source = Source::new(file_name, text);
        let mut findings = Vec::new();
        let Some(tree) = yaml::read(&source, &mut findings) else {
            return Err(Findings::sorted(findings));
        };
        let reader = Reader::new(&tree, &source);
        let inputs = inputs::declared(&reader);
        let with_stand_ins = inputs::put_in(&reader, &inputs, &inputs::stand_ins(&inputs));
        findings.extend(reader.into_findings());
        let (draft, more) = examine(&source, &with_stand_ins);
        findings.extend(more);
        let findings = Findings::sorted(findings);
        match draft.and_then(|draft| draft.raw.plan) {
            Some(name) if !findings.has_errors() => Ok(Self {
                name: name.value,
                source,
                tree,
                inputs,
                warnings: findings,
            }),
            _ => Err(findings),
        }
    }

    /// The plan's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The inputs that it declares, in the order of the file.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// What does not keep it from running.
    pub fn warnings(&self) -> &Findings {
        &self.warnings
    }

    /// Puts the given values in and examines the whole plan again.
    pub(crate) fn with_inputs(&self, given: &BTreeMap<String, String>) -> Result<Filled, Findings> {
        let reader = Reader::new(&self.tree, &self.source);
        let values = inputs::complete(&reader, &self.inputs, given);
        let tree = inputs::put_in(&reader, &self.inputs, &values);
        let mut findings = reader.into_findings();
        let (draft, more) = examine(&self.source, &tree);
        findings.extend(more);
        let findings = Findings::sorted(findings);
        if findings.has_errors() {
            return Err(findings);
        }
        let known = values
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        Ok(Filled {
            draft: draft.expect("a tree without errors is a plan"),
            inputs: known.collect(),
            tree,
        })
    }

    /// A finding about the plan as a whole.
    pub(crate) fn finding(&self, code: Code, message: String, hint: Option<String>) -> Findings {
        Findings::sorted(vec![self.source.finding(code, Span::START, message, hint)])
    }
}

/// A plan with the values of its inputs, free of errors.
pub(crate) struct Filled {
    pub(crate) draft: Draft,
    pub(crate) inputs: BTreeMap<String, String>,
    tree: Tree,
}

impl Filled {
    /// The line of a node.
    pub(crate) fn line(&self, node: NodeId) -> u32 {
        u32::try_from(self.tree.span(node).line).expect("a plan file has fewer than 2^32 lines")
    }
}

/// Types a tree and checks it.
fn examine(source: &Source, tree: &Tree) -> (Option<Draft>, Vec<Finding>) {
    let reader = Reader::new(tree, source);
    let draft = draft::read(&reader);
    if let Some(draft) = &draft {
        check::check(&reader, draft);
        args::check(&reader, draft);
        database::check(&reader, draft);
    }
    (draft, reader.into_findings())
}
