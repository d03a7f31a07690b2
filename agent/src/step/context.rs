//! What an action may use: the host's configuration, its secrets, the step's log, and time.

use std::collections::{BTreeMap, VecDeque};
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
    sink: Sink,
    written: u64,
    last: VecDeque<String>,
}

/// Where lines go, beside the last ones that are told.
enum Sink {
    /// To a file that is made with the first line: most steps say nothing.
    New(PathBuf),
    /// To a file.
    File(std::fs::File),
    /// Nowhere: it is full, or was never wanted.
    None,
}

/// The most that is kept of a step's output, in bytes: beyond it only the last lines are.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// How many lines a failure shows.
pub(crate) const LAST_LINES: usize = 20;

/// The longest line that a failure shows, in bytes.
const MAX_LINE: usize = 400;

impl StepLog {
    /// A log that goes to a file.
    pub(crate) fn to_file(path: PathBuf) -> Self {
        Self::new(Sink::New(path))
    }

    /// A log that only keeps its last lines: for looks, which belong to no attempt.
    pub(crate) fn nowhere() -> Self {
        Self::new(Sink::None)
    }

    fn new(sink: Sink) -> Self {
        Self {
            inner: Arc::new(std::sync::Mutex::new(LogFile {
                sink,
                written: 0,
                last: VecDeque::with_capacity(LAST_LINES),
            })),
        }
    }

    /// Whether only the last lines are kept from now on.
    pub(crate) fn is_full(&self) -> bool {
        let inner = self.inner.lock().expect("no holder of the log panics");
        matches!(inner.sink, Sink::None)
    }

    /// Adds a line. An error to write it never fails a step: the log is for people.
    pub(crate) fn line(&self, text: &str) {
        let lines = text.lines().flat_map(|line| [line, "\n"]);
        self.add(&lines.collect::<String>());
    }

    /// Adds whole lines, with one write.
    pub(crate) fn add(&self, lines: &str) {
        let mut inner = self.inner.lock().expect("no holder of the log panics");
        inner.write(lines);
        let newest: Vec<&str> = lines.lines().rev().take(LAST_LINES).collect();
        for line in newest.into_iter().rev() {
            // Its room is used again.
            let mut last = match inner.last.len() {
                LAST_LINES => inner.last.pop_front().unwrap_or_default(),
                _ => String::new(),
            };
            last.clear();
            last.push_str(head(line, MAX_LINE));
            inner.last.push_back(last);
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

impl Sink {
    fn open(&mut self) -> Option<&std::fs::File> {
        if let Self::New(path) = self {
            let mut options = std::fs::OpenOptions::new();
            *self = match options.create(true).append(true).open(path) {
                Ok(file) => Self::File(file),
                Err(_) => Self::None,
            };
        }
        match self {
            Self::File(file) => Some(file),
            Self::New(_) | Self::None => None,
        }
    }
}

impl LogFile {
    /// Writes as many of these lines as there is room for.
    fn write(&mut self, lines: &str) {
        use std::io::Write as _;
        let Some(mut file) = self.sink.open() else {
            return;
        };
        let room = usize::try_from(MAX_LOG_BYTES - self.written).unwrap_or(usize::MAX);
        let fitting = match lines.as_bytes().get(..room) {
            None => lines.len(),
            Some(beginning) => {
                let end = beginning.iter().rposition(|byte| *byte == b'\n');
                end.map_or(0, |end| end + 1)
            }
        };
        if fitting > 0 {
            let _ = file.write_all(&lines.as_bytes()[..fitting]);
            self.written += fitting as u64;
        }
        if fitting < lines.len() {
            self.sink = Sink::None;
        }
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
