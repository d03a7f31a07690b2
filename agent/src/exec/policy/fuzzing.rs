//! For fuzzers: what must hold of a policy, whatever stands in it (INV-9).

use std::path::Path;

use http::Uri;
use lockstep_proto::action::Action;
use lockstep_proto::ids::BootId;
use lockstep_proto::values::{Period, Timestamp};
use serde_json::Value;

use super::limits::{Begun, Moment};
use super::matching::{glob, is_any_of, is_one_of, pieces};
use super::names::Names;
use super::rule::{SECRET, values_of};
use super::{DEFAULT, Policy, Refused, is_harmless, url};

/// What parts the policy from actions that are held against it, one on each line: its name and its
/// arguments as JSON.
const ACTIONS: &str = "\n%%\n";

/// A policy, and actions that it is asked about.
pub fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (written, asked) = text.split_once(ACTIONS).unwrap_or((text, ""));
    let read = || {
        let policy = Policy::parse(Path::new("policy.toml"), written);
        policy.map(|policy| Policy {
            names: no_names(),
            ..policy
        })
    };
    let Ok(policy) = read() else {
        return;
    };
    let mut without_allow = read().expect("it was read before");
    without_allow.rules.allow.clear();
    let mut without_deny = read().expect("it was read before");
    without_deny.rules.deny.clear();
    let last_line = written.matches('\n').count() + 1;
    for rule in policy.rules.allow.iter().chain(&policy.rules.deny) {
        assert!((1..=last_line).contains(&policy.line_of(rule)));
    }
    policy.overview();

    let asked: Vec<Action> = asked
        .lines()
        .chain(ASKED.lines())
        .filter_map(read_action)
        .collect();
    let now = Moment {
        wall: Timestamp(1_800_000_000_000),
        uptime: Period::seconds(5000),
        boot: BootId::from_bytes([7; 8]),
    };
    for action in &asked {
        let allowed = policy.check(action);
        let words = policy.explain(action);
        let admitted = policy.admit(action, &Begun::default(), &now);
        let at_some_time = !matches!(admitted, Err(Refused::Never(_)));
        assert_eq!(allowed.is_ok(), at_some_time, "{words}");
        policy.limits_asking(action);

        let harmless = is_harmless(action);
        assert!(harmless || without_allow.check(action).is_err());
        if allowed.is_err() {
            continue;
        }
        // What denies takes away, and nothing else.
        assert!(without_deny.check(action).is_ok());
        assert!(policy.denied_by(action.name(), &action.args()).is_none());
        // One rule by itself is enough, or there is none.
        let enough = policy
            .rules
            .allow
            .iter()
            .any(|rule| rule.allows(action.name(), &action.args()));
        assert!(harmless || enough, "{action:?}");
        check_url(action);
    }
    let together: Vec<&Action> = asked.iter().collect();
    for (place, _) in policy.never(&together, now.wall, now.wall.plus(Period::seconds(3600))) {
        assert!(!is_harmless(together[place]));
    }
}

/// Actions that every policy is asked about.
const ASKED: &str = r#"exec.run {"name":"x","argv":["/bin/sh","-c","id"]}
exec.run {"name":"x","argv":["/usr/bin/true"],"env":{"A":"secret://x"}}
service.stop {"service":"sshd"}
service.restart {"service":"a/../b.service","driver":"process"}
env.render {"path":"/etc/../etc/shadow","values":{"A":"secret://x"}}
postgres.restore {"database":"employee_system"}
check.http {"url":"http://a:80@evil.test:80/x"}
check.http {"url":"http://app-1:8000/","then":[{"url":"http://evil.test/"}],"cleanup":[{"url":"http://x/../"}]}
check.command {"argv":["/bin/sh"],"env":{"A":"secret://x"}}
check.log {"path":"/etc/shadow"}
check.disk {"path":"/","free":"1GiB"}"#;

fn read_action(line: &str) -> Option<Action> {
    let (name, args) = line.split_once(' ')?;
    let args: Value = serde_json::from_str(args).ok()?;
    Action::deserialize_args(name, args)?.ok()
}

/// What was allowed to ask a URL is asked there by the client, and nowhere else.
fn check_url(action: &Action) {
    let args = action.args();
    for value in values_of(action.name(), &args, "url").into_iter().flatten() {
        let text = value.as_str().unwrap_or_default();
        assert!(!url::names_a_user(text), "{text}");
        same_host(text);
    }
}

/// A pattern of a rule and a value that is held against it, parted by a line break; an `argument`
/// name may stand before both.
pub fn policy_patterns(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let parts: Vec<&str> = text.splitn(3, '\n').collect();
    let (argument, pattern, text) = match parts[..] {
        [pattern, text] => ("path", pattern, text),
        [argument, pattern, text] => (argument, pattern, text),
        _ => return,
    };
    assert_eq!(
        glob(pattern, text),
        globbed(pattern, text),
        "{pattern:?} {text:?}"
    );
    same_host(text);
    // Also as JSON, for commands and maps.
    let value = |text: &str| serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
    let listed = [value(pattern)];
    let names = no_names();
    for value in [Value::from(text), value(text)] {
        let allows = is_one_of(argument, Some(&value), &listed);
        let denies = is_any_of(argument, Some(&value), &listed, &names);
        let empty = value.as_array().is_some_and(Vec::is_empty);
        // What a pattern would allow it denies too: it never means less when it denies.
        assert!(!allows || denies || empty, "{argument} {listed:?} {value}");
        let Some(text) = value.as_str().filter(|_| allows && argument != "url") else {
            continue;
        };
        let other = |pattern: &&str| pieces(pattern) != [text];
        let Some(pattern) = listed[0].as_str().filter(other) else {
            continue;
        };
        // What follows `#` is never sent.
        let sent = text.split('#').next().filter(|_| url::is_url(text));
        let mut parts = sent.unwrap_or(text).split(['/', '=', ':']);
        let climbs = parts.any(|part| part == "..");
        assert!(!climbs, "{pattern:?} lets {text:?} through");
        let is_secret = text.starts_with(SECRET) && !pattern.starts_with(SECRET);
        assert!(!is_secret, "{pattern:?} lets {text:?} through");
        assert!(pattern.contains('*') || url::is_url(pattern) || argument == "service");
    }
    assert_eq!(
        is_one_of(argument, None, &listed),
        listed[0] == DEFAULT,
        "an argument that is left out is its default"
    );
}

/// Whatever is read out of a URL here is read out of it by the client too.
fn same_host(text: &str) {
    let Some((scheme, host, port)) = url::read_for_fuzzing(text) else {
        return;
    };
    let asked = text.split_once('#').map_or(text, |(url, _)| url);
    let Ok(uri) = asked.parse::<Uri>() else {
        return;
    };
    let authority = uri.authority().expect("it has a host");
    assert_eq!(uri.scheme_str(), Some(scheme), "{text}");
    assert_eq!(authority.host().to_ascii_lowercase(), host, "{text}");
    let usual = if scheme == "https" { 443 } else { 80 };
    if let Ok(port) = port.parse::<u16>() {
        assert_eq!(authority.port_u16().unwrap_or(usual), port, "{text}");
    } else {
        assert!(authority.port_u16().is_none(), "{text}");
    }
    assert!(!authority.as_str().contains('@'), "{text}");
}

/// What `*` means, slowly: a row for each character of the pattern, a column for each of the text.
fn globbed(pattern: &str, text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let mut fits = vec![false; text.len() + 1];
    fits[0] = true;
    let mut signs = pattern.chars().peekable();
    while let Some(c) = signs.next() {
        // None is the sign that stands for anything.
        let c = match c {
            '*' => None,
            '\\' => Some(signs.next_if_eq(&'*').unwrap_or(c)),
            c => Some(c),
        };
        let mut next = vec![false; text.len() + 1];
        for at in 0..=text.len() {
            let before = at.checked_sub(1);
            next[at] = match (c, before) {
                (None, None) => fits[0],
                (None, Some(before)) => fits[at] || next[before],
                (Some(_), None) => false,
                (Some(c), Some(before)) => fits[before] && text[before] == c,
            };
        }
        fits = next;
    }
    fits[text.len()]
}

/// A host on which nothing has two names.
fn no_names() -> Names {
    Names {
        units: vec![],
        programs: vec![],
    }
}
