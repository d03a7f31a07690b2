//! Whether a value is one that a rule lists.

use serde_json::Value;

use super::names::{Names, leads_away};
use super::rule::SECRET;
use super::{DEFAULT, url};

/// What a rule does. A value that may be read in two ways is not allowed, and is denied; so is one
/// that has another name on this host.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way<'a> {
    Allow,
    Deny(&'a Names),
}

/// Whether a value is one of those listed; a list also if each of its items is.
pub(super) fn is_one_of(argument: &str, value: Option<&Value>, listed: &[Value]) -> bool {
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

/// Whether a value, or one item of it, is among those listed, perhaps by another spelling or name.
pub(super) fn is_any_of(
    argument: &str,
    value: Option<&Value>,
    listed: &[Value],
    names: &Names,
) -> bool {
    let fits_some = |value| fits_some(argument, value, listed, Way::Deny(names));
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

fn fits_some(argument: &str, value: Option<&Value>, listed: &[Value], way: Way<'_>) -> bool {
    listed.iter().any(|pattern| match (pattern, value) {
        (pattern, None) => pattern == DEFAULT,
        (Value::String(pattern), Some(Value::String(text))) => match argument {
            "url" => url::fits(pattern, text, way),
            "service" => match way {
                Way::Allow => fits_text(pattern, text, way),
                // With and without the suffix: `web.*` denies `web.service` too.
                Way::Deny(names) => names.of_unit(text).iter().any(|name| {
                    stands_for(pattern, name, way)
                        || stands_for(unsuffixed(pattern), unsuffixed(name), way)
                }),
            },
            _ => fits_text(pattern, text, way),
        },
        (pattern, Some(value)) => fits(pattern, value, way),
    })
}

/// The name of a unit as most people write it.
pub(super) fn unsuffixed(service: &str) -> &str {
    service.strip_suffix(".service").unwrap_or(service)
}

fn fits_text(pattern: &str, text: &str, way: Way<'_>) -> bool {
    if url::is_url(pattern) {
        return url::is_url(text) && url::fits(pattern, text, way);
    }
    // `*` stands for any text, and allows nothing that is put in for it.
    let secret = text.starts_with(SECRET) && !pattern.starts_with(SECRET);
    match way {
        Way::Allow => stands_for(pattern, text, way) && !secret && !leads_away(pattern, text),
        Way::Deny(names) => stands_for(pattern, text, way) || names.are_same_file(pattern, text),
    }
}

fn fits(pattern: &Value, value: &Value, way: Way<'_>) -> bool {
    let fits = |pattern: &Value, value: &Value| fits(pattern, value, way);
    match (pattern, value) {
        (Value::String(pattern), Value::String(text)) => fits_text(pattern, text, way),
        // A file of rules knows no other word for nothing.
        (Value::String(pattern), Value::Null) => pattern == DEFAULT,
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
pub(super) fn stands_for(pattern: &str, text: &str, way: Way<'_>) -> bool {
    let climbs = text.split(['/', '=', ':']).any(|part| part == "..");
    match way {
        Way::Allow if climbs => pieces(pattern).len() == 1 && glob(pattern, text),
        Way::Allow => glob(pattern, text),
        // Where a path with `..` leads, only the file system knows.
        Way::Deny(_) => {
            (climbs && pattern.contains(['/', '*']))
                || glob(pattern, text)
                || glob(pattern, &plain(text))
        }
    }
}

/// A path as it is written without detours that lead nowhere: `//` and `/./`.
pub(super) fn plain(path: &str) -> String {
    let mut parts = path.split('/');
    let first = parts.next().filter(|first| *first != ".");
    let parts = parts.filter(|part| !matches!(*part, "" | "."));
    let parts: Vec<&str> = first.into_iter().chain(parts).collect();
    parts.join("/")
}

/// `*` stands for anything, and `\*` for itself.
pub(super) fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pieces(pattern);
    let tail = parts.pop().expect("a pattern has at least one piece");
    let mut parts = parts.into_iter();
    let Some(head) = parts.next() else {
        return tail == text;
    };
    let Some(mut text) = text.strip_prefix(&*head) else {
        return false;
    };
    for part in parts {
        let Some(at) = text.find(&*part) else {
            return false;
        };
        text = &text[at + part.len()..];
    }
    text.ends_with(&*tail)
}

/// What a pattern says literally, before, between and after each `*`.
pub(super) fn pieces(pattern: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        let piece = pieces.last_mut().expect("there is one from the start");
        if let Some(after) = rest.strip_prefix(r"\*") {
            piece.push('*');
            rest = after;
            continue;
        }
        if c == '*' {
            pieces.push(String::new());
        } else {
            piece.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    pieces
}

/// The pattern that stands for a value and for nothing else.
pub(super) fn literal(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace('*', r"\*")),
        Value::Array(items) => items.iter().map(literal).collect(),
        Value::Object(fields) => {
            let fields = fields.iter();
            let fields = fields.map(|(name, value)| (name.clone(), literal(value)));
            Value::Object(fields.collect())
        }
        Value::Null => DEFAULT.into(),
        Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}
