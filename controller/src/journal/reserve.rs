//! Space set aside for the journal, so that how running steps ended can be recorded on a full disk.
//!
//! ```text
//! store/db  | what sled wrote | set aside, behind the end of the file |
//! ```
//!
//! The space lies where sled writes next: allocated, but not part of the file. So sled takes it by
//! itself, and nobody else can: no file has to be given up first, and no moment is left in which
//! another process takes the room. A file system that cannot do that has no reserve; there the
//! journal stops as soon as the disk is nearly full.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use rustix::io::Errno;

/// What is set aside, in bytes: the reports of thousands of running steps.
pub(super) const RESERVE: u64 = 32 << 20;

/// Nothing new begins with less free space than this beside the reserve, in bytes: a rollout has
/// a plan, and its steps have output.
const ROOM: u64 = 8 << 20;

/// Once the disk was full, there is room again from here on: else the two would alternate.
const ROOM_AGAIN: u64 = 2 * ROOM;

/// What sled writes beside the records of a batch, in bytes: leaves anew, and ends of segments.
const AROUND: u64 = 8 << 20;

/// The reserve behind a store's file.
#[derive(Debug)]
pub(super) struct Reserve {
    file: File,
    /// The file's length when it was last looked at.
    length: u64,
    /// Up to where space is allocated for sure.
    until: u64,
    /// Whether the whole reserve is there.
    whole: bool,
    /// Whether the file system can set space aside.
    possible: bool,
    full: bool,
}

impl Reserve {
    /// Sets space aside behind this file, as far as there is any.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).open(path)?;
        let mut reserve = Self {
            file,
            length: 0,
            until: 0,
            whole: false,
            possible: true,
            full: false,
        };
        reserve.ensure()?;
        Ok(reserve)
    }

    /// Whether there is room for what is new.
    pub(super) fn has_room(&mut self) -> bool {
        let wanted = if self.full { ROOM_AGAIN } else { ROOM };
        let room = self.ensure().and_then(|()| self.free());
        self.full = !(room.is_ok_and(|free| free >= wanted) && self.whole);
        !self.full
    }

    /// Whether a batch of so many bytes can be written, from the reserve if need be.
    pub(super) fn can_take(&mut self, bytes: u64) -> bool {
        if self.ensure().is_err() {
            // The write itself finds out.
            return true;
        }
        let aside = self.until.saturating_sub(self.length);
        let needed = bytes.saturating_mul(2) + AROUND;
        aside >= needed || self.free().is_ok_and(|free| aside + free >= needed)
    }

    /// Gives back what is set aside behind a file that nobody has open.
    pub(super) fn give_back(path: &Path) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(file.metadata()?.len())
    }

    /// Looks at another file, which can set nothing aside: the write itself finds out.
    #[cfg(test)]
    pub(super) fn fail(&mut self, file: File) {
        (self.file, self.whole) = (file, false);
    }

    /// Sets aside what sled has taken since.
    fn ensure(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length < self.length {
            // sled has cut its file, and what was behind it is gone.
            self.until = length;
        }
        if length != self.length {
            self.whole = false;
        }
        // Behind the newest segments there may be holes that were never written.
        let from = self.length.min(length).saturating_sub(AROUND);
        self.length = length;
        if self.whole || !self.possible {
            self.whole = true;
            return Ok(());
        }
        let end = length + RESERVE;
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, from, end - from) {
            Ok(()) => {
                self.until = end;
                self.whole = true;
                Ok(())
            }
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.possible = false;
                self.whole = true;
                Ok(())
            }
            Err(Errno::NOSPC | Errno::DQUOT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn free(&self) -> io::Result<u64> {
        free(&self.file)
    }
}

/// How much is free where this file is, in bytes.
pub(super) fn free(file: &File) -> io::Result<u64> {
    let stat = fstatvfs(file)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
