//! Inputs: what a plan declares, the values that are given, and how they are put in.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use super::finding::{Code, did_you_mean, list, nearest};
use super::node::{Kind, NodeId, Tree};
use super::raw::{At, RawInput};
use super::reader::Reader;

/// Variables of these families are put in later: by agents, by a chain of requests, in messages.
pub(crate) const LATER: [&str; 3] = ["host.", "capture.", "rollout."];

/// The longest value, in bytes: inputs are names and numbers, not documents.
const MAX_VALUE: usize = 256;

/// An input that a plan declares.
#[derive(Debug, Clone)]
pub struct Input {
    /// Its name, used as `${NAME}`.
    pub name: String,
    /// What it is, for people.
    pub about: Option<String>,
    /// The regular expression that the whole value must match.
    pub pattern: Option<String>,
    /// The values that are allowed; any if empty.
    pub one_of: Vec<String>,
    /// The value if none is given.
    pub default: Option<String>,
    pub(crate) node: NodeId,
    regex: Option<Regex>,
}

impl Input {
    /// Why `value` is not allowed; `None` if it is.
    pub fn refuse(&self, value: &str) -> Option<String> {
        if value.is_empty() || value.len() > MAX_VALUE || value.chars().any(char::is_control) {
            return Some(format!(
                "a value has 1 to {MAX_VALUE} bytes and no control characters"
            ));
        }
        if value.contains("${") || value.contains("secret://") {
            return Some("a value holds neither `${` nor `secret://`".to_owned());
        }
        if !self.one_of.is_empty() && !self.one_of.iter().any(|allowed| allowed == value) {
            let allowed: Vec<&str> = self.one_of.iter().map(String::as_str).collect();
            return Some(format!("it must be {}", list(&allowed, "or")));
        }
        let pattern = self.pattern.as_deref().unwrap_or_default();
        match &self.regex {
            Some(regex) if !regex.is_match(value) => Some(format!("it must match `{pattern}`")),
            _ => None,
        }
    }

    /// A value that stands in while none is given; `None` if nothing sensible is known.
    fn stand_in(&self) -> Option<String> {
        self.default
            .clone()
            .or_else(|| self.one_of.first().cloned())
    }
}

/// Reads the declarations. An input that is declared wrongly is there all the same, so that its
/// uses are not reported too.
pub(crate) fn declared(reader: &Reader<'_>) -> Vec<Input> {
    let tree = reader.tree;
    let Some(inputs) = tree.get(tree.root, "inputs") else {
        return Vec::new();
    };
    if !matches!(tree.node(inputs).kind, Kind::Mapping(_)) {
        let message = "`inputs`: expected a mapping of names";
        reader.report(Code::WrongValue, inputs, message, None);
        return Vec::new();
    }
    let entries = tree.entries(inputs).iter();
    let ours = entries.filter(|(key, _)| !tree.text(*key).starts_with("x-"));
    ours.map(|(key, value)| declare(reader, *key, *value))
        .collect()
}

fn declare(reader: &Reader<'_>, key: NodeId, value: NodeId) -> Input {
    let name = reader.tree.text(key).to_owned();
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(legal) || name.starts_with(|c: char| c.is_ascii_digit())
    {
        let message = format!("`{name}` is no name for an input");
        let hint = "letters, digits and `_`, beginning with a letter";
        reader.report(
            Code::BadInputDeclaration,
            key,
            message,
            Some(hint.to_owned()),
        );
    }
    let raw: RawInput = reader.read(value).unwrap_or_default();
    let mut input = Input {
        name,
        about: raw.about,
        pattern: raw.pattern.as_ref().map(|pattern| pattern.value.clone()),
        one_of: raw
            .one_of
            .as_ref()
            .map(|list| list.value.clone())
            .unwrap_or_default(),
        default: None,
        node: key,
        regex: None,
    };
    if let Some(At { node, value }) = &raw.pattern {
        match Regex::new(&format!("^(?:{value})$")) {
            Ok(regex) => input.regex = Some(regex),
            Err(error) => {
                let message = format!("`pattern` does not compile: {}", cause(&error));
                reader.report(Code::BadRegex, *node, message, None);
            }
        }
    }
    if let Some(At { node, value }) = &raw.one_of
        && value.is_empty()
    {
        let message = "`one_of` allows no value at all";
        reader.report(Code::BadInputDeclaration, *node, message, None);
    }
    if let Some(At { node, value }) = raw.default {
        if let Some(why) = input.refuse(&value) {
            let message = format!("the default `{value}` is not allowed: {why}");
            reader.report(Code::BadInputDeclaration, node, message, None);
        }
        input.default = Some(value);
    }
    input
}

/// The last line of a regex error says what is wrong; the ones before draw it.
pub(crate) fn cause(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default();
    last.trim_start_matches("error: ").to_owned()
}

/// Values for a check without inputs: `None` where nothing can be known.
pub(crate) fn stand_ins(inputs: &[Input]) -> BTreeMap<String, Option<String>> {
    let pairs = inputs
        .iter()
        .map(|input| (input.name.clone(), input.stand_in()));
    pairs.collect()
}

/// Holds the values that were given against the declarations, and completes them.
pub(crate) fn complete(
    reader: &Reader<'_>,
    inputs: &[Input],
    given: &BTreeMap<String, String>,
) -> BTreeMap<String, Option<String>> {
    let tree = reader.tree;
    let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
    for name in given.keys().filter(|name| !names.contains(&name.as_str())) {
        let at = tree.get(tree.root, "inputs").unwrap_or(tree.root);
        let message = format!("the plan declares no input `{name}`");
        reader.report(Code::BadInputValue, at, message, did_you_mean(name, &names));
    }
    let mut values = BTreeMap::new();
    for input in inputs {
        let name = &input.name;
        let mut value = given.get(name).or(input.default.as_ref()).cloned();
        match value.as_deref().map(|value| (value, input.refuse(value))) {
            None => {
                let message = format!("the input `{name}` has no value and no default");
                let hint = format!("give it: `{name}=...`");
                reader.report(Code::BadInputValue, input.node, message, Some(hint));
            }
            Some((refused, Some(why))) => {
                let refused = refused.escape_debug();
                let message = format!("the input `{name}` cannot be `{refused}`: {why}");
                reader.report(Code::BadInputValue, input.node, message, None);
                // What follows from a value that is refused is not worth a word.
                value = None;
            }
            Some((_, None)) => {}
        }
        values.insert(name.clone(), value);
    }
    values
}

/// Puts values in for `${NAME}` in every value of a plan, and reports the names nobody declares
/// and, as a warning, the declared ones that nobody uses.
pub(crate) fn put_in(
    reader: &Reader<'_>,
    inputs: &[Input],
    values: &BTreeMap<String, Option<String>>,
) -> Tree {
    let mut walk = Walk {
        reader,
        values,
        used: BTreeSet::new(),
        tree: reader.tree.clone(),
    };
    let root = reader.tree.root;
    for (key, value) in reader.tree.entries(root) {
        if reader.tree.text(*key) != "inputs" {
            walk.node(*value, reader.tree.text(*key).starts_with("x-"));
        }
    }
    let Walk { used, tree, .. } = walk;
    for input in inputs.iter().filter(|input| !used.contains(&input.name)) {
        let message = format!("the input `{}` is never used", input.name);
        reader.warn(
            Code::UnusedInput,
            input.node,
            message,
            "use it, or take it out",
        );
    }
    tree
}

struct Walk<'a> {
    reader: &'a Reader<'a>,
    values: &'a BTreeMap<String, Option<String>>,
    used: BTreeSet<String>,
    tree: Tree,
}

impl Walk<'_> {
    /// `is_note`: below an `x-` key, where anything may stand.
    fn node(&mut self, id: NodeId, is_note: bool) {
        match &self.reader.tree.node(id).kind {
            Kind::Scalar(scalar) if scalar.text.contains('$') => self.scalar(id, is_note),
            Kind::Scalar(_) | Kind::Broken => {}
            Kind::Sequence(items) => items.iter().for_each(|item| self.node(*item, is_note)),
            Kind::Mapping(entries) => {
                // Keys of the user's own: there, `x-` is no note (`headers: {x-request-id: ...}`).
                let own = ["headers", "form", "json", "env", "set", "labels"];
                let is_own = self
                    .reader
                    .tree
                    .key_of(id)
                    .is_some_and(|key| own.contains(&key));
                for (key, value) in entries {
                    let is_x = self.reader.tree.text(*key).starts_with("x-");
                    let is_note = is_note || (is_x && !is_own);
                    self.node(*value, is_note);
                }
            }
        }
    }

    fn scalar(&mut self, id: NodeId, is_note: bool) {
        let original = self.reader.tree.text(id);
        let mut text = String::with_capacity(original.len());
        let mut open = false;
        let mut rest = original;
        while let Some(dollar) = rest.find('$') {
            text.push_str(&rest[..dollar]);
            rest = &rest[dollar + 1..];
            if let Some(after) = rest.strip_prefix('$') {
                self.check_escape(id, after, is_note);
                text.push('$');
                rest = after;
                continue;
            }
            let Some(name_and_more) = rest.strip_prefix('{') else {
                text.push('$');
                continue;
            };
            let Some(end) = name_and_more.find('}') else {
                if !is_note {
                    let hint = "close it with `}`, or write `$$` for a `$` of your own";
                    let message = "`${` without its `}`";
                    self.reader
                        .report(Code::UnknownVariable, id, message, Some(hint.to_owned()));
                    self.tree.nodes[id.0 as usize].kind = Kind::Broken;
                }
                return;
            };
            let name = &name_and_more[..end];
            let whole = &original[original.len() - rest.len() - 1..][..name.len() + 3];
            rest = &name_and_more[end + 1..];
            match self.values.get(name) {
                Some(value) => {
                    self.used.insert(name.to_owned());
                    if let Some(value) = value {
                        text.push_str(value);
                    } else {
                        open = true;
                        text.push_str(whole);
                    }
                }
                None if is_note || LATER.iter().any(|family| name.starts_with(family)) => {
                    text.push_str(whole);
                }
                None => {
                    self.report_unknown(id, name);
                    self.tree.nodes[id.0 as usize].kind = Kind::Broken;
                    return;
                }
            }
        }
        text.push_str(rest);
        let whole = original
            .strip_prefix("${")
            .and_then(|name| name.strip_suffix('}'));
        let whole_input = whole.is_some_and(|name| self.values.contains_key(name));
        if let Kind::Scalar(scalar) = &mut self.tree.nodes[id.0 as usize].kind {
            scalar.text = text;
            scalar.open = open;
            scalar.whole_input = whole_input;
        }
    }

    /// `$$` makes a `$`, and what agents put in later looks just like it.
    fn check_escape(&self, id: NodeId, after: &str, is_note: bool) {
        let name = after.strip_prefix('{').unwrap_or_default();
        if let Some(family) = LATER.iter().find(|family| name.starts_with(**family))
            && !is_note
        {
            let message = format!("`$$` cannot keep `${{{family}` from being put in later");
            self.reader
                .report(Code::MisplacedVariable, id, message, None);
        }
    }

    fn report_unknown(&self, id: NodeId, name: &str) {
        let known: Vec<&str> = self.values.keys().map(String::as_str).collect();
        let family = name.split_once('.').map_or("", |(family, _)| family);
        let hint = if let Some(near) = nearest(name, known.iter().copied()) {
            format!("did you mean `${{{near}}}`?")
        } else if let Some(near) = nearest(&format!("{family}."), LATER) {
            format!("did you mean `${{{near}...}}`?")
        } else {
            "declare it under `inputs`, or write `$$` for a `$` of your own".to_owned()
        };
        let message = format!("`${{{name}}}` is no input of this plan");
        self.reader
            .report(Code::UnknownVariable, id, message, Some(hint));
    }
}
