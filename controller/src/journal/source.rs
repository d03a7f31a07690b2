//! The records of a whole journal, to be read as often as one likes, also while more are appended.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lockstep_core::Entry;

use super::disk::io_error;
use super::offline::{ExportError, read, write_export};
use super::reserve::{RESERVE, free};
use super::sled::{STORE_FILE, payloads};
use super::{Head, JournalId, Layout, OpenError};

/// The records that a journal had at one moment, and the right to put another one in its place.
#[derive(Debug)]
pub(crate) struct Source {
    pub(super) state: PathBuf,
    pub(super) id: JournalId,
    /// What the first record is chained to.
    pub(super) base: Head,
    pub(crate) head: Head,
    pub(super) db: sled::Db,
    pub(crate) layout: Layout,
    /// Of the state directory.
    pub(super) lock: File,
    /// Whether to end before all is read.
    pub(super) stop: Arc<AtomicBool>,
}

impl Source {
    /// The state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.state.clone()
    }

    /// How many records there are.
    pub(crate) fn count(&self) -> u64 {
        self.head.number - self.base.number
    }

    /// All payloads, from the first on. The chain was verified when the journal was opened.
    pub(super) fn payloads(&self) -> impl Iterator<Item = Result<Vec<u8>, OpenError>> {
        let payloads = payloads(&self.db, self.layout);
        let payloads = payloads.zip(self.base.number..self.head.number);
        payloads.map(|(payload, _)| {
            self.go_on()?;
            payload.map_err(|error| OpenError::Quarantined {
                dir: self.directory(),
                what: format!("a record cannot be read: {error}"),
            })
        })
    }

    /// An error if it is to end before its time.
    pub(super) fn go_on(&self) -> Result<(), OpenError> {
        if self.stop.load(Ordering::Relaxed) {
            let stopped = io::ErrorKind::Interrupted.into();
            return Err(io_error("go on compacting", &self.directory())(stopped));
        }
        Ok(())
    }

    /// What else is read, to be ended as well.
    pub(super) fn until_stopped(&self, read: impl Read) -> impl Read {
        UntilStopped {
            read,
            stop: self.stopper(),
        }
    }

    /// All records, each with its payload.
    pub(super) fn records(&self) -> impl Iterator<Item = Result<(Entry, Vec<u8>), ExportError>> {
        let numbered = self.payloads().zip(self.base.number + 1..);
        numbered.map(|(payload, number)| {
            let payload = payload?;
            Ok((read(&payload, number)?, payload))
        })
    }

    /// Writes them as text; `term` is the last one that began.
    pub(super) fn export(&self, term: u64, out: &mut impl Write) -> Result<(), ExportError> {
        let payloads = self.payloads().map(|payload| Ok(payload?));
        write_export(out, (self.id, self.base, self.head), term, payloads)
    }

    /// Whether there is room to compact it without filling the disk: for the archive, which is
    /// text of about three times its length, the new journal, and a copy of that to look at.
    pub(crate) fn has_room(&self) -> Result<bool, OpenError> {
        let path = self.directory().join(STORE_FILE);
        let length = fs::metadata(&path).map_err(io_error("read", &path))?.len();
        let free = free(&self.lock).map_err(io_error("read", &self.state))?;
        Ok(free > length.saturating_mul(6) + 2 * RESERVE)
    }

    /// Has whoever reads it end before its time, with an error.
    pub(crate) fn stopper(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// The journal's directory.
    pub(super) fn directory(&self) -> PathBuf {
        self.state.join("journal")
    }
}

struct UntilStopped<R> {
    read: R,
    stop: Arc<AtomicBool>,
}

impl<R: Read> Read for UntilStopped<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            // Whoever reads goes on after one that is `Interrupted`.
            return Err(io::Error::other("it was stopped"));
        }
        self.read.read(into)
    }
}
