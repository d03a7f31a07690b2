//! What the host allows (INV-9): a file of the host's own, which no controller can change.
//!
//! ```toml
//! [[allow]]
//! action = "postgres.*"
//! where = { database = ["employee_system"] }
//!
//! [[allow]]
//! action = "release.build"
//! [allow.where]
//! app = ["employee-system"]
//! run = [["python3", "-m", "venv", "venv"], ["venv/bin/pip", "install", "**"]]
//!
//! [[deny]]
//! action = "exec.run"
//! ```
//!
//! Nothing is allowed that is not listed, but probes that neither run what a plan names nor read
//! what a plan points at. `deny` wins. Each argument under `where` must be one of the listed
//! values; if it is a list, each of its items must. In texts `*` stands for anything (but never
//! lets `..` through); in lists of words a last `**` stands for any further words. A command may
//! be given by its words alone. `(default)` stands for an argument that the plan leaves out.
//! `deny` also holds for other spellings of a value: `/etc/./x`, `/y/../etc/x`, `x.service`.
//!
//! Patterns that begin with `http://` or `https://` are held against URLs part by part: scheme,
//! host, port, and path with query. A rule for `check.http` holds for each request of a chain.
//! Secrets reach the commands of `exec.run` and `check.command` only where `env` lists them, name
//! by name: `env = [{ TOKEN = "secret://smoke_token" }]`.
//!
//! Whose signatures the host asks for stands there, too: see [`trust`].

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::{Action, CATALOGUE, Class};
use serde::Deserialize;
use serde_json::Value;
use toml::Spanned;

use crate::process::head;

mod arguments;
pub(crate) mod trust;
mod url;

use trust::{Trust, Word, WrittenApprover, WrittenEvidence, WrittenSeal, WrittenTrust};

/// Probes that run a program or a statement that the plan names, or show what is in a file.
const MUST_BE_LISTED: [&str; 8] = [
    "check.command",
    "check.log",
    "check.sql",
    "env.diff",
    "migration.current",
    "migration.plan",
    "migration.verify",
    "postgres.assert",
];

/// Actions whose commands get secrets only if a rule lists them.
const SECRETS_BY_NAME: [&str; 2] = ["check.command", "exec.run"];

/// What a value begins with that stands for a secret.
const SECRET: &str = "secret://";

/// Stands for an argument that the plan leaves out.
const DEFAULT: &str = "(default)";

/// A policy that cannot be used. Then nothing is allowed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PolicyError {
    /// It cannot be read.
    #[error("cannot read the policy {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("the policy {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A rule that can match nothing, or not what its author meant.
    #[error("the policy {path} is not valid: line {line}: {why}")]
    Rule {
        /// The file.
        path: PathBuf,
        /// Where, counted from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// Others than its owner could change it.
    #[error("{0}")]
    Unsafe(String),
}

/// What a rule does. A value that may be read in two ways is not allowed, and is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Allow,
    Deny,
}

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    allow: Vec<Written>,
    #[serde(default)]
    deny: Vec<Written>,
    #[serde(default)]
    seal: Option<WrittenSeal>,
    #[serde(default)]
    approvals: Word,
    #[serde(default)]
    approver: Vec<WrittenApprover>,
    #[serde(default)]
    bindings: Word,
    #[serde(default)]
    evidence: Vec<WrittenEvidence>,
}

/// A rule with the places of its words.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    action: Spanned<String>,
    #[serde(default, rename = "where")]
    only: BTreeMap<Spanned<String>, Vec<Value>>,
}

#[derive(Debug, Default)]
struct Rules {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    action: String,
    only: BTreeMap<String, Vec<Value>>,
}

/// What the host allows.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    path: PathBuf,
    exists: bool,
    rules: Rules,
    trust: Trust,
}

impl Policy {
    /// Reads the file. Without one only probes are allowed.
    pub(crate) fn load(path: &Path) -> Result<Self, PolicyError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self {
                    path: path.to_owned(),
                    ..Self::default()
                });
            }
            Err(source) => {
                let path = path.to_owned();
                return Err(PolicyError::Read { path, source });
            }
        };
        check_owner(path).map_err(PolicyError::Unsafe)?;
        Self::parse(path, &text)
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, PolicyError> {
        let path = path.to_owned();
        let File {
            allow,
            deny,
            seal,
            approvals,
            approver,
            bindings,
            evidence,
        } = toml::from_str(text).map_err(|source| PolicyError::Parse {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let rules = |written: Vec<Written>| {
            let rules = written.into_iter().map(Written::check);
            rules.collect::<Result<Vec<_>, _>>()
        };
        let rules = rules(allow).and_then(|allow| {
            let deny = rules(deny)?;
            let trust = WrittenTrust {
                seal,
                approvals,
                approver,
                bindings,
                evidence,
            };
            Ok((Rules { allow, deny }, trust.check()?))
        });
        let (rules, trust) = rules.map_err(|(at, why)| PolicyError::Rule {
            path: path.clone(),
            line: text[..at].matches('\n').count() + 1,
            why,
        })?;
        Ok(Self {
            path,
            exists: true,
            rules,
            trust,
        })
    }

    /// Whose signatures the host asks for.
    pub(crate) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Whether there is a file.
    pub(crate) fn exists(&self) -> bool {
        self.exists
    }

    /// Refuses what is not allowed, saying what to add to the file.
    pub(crate) fn check(&self, action: &Action) -> Result<(), String> {
        let (name, args) = (action.name(), action.args());
        let file = self.path.display();
        if let Some(rule) = self.rules.deny.iter().find(|rule| rule.denies(name, &args)) {
            let only = if rule.only.is_empty() {
                ""
            } else {
                " with these arguments"
            };
            return Err(format!(
                "{file} denies `{}`{only}; an administrator of this host can remove that rule",
                rule.action
            ));
        }
        if is_harmless(action) {
            return Ok(());
        }
        let urls = values_of(name, &args, "url").into_iter().flatten();
        if urls.filter_map(Value::as_str).any(url::names_a_user) {
            return Err(format!(
                "a URL of `{name}` names a user before its host; a password belongs into a header, \
                 as `{SECRET}NAME`"
            ));
        }
        let rules = self.rules.allow.iter();
        let near = rules.filter_map(|rule| Some((rule, rule.misfits(name, &args)?)));
        match near.min_by_key(|(_, misfits)| misfits.len()) {
            Some((_, misfits)) if misfits.is_empty() => Ok(()),
            Some((rule, misfits)) => Err(format!("{file} {}", rule.refusal(name, &args, &misfits))),
            None if self.exists => Err(format!(
                "{file} does not allow `{name}`; if it is right on this host, add to it:\n{}",
                rule_for(name, &args)
            )),
            None => Err(format!(
                "this host has no policy, so `{name}` is not allowed; if it is right on this \
                 host, write into {file}:\n{}",
                rule_for(name, &args)
            )),
        }
    }

    /// For each action that hosts carry out, what the policy says of it.
    pub(crate) fn overview(&self) -> Vec<(&'static str, String)> {
        let on_hosts = CATALOGUE
            .iter()
            .filter(|row| row.site == lockstep_proto::action::Site::Host);
        on_hosts
            .map(|row| {
                let about = |rule: &&Rule| glob(&rule.action, row.name);
                let limits: Vec<String> = self
                    .rules
                    .allow
                    .iter()
                    .filter(about)
                    .map(Rule::limits)
                    .collect();
                let denied: Vec<String> = self
                    .rules
                    .deny
                    .iter()
                    .filter(about)
                    .map(Rule::limits)
                    .collect();
                let says = if denied.iter().any(String::is_empty) {
                    return (row.name, "denied".to_owned());
                } else if row.class == Class::Observing && !MUST_BE_LISTED.contains(&row.name) {
                    "allowed (it only looks)".to_owned()
                } else if limits.is_empty() {
                    "not allowed".to_owned()
                } else if limits.iter().any(String::is_empty) {
                    "allowed".to_owned()
                } else {
                    format!("allowed with {}", limits.join(", or with "))
                };
                let but = match denied.as_slice() {
                    [] => String::new(),
                    denied => format!("; denied with {}", denied.join(", and with ")),
                };
                (row.name, says + &but)
            })
            .collect()
    }
}

/// Whether an action needs no rule.
fn is_harmless(action: &Action) -> bool {
    let info = action.info();
    info.class == Class::Observing && !MUST_BE_LISTED.contains(&info.name)
}

/// Says what is wrong with a file that others than its owner can change, or that belongs to
/// somebody else than root or the agent's own user.
pub(crate) fn check_owner(path: &Path) -> Result<(), String> {
    let file = path.display();
    let metadata =
        std::fs::metadata(path).map_err(|error| format!("cannot read {file}: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != 0 && metadata.uid() != own {
        return Err(format!(
            "{file} belongs to user {}, who could change what this host allows; run: chown root {file}",
            metadata.uid()
        ));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "{file} can be written by others than its owner; run: chmod go-w {file}"
        ));
    }
    Ok(())
}

impl Written {
    /// The rule, or what is wrong with it and where in the file, in bytes.
    fn check(self) -> Result<Rule, (usize, String)> {
        let Self { action, only } = self;
        let at = action.span().start;
        let action = action.into_inner();
        let meant = || CATALOGUE.iter().filter(|row| glob(&action, row.name));
        if meant().next().is_none() {
            let near = arguments::suggestion(&action, arguments::actions_of_hosts());
            return Err((at, format!("there is no action `{action}`{near}")));
        }
        let known = || meant().flat_map(|row| arguments::of(row.name)).copied();
        for argument in only.keys() {
            let name = argument.get_ref().as_str();
            if !known().any(|known| known == name) {
                let near = arguments::suggestion(name, known());
                let why = format!("`{action}` has no argument `{name}`{near}");
                return Err((argument.span().start, why));
            }
        }
        let only = only
            .into_iter()
            .map(|(name, values)| (name.into_inner(), values));
        let rule = Rule {
            only: only.collect(),
            action,
        };
        rule.check().map(|()| rule).map_err(|why| (at, why))
    }
}

impl Rule {
    fn check(&self) -> Result<(), String> {
        if let Some(commands) = self.only.get("argv")
            && !commands.iter().all(Value::is_array)
        {
            return Err(format!(
                "`argv` of `{}` lists commands, each a list of words: [[\"/usr/bin/true\"]]",
                self.action
            ));
        }
        if let Some(urls) = self.only.get("url") {
            for pattern in urls.iter().filter(|pattern| *pattern != DEFAULT) {
                let Some(pattern) = pattern.as_str() else {
                    return Err(format!("`url` of `{}` lists texts", self.action));
                };
                url::check(pattern).map_err(|why| format!("`{}`: {why}", self.action))?;
            }
        }
        Ok(())
    }

    /// Whether this rule, as one that denies, speaks of the action: one forbidden value among
    /// several is enough.
    fn denies(&self, name: &str, args: &Value) -> bool {
        glob(&self.action, name)
            && self.only.iter().all(|(argument, denied)| {
                values_of(name, args, argument)
                    .into_iter()
                    .any(|value| is_any_of(argument, value, denied))
            })
    }

    /// The arguments that speak against this rule, as one that allows; none if it allows the
    /// action. `None` if it is about other actions.
    fn misfits(&self, name: &str, args: &Value) -> Option<Vec<&str>> {
        if !glob(&self.action, name) {
            return None;
        }
        let unfit = self.only.iter().filter(|(argument, allowed)| {
            !values_of(name, args, argument)
                .into_iter()
                .all(|value| is_one_of(argument, value, allowed))
        });
        let mut unfit: Vec<&str> = unfit.map(|(argument, _)| argument.as_str()).collect();
        if !self.only.contains_key("env") && has_secrets(name, args) {
            unfit.push("env");
        }
        Some(unfit)
    }

    /// What to change so that this rule allows what it does not allow now.
    fn refusal(&self, name: &str, args: &Value, misfits: &[&str]) -> String {
        if misfits == ["env"] && !self.only.contains_key("env") {
            let env = toml(&args["env"]);
            let add = if self.action == name {
                format!("`env = [{env}]` to its `where`")
            } else {
                format!("to it:\n{}", rule_for(name, args))
            };
            return format!(
                "allows `{}` without secrets in `env`; if they are right on this host, add {add}",
                self.action
            );
        }
        let add = misfits.iter().map(|&argument| {
            // Of a chain, the value of the first request that does not fit.
            let values = values_of(name, args, argument);
            let allowed = self.only.get(argument).map_or(&[][..], Vec::as_slice);
            let mut wrong = values
                .into_iter()
                .filter(|value| !is_one_of(argument, *value, allowed));
            let value = wrong.next().flatten();
            let value = value.map_or_else(|| format!("\"{DEFAULT}\""), short);
            format!("{value} to `{argument}`")
        });
        let add: Vec<String> = add.collect();
        format!(
            "allows `{}` only with other values of `{}`; if it is right on this host, add {} there",
            self.action,
            misfits.join("`, `"),
            add.join(" and ")
        )
    }

    fn limits(&self) -> String {
        let one = |(argument, values): (&String, &Vec<Value>)| {
            let values: Vec<String> = values.iter().map(short).collect();
            format!("{argument}: {}", values.join(" | "))
        };
        self.only.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// The values of an argument. A chain of requests has one for each of them: what holds for the
/// first request holds for those that follow and those that clean up.
fn values_of<'a>(name: &str, args: &'a Value, argument: &str) -> Vec<Option<&'a Value>> {
    let mut values = vec![args.get(argument)];
    if name == "check.http" && OF_REQUESTS.contains(&argument) {
        let more = ["then", "cleanup"]
            .into_iter()
            .filter_map(|list| args[list].as_array());
        values.extend(more.flatten().map(|request| request.get(argument)));
    }
    values
}

/// Arguments that each request of a chain has.
const OF_REQUESTS: [&str; 5] = ["url", "method", "headers", "form", "json"];

/// Whether a command would get secrets in its environment.
fn has_secrets(name: &str, args: &Value) -> bool {
    let is_secret = |value: &Value| value.as_str().is_some_and(|text| text.starts_with(SECRET));
    SECRETS_BY_NAME.contains(&name)
        && args["env"]
            .as_object()
            .is_some_and(|env| env.values().any(is_secret))
}

/// Whether a value is one of those listed; a list also if each of its items is.
fn is_one_of(argument: &str, value: Option<&Value>, listed: &[Value]) -> bool {
    let fits_some = |value| fits_some(argument, value, listed, Way::Allow);
    if fits_some(value) {
        return true;
    }
    match value {
        Some(Value::Array(items)) if argument != "argv" => {
            let mut items = items.iter();
            items.all(|item| fits_some(Some(item)))
        }
        _ => false,
    }
}

/// Whether a value, or one item of it, is among those listed, perhaps by another spelling.
fn is_any_of(argument: &str, value: Option<&Value>, listed: &[Value]) -> bool {
    let fits_some = |value| fits_some(argument, value, listed, Way::Deny);
    if fits_some(value) {
        return true;
    }
    match value {
        Some(Value::Array(items)) if argument != "argv" => {
            let mut items = items.iter();
            items.any(|item| fits_some(Some(item)))
        }
        _ => false,
    }
}

fn fits_some(argument: &str, value: Option<&Value>, listed: &[Value], way: Way) -> bool {
    listed.iter().any(|pattern| match (pattern, value) {
        (pattern, None) => pattern == DEFAULT,
        (Value::String(pattern), Some(Value::String(text))) => match argument {
            "url" => url::fits(pattern, text, way),
            "service" if way == Way::Deny => stands_for(unsuffixed(pattern), unsuffixed(text), way),
            _ => fits_text(pattern, text, way),
        },
        (pattern, Some(value)) => fits(pattern, value, way),
    })
}

/// The name of a unit as most people write it.
fn unsuffixed(service: &str) -> &str {
    service.strip_suffix(".service").unwrap_or(service)
}

fn fits_text(pattern: &str, text: &str, way: Way) -> bool {
    if url::is_url(pattern) {
        return url::is_url(text) && url::fits(pattern, text, way);
    }
    // `*` stands for any text, and allows nothing that is put in for it.
    let secret = text.starts_with(SECRET) && !pattern.starts_with(SECRET);
    stands_for(pattern, text, way) && (way == Way::Deny || !secret)
}

fn fits(pattern: &Value, value: &Value, way: Way) -> bool {
    let fits = |pattern: &Value, value: &Value| fits(pattern, value, way);
    match (pattern, value) {
        (Value::String(pattern), Value::String(text)) => fits_text(pattern, text, way),
        (Value::Array(patterns), Value::Array(items)) => match patterns.split_last() {
            Some((last, first)) if last == "**" => {
                first.len() <= items.len() && first.iter().zip(items).all(|(p, i)| fits(p, i))
            }
            _ => {
                patterns.len() == items.len() && patterns.iter().zip(items).all(|(p, i)| fits(p, i))
            }
        },
        // A command by its words alone: wherever in the release it runs.
        (Value::Array(_), Value::Object(command)) => {
            command.get("argv").is_some_and(|argv| fits(pattern, argv))
        }
        (Value::Object(patterns), Value::Object(fields)) => {
            fields.iter().all(|(name, value)| {
                patterns
                    .get(name)
                    .is_some_and(|pattern| fits(pattern, value))
            }) && patterns.keys().all(|name| fields.contains_key(name))
        }
        _ => pattern == value,
    }
}

/// `*` stands for anything. A pattern never lets `..` through: `/srv/*` means below /srv.
fn stands_for(pattern: &str, text: &str, way: Way) -> bool {
    let climbs = text.split(['/', '=', ':']).any(|part| part == "..");
    match way {
        Way::Allow if climbs => pattern == text,
        Way::Allow => glob(pattern, text),
        // Where a path with `..` leads, only the file system knows.
        Way::Deny => {
            (climbs && pattern.contains(['/', '*']))
                || glob(pattern, text)
                || glob(pattern, &plain(text))
        }
    }
}

/// A path as it is written without detours that lead nowhere: `//` and `/./`.
fn plain(path: &str) -> String {
    let mut parts = path.split('/');
    let first = parts.next().filter(|first| *first != ".");
    let parts = parts.filter(|part| !matches!(*part, "" | "."));
    let parts: Vec<&str> = first.into_iter().chain(parts).collect();
    parts.join("/")
}

/// `*` stands for anything.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(head) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().expect("a split has at least one part");
    for part in parts {
        let Some(at) = text.find(part) else {
            return false;
        };
        text = &text[at + part.len()..];
    }
    text.ends_with(tail)
}

/// The beginning of a value as it is written in a policy.
fn short(value: &Value) -> String {
    let text = toml(value);
    match head(&text, 160) {
        cut if cut.len() < text.len() => format!("{cut}…"),
        _ => text,
    }
}

/// A value as it is written in a policy.
fn toml(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(toml).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(fields) => {
            let bare = |name: &str| {
                let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
                !name.is_empty() && name.chars().all(plain)
            };
            let fields = fields.iter().map(|(name, value)| match name.as_str() {
                name if bare(name) => format!("{name} = {}", toml(value)),
                name => format!("{} = {}", Value::from(name), toml(value)),
            });
            format!("{{ {} }}", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// A rule that would allow an action, narrowed to what it acts on, as TOML.
fn rule_for(name: &str, args: &Value) -> String {
    let narrow = [
        "database", "service", "app", "path", "argv", "url", "address",
    ];
    let only: Vec<String> = narrow
        .iter()
        .filter_map(|argument| Some(format!("{argument} = [{}]", toml(args.get(argument)?))))
        .chain(has_secrets(name, args).then(|| format!("env = [{}]", toml(&args["env"]))))
        .collect();
    let only = match only.as_slice() {
        [] => String::new(),
        only => format!("\nwhere = {{ {} }}", only.join(", ")),
    };
    format!("[[allow]]\naction = \"{name}\"{only}")
}

#[cfg(test)]
mod tests;
