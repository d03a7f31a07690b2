//! Journals on which no controller runs: looked at, written out as text, and made from it again.
//!
//! ```text
//! {"format": "lockstep.journal/1", "journal": ID, "journal_format": 1, "anchor": HASH,
//!  "records": N, "head": HASH, "term": COUNTER}
//! {"number": 1, "hash": HASH, "payload": TEXT}      hash as the module `journal` says
//! {"number": 2, ...
//! ```
//!
//! A payload is a text in the text, so that no tool between writes it another way: its bytes are
//! what the chain covers.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lockstep_core::{Entry, Record};
use lockstep_proto::ids::{Digest, Epoch, PlanDigest};
use lockstep_proto::json;
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

use super::archive::{self, ArchiveFound};
use super::disk::io_error;
use super::head::{HeadError, HeadFile, Stored};
use super::sled::{self, Copied, SledJournal, Unread};
use super::source::Source;
use super::{
    AppendError, Broken, FORMAT, Head, Journal as _, JournalId, Layout, OpenError, begins_after,
};
use crate::driver::{taken_over, wall_clock};

/// The version of the text.
const EXPORT: &str = "lockstep.journal/1";

/// A line holds a payload of at most 32 KiB; as a text in a text it may grow sixfold.
const MAX_LINE: u64 = 256 << 10;

/// Records that are imported together; a batch is at most 8 MiB then.
const BATCH: usize = 256;

/// What is found in a journal.
#[derive(Debug)]
pub(crate) struct Inspection {
    /// Whose it is; none if neither its head nor its store says so.
    pub(crate) id: Option<JournalId>,
    /// How its records lie in its store; none likewise.
    pub(crate) layout: Option<Layout>,
    /// The head that was acknowledged; none if the head file is broken.
    pub(crate) acknowledged: Option<Head>,
    /// What its first record is chained to, if that is the end of an archive.
    pub(crate) begins_after: Option<Head>,
    /// The archives that hold what is before it, the newest first.
    pub(crate) archives: Vec<ArchiveFound>,
    /// The last record that is what was written, with all before it; none if nothing can be read.
    pub(crate) last: Option<Head>,
    /// What is wrong; none if the journal is whole.
    pub(crate) broken: Option<Broken>,
}

/// A journal that cannot be exported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A record cannot be read as what this release writes.
    #[error("record {number} cannot be read by this release")]
    Record {
        /// Its number.
        number: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The text cannot be written.
    #[error("the export cannot be written")]
    Output(#[from] io::Error),
}

/// An export that cannot be imported. The state directory is as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    /// There is something in the state directory that would be mixed up with it.
    #[error("{dir} is not empty: there is {name} in it")]
    NotEmpty {
        /// The state directory.
        dir: PathBuf,
        /// What was found.
        name: String,
    },
    /// The text is not an export that this release reads.
    #[error("line {line} is not of an export that this release reads: {why}")]
    NotAnExport {
        /// From 1.
        line: u64,
        /// Why not.
        why: String,
    },
    /// A record is missing or was changed.
    #[error("record {record} of the export is not what was written: {why}")]
    Broken {
        /// The first one.
        record: u64,
        /// What is wrong.
        why: String,
    },
    /// The text cannot be read.
    #[error("the export cannot be read")]
    Input(#[from] io::Error),
    /// The journal cannot be made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The journal cannot be written.
    #[error(transparent)]
    Append(#[from] AppendError),
}

/// What was imported.
#[derive(Debug)]
pub(crate) struct Imported {
    /// The journal, the same as the exported one.
    pub(crate) id: JournalId,
    /// The last record of the export.
    pub(crate) exported: Head,
    /// The term that the import began, in one more record.
    pub(crate) term: Epoch,
    /// Plans that records name, and that are not in the state directory.
    pub(crate) missing_plans: Vec<PlanDigest>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: String,
    journal: String,
    journal_format: u32,
    anchor: Digest,
    records: u64,
    head: Digest,
    /// The last term that began; 0 if none has.
    term: u64,
    /// What the first record is chained to, if the journal was compacted; else to the anchor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after: Option<After>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct After {
    number: u64,
    hash: Digest,
}

impl From<Head> for After {
    fn from(Head { number, hash }: Head) -> Self {
        Self { number, hash }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct ExportedRecord {
    number: u64,
    hash: Digest,
    payload: String,
}

/// Looks at the journal of a state directory, and changes nothing.
pub(crate) fn inspect(state: &Path) -> Result<Inspection, OpenError> {
    let journal = Offline::open(state)?;
    let stored = journal.stored.as_ref().ok();
    let mut inspection = Inspection {
        id: stored.map(|stored| stored.id),
        layout: stored.map(|stored| stored.layout),
        acknowledged: stored.map(|stored| stored.head),
        begins_after: None,
        archives: vec![],
        last: None,
        broken: None,
    };
    match journal.look() {
        Ok((db, followed)) => {
            inspection.id = Some(followed.id);
            inspection.layout = Some(followed.layout);
            let first = sled::payloads(&db, followed.layout)
                .next()
                .and_then(Result::ok);
            if followed.base.number > 0
                && let Some((base, name)) = first.and_then(|first| begins_after(&first))
            {
                inspection.begins_after = Some(base);
                inspection.archives = archive::follow(state, followed.id, base, name);
            }
            inspection.last = Some(followed.head);
            inspection.broken = followed.broken;
        }
        Err(Unread::Broken(broken)) => inspection.broken = Some(broken),
        Err(refused @ Unread::Refused(_)) => return Err(refused.of(&journal.dir)),
    }
    if let Err(error) = &journal.stored {
        let what = match &inspection.broken {
            None => error.to_string(),
            Some(broken) => format!("{error}; and {broken}"),
        };
        let record = inspection.broken.and_then(|broken| broken.record);
        inspection.broken = Some(Broken { record, what });
    }
    Ok(inspection)
}

/// Writes a whole journal as text, and changes nothing in it.
pub(crate) fn export(state: &Path, out: &mut impl Write) -> Result<Head, ExportError> {
    let records = Offline::open(state)?.read_all()?;
    records.write(out)?;
    Ok(records.head)
}

/// All records of a whole journal: what a controller reads at its start.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) id: JournalId,
    /// What the first one is chained to.
    pub(super) base: Head,
    pub(super) head: Head,
    pub(super) payloads: Vec<Vec<u8>>,
    pub(super) entries: Vec<Entry>,
}

impl Records {
    /// Writes them as text.
    pub(super) fn write(&self, out: &mut impl Write) -> Result<(), ExportError> {
        let Self { id, base, head, .. } = *self;
        let term = self.entries.iter().rev().find_map(term_of).unwrap_or(0);
        let payloads = self.payloads.iter().cloned().map(Ok);
        write_export(out, (id, base, head), term, payloads)
    }
}

/// Writes a journal as text: its records, from what the first one is chained to until the head.
pub(super) fn write_export(
    out: &mut impl Write,
    (id, base, head): (JournalId, Head, Head),
    term: u64,
    payloads: impl Iterator<Item = Result<Vec<u8>, ExportError>>,
) -> Result<(), ExportError> {
    let header = Header {
        format: EXPORT.to_owned(),
        journal: id.to_string(),
        journal_format: FORMAT,
        anchor: id.anchor().hash,
        records: head.number,
        head: head.hash,
        term,
        after: (base.number > 0).then(|| After::from(base)),
    };
    write_line(out, &header)?;
    let mut at = base;
    for payload in payloads {
        let payload = payload?;
        at = at.next(&payload);
        let Head { number, hash } = at;
        let payload = String::from_utf8(payload).expect("it is JSON");
        write_line(
            out,
            &ExportedRecord {
                number,
                hash,
                payload,
            },
        )?;
    }
    out.flush()?;
    Ok(())
}

/// Reads a payload as the record that it is, under this number.
pub(super) fn read(payload: &[u8], number: u64) -> Result<Entry, ExportError> {
    json::read(payload).map_err(|source| ExportError::Record { number, source })
}

/// Reads payloads; `base` is the number before the first one's.
pub(super) fn read_entries(payloads: &[Vec<u8>], base: u64) -> Result<Vec<Entry>, ExportError> {
    let numbered = payloads.iter().zip(base + 1..);
    let entries = numbered.map(|(payload, number)| read(payload, number));
    entries.collect()
}

/// Makes a journal from an export, in a state directory that holds nothing but perhaps the plans
/// and logs of the exported one. It begins a term above the exported ones and above `epoch_above`
/// (INV-4), so that whoever goes on from the journal is newer than the controller that wrote it.
pub(crate) fn import(
    state: &Path,
    input: &mut impl BufRead,
    epoch_above: u64,
) -> Result<Imported, ImportError> {
    check_empty(state)?;
    let mut lines = Lines { input, number: 0 };
    let (header, id, base) = read_header(&mut lines)?;
    let mut found = Found::new(base);
    let mut term = Epoch::NONE;
    let first = match base.number {
        0 => None,
        _ => Some(found.take_first(lines.next()?)?),
    };
    let first = first.as_deref().map(|payload| (base, payload));
    SledJournal::make(state, id, first, |journal| {
        let mut batch = Vec::with_capacity(BATCH);
        while found.head.number < header.records {
            batch.push(found.take(lines.next()?)?);
            if batch.len() == BATCH {
                journal.append(&batch)?;
                batch.clear();
            }
        }
        if found.head.hash != header.head {
            return Err(found.broken("it is not the head that the export names"));
        }
        if let Some(_more) = lines.next::<serde_json::Value>()? {
            return Err(found.broken_after("the export goes on after its last record"));
        }
        // Whoever goes on from an import takes over (INV-4).
        term = Epoch {
            counter: taken_over(found.term.max(epoch_above), found.at.max(wall_clock())),
            id: rand::random(),
        };
        for record in [
            Record::TermBegan { epoch: term },
            Record::TookOver { epoch: term },
        ] {
            let entry = Entry {
                at: found.at,
                record,
            };
            batch.push(serde_json::to_vec(&entry).expect("a term is numbers"));
        }
        journal.append(&batch)?;
        Ok::<_, ImportError>(())
    })?;
    let blobs = state.join("blobs");
    found.plans.retain(|plan| !blobs.join(plan.hex()).exists());
    Ok(Imported {
        id,
        exported: found.head,
        term,
        missing_plans: found.plans,
    })
}

/// A journal on which nobody runs.
#[derive(Debug)]
pub(super) struct Offline {
    state: PathBuf,
    dir: PathBuf,
    stored: Result<Stored, HeadError>,
    /// None if there is no store to copy.
    copied: Option<Copied>,
    lock: fs::File,
}

impl Offline {
    pub(super) fn open(state: &Path) -> Result<Self, OpenError> {
        let dir = state.join("journal");
        if !dir.is_dir() {
            return Err(OpenError::None {
                dir: state.to_owned(),
            });
        }
        let lock = sled::lock_existing(state)?;
        let stored = match HeadFile::read(&dir.join("head")) {
            // Broken is what can be told of; the rest says nothing about the journal.
            Err(error) if !matches!(error.of(&dir), OpenError::Quarantined { .. }) => {
                return Err(error.of(&dir));
            }
            stored => stored,
        };
        if !dir.join(sled::STORE_FILE).exists() {
            // sled would make an empty one.
            return Ok(Self {
                state: state.to_owned(),
                dir,
                stored,
                copied: None,
                lock,
            });
        }
        // Not where a controller puts its copy: what another user left there would be in its way.
        let copied = Copied::make(&dir.join("store"), &state.join("journal.verify"))?;
        Ok(Self {
            state: state.to_owned(),
            dir,
            stored,
            copied: Some(copied),
            lock,
        })
    }

    /// All records of a whole journal.
    pub(super) fn read_all(&self) -> Result<Records, ExportError> {
        let source = self.source()?;
        let payloads = source.payloads().collect::<Result<Vec<_>, _>>()?;
        let Source { id, base, head, .. } = source;
        Ok(Records {
            id,
            base,
            head,
            entries: read_entries(&payloads, base.number)?,
            payloads,
        })
    }

    /// The records of a whole journal, out of the copy.
    pub(super) fn source(&self) -> Result<Source, OpenError> {
        self.stored.as_ref().map_err(|error| error.of(&self.dir))?;
        let looked = self.look().and_then(sled::whole);
        let (db, followed) = looked.map_err(|unread| unread.of(&self.dir))?;
        let lock = self.lock.try_clone();
        Ok(Source {
            state: self.state.clone(),
            id: followed.id,
            base: followed.base,
            head: followed.head,
            db,
            layout: followed.layout,
            lock: lock.map_err(io_error("lock", &self.state))?,
            stop: Arc::default(),
        })
    }

    fn look(&self) -> Result<(::sled::Db, sled::Followed), Unread> {
        let missing = || sled::unreadable("its store is missing".to_owned());
        let copied = self.copied.as_ref().ok_or_else(missing)?;
        copied.look(self.stored.as_ref().ok().copied())
    }
}

/// Verifies an export of this journal that ends with this record; answers with what is before it,
/// if that is in an archive.
pub(super) fn verify_export(
    input: &mut impl BufRead,
    id: JournalId,
    last: Head,
) -> Result<Option<(Head, String)>, ImportError> {
    let mut lines = Lines { input, number: 0 };
    let (header, found_id, base) = read_header(&mut lines)?;
    let other = |why: String| ImportError::NotAnExport { line: 1, why };
    if found_id != id {
        return Err(other(format!("it is of the journal {found_id}")));
    }
    if header.records != last.number || header.head != last.hash {
        let (number, hash) = (header.records, header.head);
        return Err(other(format!(
            "it ends with {number} {hash}, not with {last}"
        )));
    }
    let mut found = Found::new(base);
    let mut before = None;
    if base.number > 0 {
        before = begins_after(&found.take_first(lines.next()?)?);
    }
    while found.head.number < last.number {
        found.take(lines.next()?)?;
    }
    if found.head != last {
        return Err(found.broken("it is not the one that the journal goes on from"));
    }
    Ok(before)
}

/// Reads all records of an export that was verified.
pub(super) fn read_export(input: &mut impl BufRead) -> Result<Records, ExportError> {
    let mut lines = Lines { input, number: 0 };
    let read = |error: ImportError| ExportError::Output(io::Error::other(error.to_string()));
    let (header, id, base) = read_header(&mut lines).map_err(read)?;
    let mut payloads = vec![];
    while let Some(record) = lines.next::<ExportedRecord>().map_err(read)? {
        payloads.push(record.payload.into_bytes());
    }
    Ok(Records {
        id,
        base,
        head: Head {
            number: header.records,
            hash: header.head,
        },
        entries: read_entries(&payloads, base.number)?,
        payloads,
    })
}

/// Reads the first line: whose journal it is, and what its first record is chained to.
fn read_header<R: BufRead>(
    lines: &mut Lines<'_, R>,
) -> Result<(Header, JournalId, Head), ImportError> {
    let header: Header = lines.expect("it has no header")?;
    let refused = |why: String| ImportError::NotAnExport { line: 1, why };
    if header.format != EXPORT {
        return Err(refused(format!("its format is {}", header.format)));
    }
    if header.journal_format != FORMAT {
        let found = header.journal_format;
        return Err(refused(format!(
            "the journal has format {found}, this release reads format {FORMAT}"
        )));
    }
    let id: [u8; 16] = hex::decode(&header.journal)
        .ok()
        .and_then(|id| id.try_into().ok())
        .ok_or_else(|| refused("the journal's id is not one".to_owned()))?;
    let id = JournalId(id);
    if header.anchor != id.anchor().hash {
        return Err(refused("the anchor is not that of the id".to_owned()));
    }
    let after = header
        .after
        .map(|After { number, hash }| Head { number, hash });
    Ok((header, id, after.unwrap_or_else(|| id.anchor())))
}

/// What an export has said so far.
#[derive(Debug)]
struct Found {
    head: Head,
    at: Timestamp,
    term: u64,
    plans: Vec<PlanDigest>,
}

impl Found {
    fn new(anchor: Head) -> Self {
        Self {
            head: anchor,
            at: Timestamp(0),
            term: 0,
            plans: vec![],
        }
    }

    /// Takes the next record; answers with its payload.
    fn take(&mut self, record: Option<ExportedRecord>) -> Result<Vec<u8>, ImportError> {
        let Some(record) = record else {
            return Err(self.broken_after("the export ends before it"));
        };
        let payload = record.payload.into_bytes();
        let next = self.head.next(&payload);
        if record.number != next.number {
            let why = format!("record {} stands in its place", record.number);
            return Err(self.broken_after(&why));
        }
        if record.hash != next.hash {
            return Err(self.broken_after("its hash differs"));
        }
        let entry: Entry = json::read(&payload)
            .map_err(|error| self.broken_after(&format!("this release cannot read it: {error}")))?;
        self.head = next;
        self.at = entry.at;
        self.term = term_of(&entry).map_or(self.term, |term| term.max(self.term));
        if let Record::Submitted { plan, .. } = entry.record
            && !self.plans.contains(&plan)
        {
            self.plans.push(plan);
        }
        Ok(payload)
    }

    /// Takes the first record of a compacted journal: it names what it is chained to.
    fn take_first(&mut self, record: Option<ExportedRecord>) -> Result<Vec<u8>, ImportError> {
        let base = self.head;
        let payload = self.take(record)?;
        match begins_after(&payload) {
            Some((after, _)) if after == base => Ok(payload),
            _ => Err(self.broken("it does not say what was before it")),
        }
    }

    fn broken(&self, why: &str) -> ImportError {
        ImportError::Broken {
            record: self.head.number,
            why: why.to_owned(),
        }
    }

    fn broken_after(&self, why: &str) -> ImportError {
        ImportError::Broken {
            record: self.head.number + 1,
            why: why.to_owned(),
        }
    }
}

fn term_of(entry: &Entry) -> Option<u64> {
    match entry.record {
        Record::TermBegan { epoch } => Some(epoch.counter),
        _ => None,
    }
}

/// Only what belongs to the exported journal may be there already.
fn check_empty(state: &Path) -> Result<(), ImportError> {
    let entries = match fs::read_dir(state) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("read", state)(error).into()),
    };
    for entry in entries {
        let name = entry.map_err(io_error("read", state))?.file_name();
        let known = [
            "archive",
            "blobs",
            "logs",
            "journal.new",
            "journal.check",
            "lost+found",
        ];
        if !known.iter().any(|known| name == OsStr::new(known)) {
            return Err(ImportError::NotEmpty {
                dir: state.to_owned(),
                name: name.to_string_lossy().into_owned(),
            });
        }
    }
    Ok(())
}

fn write_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

/// Reads one JSON value per line.
struct Lines<'a, R> {
    input: &'a mut R,
    /// Of the last line that was read.
    number: u64,
}

impl<R: BufRead> Lines<'_, R> {
    fn next<T: for<'de> Deserialize<'de>>(&mut self) -> Result<Option<T>, ImportError> {
        let mut line = Vec::new();
        let read = io::Read::take(&mut *self.input, MAX_LINE).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        let value = serde_json::from_slice(&line).map_err(|error| self.refused(error.to_string()));
        value.map(Some)
    }

    fn expect<T: for<'de> Deserialize<'de>>(&mut self, without: &str) -> Result<T, ImportError> {
        self.next()?.ok_or_else(|| ImportError::NotAnExport {
            line: 1,
            why: without.to_owned(),
        })
    }

    fn refused(&self, why: String) -> ImportError {
        ImportError::NotAnExport {
            line: self.number,
            why,
        }
    }
}

#[cfg(test)]
mod tests;
