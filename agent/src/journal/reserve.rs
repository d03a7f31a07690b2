//! Space set aside, so that how a running step ended can be recorded on a full disk.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::faults::reached;

/// Enough for 30 of the largest reports: a host runs one step at a time.
const RESERVE: u64 = 1 << 20;

/// Nothing new begins with less space than this beside the reserve: a step needs a directory, a
/// job file, a log and an outcome.
const ROOM: u64 = 4 << 20;

/// The reserve file of a state directory.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            path: dir.join("reserve"),
        }
    }

    /// Makes the reserve if it is not there; false if there is no room for it and a new step.
    pub(super) fn ensure(&self) -> bool {
        let Some(free) = free(self.dir()) else {
            return false;
        };
        if self.is_whole() {
            return free >= ROOM;
        }
        free >= ROOM + RESERVE && self.make().is_ok()
    }

    /// Whether more may be written without taking what the reserve is for, or was given back for.
    pub(super) fn spares(&self) -> bool {
        self.is_whole() || free(self.dir()).is_some_and(|free| free >= RESERVE / 2)
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or_else(|| Path::new("."))
    }

    fn is_whole(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|file| file.len() == RESERVE)
    }

    fn make(&self) -> std::io::Result<()> {
        reached("reserve: to be made");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.path)?;
        reached("reserve: made");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE)?;
        reached("reserve: filled");
        file.sync_all()
    }

    /// Frees the space; false if there was none.
    pub(super) fn give_back(&self) -> bool {
        std::fs::remove_file(&self.path).is_ok()
    }
}

/// The free space of the file system that holds a directory, in bytes.
fn free(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
