//! A journal's head in a file of its own: two slots, written in turn, so that a write that was
//! torn by a power loss leaves the other one whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::Digest;
use sha2::Digest as _;

use super::disk::{io_error, sync};
use super::{Head, JournalId, Layout, OpenError};
use crate::faults::reached;

/// The distance of the slots: no sector of a disk holds parts of both.
const SLOT_DISTANCE: u64 = 4096;

/// Magic, format, journal id, turn, number, hash, checksum.
const SLOT_BYTES: usize = 8 + 4 + 16 + 8 + 8 + 32 + 8;

const MAGIC: &[u8; 8] = b"lockhead";

/// The open head file.
#[derive(Debug)]
pub(super) struct HeadFile {
    file: File,
    path: PathBuf,
    /// Of the newest slot; the next one goes into the other slot.
    turn: u64,
}

/// What a head file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) id: JournalId,
    pub(super) layout: Layout,
    pub(super) head: Head,
}

/// A head file that says nothing reliable.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeadError {
    #[error("its head file has no whole slot")]
    NoSlot,
    #[error("its head file has format {0}")]
    Format(u32),
    #[error("its head file cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl HeadError {
    /// For the journal in this directory.
    pub(super) fn of(&self, dir: &Path) -> OpenError {
        match self {
            Self::Format(found) => OpenError::Format {
                dir: dir.to_owned(),
                found: *found,
            },
            // That says nothing about what is in it.
            Self::Io(error) if error.kind() != io::ErrorKind::NotFound => {
                let error = io::Error::new(error.kind(), error.to_string());
                io_error("read the head of", dir)(error)
            }
            error => OpenError::Quarantined {
                dir: dir.to_owned(),
                what: error.to_string(),
            },
        }
    }
}

impl HeadFile {
    /// Makes a head file; the caller syncs its directory.
    pub(super) fn create(path: &Path, stored: Stored) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path)?;
        file.set_len(2 * SLOT_DISTANCE)?;
        sync(&file, path)?;
        let path = path.to_owned();
        let turn = 0;
        let mut head = Self { file, path, turn };
        head.write(stored)?;
        Ok(head)
    }

    /// Opens a head file and reads its newest whole slot.
    pub(super) fn open(path: &Path) -> Result<(Self, Stored), HeadError> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let (turn, stored) = Self::newest(&file)?;
        let path = path.to_owned();
        Ok((Self { file, path, turn }, stored))
    }

    /// Reads a head file's newest whole slot, and can change nothing.
    pub(super) fn read(path: &Path) -> Result<Stored, HeadError> {
        let (_, stored) = Self::newest(&File::open(path)?)?;
        Ok(stored)
    }

    fn newest(file: &File) -> Result<(u64, Stored), HeadError> {
        let mut newest: Option<(u64, Stored)> = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT_BYTES];
            match file.read_exact_at(&mut bytes, slot * SLOT_DISTANCE) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                result => result?,
            }
            let Some((turn, stored)) = decode(&bytes)? else {
                continue;
            };
            if newest.is_none_or(|(other, _)| turn > other) {
                newest = Some((turn, stored));
            }
        }
        newest.ok_or(HeadError::NoSlot)
    }

    /// Puts another file in its place, one that fails.
    #[cfg(test)]
    pub(super) fn fail(&mut self, file: File) {
        self.file = file;
    }

    /// Writes the next head; when it returns, the head is on the disk.
    pub(super) fn write(&mut self, stored: Stored) -> io::Result<()> {
        let turn = self.turn + 1;
        let bytes = encode(turn, stored);
        self.file.write_all_at(&bytes, (turn % 2) * SLOT_DISTANCE)?;
        reached("head: written");
        sync(&self.file, &self.path)?;
        reached("head: synced");
        self.turn = turn;
        Ok(())
    }
}

fn encode(turn: u64, Stored { id, layout, head }: Stored) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&layout.format().to_be_bytes());
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(&turn.to_be_bytes());
    bytes.extend_from_slice(&head.number.to_be_bytes());
    bytes.extend_from_slice(&head.hash.0);
    bytes.extend_from_slice(&checksum(&bytes));
    bytes
}

/// Reads a slot; none if it is empty or torn.
fn decode(bytes: &[u8; SLOT_BYTES]) -> Result<Option<(u64, Stored)>, HeadError> {
    let (content, sum) = bytes.split_at(SLOT_BYTES - 8);
    if !content.starts_with(MAGIC) || checksum(content) != sum {
        return Ok(None);
    }
    let number = |at: usize| {
        let bytes = content[at..at + 8].try_into().expect("eight bytes");
        u64::from_be_bytes(bytes)
    };
    let format = u32::from_be_bytes(content[8..12].try_into().expect("four bytes"));
    let layout = Layout::of_format(format).ok_or(HeadError::Format(format))?;
    let stored = Stored {
        layout,
        id: JournalId(content[12..28].try_into().expect("sixteen bytes")),
        head: Head {
            number: number(36),
            hash: Digest(content[44..76].try_into().expect("thirty-two bytes")),
        },
    };
    Ok(Some((number(28), stored)))
}

fn checksum(bytes: &[u8]) -> [u8; 8] {
    let digest: [u8; 32] = sha2::Sha256::digest(bytes).into();
    digest[..8].try_into().expect("eight bytes")
}

/// For fuzzers: a slot that is read is the one that would be written.
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<SLOT_BYTES>() else {
        return;
    };
    // With the checksum that the content asks for, as whoever can write the file can make it.
    let mut whole = *bytes;
    let sum = checksum(&bytes[..SLOT_BYTES - 8]);
    whole[SLOT_BYTES - 8..].copy_from_slice(&sum);
    for slot in [*bytes, whole] {
        if let Ok(Some((turn, stored))) = decode(&slot) {
            assert_eq!(encode(turn, stored), slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(number: u64) -> Stored {
        Stored {
            id: JournalId([7; 16]),
            layout: Layout::Bundles,
            head: Head {
                number,
                hash: Digest::of(&number.to_be_bytes()),
            },
        }
    }

    #[test]
    fn the_newest_head_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        let mut file = HeadFile::create(&path, stored(0)).unwrap();
        for number in 1..10 {
            file.write(stored(number)).unwrap();
            assert_eq!(HeadFile::open(&path).unwrap().1, stored(number));
        }
    }

    #[test]
    fn a_torn_slot_leaves_the_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("head");
        let mut file = HeadFile::create(&path, stored(0)).unwrap();
        file.write(stored(1)).unwrap();
        file.write(stored(2)).unwrap();
        // The third turn goes into slot 1: head 2 was the third write.
        file.file.write_all_at(b"torn", SLOT_DISTANCE + 40).unwrap();
        assert_eq!(HeadFile::open(&path).unwrap().1, stored(1));
        file.file.write_all_at(b"torn", 40).unwrap();
        assert!(matches!(HeadFile::open(&path), Err(HeadError::NoSlot)));
    }
}
