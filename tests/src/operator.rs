//! People at their command line: `lockstep` with somebody's profile.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::daemon::PATH;
use crate::wait;

/// A person with a certificate.
#[derive(Debug, Clone)]
pub struct Operator {
    /// The name in the certificate.
    pub name: String,
    /// The groups in it.
    pub groups: Vec<String>,
    /// The binary.
    pub binary: PathBuf,
    /// The profile: controller, trust anchor, certificate and key.
    pub profile: PathBuf,
}

/// What a command said.
#[derive(Debug, Clone)]
pub struct Said {
    /// The exit code; 128 and above for signals.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// Talk.
    pub stderr: String,
}

impl Said {
    /// Everything, for messages.
    pub fn text(&self) -> String {
        format!("exit code {}\n{}{}", self.code, self.stdout, self.stderr)
    }
}

/// The states in which a rollout has ended.
const ENDS: [&str; 5] = ["succeeded", "partial", "rolled_back", "halted", "cancelled"];

impl Operator {
    /// The command with its profile, ready for arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .env_clear()
            .env("PATH", PATH)
            .env("NO_COLOR", "1")
            .env(
                "HOME",
                self.profile.parent().unwrap_or_else(|| Path::new("/")),
            )
            .env("LOCKSTEP_PROFILE", &self.profile)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Said> {
        let output = self
            .command()
            .args(arguments)
            .output()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        Ok(Said {
            code: output.status.code().unwrap_or(128),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command that must succeed, and reads its JSON.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value> {
        let mut all: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
        all.extend(["--output".as_ref(), "json".as_ref()] as [&OsStr; 2]);
        let said = self.run(&all)?;
        ensure!(said.code == 0, "lockstep {}: {}", words(&all), said.text());
        serde_json::from_str(&said.stdout)
            .with_context(|| format!("lockstep {} printed no JSON: {}", words(&all), said.stdout))
    }

    /// Submits a plan and comes back with the rollout's id at once.
    pub fn submit(&self, plan: &Path, inputs: &[(&str, &str)]) -> Result<String> {
        let mut arguments = vec!["apply".to_owned(), plan.display().to_string()];
        arguments.push("--detach".to_owned());
        for (name, value) in inputs {
            arguments.push("--input".to_owned());
            arguments.push(format!("{name}={value}"));
        }
        let answer = self.json(&arguments)?;
        match answer["rollout"].as_str() {
            Some(rollout) => Ok(rollout.to_owned()),
            None => bail!("`lockstep apply` named no rollout: {answer}"),
        }
    }

    /// A rollout as its document stands.
    pub fn rollout(&self, rollout: &str) -> Result<Value> {
        self.json(&["status", rollout])
    }

    /// The state of a rollout and why, once it has ended; before, what it is at.
    pub fn ended(&self, rollout: &str) -> Result<Result<Value, String>> {
        let document = self.rollout(rollout)?;
        let state = text(&document["state"]);
        if ENDS.contains(&state) {
            return Ok(Ok(document));
        }
        let last = document["events"]
            .as_array()
            .and_then(|events| events.last());
        Ok(Err(format!(
            "{state}; {}",
            last.map_or("", |event| text(&event["message"]))
        )))
    }

    /// Waits until a rollout has ended. The controller may be away meanwhile.
    pub fn wait(&self, rollout: &str, bound: Duration) -> Result<Value> {
        wait::until(&format!("rollout {rollout} to end"), bound, || {
            self.ended(rollout)
                .unwrap_or_else(|error| Err(format!("{error:#}")))
        })
    }

    /// The gates of a rollout that wait for people.
    pub fn open_gates(&self, rollout: &str) -> Result<Vec<Gate>> {
        Ok(gates(&self.rollout(rollout)?))
    }

    /// Approves a gate, or confirms all of a checklist.
    pub fn approve(&self, rollout: &str, gate: &Gate, comment: &str) -> Result<Said> {
        let command = if gate.items.is_empty() {
            "approve"
        } else {
            "confirm"
        };
        self.run(&[
            command,
            rollout,
            "--gate",
            &gate.at,
            "--comment",
            comment,
            "--yes",
        ])
    }
}

/// A gate that waits for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// `<phase>.<step>`.
    pub at: String,
    /// The phase's name.
    pub phase: String,
    /// The action.
    pub action: String,
    /// What a checklist asks to confirm.
    pub items: Vec<String>,
    /// The groups that may decide; empty means anybody.
    pub groups: Vec<String>,
    /// What is still missing.
    pub missing: String,
}

/// The gates of a rollout's document that wait for people.
pub fn gates(document: &Value) -> Vec<Gate> {
    let mut open = vec![];
    for (phase, step) in steps(document) {
        let gate = &step["gate"];
        let waits = gate.is_object() && gate["closed"].is_null();
        let action = text(&step["action"]);
        if waits && matches!(action, "gate.approval" | "gate.checklist") {
            open.push(Gate {
                at: text(&step["at"]).to_owned(),
                phase: text(&phase["name"]).to_owned(),
                action: action.to_owned(),
                items: list(&gate["items"])
                    .map(|item| text(item).to_owned())
                    .collect(),
                groups: match &step["args"]["from"] {
                    Value::String(group) => vec![group.clone()],
                    Value::Object(groups) => groups.keys().cloned().collect(),
                    _ => vec![],
                },
                missing: text(&gate["missing"]).to_owned(),
            });
        }
    }
    open
}

/// Every step of a rollout's document with its phase.
pub fn steps(document: &Value) -> impl Iterator<Item = (&Value, &Value)> {
    list(&document["phases"]).flat_map(|phase| list(&phase["steps"]).map(move |step| (phase, step)))
}

/// The attempts at an action, over all hosts, in the order of the document.
pub fn attempts<'a>(document: &'a Value, action: &str) -> Vec<&'a Value> {
    steps(document)
        .filter(|(_, step)| text(&step["action"]) == action)
        .flat_map(|(_, step)| list(&step["attempts"]))
        .collect()
}

/// The elements of an array; none of anything else.
pub fn list(value: &Value) -> std::slice::Iter<'_, Value> {
    value
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
}

/// A string; empty for anything else.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn words(arguments: &[&OsStr]) -> String {
    let words: Vec<_> = arguments
        .iter()
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}

/// Answers every gate of a rollout until it ends, as people would: whoever may, approves.
/// `tell` hears of each decision.
pub fn answer_gates(
    people: &[&Operator],
    rollout: &str,
    bound: Duration,
    mut tell: impl FnMut(&Operator, &Gate),
) -> Result<Value> {
    let watcher = people.first().context("nobody is there to approve")?;
    let mut refused = String::new();
    wait::until(&format!("rollout {rollout} to end"), bound, || {
        let seen = match watcher.ended(rollout) {
            Ok(Ok(document)) => return Ok(document),
            Ok(Err(seen)) => seen,
            Err(error) => format!("{error:#}"),
        };
        for gate in watcher.open_gates(rollout).unwrap_or_default() {
            let may = |person: &&&Operator| {
                gate.groups.is_empty()
                    || gate
                        .groups
                        .iter()
                        .any(|group| person.groups.contains(group))
            };
            for person in people.iter().filter(may) {
                match person.approve(rollout, &gate, "checked by eye") {
                    Ok(said) if said.code == 0 => tell(person, &gate),
                    Ok(said) => refused = said.text(),
                    Err(error) => refused = format!("{error:#}"),
                }
                let still = watcher.open_gates(rollout).unwrap_or_default();
                if !still.iter().any(|other| other.at == gate.at) {
                    break;
                }
            }
        }
        Err(format!("{seen}; last refused decision: {refused}"))
    })
}
