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
//! lets `..` through) and `\*` for itself; in lists of words a last `**` stands for any further
//! words. A command may be given by its words alone. `(default)` stands for an argument that the
//! plan leaves out.
//! `deny` also holds for other spellings of a value: `/etc/./x`, `/y/../etc/x`, `x.service`.
//!
//! Patterns that begin with `http://` or `https://` are held against URLs part by part: scheme,
//! host, port, and path with query. A rule for `check.http` holds for each request of a chain.
//! An argument holds a secret only where a rule lists it, name by name:
//! `env = [{ TOKEN = "secret://smoke_token" }]`.
//!
//! `per_hour` and `windows` limit how often and when a rule allows ([`limits`]); `deny` holds for
//! what has another name on this host, too ([`names`]).
//! Whose signatures the host asks for stands there, too: see [`trust`].

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::{Action, CATALOGUE, Class};
use lockstep_proto::ids::Digest;
use lockstep_proto::values::Timestamp;
use serde::Deserialize;
use serde_json::Value;

mod arguments;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod limits;
mod matching;
mod names;
mod rule;
pub(crate) mod trust;
mod url;

use limits::Limits;
pub(crate) use limits::{Begun, Counted, Moment, parse_utc, utc};
use matching::glob;
use names::Names;
use rule::{Rule, SECRET, Written, rule_for, values_of};
use trust::{
    Trust, Word, WrittenApprover, WrittenBreaker, WrittenEvidence, WrittenSeal, WrittenTrust,
};

/// Stands for an argument that the plan leaves out.
const DEFAULT: &str = "(default)";

/// Probes that run a program or a statement that the plan names, show what is in a file, or read
/// a whole database.
const MUST_BE_LISTED: [&str; 9] = [
    "check.command",
    "check.log",
    "check.sql",
    "env.diff",
    "migration.current",
    "migration.plan",
    "migration.verify",
    "postgres.assert",
    "postgres.integrity",
];

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
    break_glass: Vec<WrittenBreaker>,
    #[serde(default)]
    bindings: Word,
    #[serde(default)]
    evidence: Vec<WrittenEvidence>,
}

#[derive(Debug, Default)]
struct Rules {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
}

/// What the host allows.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    path: PathBuf,
    exists: bool,
    rules: Rules,
    /// Where each line of the file begins, in bytes.
    lines: Vec<usize>,
    names: Names,
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
            break_glass,
            bindings,
            evidence,
        } = toml::from_str(text).map_err(|source| PolicyError::Parse {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let trust = WrittenTrust {
            seal,
            approvals,
            approver,
            break_glass,
            bindings,
            evidence,
        };
        let rules = || {
            let allow = allow.into_iter().map(Written::allow);
            let allow = allow.collect::<Result<_, _>>()?;
            let deny = deny.into_iter().map(Written::deny);
            let deny = deny.collect::<Result<_, _>>()?;
            Ok((Rules { allow, deny }, trust.check()?))
        };
        let (rules, trust) = rules().map_err(|(at, why)| PolicyError::Rule {
            path: path.clone(),
            line: text[..at].matches('\n').count() + 1,
            why,
        })?;
        Ok(Self {
            path,
            exists: true,
            rules,
            lines: std::iter::once(0)
                .chain(text.match_indices('\n').map(|(at, _)| at + 1))
                .collect(),
            names: Names::default(),
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
        if let Some(rule) = self.denied_by(name, &args) {
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

    fn denied_by(&self, name: &str, args: &Value) -> Option<&Rule> {
        let mut rules = self.rules.deny.iter();
        rules.find(|rule| rule.denies(name, args, &self.names))
    }

    /// The rules that allow an action at some time; empty if it needs none.
    fn allowing(&self, action: &Action) -> Vec<&Rule> {
        if is_harmless(action) {
            return vec![];
        }
        let (name, args) = (action.name(), action.args());
        let rules = self.rules.allow.iter();
        rules.filter(|rule| rule.allows(name, &args)).collect()
    }

    /// Refuses what is not allowed at this moment, saying when it will be. Says under which rules an
    /// attempt that begins now is counted.
    pub(crate) fn admit(
        &self,
        action: &Action,
        begun: &Begun,
        now: &Moment,
    ) -> Result<Vec<Digest>, Refused> {
        self.check(action).map_err(Refused::Never)?;
        let rules = self.allowing(action);
        let waits = rules.iter().map(|rule| begun.wait(rule, now));
        let waits: Vec<_> = waits.collect();
        if let Some(soonest) = waits
            .into_iter()
            .min_by_key(|wait| wait.as_ref().map(|w| w.until))
            && let Some(wait) = soonest
        {
            return Err(Refused::Later(format!(
                "{} does not allow `{}` now: {}",
                self.path.display(),
                action.name(),
                wait.words(now.wall)
            )));
        }
        let limited = rules.iter().filter(|rule| rule.limits.per_hour.is_some());
        Ok(limited.map(|rule| rule.id()).collect())
    }

    /// Whether asking the host about an action would do what the policy limits: run a command or a
    /// statement, or send a request. An ask is not counted, so it must not be a way around.
    pub(crate) fn limits_asking(&self, action: &Action) -> bool {
        let info = action.info();
        let asks = info.class == Class::Observing || info.name == "check.http";
        let rules = self.allowing(action);
        asks && !rules.is_empty() && rules.iter().all(|rule| rule.limits != Limits::default())
    }

    /// What speaks against these actions of one plan together, by their places: more than the rates
    /// admit within an hour, or no window before the plan expires.
    pub(crate) fn never(
        &self,
        actions: &[&Action],
        now: Timestamp,
        expires: Timestamp,
    ) -> Vec<(usize, String)> {
        let mut refusals = vec![];
        let mut counts: BTreeMap<Vec<usize>, u32> = BTreeMap::new();
        for (place, action) in actions.iter().enumerate() {
            let rules = self.allowing(action);
            if rules.is_empty() {
                continue;
            }
            let opens = rules.iter().filter_map(|rule| rule.limits.opens(now)).min();
            if opens.is_none_or(|opens| opens > expires) {
                let windows = rules
                    .iter()
                    .filter_map(|rule| rule.limits.describe_windows());
                let windows = windows.collect::<Vec<_>>().join(", or ");
                refusals.push((
                    place,
                    format!(
                        "{} allows `{}` only {windows}, and the plan expires at {} before that; \
                         compile it again nearer to its time",
                        self.path.display(),
                        action.name(),
                        utc(expires)
                    ),
                ));
                continue;
            }
            let rates = rules.iter().map(|rule| rule.limits.per_hour);
            let Some(most) = rates.sum::<Option<u32>>() else {
                continue;
            };
            let set = rules.iter().map(|rule| rule.place).collect();
            let count = counts.entry(set).or_default();
            *count += 1;
            if *count > most {
                let times = match most {
                    1 => "once".to_owned(),
                    most => format!("{most} times"),
                };
                refusals.push((
                    place,
                    format!(
                        "{} allows `{}` {times} in an hour, and this is the plan's {} of its \
                         kind; raise `per_hour` in line {}, or split the plan",
                        self.path.display(),
                        action.name(),
                        ordinal(*count),
                        self.line_of(rules[0])
                    ),
                ));
            }
        }
        refusals
    }

    /// Under which rule an action is allowed, in words.
    pub(crate) fn explain(&self, action: &Action) -> String {
        let rules = self.allowing(action);
        let words = rules.iter().map(|rule| {
            let limits: Vec<String> = rule.limits.describe().collect();
            let line = self.line_of(rule);
            match limits.as_slice() {
                [] => format!("line {line}"),
                limits => format!("line {line}, {}", limits.join(", ")),
            }
        });
        match words.collect::<Vec<_>>().as_slice() {
            [] => "allowed: it only looks".to_owned(),
            words => format!("allowed by {}", words.join("; or by ")),
        }
    }

    /// The line in which a rule begins, counted from 1.
    fn line_of(&self, rule: &Rule) -> usize {
        self.lines.partition_point(|begin| *begin <= rule.place)
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
                    .map(Rule::describe)
                    .collect();
                let denied: Vec<String> = self
                    .rules
                    .deny
                    .iter()
                    .filter(about)
                    .map(Rule::describe)
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

/// Why an action is not admitted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not as the policy is.
    Never(String),
    /// Not at this moment.
    Later(String),
}

fn ordinal(number: u32) -> String {
    match (number % 100, number % 10) {
        (11..=13, _) => format!("{number}th"),
        (_, 1) => format!("{number}st"),
        (_, 2) => format!("{number}nd"),
        (_, 3) => format!("{number}rd"),
        _ => format!("{number}th"),
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

#[cfg(test)]
mod tests;
