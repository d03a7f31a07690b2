//! What answers told, kept on the disk, and put into later requests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lockstep_proto::action::check::Request;
use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::actions::files::{self, OrFailed as _};
use crate::secrets::Secret;
use crate::step::{Context, failure};

/// The file's name in an attempt's directory.
pub(super) const FILE: &str = "captures.json";

/// What answers told. Tokens are among it, so its file is private and removed after the clean-up.
#[derive(Debug, Default)]
pub(super) struct Captures {
    file: Option<PathBuf>,
    kept: Kept,
    /// The set that is put into requests; beyond the earlier ones, that of the chain itself.
    turn: Option<usize>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// That of the chain.
    #[serde(flatten)]
    own: Set,
    /// Those of tries that were not met: what they created is there all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<Set>,
    /// The mark: a request of the chain, by its place, that may have had its effect, while what a
    /// clean-up needs of its answer is not here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    open: Option<usize>,
}

/// What the answers to one try told.
#[derive(Default, Serialize, Deserialize)]
struct Set {
    values: BTreeMap<String, Value>,
    /// Clean-up requests that have been met, by their place in the plan.
    cleaned: Vec<usize>,
}

impl std::fmt::Debug for Set {
    /// Names only: tokens are among the values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Captures {
    /// Those of a new attempt.
    pub(super) fn new(cx: &Context) -> Self {
        Self {
            file: Some(cx.dir.join(FILE)),
            ..Self::default()
        }
    }

    /// Captures that are never stored.
    pub(super) fn none() -> Self {
        Self::default()
    }

    /// Those of an earlier attempt.
    pub(super) fn load(file: PathBuf) -> Result<Self, Failure> {
        let read = |path: &Path| Ok(json::read(&std::fs::read(path)?)?);
        let kept = read(&file).or_failed(|| format!("read {}", file.display()))?;
        Ok(Self {
            file: Some(file),
            kept,
            turn: None,
        })
    }

    /// The request whose mark stands open in what an attempt left.
    pub(super) fn open_in(cx: &Context) -> Result<Option<usize>, Failure> {
        let file = cx.dir.join(FILE);
        let there = file
            .try_exists()
            .or_failed(|| format!("look for {}", file.display()))?;
        if !there {
            return Ok(None);
        }
        Ok(Self::load(file)?.open())
    }

    /// The request whose mark stands open.
    pub(super) fn open(&self) -> Option<usize> {
        self.kept.open
    }

    /// Marks a request that is about to be sent. Returns when the mark is on the disk; a request
    /// whose mark fails must not be sent.
    pub(super) fn mark(&mut self, request: usize) -> Result<(), Failure> {
        self.kept.open = Some(request);
        self.save().inspect_err(|_| self.kept.open = None)
    }

    /// Settles the mark; on the disk with the next [`Self::save`].
    pub(super) fn settle(&mut self) {
        self.kept.open = None;
    }

    /// Adds what an answer told.
    pub(super) fn add(&mut self, told: Vec<(String, Value)>) {
        self.set_mut().values.extend(told);
    }

    /// Puts aside what a try has told that was not met, so that the next one does not overwrite
    /// it.
    pub(super) fn begin_anew(&mut self) {
        let told = std::mem::take(&mut self.kept.own);
        let known = |set: &Set| set.values == told.values;
        if !told.values.is_empty() && !self.kept.earlier.iter().any(known) {
            self.kept.earlier.push(told);
        }
    }

    /// How many sets have been put aside.
    pub(super) fn earlier(&self) -> usize {
        self.kept.earlier.len()
    }

    /// Turns to one of the sets that were put aside, or to the chain's own after them. Says
    /// whether it is the chain's own.
    pub(super) fn turn_to(&mut self, set: usize) -> bool {
        self.turn = (set < self.earlier()).then_some(set);
        self.turn.is_none()
    }

    fn set(&self) -> &Set {
        self.turn
            .map_or(&self.kept.own, |set| &self.kept.earlier[set])
    }

    fn set_mut(&mut self) -> &mut Set {
        match self.turn {
            Some(set) => &mut self.kept.earlier[set],
            None => &mut self.kept.own,
        }
    }

    /// All sets that hold anything.
    fn all(&self) -> impl Iterator<Item = &Set> {
        let sets = self.kept.earlier.iter().chain([&self.kept.own]);
        sets.filter(|set| !set.values.is_empty())
    }

    /// Returns when they are on the disk.
    pub(super) fn save(&self) -> Result<(), Failure> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let text = serde_json::to_vec(&self.kept).expect("captures have a JSON form");
        files::write(file, &text, 0o600, None).or_failed(|| "keep what the answers told")
    }

    /// Whether a clean-up request was met, or the chain's own set says the same as this one.
    pub(super) fn is_cleaned(&self, request: usize) -> bool {
        let set = self.set();
        let own = &self.kept.own.values;
        let repeated = || {
            let mut values = set.values.iter();
            self.turn.is_some() && values.all(|(name, value)| own.get(name) == Some(value))
        };
        set.cleaned.contains(&request) || repeated()
    }

    /// Notes that a clean-up request was met, so that it is not sent again.
    pub(super) fn set_cleaned(&mut self, request: usize) -> Result<(), Failure> {
        self.set_mut().cleaned.push(request);
        if self.all().next().is_none() {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Forgets them on the disk: there is nothing left to remove. A mark that stands open stays.
    pub(super) fn remove(&mut self) -> Result<(), Failure> {
        if let Some(request) = self.kept.open {
            self.turn = None;
            self.kept = Kept {
                open: Some(request),
                ..Kept::default()
            };
            return self.save();
        }
        let Some(file) = &self.file else {
            return Ok(());
        };
        files::remove(file).or_failed(|| format!("remove {}", file.display()))
    }

    /// Captured texts that are long enough to be tokens.
    pub(super) fn tokens(&self, from: usize) -> Vec<Secret> {
        let values = self.all().flat_map(|set| set.values.values());
        let texts = values.filter_map(Value::as_str);
        texts
            .filter(|text| text.len() >= from)
            .map(Secret::from)
            .collect()
    }

    /// The text with `${capture.NAME}` replaced, each value through `encode`. What was captured
    /// is not looked through again: an answer cannot ask for secrets. Fails with the first name
    /// that was not captured.
    pub(super) fn fill(&self, text: &str, encode: fn(&str) -> String) -> Result<String, String> {
        let mut filled = String::new();
        for part in parts(text) {
            match part {
                Part::Text(text) => filled.push_str(text),
                Part::Capture(name) => filled.push_str(&encode(&plain(self.get(name)?))),
            }
        }
        Ok(filled)
    }

    /// The same in every string of a JSON value. A string that is one capture and nothing else
    /// becomes the captured value with its type: an id stays a number.
    pub(super) fn fill_json<'s>(
        &self,
        value: &Value,
        secret: &dyn Fn(&str) -> Option<&'s str>,
    ) -> Result<Value, String> {
        match value {
            Value::String(text) => match (secret(text), parts(text).as_slice()) {
                (Some(secret), _) => Ok(Value::String(secret.to_owned())),
                (None, [Part::Capture(name)]) => self.get(name).cloned(),
                (None, _) => self.fill(text, str::to_owned).map(Value::String),
            },
            Value::Array(values) => {
                let filled = values.iter().map(|value| self.fill_json(value, secret));
                filled.collect::<Result<_, _>>().map(Value::Array)
            }
            Value::Object(fields) => {
                let filled = fields
                    .iter()
                    .map(|(name, value)| Ok((name.clone(), self.fill_json(value, secret)?)));
                filled.collect::<Result<_, _>>().map(Value::Object)
            }
            other => Ok(other.clone()),
        }
    }

    fn get(&self, name: &str) -> Result<&Value, String> {
        self.set().values.get(name).ok_or_else(|| name.to_owned())
    }
}

/// A captured value in a text: strings without their quotes.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

enum Part<'a> {
    Text(&'a str),
    Capture(&'a str),
}

fn parts(text: &str) -> Vec<Part<'_>> {
    const OPEN: &str = "${capture.";
    let mut parts = vec![];
    let mut rest = text;
    while let Some((before, name, after)) = rest.split_once(OPEN).and_then(|(before, after)| {
        let (name, after) = after.split_once('}')?;
        Some((before, name, after))
    }) {
        if !before.is_empty() {
            parts.push(Part::Text(before));
        }
        parts.push(Part::Capture(name));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest));
    }
    parts
}

/// The captures that a request needs.
pub(super) fn used(request: &Request) -> Vec<String> {
    fn in_json(value: &Value, names: &mut Vec<String>) {
        match value {
            Value::String(text) => in_text(text, names),
            Value::Array(values) => values.iter().for_each(|value| in_json(value, names)),
            Value::Object(fields) => fields.values().for_each(|value| in_json(value, names)),
            _ => {}
        }
    }
    fn in_text(text: &str, names: &mut Vec<String>) {
        names.extend(parts(text).into_iter().filter_map(|part| match part {
            Part::Capture(name) => Some(name.to_owned()),
            Part::Text(_) => None,
        }));
    }
    let mut names = vec![];
    in_text(&request.url, &mut names);
    let values = request.headers.values().chain(request.form.values());
    values.for_each(|text| in_text(text, &mut names));
    if let Some(json) = &request.json {
        in_json(json, &mut names);
    }
    names
}

/// Bytes that stand for themselves in any part of a URL and in a form.
const UNRESERVED: &[u8] = b"-._~";

/// The text as a part of a URL or form: whatever has a meaning there is escaped.
pub(super) fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || UNRESERVED.contains(&byte) {
            encoded.push(byte.into());
        } else {
            write!(encoded, "%{byte:02X}").expect("a string takes everything");
        }
    }
    encoded
}

/// The failure for a value that was not captured, where there is no chain to say it.
pub(super) fn refused(message: String) -> Failure {
    failure(Cause::Refused, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn captures(values: Value) -> Captures {
        let told: BTreeMap<String, Value> = serde_json::from_value(values).unwrap();
        let mut captures = Captures::none();
        captures.add(told.into_iter().collect());
        captures
    }

    #[test]
    fn captures_are_put_in_once_and_encoded() {
        let captures = captures(json!({"id": 7, "name": "a/b ${capture.id}", "s": "secret://db"}));
        let fill = |text| captures.fill(text, percent_encode);
        assert_eq!(
            fill("/x/${capture.id}?n=${capture.name}").unwrap(),
            "/x/7?n=a%2Fb%20%24%7Bcapture.id%7D"
        );
        assert_eq!(
            fill("${other} ${capture.open").unwrap(),
            "${other} ${capture.open"
        );
        assert_eq!(fill("${capture.none}").unwrap_err(), "none");
    }

    #[test]
    fn a_captured_value_keeps_its_type_in_json_and_cannot_name_a_secret() {
        let captures = captures(json!({"id": 7, "s": "secret://db"}));
        let asked = std::cell::RefCell::new(vec![]);
        let resolve = |text: &str| {
            asked.borrow_mut().push(text.to_owned());
            text.starts_with("secret://").then_some("<key>")
        };
        let value = json!({"id": "${capture.id}", "t": ["no ${capture.id}", "secret://key"],
            "s": "${capture.s}"});
        let filled = captures.fill_json(&value, &resolve).unwrap();
        assert_eq!(
            filled,
            json!({"id": 7, "t": ["no 7", "<key>"], "s": "secret://db"})
        );
        assert!(!asked.borrow().contains(&"secret://db".to_owned()));
    }
}
