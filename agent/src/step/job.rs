//! The files through which exec and step processes speak. Both may die between any two of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::action::Action;
use lockstep_proto::ids::StepKey;
use lockstep_proto::json;
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::report::StepOutcome;
use lockstep_proto::values::Period;
use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Keep, LogMark};
use crate::faults::reached;
use crate::identity::{private_dir, replace_file, write_file};
use crate::journal::{sync_all, sync_dir};

/// What a step process is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The attempt, with its direction.
    pub(crate) key: StepKey,
    /// The action, with the host's variables put in.
    pub(crate) action: Action,
    /// The before-state in the intent.
    pub(crate) before: Value,
    /// The order's facts.
    pub(crate) bindings: Vec<Binding>,
    /// The longest time, from the step process's start.
    pub(crate) timeout: Period,
    /// Where the log files that `check.log` reads ended at the time of consent.
    pub(crate) log_offsets: BTreeMap<PathBuf, LogMark>,
}

/// Space for an outcome, in bytes: with the facts of all actions there are, it takes less.
const OUTCOME: u64 = 64 << 10;

/// How a step process ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// How.
    pub(crate) outcome: StepOutcome,
    /// What it proved.
    pub(crate) facts: Vec<Fact>,
    /// How long it ran.
    pub(crate) took: Period,
}

/// The directory of one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StepDir(PathBuf);

impl StepDir {
    /// Where the directories of all attempts are.
    pub(crate) fn parent(state_dir: &Path) -> PathBuf {
        state_dir.join("steps")
    }

    /// That of an attempt.
    pub(crate) fn of(state_dir: &Path, key: &StepKey) -> Self {
        Self(Self::parent(state_dir).join(key.to_string()))
    }

    /// One whose path is known.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn claim(&self) -> PathBuf {
        self.0.join("claim")
    }

    /// Where a process writes its claim before it makes it.
    pub(crate) fn claim_of(&self, pid: i32) -> PathBuf {
        self.0.join(format!("claim.{pid}"))
    }

    pub(crate) fn outcome(&self) -> PathBuf {
        self.0.join("outcome.json")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    pub(crate) fn output(&self) -> PathBuf {
        self.0.join("output")
    }

    pub(crate) fn cancel(&self) -> PathBuf {
        self.0.join("cancel")
    }

    pub(crate) fn files(&self) -> PathBuf {
        self.0.join("files")
    }

    fn job(&self) -> PathBuf {
        self.0.join("job.json")
    }

    /// Makes the directory. It is durable, if it is kept so, once the job is written: until then
    /// nobody relies on it.
    pub(crate) fn make(&self, keep: Keep) -> io::Result<()> {
        reached("step directory: to be made");
        // Who only observes keeps nothing.
        let made = match keep {
            Keep::Durably => private_dir(&self.files()),
            Keep::ThisBoot => private_dir(&self.0),
        };
        made.map_err(io::Error::other)?;
        reached("step directory: made");
        Ok(())
    }

    /// Writes the job. Only the process that is started afterwards reads it, or, where the attempt
    /// may have changed something, whoever settles it after a power loss.
    pub(crate) fn write_job(&self, job: &Job) -> io::Result<()> {
        let text = serde_json::to_vec(job).expect("a job has no map with other keys than text");
        match Keep::of(&job.action) {
            Keep::Durably => {
                // With it the names in the directory, and then the directory's own.
                replace_file(&self.job(), &text)?;
                sync_dir(self.0.parent().unwrap_or_else(|| Path::new(".")))
            }
            Keep::ThisBoot => write_file(&self.job(), &text),
        }
    }

    /// Reads the job.
    pub(crate) fn read_job(&self) -> io::Result<Job> {
        read_json(&self.job())
    }

    fn outcome_to_be(&self) -> PathBuf {
        self.0.join("outcome.new")
    }

    /// Sets space aside for the outcome, before anything is done: the disk may be full by then.
    pub(crate) fn reserve_outcome(&self) -> io::Result<()> {
        reached("outcome: to be reserved");
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.outcome_to_be())?;
        // The size stays what it is: another process may be writing its outcome right now.
        rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, OUTCOME)?;
        reached("outcome: reserved");
        Ok(())
    }

    /// Writes the outcome: whole when it is there, and durable when this returns if it is kept so.
    pub(crate) fn write_outcome(&self, ended: &Ended, keep: Keep) -> io::Result<()> {
        let text =
            serde_json::to_vec(ended).expect("an outcome has no map with other keys than text");
        let path = self.outcome_to_be();
        let file = File::options().write(true).open(&path)?;
        // Not truncated first: that would give the space back.
        reached("outcome: to be written");
        file.write_all_at(&text, 0)?;
        reached("outcome: written");
        file.set_len(text.len() as u64)?;
        reached("outcome: cut");
        if keep.is_durable() {
            sync_all(&file, &path)?;
        }
        reached("outcome: synchronised");
        std::fs::rename(path, self.outcome())?;
        reached("outcome: renamed");
        if keep.is_durable() {
            sync_dir(&self.0)?;
        }
        reached("outcome: there");
        Ok(())
    }

    /// The outcome, if there is one.
    pub(crate) fn read_outcome(&self) -> io::Result<Option<Ended>> {
        match read_json(&self.outcome()) {
            Ok(ended) => Ok(Some(ended)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> io::Result<T> {
    let text = std::fs::read(path)?;
    json::read(&text).map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
}
