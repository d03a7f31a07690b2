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
//! lets `..` through); in lists of words a last `**` stands for any further words. A command may be given by its words
//! alone. `(default)` stands for an argument that the plan leaves out.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::{Action, CATALOGUE, Class};
use serde::Deserialize;
use serde_json::Value;

use crate::process::head;

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
    #[error("the policy {path} is not valid: {why}")]
    Rule {
        /// The file.
        path: PathBuf,
        /// Which rule and why.
        why: String,
    },
    /// Others than its owner could change it.
    #[error("{0}")]
    Unsafe(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    allow: Vec<Rule>,
    #[serde(default)]
    deny: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    action: String,
    #[serde(default, rename = "where")]
    only: BTreeMap<String, Vec<Value>>,
}

/// What the host allows.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    path: PathBuf,
    exists: bool,
    rules: File,
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

    fn parse(path: &Path, text: &str) -> Result<Self, PolicyError> {
        let path = path.to_owned();
        let rules: File = toml::from_str(text).map_err(|source| PolicyError::Parse {
            path: path.clone(),
            source: Box::new(source),
        })?;
        for rule in rules.allow.iter().chain(&rules.deny) {
            if let Err(why) = rule.check() {
                return Err(PolicyError::Rule { path, why });
            }
        }
        Ok(Self {
            path,
            exists: true,
            rules,
        })
    }

    /// Whether there is a file.
    pub(crate) fn exists(&self) -> bool {
        self.exists
    }

    /// Refuses what is not allowed, saying what to add to the file.
    pub(crate) fn check(&self, action: &Action) -> Result<(), String> {
        let (name, args) = (action.name(), action.args());
        let file = self.path.display();
        if let Some(rule) = self
            .rules
            .deny
            .iter()
            .find(|r| r.mismatch(name, &args).is_ok())
        {
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
        let mut nearest = None;
        for rule in &self.rules.allow {
            match rule.mismatch(name, &args) {
                Ok(()) => return Ok(()),
                Err(Mismatch::Name) => {}
                Err(Mismatch::Argument(argument)) => nearest = Some((rule, argument)),
            }
        }
        Err(match nearest {
            Some((rule, argument)) => format!(
                "{file} allows `{}` only with other values of `{argument}`; if it is right on this \
                 host, add {} to `{argument}` there",
                rule.action,
                args.get(&argument)
                    .map_or_else(|| format!("\"{DEFAULT}\""), short),
            ),
            None if self.exists => format!(
                "{file} does not allow `{name}`; if it is right on this host, add {}",
                line_for(name, &args)
            ),
            None => format!(
                "this host has no policy, so only probes are allowed; if `{name}` is right here, \
                 write {} into {file}",
                line_for(name, &args)
            ),
        })
    }

    /// For each action that hosts carry out, what the policy says of it.
    pub(crate) fn overview(&self) -> Vec<(&'static str, String)> {
        let on_hosts = CATALOGUE
            .iter()
            .filter(|row| row.site == lockstep_proto::action::Site::Host);
        on_hosts
            .map(|row| {
                let denied = |rule: &&Rule| glob(&rule.action, row.name) && rule.only.is_empty();
                let rules = self
                    .rules
                    .allow
                    .iter()
                    .filter(|r| glob(&r.action, row.name));
                let limits: Vec<String> = rules.map(Rule::limits).collect();
                let says = if self.rules.deny.iter().any(|rule| denied(&rule)) {
                    "denied".to_owned()
                } else if row.class == Class::Observing && !MUST_BE_LISTED.contains(&row.name) {
                    "allowed (it only looks)".to_owned()
                } else if limits.is_empty() {
                    "not allowed".to_owned()
                } else if limits.iter().any(String::is_empty) {
                    "allowed".to_owned()
                } else {
                    format!("allowed with {}", limits.join(", or with "))
                };
                (row.name, says)
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

enum Mismatch {
    Name,
    Argument(String),
}

impl Rule {
    fn check(&self) -> Result<(), String> {
        if !CATALOGUE.iter().any(|row| glob(&self.action, row.name)) {
            return Err(format!("there is no action `{}`", self.action));
        }
        if let Some(commands) = self.only.get("argv")
            && !commands.iter().all(Value::is_array)
        {
            return Err(format!(
                "`argv` of `{}` lists commands, each a list of words: [[\"/usr/bin/true\"]]",
                self.action
            ));
        }
        Ok(())
    }

    fn mismatch(&self, name: &str, args: &Value) -> Result<(), Mismatch> {
        if !glob(&self.action, name) {
            return Err(Mismatch::Name);
        }
        for (argument, allowed) in &self.only {
            let fits = match args.get(argument) {
                Some(value) => is_one_of(value, allowed, argument != "argv"),
                None => allowed.iter().any(|value| value == DEFAULT),
            };
            if !fits {
                return Err(Mismatch::Argument(argument.clone()));
            }
        }
        Ok(())
    }

    fn limits(&self) -> String {
        let one = |(argument, values): (&String, &Vec<Value>)| {
            let values: Vec<String> = values.iter().map(short).collect();
            format!("{argument}: {}", values.join(" | "))
        };
        self.only.iter().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// Whether a value is one of those listed; a list also if each of its items is.
fn is_one_of(value: &Value, allowed: &[Value], by_item: bool) -> bool {
    if allowed.iter().any(|pattern| fits(pattern, value)) {
        return true;
    }
    match value {
        Value::Array(items) if by_item => items
            .iter()
            .all(|item| allowed.iter().any(|pattern| fits(pattern, item))),
        _ => false,
    }
}

fn fits(pattern: &Value, value: &Value) -> bool {
    match (pattern, value) {
        (Value::String(pattern), Value::String(text)) => glob(pattern, text),
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
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    if text.split(['/', '=', ':']).any(|part| part == "..") {
        return false;
    }
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

fn short(value: &Value) -> String {
    let text = value.to_string();
    match head(&text, 160) {
        cut if cut.len() < text.len() => format!("{cut}…"),
        _ => text,
    }
}

/// A rule that would allow an action, narrowed to what it acts on.
fn line_for(name: &str, args: &Value) -> String {
    let narrow = [
        "database", "service", "app", "path", "argv", "url", "address",
    ];
    let only: Vec<String> = narrow
        .iter()
        .filter_map(|argument| Some(format!("{argument} = [{}]", short(args.get(argument)?))))
        .collect();
    match only.as_slice() {
        [] => format!("`[[allow]] action = \"{name}\"`"),
        only => format!(
            "`[[allow]] action = \"{name}\", where = {{ {} }}`",
            only.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn action(name: &str, args: Value) -> Action {
        Action::deserialize_args(name, args).unwrap().unwrap()
    }

    fn policy(text: &str) -> Policy {
        Policy::parse(Path::new("/etc/lockstep/policy.toml"), text).unwrap()
    }

    #[test]
    fn without_a_policy_only_probes_that_run_nothing_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let none = Policy::load(&dir.path().join("policy.toml")).unwrap();
        assert!(!none.exists());
        let allowed = action("check.disk", json!({"path": "/", "free": "1GiB"}));
        assert_eq!(none.check(&allowed), Ok(()));
        for (name, args) in [
            ("check.command", json!({"argv": ["true"]})),
            ("check.sql", json!({"database": "d", "sql": "select 1"})),
            ("check.log", json!({"path": "/etc/shadow"})),
            ("service.stop", json!({"service": "web"})),
            ("exec.run", json!({"name": "x", "argv": ["true"]})),
            ("check.http", json!({"url": "http://localhost"})),
        ] {
            let refusal = none.check(&action(name, args)).unwrap_err();
            assert!(
                refusal.contains(name) && refusal.contains("[[allow]]"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn a_rule_allows_only_the_values_it_lists() {
        let policy =
            policy("[[allow]]\naction = 'service.*'\nwhere = { service = ['employee-*', 'web'] }");
        let stop = |service: &str| action("service.stop", json!({"service": service}));
        assert_eq!(policy.check(&stop("employee-backend")), Ok(()));
        assert_eq!(policy.check(&stop("web")), Ok(()));
        let refusal = policy.check(&stop("sshd")).unwrap_err();
        assert!(
            refusal.contains("`service`") && refusal.contains("\"sshd\""),
            "{refusal}"
        );
        let other = action("release.previous", json!({"app": "x"}));
        assert_eq!(policy.check(&other), Ok(()), "it only looks");
    }

    #[test]
    fn an_argument_that_the_plan_leaves_out_is_its_default() {
        let policy = policy(
            "[[allow]]\naction = 'service.stop'\nwhere = { driver = ['(default)', 'process'] }",
        );
        let stop = |driver: Value| {
            let mut args = json!({"service": "web"});
            if !driver.is_null() {
                args["driver"] = driver;
            }
            policy.check(&action("service.stop", args))
        };
        assert_eq!(stop(Value::Null), Ok(()));
        assert_eq!(stop(json!("process")), Ok(()));
        assert!(stop(json!("command")).is_err());
    }

    #[test]
    fn deny_wins() {
        let policy = policy("[[allow]]\naction = '*'\n[[deny]]\naction = 'exec.*'");
        let run = action("exec.run", json!({"name": "x", "argv": ["true"]}));
        assert!(policy.check(&run).unwrap_err().contains("denies"));
        let stop = action("service.stop", json!({"service": "web"}));
        assert_eq!(policy.check(&stop), Ok(()));
    }

    #[test]
    fn commands_are_listed_word_by_word() {
        let policy = policy(
            "[[allow]]\naction = 'exec.run'\n[allow.where]\n\
             argv = [['/usr/bin/python3', 'scripts/*.py'], ['npm', 'run', '**']]",
        );
        let run =
            |argv: &[&str]| policy.check(&action("exec.run", json!({"name": "x", "argv": argv})));
        assert_eq!(run(&["/usr/bin/python3", "scripts/smoke.py"]), Ok(()));
        assert_eq!(run(&["npm", "run", "build", "--", "x"]), Ok(()));
        for bad in [
            &["/usr/bin/python3"][..],
            &["/usr/bin/python3", "scripts/smoke.py", "-c"],
            &["/usr/bin/python3", "scripts/../../tmp/x.py"],
            &["npm"],
            &["npm", "install"],
            &["scripts/x.py"],
        ] {
            assert!(run(bad).is_err(), "{bad:?}");
        }
        let flat = "[[allow]]\naction = 'exec.run'\nwhere = { argv = ['true', '*'] }";
        assert!(Policy::parse(Path::new("p"), flat).is_err());
    }

    #[test]
    fn every_build_command_must_be_listed() {
        let policy = policy(
            "[[allow]]\naction = 'release.build'\n[allow.where]\napp = ['web']\n\
             run = [['make', '**'], { argv = ['npm', 'ci'], in = 'frontend' }]",
        );
        let build = |run: Value| {
            let args = json!({"app": "web", "release": "v1", "run": run});
            policy.check(&action("release.build", args))
        };
        let make = json!({"argv": ["make", "all"], "in": "backend"});
        let npm = json!({"argv": ["npm", "ci"], "in": "frontend"});
        assert_eq!(build(json!([make, npm])), Ok(()));
        assert!(build(json!([make, {"argv": ["npm", "ci"]}])).is_err());
        assert!(build(json!([make, {"argv": ["curl", "x"]}])).is_err());
    }

    #[test]
    fn a_rule_for_no_action_is_an_error() {
        for bad in [
            "[[allow]]\naction = 'servce.stop'",
            "[[alow]]\naction = '*'",
            "allow = 1",
        ] {
            assert!(Policy::parse(Path::new("p"), bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_policy_that_others_can_write_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.toml");
        std::fs::write(&path, "[[allow]]\naction = '*'").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        mode(0o644);
        assert!(Policy::load(&path).is_ok());
        for unsafe_mode in [0o664, 0o646] {
            mode(unsafe_mode);
            let error = Policy::load(&path).unwrap_err().to_string();
            assert!(error.contains("chmod"), "{error}");
        }
    }
}
