//! Commands of the user's own, and commands that only look.

use lockstep_proto::action::exec::Run;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use regex::Regex;
use serde_json::Value;

use super::{Act, Done, Probe};
use crate::process::{Ended, Program, head};
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
            unmatched.map(|pattern| format!("its output does not match `{pattern}`"))
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

/// The command as it is run: from the root directory unless another is named.
pub(crate) fn program(argv: &[String], dir: Option<&str>) -> Program {
    let dir = Some(dir.unwrap_or("/").into());
    Program {
        argv: argv.to_vec(),
        dir,
        ..Program::default()
    }
}

impl Act for Run {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        Ok(if cx.dry_run {
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
        let program = program(&self.argv, self.dir.as_deref()).with_env(cx, &self.env)?;
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
mod tests {
    use super::*;
    use crate::testing::Host;

    fn run(argv: &[&str]) -> Run {
        Run {
            name: "greet".into(),
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            dir: None,
            env: std::collections::BTreeMap::new(),
            exit: 0,
            matches: None,
        }
    }

    #[tokio::test]
    async fn a_command_is_held_against_exit_code_and_output() {
        let host = Host::new();
        let cx = host.context();
        let done = run(&["printf", "one\nlast\n\n"])
            .apply(&cx, &Value::Null)
            .await
            .unwrap();
        assert!(done.changed);
        let note = Fact::Note {
            name: "greet".into(),
            value: "last".into(),
        };
        assert_eq!(done.facts, [note]);

        let failed = run(&["false"]).apply(&cx, &Value::Null).await.unwrap_err();
        assert_eq!(
            (failed.cause, failed.message.as_str()),
            (Cause::Step, "greet exited with 1, not 0")
        );
        assert!(failed.changed);
        Run {
            exit: 1,
            ..run(&["false"])
        }
        .apply(&cx, &Value::Null)
        .await
        .unwrap();

        let unmatched = Run {
            matches: Some("^two$".into()),
            ..run(&["printf", "one"])
        };
        let failed = unmatched.apply(&cx, &Value::Null).await.unwrap_err();
        assert!(
            failed.message.contains("does not match `^two$`"),
            "{}",
            failed.message
        );
    }

    #[tokio::test]
    async fn a_bad_expression_is_refused_before_anything_is_run() {
        let host = Host::new();
        let marker = host.path().join("ran");
        let touch = Run {
            matches: Some("(".into()),
            ..run(&["touch", marker.to_str().unwrap()])
        };
        let failed = touch
            .apply(&host.context(), &Value::Null)
            .await
            .unwrap_err();
        assert_eq!(failed.cause, Cause::Refused);
        assert!(!marker.exists());
    }

    #[tokio::test]
    async fn after_a_crash_there_is_no_proof() {
        let host = Host::new();
        let probe = run(&["true"]).probe(&host.context()).await.unwrap();
        assert!(matches!(probe, Probe::NoProof(_)));
    }
}
