//! The head file: which record was relied on last. Two slots, written in turn, so that one of
//! them is whole whenever the power fails.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::faults::reached;

use super::{Hash, sync, sync_dir};

/// The slots lie in different blocks: a torn write harms one only.
const SLOT_DISTANCE: u64 = 4096;

const MAGIC: [u8; 8] = *b"LSHEAD1\n";
const BODY: usize = 8 + 8 + 32;
pub(super) const SLOT: usize = BODY + 32;

/// The open head file.
#[derive(Debug)]
pub(super) struct Head {
    file: File,
    path: PathBuf,
    next: u64,
}

impl Head {
    /// Opens or makes the file, and reads what it says.
    pub(super) fn open(path: &Path) -> io::Result<(Self, Known)> {
        let existed = path.exists();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        if !existed {
            sync_dir(path.parent().unwrap_or_else(|| Path::new(".")))?;
        }
        let (slot, known) = newest(&file)?;
        // The older slot, or the broken one, is written next.
        let next = slot.map_or(0, |slot| 1 - slot);
        let path = path.to_owned();
        Ok((Self { file, path, next }, known))
    }

    /// Reads what the file says, and can change nothing.
    pub(super) fn read(path: &Path) -> io::Result<Known> {
        match File::open(path) {
            Ok(file) => Ok(newest(&file)?.1),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Known::BLANK),
            Err(error) => Err(error),
        }
    }

    /// Puts another file in its place, one that fails.
    #[cfg(test)]
    pub(super) fn fail(&mut self, file: File) {
        self.file = file;
    }

    /// Makes a new head durable.
    pub(super) fn write(&mut self, number: u64, hash: Hash) -> io::Result<()> {
        let slot = encode(number, hash);
        reached("head: to be written");
        self.file.write_all_at(&slot, self.next * SLOT_DISTANCE)?;
        reached("head: written");
        sync(&self.file, &self.path)?;
        self.next = 1 - self.next;
        Ok(())
    }
}

/// What a head file says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    /// The newest head: number and hash.
    pub(super) newest: Option<(u64, Hash)>,
    /// Nothing was ever written.
    pub(super) blank: bool,
}

impl Known {
    const BLANK: Self = Self {
        newest: None,
        blank: true,
    };

    /// The number of the newest head.
    pub(super) fn number(&self) -> Option<u64> {
        self.newest.map(|(number, _)| number)
    }
}

/// The slot with the newest head, and what the file says.
fn newest(file: &File) -> io::Result<(Option<u64>, Known)> {
    let (slot, newest) = match (read_slot(file, 0)?, read_slot(file, 1)?) {
        (Some(a), Some(b)) if a.0 > b.0 => (Some(0), Some(a)),
        (_, Some(b)) => (Some(1), Some(b)),
        (Some(a), None) => (Some(0), Some(a)),
        (None, None) => (None, None),
    };
    let blank = file.metadata()?.len() == 0;
    Ok((slot, Known { newest, blank }))
}

fn read_slot(file: &File, slot: u64) -> io::Result<Option<(u64, Hash)>> {
    let mut bytes = [0; SLOT];
    match file.read_exact_at(&mut bytes, slot * SLOT_DISTANCE) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(decode(&bytes))
}

pub(super) fn encode(number: u64, hash: Hash) -> Vec<u8> {
    let mut slot = Vec::with_capacity(SLOT);
    slot.extend_from_slice(&MAGIC);
    slot.extend_from_slice(&number.to_le_bytes());
    slot.extend_from_slice(&hash);
    let check = Sha256::digest(&slot);
    slot.extend_from_slice(&check);
    slot
}

/// What a slot says; none if it is empty or torn.
pub(super) fn decode(slot: &[u8; SLOT]) -> Option<(u64, Hash)> {
    let (body, check) = slot.split_at(BODY);
    if body[..8] != MAGIC || Sha256::digest(body)[..] != *check {
        return None;
    }
    let number = u64::from_le_bytes(body[8..16].try_into().expect("8 bytes"));
    let hash = body[16..].try_into().expect("32 bytes");
    Some((number, hash))
}
