//! What an action may use: the host's configuration, its secrets, the step's log, and time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lockstep_proto::ids::StepKey;
use lockstep_proto::order::Binding;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::process::head;
use crate::secrets::{self, Fetched, Secret};

/// A place in a log file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredMark")]
pub(crate) struct LogMark {
    /// In bytes, from the beginning of the file.
    pub(crate) size: u64,
    /// Which file it is: one with another number was begun since. Unknown if there was none.
    pub(crate) inode: Option<u64>,
}

impl LogMark {
    /// The end of a file.
    pub(crate) fn end_of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(path).map_or_else(
            |_| Self::default(),
            |file| Self {
                size: file.len(),
                inode: Some(file.ino()),
            },
        )
    }
}

/// The forms in which a place may have been stored; first there was the size alone.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredMark {
    Size(u64),
    Mark { size: u64, inode: Option<u64> },
}

impl From<StoredMark> for LogMark {
    fn from(stored: StoredMark) -> Self {
        match stored {
            StoredMark::Size(size) => Self { size, inode: None },
            StoredMark::Mark { size, inode } => Self { size, inode },
        }
    }
}

/// What an action may use.
#[derive(Clone)]
pub(crate) struct Context {
    /// The attempt. Sessions, files and requests that it makes carry this key.
    pub(crate) key: StepKey,
    /// The host's configuration.
    pub(crate) config: Arc<Config>,
    /// Secrets that were fetched.
    pub(crate) secrets: Arc<Fetched>,
    /// The order's run-time facts.
    pub(crate) bindings: Arc<[Binding]>,
    /// A private directory of the attempt (0700), kept until the rollout ends.
    pub(crate) dir: PathBuf,
    /// Where output goes.
    pub(crate) log: StepLog,
    /// The attempt must have ended by then.
    pub(crate) deadline: Instant,
    /// Cancelled when the attempt is to stop. What does not look at it is dropped at once; an
    /// action that would leave something behind ends early by itself ([`Cause::Cancelled`]).
    pub(crate) stop: CancellationToken,
    /// Where the log files that the plan's `check.log` steps name ended when the host consented:
    /// lines before are older than the rollout.
    pub(crate) log_offsets: Arc<BTreeMap<PathBuf, LogMark>>,
    /// Whether this is a dry run: then `probe` may answer `NotYet` for what depends on earlier
    /// steps.
    pub(crate) dry_run: bool,
}

impl Context {
    /// The value of a text that may be `secret://NAME`; other texts are their own value. The value
    /// must never be logged, put in argv, or returned in a fact.
    pub(crate) async fn secret(&self, text: &str) -> Result<Secret, Failure> {
        match secrets::named(text) {
            Some(name) => self.secrets.get(&self.config, name).await,
            None => Ok(text.into()),
        }
    }

    /// Whether all secrets that stand in these arguments can be had.
    pub(crate) async fn check_secrets(&self, args: &Value) -> Result<(), Failure> {
        let mut texts = vec![];
        texts_of(args, &mut texts);
        for text in texts {
            self.secret(text).await?;
        }
        Ok(())
    }
}

/// All texts in a value.
fn texts_of<'a>(value: &'a Value, texts: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => texts.push(text),
        Value::Array(items) => items.iter().for_each(|item| texts_of(item, texts)),
        Value::Object(fields) => fields.values().for_each(|field| texts_of(field, texts)),
        _ => {}
    }
}

/// A failure without hint and output.
pub(crate) fn failure(cause: Cause, message: impl Into<String>) -> Failure {
    Failure {
        cause,
        message: message.into(),
        hint: None,
        last_lines: vec![],
        changed: false,
    }
}

/// A failure with what to do next.
pub(crate) fn hinted(cause: Cause, message: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure {
        hint: Some(hint.into()),
        ..failure(cause, message)
    }
}

/// The same failure, of an attempt that may have changed something.
pub(crate) fn changed(failure: Failure) -> Failure {
    Failure {
        changed: true,
        ..failure
    }
}

/// The step's log: a bounded file beside the outcome, followed by the daemon while the step runs.
#[derive(Clone)]
pub(crate) struct StepLog {
    inner: Arc<std::sync::Mutex<LogFile>>,
}

struct LogFile {
    file: Option<std::fs::File>,
    written: u64,
    last: std::collections::VecDeque<String>,
}

/// The most that is kept of a step's output, in bytes: beyond it only the last lines are.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// How many lines a failure shows.
const LAST_LINES: usize = 20;

/// The longest line that a failure shows, in bytes.
const MAX_LINE: usize = 400;

impl StepLog {
    /// A log that goes to a file.
    pub(crate) fn to_file(path: &Path) -> std::io::Result<Self> {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)?;
        Ok(Self::new(Some(file)))
    }

    /// A log that only keeps its last lines: for looks, which belong to no attempt.
    pub(crate) fn nowhere() -> Self {
        Self::new(None)
    }

    fn new(file: Option<std::fs::File>) -> Self {
        let last = std::collections::VecDeque::with_capacity(LAST_LINES);
        Self {
            inner: Arc::new(std::sync::Mutex::new(LogFile {
                file,
                written: 0,
                last,
            })),
        }
    }

    /// Adds a line. An error to write it never fails a step: the log is for people.
    pub(crate) fn line(&self, text: &str) {
        use std::io::Write as _;
        let mut inner = self.inner.lock().expect("no holder of the log panics");
        for line in text.lines() {
            let length = line.len() as u64 + 1;
            if inner.written + length <= MAX_LOG_BYTES {
                inner.written += length;
                if let Some(file) = &mut inner.file {
                    let _ = writeln!(file, "{line}");
                }
            }
            if inner.last.len() == LAST_LINES {
                inner.last.pop_front();
            }
            inner.last.push_back(head(line, MAX_LINE).to_owned());
        }
    }

    /// Says how far the step is, from 0 to 1, and what it is at. The daemon forwards it.
    pub(crate) fn progress(&self, fraction: f64, text: &str) {
        self.line(&format!(
            "\u{1}progress {:.3} {text}",
            fraction.clamp(0.0, 1.0)
        ));
    }

    /// The last lines, without progress marks.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        let inner = self.inner.lock().expect("no holder of the log panics");
        inner
            .last
            .iter()
            .filter(|line| !line.starts_with('\u{1}'))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_in_both_forms() {
        let read = |text: &str| serde_json::from_str::<LogMark>(text).unwrap();
        let old = LogMark {
            size: 7,
            inode: None,
        };
        assert_eq!(read("7"), old);
        let new = LogMark {
            size: 7,
            inode: Some(3),
        };
        assert_eq!(read(&serde_json::to_string(&new).unwrap()), new);
    }
}
