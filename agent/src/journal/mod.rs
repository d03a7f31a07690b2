//! The agent's memory: an append-only file of numbered, hash-chained records (INV-2, INV-11).
//!
//! ```text
//! journal:  [length u32][number u64][hash 32][payload]  [length ...
//!           hash = SHA-256(hash before | length | number | payload)
//!           the length's highest bit says that the next record was appended with this one
//! head:     two slots, each (number, hash) with a checksum; written in turn
//! reserve:  space that is given back when the disk is full, to record how steps ended
//! ```
//!
//! [`Journal::append`] returns when the records are on the disk *and* the head names them, so at
//! the next start a journal that does not reach its head has lost something that was relied on:
//! it is quarantined, never repaired and never deleted. What lies beyond the head was relied on
//! by nobody: a torn end there is cut.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::json;
use sha2::{Digest as _, Sha256};

use crate::faults::reached;

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod head;
mod record;
mod reserve;
mod verify;

use head::{Head, Known};
pub(crate) use record::{FORMAT, Held, Intent, Record, Seen};
use reserve::Reserve;
#[cfg(feature = "faults")]
pub(crate) use verify::look;
pub(crate) use verify::{Verified, domain, verify, walk};

/// The largest payload, in bytes.
pub(crate) const MAX_RECORD: usize = 32 << 10;

const FRAME: usize = 4 + 8 + 32;

/// In a record's length: the next one was appended with it, and one does not count without the
/// other.
const MORE: u32 = 1 << 31;

/// The largest first record, with its frame.
const FIRST: u64 = (FRAME + MAX_RECORD) as u64;

/// The hash before the first record.
const GENESIS: &[u8] = b"lockstep agent journal 1\n";

pub(crate) type Hash = [u8; 32];

/// Where a record begins in the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position(u64);

/// A record's place in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) position: Position,
    /// From 1.
    pub(crate) number: u64,
    pub(crate) hash: Hash,
}

/// How much a record matters when the disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// It opens something new, and may be refused.
    Opens,
    /// It answers what opened nothing, and may be refused: the reserve is not for it.
    Answers,
    /// It closes something that runs already: the reserve is given back for it.
    Closes,
}

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// The operating system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that was relied on is missing or changed. The files are left as they are.
    #[error("the journal {path} is broken: {why}")]
    Quarantined {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the record's number.
        why: String,
    },
    /// It holds something that this release does not know.
    #[error("record {number} of {path} is of a kind that this release does not know")]
    Newer {
        /// The file.
        path: PathBuf,
        /// The record.
        number: u64,
        /// Why it cannot be read.
        #[source]
        source: serde_json::Error,
    },
}

/// Records that were not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    /// There is no space; nothing has changed.
    #[error("the disk that holds {0} is full")]
    Full(PathBuf),
    /// A record is larger than [`MAX_RECORD`]; nothing has changed.
    #[error("a record of {0} bytes does not fit into the journal")]
    TooLarge(usize),
    /// It is not known what is on the disk: the agent must end, and look again at its next start.
    #[error("the journal {path} cannot be written")]
    Fatal {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The open journal. One process holds it: see `identity::StateLock`.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    number: u64,
    hash: Hash,
    head: Head,
    reserve: Reserve,
}

impl Journal {
    /// Opens or makes the journal of a state directory, and hands every record to `visit`.
    pub(crate) fn open(
        dir: &Path,
        mut visit: impl FnMut(Position, Record),
    ) -> Result<Self, JournalError> {
        let path = dir.join("journal");
        let head_path = dir.join("head");
        let (head, known) = Head::open(&head_path).map_err(io_error("open", &head_path))?;
        let existed = path.exists();
        let quarantined = |broken: Broken| JournalError::Quarantined {
            path: path.clone(),
            why: broken.why,
        };
        if !existed && known.newest.is_some() {
            return Err(quarantined(Broken::lost()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        if !existed {
            sync_dir(dir).map_err(io_error("synchronise", dir))?;
        }
        let size = file.metadata().map_err(io_error("read", &path))?.len();
        let scan = Scan::run(&file, known.number(), &mut |at, record| {
            visit(at.position, record);
        })
        .map_err(|error| error.locate(&path))?;
        judge(known, &scan, size).map_err(quarantined)?;
        if scan.length < size {
            tracing::warn!(
                path = %path.display(),
                bytes = size - scan.length,
                "the end of the journal was torn before anybody relied on it, and is cut"
            );
            reached("journal: to be cut");
            file.set_len(scan.length).map_err(io_error("cut", &path))?;
            reached("journal: cut");
            sync(&file, &path).map_err(io_error("synchronise", &path))?;
        }
        let mut journal = Self {
            reserve: Reserve::new(dir),
            path,
            file,
            length: scan.length,
            number: scan.number,
            hash: scan.hash,
            head,
        };
        // Records beyond the head are whole: from here on they are relied on. Whoever wrote them
        // may have been killed before they were synced, or the sync may have failed: then they are
        // read from memory and count as written, and a sync by itself writes nothing of them. They
        // are not cut, for it may be the newest head that never came to the disk, and then they
        // have been acknowledged.
        if known.number().unwrap_or(0) < journal.number {
            journal
                .write_again(scan.relied_on)
                .map_err(io_error("write", &journal.path))?;
            sync(&journal.file, &journal.path).map_err(io_error("synchronise", &journal.path))?;
            journal
                .head
                .write(journal.number, journal.hash)
                .map_err(io_error("write", &head_path))?;
        }
        Ok(journal)
    }

    /// Writes what is there from this byte on once more, as it is.
    fn write_again(&self, mut from: u64) -> io::Result<()> {
        reached("journal: to be written again");
        let mut bytes = vec![0; MAX_RECORD];
        while from < self.length {
            let left = usize::try_from(self.length - from).unwrap_or(usize::MAX);
            let bytes = &mut bytes[..left.min(MAX_RECORD)];
            self.file.read_exact_at(bytes, from)?;
            self.file.write_all_at(bytes, from)?;
            from += bytes.len() as u64;
        }
        reached("journal: written again");
        Ok(())
    }

    /// Whether nothing has ever been written.
    pub(crate) fn is_empty(&self) -> bool {
        self.number == 0
    }

    /// Appends records as one: afterwards all are on the disk, or none is.
    pub(crate) fn append(
        &mut self,
        records: &[Record],
        need: Need,
    ) -> Result<Vec<Position>, AppendError> {
        let mut bytes = Vec::new();
        let mut positions = Vec::with_capacity(records.len());
        let (mut number, mut hash) = (self.number, self.hash);
        for (record, left) in records.iter().zip((0..records.len()).rev()) {
            let payload =
                serde_json::to_vec(record).expect("a record has no map with other keys than text");
            if payload.len() > MAX_RECORD {
                return Err(AppendError::TooLarge(payload.len()));
            }
            number += 1;
            positions.push(Position(self.length + bytes.len() as u64));
            hash = push_frame(&mut bytes, hash, number, &payload, left > 0);
        }
        let room = match need {
            Need::Opens => self.reserve.ensure(),
            Need::Answers => self.reserve.spares(),
            Need::Closes => true,
        };
        if !room {
            return Err(AppendError::Full(self.path.clone()));
        }
        let mut written = self.write(&bytes);
        let full = matches!(written, Err(WriteError::Full));
        if full && need == Need::Closes && self.reserve.give_back() {
            tracing::warn!("the disk is full: the reserve is given back to record what has ended");
            written = self.write(&bytes);
        }
        written.map_err(|error| self.refused(error))?;
        self.head
            .write(number, hash)
            .map_err(|source| self.fatal(source))?;
        reached("journal: relied on");
        self.length += bytes.len() as u64;
        (self.number, self.hash) = (number, hash);
        Ok(positions)
    }

    /// Writes at the end and makes it durable; undoes a partial write.
    fn write(&self, bytes: &[u8]) -> Result<(), WriteError> {
        reached("journal: to be written");
        if let Err(source) = self.file.write_all_at(bytes, self.length) {
            self.file.set_len(self.length).map_err(WriteError::Fatal)?;
            return Err(match source.raw_os_error() {
                Some(NO_SPACE | OVER_QUOTA) => WriteError::Full,
                _ => WriteError::Fatal(source),
            });
        }
        reached("journal: written");
        // A failed sync may have dropped the data and says so only once, so that nothing may be
        // concluded from a second one that succeeds.
        sync(&self.file, &self.path).map_err(WriteError::Fatal)
    }

    fn refused(&self, error: WriteError) -> AppendError {
        match error {
            WriteError::Full => AppendError::Full(self.path.clone()),
            WriteError::Fatal(source) => self.fatal(source),
        }
    }

    fn fatal(&self, source: io::Error) -> AppendError {
        AppendError::Fatal {
            path: self.path.clone(),
            source,
        }
    }

    /// Reads one record again.
    pub(crate) fn read(&self, position: Position) -> Result<Record, JournalError> {
        self.read_linked(position).map(|(_, record)| record)
    }

    /// Reads one record again, with its place in the chain.
    pub(crate) fn read_linked(&self, position: Position) -> Result<(Link, Record), JournalError> {
        let io_error = |source| JournalError::Io {
            what: "read",
            path: self.path.clone(),
            source,
        };
        let mut frame = [0; FRAME];
        self.file
            .read_exact_at(&mut frame, position.0)
            .map_err(io_error)?;
        let frame = Frame::split(&frame);
        let mut payload = vec![0; frame.size().min(MAX_RECORD)];
        self.file
            .read_exact_at(&mut payload, position.0 + FRAME as u64)
            .map_err(io_error)?;
        let Frame { number, hash, .. } = frame;
        let record = json::read(&payload).map_err(|source| JournalError::Newer {
            path: self.path.clone(),
            number,
            source,
        })?;
        let link = Link {
            position,
            number,
            hash,
        };
        Ok((link, record))
    }
}

enum WriteError {
    Full,
    Fatal(io::Error),
}

const NO_SPACE: i32 = rustix::io::Errno::NOSPC.raw_os_error();
const OVER_QUOTA: i32 = rustix::io::Errno::DQUOT.raw_os_error();

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    let opened = File::open(dir)?;
    #[cfg(any(test, feature = "faults"))]
    lockstep_tests::power::before_sync(dir);
    opened.sync_all()
}

/// Makes a new file's content durable.
pub(crate) fn sync_all(file: &File, path: &Path) -> io::Result<()> {
    #[cfg(any(test, feature = "faults"))]
    lockstep_tests::power::before_sync(path);
    #[cfg(not(any(test, feature = "faults")))]
    let _ = path;
    file.sync_all()
}

/// Makes a file's content durable. Tests cut the power between any two of these.
fn sync(file: &File, path: &Path) -> io::Result<()> {
    if crate::faults::planted!(AgentSkipsSync) {
        return Ok(());
    }
    #[cfg(any(test, feature = "faults"))]
    lockstep_tests::power::before_sync(path);
    #[cfg(not(any(test, feature = "faults")))]
    let _ = path;
    file.sync_data()
}

fn genesis() -> Hash {
    Sha256::digest(GENESIS).into()
}

fn chain(before: Hash, length: u32, number: u64, payload: &[u8]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update(before);
    hasher.update(length.to_le_bytes());
    hasher.update(number.to_le_bytes());
    hasher.update(payload);
    hasher.finalize().into()
}

fn push_frame(bytes: &mut Vec<u8>, before: Hash, number: u64, payload: &[u8], more: bool) -> Hash {
    let length = u32::try_from(payload.len()).expect("a payload is at most MAX_RECORD long");
    let length = if more { length | MORE } else { length };
    let hash = chain(before, length, number, payload);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&hash);
    bytes.extend_from_slice(payload);
    hash
}

/// What stands before a payload.
struct Frame {
    /// With [`MORE`].
    length: u32,
    number: u64,
    hash: Hash,
}

impl Frame {
    fn split(frame: &[u8; FRAME]) -> Self {
        Self {
            length: u32::from_le_bytes(frame[..4].try_into().expect("4 bytes")),
            number: u64::from_le_bytes(frame[4..12].try_into().expect("8 bytes")),
            hash: frame[12..].try_into().expect("32 bytes"),
        }
    }

    /// The payload's, in bytes.
    fn size(&self) -> usize {
        (self.length & !MORE) as usize
    }

    fn has_more(&self) -> bool {
        self.length & MORE != 0
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError + use<> {
    let path = path.to_owned();
    move |source| JournalError::Io { what, path, source }
}

/// Where a journal ceases to be what was relied on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    /// The first record that is missing or changed; none if it is the head that is broken.
    pub(crate) record: Option<u64>,
    /// What is wrong, with the record's number.
    pub(crate) why: String,
}

impl Broken {
    fn lost() -> Self {
        Self {
            record: Some(1),
            why: "the file with its records is missing".to_owned(),
        }
    }
}

/// Whether what was found in a file of this size reaches the head that is known.
fn judge(known: Known, scan: &Scan, size: u64) -> Result<(), Broken> {
    let stopped = scan.stopped.map(|why| format!(" ({why})"));
    let stopped = stopped.unwrap_or_default();
    match known.newest {
        Some((number, _)) if scan.number < number => Err(Broken {
            record: Some(scan.number + 1),
            why: format!(
                "it ends after record {}, and {number} were written{stopped}",
                scan.number,
            ),
        }),
        Some((number, hash)) if scan.at_known != Some(hash) => Err(Broken {
            record: Some(number),
            why: format!("record {number} is not the one that was written"),
        }),
        // The first record was durable before the first head was written, and the second came
        // after that; a journal without a head has one record, or a part of it.
        None if scan.number > 1 => Err(Broken {
            record: None,
            why: "its head is missing or broken".to_owned(),
        }),
        None if scan.number == 0 && (!known.blank || size > FIRST) => Err(Broken {
            record: Some(1),
            why: format!("its head is missing or broken, and so is record 1{stopped}"),
        }),
        _ => Ok(()),
    }
}

/// What reading a journal from its beginning finds.
struct Scan {
    /// Bytes of whole records.
    length: u64,
    /// The last whole record, and its hash.
    number: u64,
    hash: Hash,
    /// The hash of the record that the head names.
    at_known: Option<Hash>,
    /// Bytes up to the end of that record.
    relied_on: u64,
    /// Why it ended before the end of the file.
    stopped: Option<&'static str>,
}

enum ScanError {
    Io(io::Error),
    Newer(u64, Hash, serde_json::Error),
}

impl ScanError {
    fn locate(self, path: &Path) -> JournalError {
        let path = path.to_owned();
        match self {
            Self::Io(source) => JournalError::Io {
                what: "read",
                path,
                source,
            },
            Self::Newer(number, _, source) => JournalError::Newer {
                path,
                number,
                source,
            },
        }
    }
}

impl Scan {
    fn run(
        file: impl io::Read,
        known: Option<u64>,
        visit: &mut impl FnMut(Link, Record),
    ) -> Result<Self, ScanError> {
        let mut reader = BufReader::new(file);
        let mut scan = Self {
            length: 0,
            number: 0,
            hash: genesis(),
            at_known: None,
            relied_on: 0,
            stopped: None,
        };
        // Records whose append may not have come to its end.
        let mut waiting: Vec<(Link, Record)> = vec![];
        let mut last = (scan.length, scan.number, scan.hash);
        loop {
            let mut frame = [0; FRAME];
            match fill(&mut reader, &mut frame).map_err(ScanError::Io)? {
                0 if waiting.is_empty() => return Ok(scan),
                FRAME => {}
                _ => return Ok(scan.stop("a record is incomplete")),
            }
            let (length, number, hash) = last;
            let frame = Frame::split(&frame);
            if frame.size() > MAX_RECORD || frame.number != number + 1 {
                return Ok(scan.stop("a record has no valid beginning"));
            }
            let mut payload = vec![0; frame.size()];
            if fill(&mut reader, &mut payload).map_err(ScanError::Io)? < payload.len() {
                return Ok(scan.stop("a record is incomplete"));
            }
            if chain(hash, frame.length, frame.number, &payload) != frame.hash {
                return Ok(scan.stop("a record does not match its hash"));
            }
            let record =
                json::read(&payload).map_err(|e| ScanError::Newer(frame.number, frame.hash, e))?;
            let link = Link {
                position: Position(length),
                number: frame.number,
                hash: frame.hash,
            };
            waiting.push((link, record));
            let whole = (FRAME + payload.len()) as u64;
            last = (length + whole, frame.number, frame.hash);
            if frame.has_more() {
                continue;
            }
            for (link, record) in waiting.drain(..) {
                visit(link, record);
            }
            (scan.length, scan.number, scan.hash) = last;
            if known == Some(scan.number) {
                scan.at_known = Some(scan.hash);
                scan.relied_on = scan.length;
            }
        }
    }

    fn stop(mut self, why: &'static str) -> Self {
        self.stopped = Some(why);
        self
    }
}

/// Reads until the buffer is full or the file ends; says how much there was.
fn fill(reader: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod storms;
#[cfg(test)]
mod tests;
