//! From text to [`Tree`]: strict YAML 1.2, with everything refused that lets a plan say one thing
//! and show another (aliases, tags, duplicate keys), and a bound on each dimension.

use std::collections::HashMap;

use granit_parser::{Event, Marker, Parser, ScalarStyle};

use super::finding::{Code, Finding, MOST, Source};
use super::node::{Kind, Node, NodeId, Scalar, Span, Tree};

/// The largest plan file, in bytes: the compiled plan has the same bound.
const MAX_BYTES: usize = 1 << 20;

/// The deepest nesting. Plans need about ten; reading is recursive, so the stack needs a bound.
const MAX_DEPTH: usize = 64;

/// The largest number of values in a file. The largest plan of 1 MiB has fewer than half of it.
const MAX_NODES: usize = 250_000;

/// Reads a file, adding what is wrong with it to `findings`; `None` if that leaves nothing.
pub(crate) fn read(source: &Source, findings: &mut Vec<Finding>) -> Option<Tree> {
    if source.text.len() > MAX_BYTES {
        let size = source.text.len();
        let message = format!("a plan file has at most {MAX_BYTES} bytes, this one has {size}");
        findings.push(source.finding(Code::Syntax, Span::START, message, None));
        return None;
    }
    let options = granit_parser::options! {
        strict_indentation: true,
        disallow_directives: true,
        emit_unresolved_aliases: true,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    let mut builder = Builder {
        source,
        findings,
        nodes: Vec::new(),
        open: Vec::new(),
        root: None,
        documents: 0,
    };
    for event in Parser::new_from_str_with_options(&source.text, options) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(error) => {
                let place = place(error.marker(), error.marker());
                builder.report_syntax(place, &error.info());
                return None;
            }
        };
        if !builder.take(event, place(&span.start, &span.end)) {
            return None;
        }
    }
    builder.finish()
}

fn place(start: &Marker, end: &Marker) -> Span {
    Span {
        line: start.line().max(1),
        column: start.col() + 1,
        end_line: end.line().max(1),
        end_column: end.col() + 1,
    }
}

struct Builder<'a> {
    source: &'a Source,
    findings: &'a mut Vec<Finding>,
    nodes: Vec<Node>,
    /// Collections that have begun and not ended, with the key that waits for its value.
    open: Vec<(NodeId, Option<NodeId>)>,
    root: Option<NodeId>,
    documents: usize,
}

impl Builder<'_> {
    /// Takes one event; false if there is no point in going on.
    fn take(&mut self, event: Event<'_>, span: Span) -> bool {
        if self.findings.len() >= MOST {
            return false;
        }
        if self.nodes.len() >= MAX_NODES || self.open.len() > MAX_DEPTH {
            self.report_syntax(span, "more values, or deeper nesting, than any plan needs");
            return false;
        }
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    let message = "a plan file is one document, and here begins another";
                    let hint = "put the other plan into a file of its own";
                    self.report(Code::NotPlain, span, message, hint);
                    return false;
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), span);
                let scalar = Scalar {
                    text: text.into_owned(),
                    plain: style == ScalarStyle::Plain,
                    ..Scalar::default()
                };
                self.add(Kind::Scalar(scalar), span);
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), span);
                let id = self.add(Kind::Sequence(Vec::new()), span);
                self.open.push((id, None));
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), span);
                let id = self.add(Kind::Mapping(Vec::new()), span);
                self.open.push((id, None));
            }
            Event::SequenceEnd => {
                self.open.pop();
            }
            Event::MappingEnd => {
                if let Some((id, _)) = self.open.pop() {
                    self.check_keys(id);
                }
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                let message = "aliases have no place in a plan";
                self.report(Code::NotPlain, span, message, "write the value again here");
                self.add(Kind::Broken, span);
            }
            _ => {}
        }
        true
    }

    fn refuse_properties(&mut self, anchor: usize, tagged: bool, span: Span) {
        if anchor != 0 {
            let message = "anchors have no place in a plan";
            self.report(Code::NotPlain, span, message, "leave the `&name` out");
        }
        if tagged {
            let message = "tags have no place in a plan";
            self.report(Code::NotPlain, span, message, "leave the `!tag` out");
        }
    }

    /// Adds a node where the file has it.
    fn add(&mut self, kind: Kind, span: Span) -> NodeId {
        let id = NodeId(u32::try_from(self.nodes.len()).expect("fewer nodes than MAX_NODES"));
        self.nodes.push(Node {
            span,
            kind,
            parent: None,
        });
        let Some((holder, key)) = self.open.last_mut() else {
            self.root.get_or_insert(id);
            return id;
        };
        match &mut self.nodes[holder.0 as usize].kind {
            Kind::Sequence(items) => items.push(id),
            Kind::Mapping(entries) => match key.take() {
                Some(key) => entries.push((key, id)),
                None => *key = Some(id),
            },
            Kind::Scalar(_) | Kind::Broken => unreachable!("only collections are open"),
        }
        id
    }

    /// Keeps of a mapping that has ended the entries whose keys are texts, each once.
    fn check_keys(&mut self, id: NodeId) {
        let Kind::Mapping(entries) = &mut self.nodes[id.0 as usize].kind else {
            unreachable!("a mapping has ended")
        };
        let entries = std::mem::take(entries);
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut kept = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let Node { span, kind, .. } = &self.nodes[key.0 as usize];
            let span = *span;
            match kind {
                Kind::Scalar(Scalar { text, .. }) => match seen.get(text) {
                    None => {
                        seen.insert(text.clone(), span.line);
                        kept.push((key, value));
                    }
                    Some(line) => {
                        let message = format!("`{text}` stands here twice");
                        let hint = format!("it stands first on line {line}; keep one of them");
                        self.report(Code::DuplicateKey, span, message, hint);
                    }
                },
                Kind::Broken => {}
                Kind::Sequence(_) | Kind::Mapping(_) => {
                    let message = "a key is a text, not a list or mapping";
                    let hint = "quote the key, or a value that begins with `[` or `{`";
                    self.report(Code::NotPlain, span, message, hint);
                }
            }
        }
        self.nodes[id.0 as usize].kind = Kind::Mapping(kept);
    }

    fn report(
        &mut self,
        code: Code,
        at: Span,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        // The keys of one mapping are looked at together.
        if self.findings.len() < MOST {
            let finding = self.source.finding(code, at, message, Some(hint.into()));
            self.findings.push(finding);
        }
    }

    fn report_syntax(&mut self, at: Span, cause: &str) {
        let message = format!("this is not YAML: {cause}");
        let line = self.source.line(at.line);
        let hint = if line.contains('\t') {
            Some("indent with spaces, not tabs".to_owned())
        } else if line.trim_start().starts_with('%') {
            Some("leave the directive out".to_owned())
        } else {
            None
        };
        self.findings
            .push(self.source.finding(Code::Syntax, at, message, hint));
    }

    fn finish(self) -> Option<Tree> {
        let Some(root) = self.root else {
            let hint = Some("a plan begins with `version: 1`".to_owned());
            let finding =
                (self.source).finding(Code::Syntax, Span::START, "the file is empty", hint);
            self.findings.push(finding);
            return None;
        };
        let mut tree = Tree {
            nodes: self.nodes,
            root,
        };
        tree.link();
        Some(tree)
    }
}
