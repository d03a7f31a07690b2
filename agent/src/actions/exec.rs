//! Commands of the user's own, and commands that only look.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use lockstep_proto::action::exec::Run;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use regex::Regex;
use serde_json::Value;

use super::{Act, Done, Probe};
use crate::config::{App, Config};
use crate::process::{Ended, Program, base_env, head};
use crate::step::{Context, failure};

/// The longest line of output that stands in a report, in bytes.
const MAX_NOTE: usize = 300;

/// A command that was held against its expectations.
pub(crate) struct Ran {
    /// Whether it met them.
    pub(crate) met: bool,
    /// How it ended, in words.
    pub(crate) words: String,
    /// The last line of its standard output.
    pub(crate) last_line: String,
}

/// A command with what is expected of it.
pub(crate) struct Expected<'a> {
    /// The exit code.
    pub(crate) exit: i32,
    /// What standard output must match.
    pub(crate) matches: Option<&'a str>,
}

impl Expected<'_> {
    /// Reads the expression, before anything is run.
    pub(crate) fn pattern(&self) -> Result<Option<Regex>, Failure> {
        self.matches.map(pattern).transpose()
    }

    /// Holds what happened against it.
    pub(crate) fn hold(&self, pattern: Option<&Regex>, ended: &Ended) -> Ran {
        let mut lines = ended.stdout.lines().map(str::trim);
        let last_line = lines.rfind(|line| !line.is_empty()).unwrap_or_default();
        let words = if ended.code == self.exit {
            let unmatched = pattern.filter(|pattern| !pattern.is_match(&ended.stdout));
            unmatched.map(|pattern| format!("has output that does not match `{pattern}`"))
        } else {
            Some(format!("exited with {}, not {}", ended.code, self.exit))
        };
        Ran {
            met: words.is_none(),
            words: words.unwrap_or_else(|| format!("exited with {}", ended.code)),
            last_line: head(last_line, MAX_NOTE).to_owned(),
        }
    }
}

/// Reads a regular expression of a plan.
pub(crate) fn pattern(text: &str) -> Result<Regex, Failure> {
    Regex::new(text).map_err(|error| {
        failure(
            Cause::Refused,
            format!("`{text}` is no regular expression: {error}"),
        )
    })
}

/// The command as it is run: from the root directory unless another is named. What belongs to an
/// application, by its directory or its program, runs as the application's user: others than root
/// can change it.
pub(crate) async fn program(
    cx: &Context,
    argv: &[String],
    dir: Option<&str>,
    env: &BTreeMap<String, String>,
) -> Result<Program, Failure> {
    let dir = Path::new(dir.unwrap_or("/"));
    let mut program = Program {
        argv: argv.to_vec(),
        dir: Some(dir.to_owned()),
        ..Program::default()
    };
    // The search path may lead into an application.
    let of_dir = app_of(&cx.config, dir);
    let path = env
        .get("PATH")
        .or_else(|| of_dir.and_then(|app| app.env.get("PATH")));
    let file = file_of(argv, dir, path.map(String::as_str));
    let of_program = file.and_then(|file| app_of(&cx.config, &file));
    if let (Some(one), Some(other)) = (of_dir, of_program)
        && one.user != other.user
    {
        return Err(Failure {
            hint: Some("run it in a directory of the application that brings the program".into()),
            ..failure(
                Cause::Refused,
                format!(
                    "`{}` and {} belong to applications of different users",
                    argv.first().map_or("", String::as_str),
                    dir.display()
                ),
            )
        });
    }
    if let Some(app) = of_dir.or(of_program) {
        program.user.clone_from(&app.user);
        program = program.with_env(cx, &app.env).await?;
    }
    program.with_env(cx, env).await
}

/// The application whose directory a path lies in, by its name or by where its links lead.
pub(crate) fn app_of<'a>(config: &'a Config, path: &Path) -> Option<&'a App> {
    let named = plain(path);
    let real = path.canonicalize().ok();
    let holds = |app: &&App| {
        let root = app.root.canonicalize().ok();
        named.starts_with(plain(&app.root))
            || real
                .iter()
                .any(|real| root.iter().any(|root| real.starts_with(root)))
    };
    // One may lie within another's directory.
    let within = config.apps.values().filter(holds);
    within.max_by_key(|app| plain(&app.root).components().count())
}

/// The path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

/// The file that a command runs, found as the system finds it.
fn file_of(argv: &[String], dir: &Path, path: Option<&str>) -> Option<PathBuf> {
    let name = argv.first()?;
    if name.contains('/') {
        return Some(dir.join(name));
    }
    let path = path.map(str::to_owned).or_else(|| {
        let mut own = base_env(None).into_iter();
        own.find_map(|(name, value)| (name == "PATH").then_some(value))
    })?;
    let mut files = path.split(':').map(|entry| dir.join(entry).join(name));
    files.find(|file| file.is_file())
}

impl Act for Run {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        Ok(if cx.dry_run {
            program(cx, &self.argv, self.dir.as_deref(), &self.env)
                .await?
                .check()?;
            Probe::Absent(format!("runs {}: {:?}", self.name, self.argv))
        } else {
            Probe::NoProof(format!(
                "nothing shows whether `{}` was run to its end",
                self.name
            ))
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let expected = Expected {
            exit: self.exit,
            matches: self.matches.as_deref(),
        };
        let pattern = expected.pattern()?;
        let program = program(cx, &self.argv, self.dir.as_deref(), &self.env).await?;
        let ended = program.run(cx).await?;
        let ran = expected.hold(pattern.as_ref(), &ended);
        let summary = format!("{} {}", self.name, ran.words);
        if !ran.met {
            let last_lines = cx.log.last_lines();
            return Err(Failure {
                last_lines,
                changed: true,
                ..failure(Cause::Step, summary)
            });
        }
        let note = Fact::Note {
            name: self.name.clone(),
            value: ran.last_line,
        };
        Ok(Done {
            changed: true,
            summary,
            facts: vec![note],
        })
    }

    fn describe(&self) -> String {
        format!("run {}", self.name)
    }
}

#[cfg(test)]
mod tests;
