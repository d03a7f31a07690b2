//! One rule of a policy: what it speaks of, and what speaks against it.

use std::collections::BTreeMap;

use lockstep_proto::action::{CATALOGUE, Class};
use lockstep_proto::ids::Digest;
use serde::Deserialize;
use serde_json::Value;
use toml::Spanned;

use super::limits::{Limits, MOST_PER_HOUR, Window};
use super::matching::{glob, is_any_of, is_one_of, literal};
use super::names::Names;
use super::{DEFAULT, MUST_BE_LISTED, arguments, url};
use crate::process::head;

/// What a value begins with that stands for a secret.
pub(super) const SECRET: &str = "secret://";

/// A rule with the places of its words.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    action: Spanned<String>,
    #[serde(default, rename = "where")]
    only: BTreeMap<Spanned<String>, Vec<Value>>,
    per_hour: Option<Spanned<u32>>,
    windows: Option<Spanned<Vec<Window>>>,
}

/// A rule.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) action: String,
    pub(super) only: BTreeMap<String, Vec<Value>>,
    /// How often and when, if it allows.
    pub(super) limits: Limits,
    /// Where in the file it begins, in bytes.
    pub(super) place: usize,
}

impl Written {
    /// The rule as one that denies: it always holds.
    pub(super) fn deny(self) -> Result<Rule, (usize, String)> {
        let per_hour = self.per_hour.as_ref().map(|it| (it.span(), "per_hour"));
        let windows = self.windows.as_ref().map(|it| (it.span(), "windows"));
        if let Some((span, key)) = per_hour.or(windows) {
            let why = format!("a rule that denies always holds: it has no `{key}`");
            return Err((span.start, why));
        }
        self.allow()
    }

    /// The rule as one that allows, or what is wrong with it and where in the file, in bytes.
    pub(super) fn allow(self) -> Result<Rule, (usize, String)> {
        let Self {
            action,
            only,
            per_hour,
            windows,
        } = self;
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
        let limits = check_limits(&action, per_hour, windows)?;
        let rule = Rule {
            only: only.collect(),
            action,
            limits,
            place: at,
        };
        rule.check().map(|()| rule).map_err(|why| (at, why))
    }
}

fn check_limits(
    action: &str,
    per_hour: Option<Spanned<u32>>,
    windows: Option<Spanned<Vec<Window>>>,
) -> Result<Limits, (usize, String)> {
    let spans = per_hour.as_ref().map(Spanned::span);
    let spans = spans.or_else(|| windows.as_ref().map(Spanned::span));
    if let Some(span) = spans {
        let mut meant = CATALOGUE.iter().filter(|row| glob(action, row.name));
        let free = |class, name| class == Class::Observing && !MUST_BE_LISTED.contains(&name);
        if meant.all(|row| free(row.class, row.name)) {
            let why = format!("`{action}` only looks and needs no rule, so nothing limits it");
            return Err((span.start, why));
        }
    }
    if let Some(rate) = &per_hour
        && !(1..=MOST_PER_HOUR).contains(rate.get_ref())
    {
        let why = format!(
            "`per_hour` is from 1 to {MOST_PER_HOUR}; without it there is no limit, and \
             `[[deny]]` is for what must never be"
        );
        return Err((rate.span().start, why));
    }
    if let Some(windows) = &windows
        && windows.get_ref().is_empty()
    {
        let why = "`windows` is empty, so that the rule allows nothing: leave it out, or list one";
        return Err((windows.span().start, why.to_owned()));
    }
    Ok(Limits {
        per_hour: per_hour.map(Spanned::into_inner),
        windows: windows.map(Spanned::into_inner).unwrap_or_default(),
    })
}

impl Rule {
    /// What its attempts are counted under. Other limits leave it as it is; another action or other
    /// arguments begin a new count.
    pub(super) fn id(&self) -> Digest {
        let what = serde_json::to_vec(&(&self.action, &self.only));
        Digest::of(&what.expect("a rule is plain data"))
    }

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
    pub(super) fn denies(&self, name: &str, args: &Value, names: &Names) -> bool {
        glob(&self.action, name)
            && self.only.iter().all(|(argument, denied)| {
                values_of(name, args, argument)
                    .into_iter()
                    .any(|value| is_any_of(argument, value, denied, names))
            })
    }

    /// The arguments that speak against this rule, as one that allows; none if it allows the
    /// action. `None` if it is about other actions.
    pub(super) fn misfits<'a>(&'a self, name: &str, args: &'a Value) -> Option<Vec<&'a str>> {
        if !glob(&self.action, name) {
            return None;
        }
        let unfit = self.only.iter().filter(|(argument, allowed)| {
            !values_of(name, args, argument)
                .into_iter()
                .all(|value| is_one_of(argument, value, allowed))
        });
        let mut unfit: Vec<&str> = unfit.map(|(argument, _)| argument.as_str()).collect();
        // A secret goes nowhere, a command of a copy does not run, and what reaches further than an
        // action's name says does not happen, but where a rule says so.
        let named = with_secrets(name, args).into_iter();
        let named = named
            .chain(with_commands(name, args))
            .chain(reaching(name, args));
        unfit.extend(named.filter(|argument| !self.only.contains_key(*argument)));
        Some(unfit)
    }

    /// What to change so that this rule allows what it does not allow now.
    pub(super) fn refusal(&self, name: &str, args: &Value, misfits: &[&str]) -> String {
        if !misfits
            .iter()
            .any(|argument| self.only.contains_key(*argument))
        {
            let one =
                |argument: &&str| format!("`{argument} = [{}]`", pinned(name, args, argument));
            let add = if self.action == name {
                let all: Vec<String> = misfits.iter().map(one).collect();
                format!("{} to its `where`", all.join(" and "))
            } else {
                format!("to it:\n{}", rule_for(name, args))
            };
            return format!(
                "allows `{}`, but lists nothing for `{}`, and what the plan has there must be \
                 listed; if it is right on this host, add {add}",
                self.action,
                misfits.join("`, `")
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
            let value = short(&value.map_or_else(|| DEFAULT.into(), literal));
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

    /// Whether it allows an action with these arguments, at some time.
    pub(super) fn allows(&self, name: &str, args: &Value) -> bool {
        self.misfits(name, args)
            .is_some_and(|unfit| unfit.is_empty())
    }

    /// The arguments and times that it holds for; empty if it holds for all.
    pub(super) fn describe(&self) -> String {
        let one = |(argument, values): (&String, &Vec<Value>)| {
            let values: Vec<String> = values.iter().map(short).collect();
            format!("{argument}: {}", values.join(" | "))
        };
        let arguments = self.only.iter().map(one);
        arguments
            .chain(self.limits.describe())
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// The values of an argument. A chain of requests has one for each of them: what holds for the
/// first request holds for those that follow and those that clean up.
pub(super) fn values_of<'a>(name: &str, args: &'a Value, argument: &str) -> Vec<Option<&'a Value>> {
    let mut values = vec![args.get(argument)];
    if name == "check.http" && OF_REQUESTS.contains(&argument) {
        let more = REQUESTS
            .into_iter()
            .filter_map(|list| args[list].as_array());
        values.extend(more.flatten().map(|request| request.get(argument)));
    }
    values
}

/// Arguments that hold further requests of a chain.
const REQUESTS: [&str; 2] = ["then", "cleanup"];

/// Arguments that each request of a chain has.
const OF_REQUESTS: [&str; 5] = ["url", "method", "headers", "form", "json"];

/// Arguments that point at what the server is to run, where the plan has them: an archive holds
/// statements.
const POINTING: [(&str, &str); 1] = [("postgres.verify_backup", "from")];

/// Values with which an action does what another one is for: a rule that says nothing of them does
/// not mean them.
const REACHING: [(&str, &str, &str); 3] = [
    // It puts another database into the place of this one.
    ("migration.apply", "undo_by", "restore"),
    // It stops the server, and takes all of its databases back.
    ("migration.apply", "undo_by", "recover"),
    // It ends other people's sessions.
    ("migration.apply", "on_long_tx", "end"),
];

/// The arguments with such a value.
fn reaching<'a>(name: &str, args: &Value) -> impl Iterator<Item = &'a str> {
    let has = |(action, argument, value): &(&str, &'static str, &str)| {
        (*action == name && args[*argument] == *value).then_some(*argument)
    };
    let is_there = |(action, argument): &(&str, &'static str)| {
        (*action == name && !args[*argument].is_null()).then_some(*argument)
    };
    let reaching = REACHING.iter().filter_map(has);
    let pointing = POINTING.iter().filter_map(is_there);
    reaching.chain(pointing).collect::<Vec<_>>().into_iter()
}

/// The arguments that hold a secret, each once. Those of a chain's requests are the requests' own.
fn with_secrets<'a>(name: &str, args: &'a Value) -> Vec<&'a str> {
    let arguments = args.as_object().into_iter().flatten();
    let mut found: Vec<&str> = vec![];
    for (argument, value) in arguments.filter(|(_, value)| has_secret(value)) {
        if name == "check.http" && REQUESTS.contains(&argument.as_str()) {
            let requests = value.as_array().into_iter().flatten();
            let parts = requests.filter_map(Value::as_object).flatten();
            let parts = parts.filter(|(_, value)| has_secret(value));
            found.extend(parts.map(|(part, _)| part.as_str()));
        } else {
            found.push(argument);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The argument that holds commands beside others that are none; of actions whose arguments are a
/// command, the rule for the action is enough.
fn with_commands<'a>(name: &str, args: &'a Value) -> Option<&'a str> {
    let (argument, copies) = args.as_object()?.get_key_value("copies")?;
    let is_command = copies.as_array()?.iter().any(Value::is_object);
    (name == "postgres.backup" && is_command).then_some(argument)
}

fn has_secret(value: &Value) -> bool {
    match value {
        Value::String(text) => text.starts_with(SECRET),
        Value::Array(items) => items.iter().any(has_secret),
        Value::Object(fields) => fields.values().any(has_secret),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
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

/// A rule that allows an action with these arguments and with no others, as TOML.
pub(super) fn rule_for(name: &str, args: &Value) -> String {
    let lines = arguments::of(name)
        .iter()
        .map(|argument| format!("\n{argument} = [{}]", pinned(name, args, argument)));
    let lines: String = lines.collect();
    format!("[[allow]]\naction = \"{name}\"\n[allow.where]{lines}")
}

/// What a rule lists that allows an argument as it is.
fn pinned(name: &str, args: &Value, argument: &str) -> String {
    let mut listed: Vec<String> = vec![];
    for value in values_of(name, args, argument) {
        let value = toml(&value.map_or_else(|| DEFAULT.into(), literal));
        if !listed.contains(&value) {
            listed.push(value);
        }
    }
    listed.join(", ")
}
