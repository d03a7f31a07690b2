//! The journal: numbered records, each chained to the one before it (INV-2, INV-11).
//!
//! ```text
//! anchor = SHA-256("lockstep journal" || format || journal id)
//! hash n = SHA-256(hash n-1 || number n, 8 bytes big-endian || payload n)      hash 0 = anchor
//! head   = (number, hash) of the newest record
//! ```
//!
//! A compacted journal begins after the last record of an archive instead of the anchor: its first
//! record names that one's number and hash, and is chained to it, so that the chain goes on.
//!
//! A journal keeps its head apart from its records. What does not reach its head has lost
//! something that was acknowledged, and is quarantined: never repaired, never started over.

pub(crate) mod archive;
pub(crate) mod audit;
pub(crate) mod compact;
#[cfg(test)]
mod contract;
mod disk;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod head;
#[cfg(any(test, feature = "faults"))]
pub(crate) mod memory;
pub(crate) mod offline;
mod reserve;
pub(crate) mod sled;
pub(crate) mod source;

use std::fmt;
use std::io;
use std::path::PathBuf;

use lockstep_core::{Entry, Record};
use lockstep_proto::ids::Digest;
use lockstep_proto::json;
use sha2::Digest as _;

use source::Source;

/// The version of the chain, and of what is exported.
pub(crate) const FORMAT: u32 = 1;

/// How records lie in the store. A journal keeps the layout that it was made with, so that the
/// release that made it can go on with it; `lockstep journal compact` makes it anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A key for each record. What releases before bundles make.
    Records = 1,
    /// A key for records that were appended together, up to 32 KiB of them, packed: a hundredth of
    /// the keys where thousands report at once, and a third of the bytes.
    Bundles = 2,
}

impl Layout {
    /// The version of the store's format, as it stands in its files.
    pub(crate) fn format(self) -> u32 {
        self as u32
    }

    /// The layout of a format; none if this release does not know it.
    pub(crate) fn of_format(format: u32) -> Option<Self> {
        [Self::Records, Self::Bundles]
            .into_iter()
            .find(|layout| layout.format() == format)
    }
}

/// The largest payload, in bytes: with its hash it has 32 KiB. Whatever a journal of either layout
/// holds, one of the other can take.
pub(crate) const MAX_PAYLOAD: usize = (32 << 10) - 32;

/// A journal's random id, made with it: records of one journal do not chain in another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalId(pub [u8; 16]);

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JournalId({self})")
    }
}

impl JournalId {
    /// A new one.
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    /// What the first record is chained to.
    pub(crate) fn anchor(self) -> Head {
        let mut hash = sha2::Sha256::new();
        hash.update(b"lockstep journal");
        hash.update(FORMAT.to_be_bytes());
        hash.update(self.0);
        Head {
            number: 0,
            hash: Digest(hash.finalize().into()),
        }
    }
}

/// The newest record of a journal; number 0 if it is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    /// Its number, from 1.
    pub(crate) number: u64,
    /// Its hash.
    pub(crate) hash: Digest,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.number, self.hash)
    }
}

impl Head {
    /// The head after one more record.
    #[must_use]
    pub(crate) fn next(self, payload: &[u8]) -> Self {
        let number = self.number + 1;
        let mut hash = sha2::Sha256::new();
        hash.update(self.hash.0);
        hash.update(number.to_be_bytes());
        hash.update(payload);
        Self {
            number,
            hash: Digest(hash.finalize().into()),
        }
    }
}

/// Durable records in the order in which they were appended.
///
/// One value owns a journal; a second one on the same state is refused.
pub(crate) trait Journal: fmt::Debug + Send {
    /// The journal's id.
    fn id(&self) -> JournalId;

    /// What its first record is chained to: the anchor, or the last record of an archive.
    fn base(&self) -> Head {
        self.id().anchor()
    }

    /// The newest record that is durable.
    fn head(&self) -> Head;

    /// Appends a batch. When it returns, all of it is on the disk and found again after power is
    /// lost, and so is a head that reaches it. After an error nothing is known of the batch but
    /// that no part of it may be acknowledged: the process must end, and the next one finds out.
    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError>;

    /// Whether there is room for what is new, beside what is set aside for what runs already.
    /// Asked before each batch, so it is cheap.
    fn has_room(&mut self) -> bool {
        true
    }

    /// All payloads, from the first on. The chain was verified when the journal was opened.
    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_>;

    /// What compacts it while it is open; none if it is kept where nothing can.
    fn compactable(&mut self) -> Option<&mut dyn Compactable> {
        None
    }

    /// Closes the journal; what was appended was durable before.
    fn close(self: Box<Self>);
}

/// A journal whose records another thread can read, to make a shorter one of them.
pub(crate) trait Compactable {
    /// The records of this moment.
    fn source(&self) -> Result<Source, OpenError>;

    /// Goes on as the journal that was built beside it, in its place. If the two cannot be exchanged
    /// it goes on as it was, and its base tells. After an error it takes nothing any more.
    fn exchange(&mut self) -> Result<(), OpenError>;
}

/// Where a journal ceases to be what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Broken {
    /// The first record that is missing or changed; none if no record can be read at all, or if
    /// it is the head that is broken.
    pub(crate) record: Option<u64>,
    /// What is wrong, with the record's number where that is known.
    pub(crate) what: String,
}

/// A journal that cannot be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// Another process has it.
    #[error("another controller runs on {dir}; end it first")]
    InUse {
        /// The journal's directory.
        dir: PathBuf,
    },
    /// Its state directory belongs to another user than this process runs as. What root makes
    /// there, the controller could not read at its next start.
    #[error("{dir} belongs to the user {owner}, and this runs as {own}")]
    NotOwner {
        /// The state directory.
        dir: PathBuf,
        /// Whose it is: a user id.
        owner: u32,
        /// The user id of this process.
        own: u32,
    },
    /// There is none, and it is not to be made.
    #[error("there is no journal in {dir}")]
    None {
        /// The state directory.
        dir: PathBuf,
    },
    /// The journal lacks something that was acknowledged, or holds what it never wrote.
    #[error(
        "the journal in {dir} is quarantined: {what}; nothing was started and nothing was \
         changed. Keep a copy of the directory, then put a backup of the whole state directory in \
         its place. Agents hold what they have not been able to report, and refuse what is older \
         than what they have seen"
    )]
    Quarantined {
        /// The journal's directory.
        dir: PathBuf,
        /// What is wrong, with the record's number where that is known.
        what: String,
    },
    /// The journal was written by a release with another format.
    #[error(
        "the journal in {dir} has format {found}, which this release does not read: it is \
         of a newer one"
    )]
    Format {
        /// The journal's directory.
        dir: PathBuf,
        /// The format that was found.
        found: u32,
    },
    /// The operating system refuses.
    #[error("the journal cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    /// What to type instead, if it can be said.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::NotOwner { dir, .. } => Some(format!(
                "run it as that user: runuser -u \"$(stat -c %U {})\" -- lockstep ...",
                dir.display()
            )),
            Self::None { .. } => {
                Some("--dir is the controller's state directory, `state_dir` in its file".into())
            }
            _ => None,
        }
    }

    /// Whether there is no room on the disk, which says nothing about the journal.
    pub(crate) fn is_full_disk(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(
            self,
            Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded)
        )
    }
}

/// A batch that may not be acknowledged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    /// A payload is larger than [`MAX_PAYLOAD`]; nothing of the batch was written.
    #[error("record {number} has {size} bytes, more than a journal keeps in one record")]
    TooLarge {
        /// The number that it would have had.
        number: u64,
        /// Its size.
        size: usize,
    },
    /// The disk is full, and so is what was set aside on it; nothing of the batch was written.
    #[error("the disk is full, and what the journal had set aside on it is used up")]
    Full,
    /// The store refuses.
    #[error("the journal cannot {what}")]
    Store {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An earlier append failed.
    #[error("the journal takes nothing more, because an earlier append failed")]
    Poisoned,
}

/// What the first record of a compacted journal is chained to, and the archive's file name; none
/// for any other record.
fn begins_after(payload: &[u8]) -> Option<(Head, String)> {
    let entry: Entry = json::read(payload).ok()?;
    match entry.record {
        Record::Compacted {
            number,
            hash,
            archive,
        } => Some((Head { number, hash }, archive)),
        _ => None,
    }
}

/// Checks sizes and chains a batch to the head: the new heads, one for each payload.
fn chain(head: Head, payloads: &[Vec<u8>]) -> Result<Vec<Head>, AppendError> {
    let mut last = head;
    let mut heads = Vec::with_capacity(payloads.len());
    for payload in payloads {
        if payload.len() > MAX_PAYLOAD {
            return Err(AppendError::TooLarge {
                number: last.number + 1,
                size: payload.len(),
            });
        }
        last = last.next(payload);
        heads.push(last);
    }
    Ok(heads)
}
