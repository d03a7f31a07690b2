//! Archives: exports of a journal's former records, kept beside it when it is compacted.
//!
//! ```text
//! STATE/archive/journal-1-1482.jsonl      records 1 to 1482, in the format of an export
//! STATE/archive/journal-1483-2900.jsonl   the next ones: its first record names the former's last
//! ```

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::disk::io_error;
use super::offline::{ExportError, ImportError, Records, read_export, verify_export};
use super::{Head, JournalId, OpenError, begins_after};

/// Archives that one journal goes back to: more than a journal that is compacted daily has in a
/// hundred years, so that files that name each other end somewhere.
const MOST: usize = 40_000;

/// The extension of one that is not whole yet.
const PART: &str = "part";

/// What is found of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ArchiveFound {
    /// Its file name.
    pub(crate) name: String,
    /// The last record that it should have.
    pub(crate) last: Head,
    /// How it is.
    pub(crate) state: ArchiveState,
}

/// How an archive is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ArchiveState {
    /// Every record is what was written, to the one that its successor names.
    Whole,
    /// It is not there; it may have been moved elsewhere.
    Elsewhere,
    /// It is not what was written.
    Broken(String),
}

/// The directory of a state directory's archives.
pub(super) fn directory(state: &Path) -> PathBuf {
    state.join("archive")
}

/// Where an archive is written, and where it is found once it is whole.
pub(super) fn paths(state: &Path, name: &str) -> (PathBuf, PathBuf) {
    let path = directory(state).join(name);
    (path.with_extension(PART), path)
}

/// Removes what a compaction left that was ended.
pub(super) fn remove_parts(dir: &Path) -> Result<(), OpenError> {
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.extension().is_some_and(|extension| extension == PART) {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Follows archives back from what a compacted journal begins after.
pub(super) fn follow(state: &Path, id: JournalId, last: Head, name: String) -> Vec<ArchiveFound> {
    let mut found = vec![];
    let mut next = Some((last, name));
    while let Some((last, name)) = next.take()
        && found.len() < MOST
    {
        let state = match check(&directory(state).join(&name), id, last) {
            Ok(before) => {
                next = before;
                ArchiveState::Whole
            }
            Err(ImportError::Input(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                ArchiveState::Elsewhere
            }
            Err(error) => ArchiveState::Broken(error.to_string()),
        };
        found.push(ArchiveFound { name, last, state });
    }
    found
}

/// The archives that the records of a journal go back to, the newest first.
pub(super) fn follow_from(state: &Path, records: &Records) -> Vec<ArchiveFound> {
    let first = records.payloads.first().filter(|_| records.base.number > 0);
    let before = first.and_then(|first| begins_after(first));
    before.map_or_else(Vec::new, |(last, name)| {
        follow(state, records.id, last, name)
    })
}

/// Reads the records of an archive that was found whole.
pub(super) fn read(state: &Path, name: &str) -> Result<Records, ExportError> {
    let path = directory(state).join(name);
    let file = File::open(&path).map_err(io_error("read", &path))?;
    read_export(&mut BufReader::new(file))
}

/// Verifies an archive; answers with what is before it, if that is another one.
pub(super) fn check(
    path: &Path,
    id: JournalId,
    last: Head,
) -> Result<Option<(Head, String)>, ImportError> {
    check_read(File::open(path)?, id, last)
}

/// The same of one that is open.
pub(super) fn check_read(
    archive: impl Read,
    id: JournalId,
    last: Head,
) -> Result<Option<(Head, String)>, ImportError> {
    verify_export(&mut BufReader::new(archive), id, last)
}
