//! Compaction: rollouts that have ended go out of the journal, into an archive beside it.
//!
//! ```text
//! journal   1 ................................ 1482        before
//! archive   1 ................................ 1482        all of them, as an export
//! journal   1483 Compacted{1482, its hash} | Archived ... | what is kept | 1483+n    after
//! ```
//!
//! The chain goes on from the archive's last hash. What the fold needs of a rollout that went out
//! stays: that its serial is used up, how it ended, and which reports its hosts were told are
//! durable. Records of other rollouts and of hosts are kept word for word, in their order.
//!
//! First the archive is on the disk and was read again; then the new journal is made beside the
//! old one, and folded: it must say what the old one says of everything that stays. Only then the
//! archive gets its name, and the two journals change places in one step. Whatever ends it before,
//! the old journal is whole; afterwards, the new one.
//!
//! A controller that runs prepares it on a thread of its own (see `driver/compaction.rs`).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lockstep_core::coordinator::HostInfo;
use lockstep_core::trust::{Trust, TrustRecord};
use lockstep_core::{Archived, Config, Coordinator, Entry, Record, RecoverError};
use lockstep_proto::ids::{Epoch, HostId, PlanDigest, RolloutId};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

use super::archive;
use super::disk::{io_error, sync, sync_directory};
use super::offline::{ExportError, ImportError, Offline, read};
use super::sled::SledJournal;
use super::source::Source;
use super::{AppendError, Head, Journal as _, JournalId, Layout, MAX_PAYLOAD, OpenError};
use crate::blobs::{BlobError, Blobs};
use crate::driver::wall_clock;
use crate::faults::reached;

/// Records that are written together; a batch is at most 8 MiB then.
const BATCH: usize = 256;

/// Which rollouts go out, of those that have ended and wait for nobody.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Which {
    /// Those that ended longer ago than this.
    pub(crate) older_than: Option<Period>,
    /// All but the newest so many.
    pub(crate) keep: Option<usize>,
}

/// A journal that cannot be compacted. It is as it was, or compacted already.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompactError {
    /// It cannot be opened or made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A record cannot be read, or the archive cannot be written.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The new journal cannot be written.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The plans cannot be read.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The records do not fit together.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// An archive is there and is not this journal's, or is not what was written.
    #[error("the archive {path} is not what it should be")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ImportError,
    },
    /// The new journal would not say the same as the old one.
    #[error("the compacted journal would say something else of {0}; nothing was changed")]
    Differs(String),
    /// It would make the disk full.
    #[error("there is too little room to compact the journal; make some in {0}")]
    NoRoom(PathBuf),
    /// More records than that would stay.
    #[error("the compacted journal would be hardly shorter")]
    InVain,
    /// Its thread could not be started, or ended by a panic.
    #[error("the thread that compacts the journal has failed; see the lines above")]
    Thread,
}

/// What a compaction did.
#[derive(Debug)]
pub(crate) struct Compacted {
    /// The archive; none if nothing was to be done.
    pub(crate) archive: Option<PathBuf>,
    /// The archive's last record.
    pub(crate) archived: Head,
    /// The rollouts that went out.
    pub(crate) rollouts: Vec<RolloutId>,
    /// The new journal's records.
    pub(crate) records: u64,
    /// The length of the journal's files before, in bytes.
    pub(crate) bytes_before: u64,
    /// The same afterwards.
    pub(crate) bytes_after: u64,
}

/// Takes rollouts out of a journal on which no controller runs.
pub(crate) fn compact(state: &Path, which: Which) -> Result<Compacted, CompactError> {
    let journal = Offline::open(state)?;
    let source = journal.source()?;
    let blobs = Blobs::open(state.join("blobs"))?;
    // A plan that cannot be read is missing, which the fold says by name.
    let plan = |digest| blobs.plan(digest).ok().flatten();
    let before = fold(source.records().map(|read| Ok(read?.0)), &plan)?;
    let goes_out = choose(&before, which);
    let mut compacted = Compacted {
        archive: None,
        archived: source.head,
        rollouts: goes_out.clone(),
        records: source.count(),
        bytes_before: size(&source.directory()),
        bytes_after: size(&source.directory()),
    };
    if goes_out.is_empty() {
        return Ok(compacted);
    }
    let outgoing = Outgoing::new(&before, &source, &goes_out);
    let prepared = prepare(source, outgoing, Layout::Bundles, &plan, usize::MAX)?;
    // The copy goes; the state directory stays locked.
    drop(journal);
    let asked_for = |info: &HostInfo| {
        let mut info = info.clone();
        // What nobody had asked for went out with the rest.
        info.unasked = 0;
        info
    };
    let published = prepared.check(&before, asked_for);
    let published = published.and_then(|()| prepared.publish());
    if published.is_err() {
        prepared.discard();
    }
    compacted.archive = Some(published?);
    compacted.records = prepared.records;
    SledJournal::exchange(state, &prepared.lock)?;
    compacted.bytes_after = size(&state.join("journal"));
    Ok(compacted)
}

fn fold(
    entries: impl Iterator<Item = Result<Entry, ExportError>>,
    plan: &impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
) -> Result<Coordinator, CompactError> {
    let config = Config {
        epoch: Epoch::NONE,
        break_glass: None,
    };
    let mut unread = None;
    let entries = entries.map_while(|entry| entry.map_err(|error| unread = Some(error)).ok());
    let folded = Coordinator::recover(config, entries, plan);
    match unread {
        // What could not be read comes before what could not be folded without it.
        Some(error) => Err(error.into()),
        None => Ok(folded?),
    }
}

/// The rollouts that go out, in the order of their submission.
fn choose(folded: &Coordinator, which: Which) -> Vec<RolloutId> {
    let now = wall_clock().max(folded.last_at());
    let over = folded.over();
    let newest = over.iter().rev().enumerate();
    let goes_out: BTreeSet<&RolloutId> = newest
        .filter(|(place, (ended_at, _))| {
            let old = which
                .older_than
                .is_some_and(|age| now.since(*ended_at) > age);
            old || which.keep.is_some_and(|keep| *place >= keep)
        })
        .map(|(_, (_, rollout))| *rollout)
        .collect();
    let in_order = folded.rollouts();
    in_order
        .filter(|rollout| goes_out.contains(rollout))
        .cloned()
        .collect()
}

/// What goes out of a journal, and what its records are held against.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// The archive's file name.
    archive: String,
    /// In the order of their submission.
    archived: Vec<Archived>,
    trust: Trust,
    term: Option<Epoch>,
    took_over: Option<Epoch>,
    /// When the last record was written.
    last_at: Timestamp,
}

impl Outgoing {
    /// These rollouts, which have ended. `folded` is what the source says.
    pub(crate) fn new(folded: &Coordinator, source: &Source, rollouts: &[RolloutId]) -> Self {
        let (first, last) = (source.base.number + 1, source.head.number);
        let archive = format!("journal-{first}-{last}.jsonl");
        let archived = rollouts.iter();
        let archived = archived.filter_map(|rollout| folded.as_archived(rollout, &archive));
        Self {
            archived: archived.collect(),
            archive,
            trust: folded.trust().clone(),
            term: folded.last_epoch(),
            took_over: folded.took_over(),
            last_at: folded.last_at(),
        }
    }
}

/// An archive and the journal that goes on from it, on the disk under names that nobody looks for.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// The last record of the archive.
    pub(crate) archived: Head,
    /// The new journal's records.
    pub(crate) records: u64,
    id: JournalId,
    outgoing: Outgoing,
    /// What the new journal says.
    folded: Coordinator,
    state: PathBuf,
    lock: File,
}

/// Makes the archive and the new journal, of this layout; nothing, if more records than `at_most`
/// would stay.
pub(crate) fn prepare(
    source: Source,
    outgoing: Outgoing,
    layout: Layout,
    plan: &impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
    at_most: usize,
) -> Result<Prepared, CompactError> {
    let kept = keep(&source, &outgoing, at_most)?;
    let numbered = kept.iter().zip(source.head.number + 1..);
    let read = numbered.map(|(payload, number)| {
        source.go_on()?;
        read(payload, number)
    });
    let folded = fold(read, plan)?;
    write_archive(&source, &outgoing)?;
    let (first, rest) = kept.split_first().expect("its first record says so");
    let first = Some((source.head, first.as_slice()));
    let id = (source.id, layout);
    let built = SledJournal::build(&source.state, &source.lock, id, first, |new| {
        for batch in rest.chunks(BATCH) {
            source.go_on()?;
            new.append(batch)?;
        }
        Ok::<_, CompactError>(())
    });
    if built.is_err() {
        // It takes room that may be missing; what is wrong matters more.
        let _ = archive::remove_parts(&archive::directory(&source.state));
    }
    built?;
    Ok(Prepared {
        archived: source.head,
        id: source.id,
        records: kept.len() as u64,
        outgoing,
        folded,
        state: source.state,
        lock: source.lock,
    })
}

impl Prepared {
    /// Whether the new journal says what this coordinator does, but for what goes out. `recorded`
    /// leaves of a host what both must say.
    pub(crate) fn check(
        &self,
        before: &Coordinator,
        recorded: impl Fn(&HostInfo) -> HostInfo,
    ) -> Result<(), CompactError> {
        let after = &self.folded;
        let differs = |what: &dyn std::fmt::Display| Err(CompactError::Differs(what.to_string()));
        if before.last_epoch() != after.last_epoch() || before.took_over() != after.took_over() {
            return differs(&"the term");
        }
        if before.serials() != after.serials() {
            return differs(&"the serials");
        }
        // What has ended says nothing any more.
        let last = self.outgoing.last_at;
        if before.trust().as_of(last) != after.trust().as_of(last) {
            return differs(&"who may be");
        }
        let hosts = before
            .all_hosts()
            .map(|(host, info)| (host, recorded(info)));
        if !hosts.eq(after.all_hosts().map(|(host, info)| (host, recorded(info)))) {
            return differs(&"the hosts");
        }
        for archived in before.all_archived() {
            if after.archived(&archived.rollout) != Some(archived) {
                return differs(&archived.rollout);
            }
        }
        let goes_out: BTreeSet<&RolloutId> = self.rollouts().collect();
        for rollout in before.rollouts() {
            if goes_out.contains(rollout) {
                if after.archived(rollout).is_none() {
                    return differs(rollout);
                }
            } else if !before.agrees_with(after, rollout) {
                return differs(rollout);
            }
        }
        Ok(())
    }

    /// Gives the archive its name, which it has when this returns; answers with its path.
    pub(crate) fn publish(&self) -> Result<PathBuf, CompactError> {
        let (part, path) = archive::paths(&self.state, &self.outgoing.archive);
        if path.exists() {
            // A compaction was ended here; or it is another journal's, and nothing else has it.
            as_written(archive::check(&path, self.id, self.archived), &path)?;
        }
        fs::rename(&part, &path).map_err(io_error("make", &path))?;
        sync_directory(&archive::directory(&self.state))?;
        sync_directory(&self.state)?;
        reached("compact: archived");
        Ok(path)
    }

    /// Removes what was made, as far as that can be done: the next one is made over it.
    pub(crate) fn discard(&self) {
        let (part, _) = archive::paths(&self.state, &self.outgoing.archive);
        let _ = fs::remove_file(part);
        let _ = fs::remove_dir_all(self.state.join("journal.new"));
    }

    /// The rollouts that go out, in the order of their submission.
    pub(crate) fn rollouts(&self) -> impl Iterator<Item = &RolloutId> {
        self.outgoing.archived.iter().map(|it| &it.rollout)
    }

    /// What is known of them afterwards.
    pub(crate) fn into_archived(self) -> Vec<Archived> {
        self.outgoing.archived
    }
}

/// The records of the new journal.
fn keep(
    source: &Source,
    outgoing: &Outgoing,
    at_most: usize,
) -> Result<Vec<Vec<u8>>, CompactError> {
    let goes_out: HashSet<&RolloutId> = outgoing.archived.iter().map(|it| &it.rollout).collect();
    let mut kept = Kept::default();
    // Where the newest of a host's reports is counted that are only counted.
    let mut counted: HashMap<HostId, usize> = HashMap::new();
    // Hosts of which something is left.
    let mut named: HashSet<HostId> = HashSet::new();
    for (read, further) in source.records().zip((0..source.count()).rev()) {
        let (entry, payload) = read?;
        if kept.left > at_most {
            return Err(CompactError::InVain);
        }
        if kept.left == 0 {
            // Times never go back, so what is said first has the time of the first record.
            for payload in beginning(entry.at, source.head, outgoing) {
                kept.push(payload);
            }
        }
        let out = entry
            .record
            .rollout()
            .is_some_and(|rollout| goes_out.contains(rollout));
        let said = match entry.record {
            // The archive has them.
            Record::Compacted { .. } => continue,
            // The last record says what time it is.
            Record::CallsRefused(_) if further > 0 => continue,
            Record::TermBegan { epoch } if Some(epoch) != outgoing.term => continue,
            Record::TookOver { epoch } if Some(epoch) != outgoing.took_over => continue,
            Record::Reported { host, number, .. } if out => {
                kept.forget(counted.insert(host.clone(), kept.place()));
                let through = number;
                encode(entry.at, Record::ReportsArchived { host, through })
            }
            Record::Trust(record) if !outgoing.trust.is_of_use(&record, outgoing.last_at) => {
                continue;
            }
            // Its certificates have ended, and it was never seen.
            Record::HostForgotten { host, .. } if !named.contains(&host) => continue,
            Record::Archived(_) => payload,
            _ if out => continue,
            record => {
                match record {
                    Record::ReportsArchived { host, .. } => {
                        kept.forget(counted.insert(host, kept.place()));
                    }
                    Record::Reported { host, .. } | Record::ReportsLost { host, .. } => {
                        kept.forget(counted.remove(&host));
                    }
                    // Another installation counts anew: what was counted before stays said.
                    Record::HostSeen { host, .. } => {
                        counted.remove(&host);
                        named.insert(host);
                    }
                    Record::Trust(
                        TrustRecord::Enrolled { grant, .. } | TrustRecord::Renewed { grant, .. },
                    ) => _ = named.insert(grant.host),
                    _ => {}
                }
                payload
            }
        };
        kept.push(said);
    }
    Ok(kept.payloads.into_iter().flatten().collect())
}

/// Records that are kept, as far as no later one says more.
#[derive(Debug, Default)]
struct Kept {
    payloads: Vec<Option<Vec<u8>>>,
    left: usize,
}

impl Kept {
    /// Where the next one goes.
    fn place(&self) -> usize {
        self.payloads.len()
    }

    fn push(&mut self, payload: Vec<u8>) {
        self.payloads.push(Some(payload));
        self.left += 1;
    }

    fn forget(&mut self, place: Option<usize>) {
        if let Some(place) = place {
            self.payloads[place] = None;
            self.left -= 1;
        }
    }
}

/// What a compacted journal says first: what it goes on from, and what went out.
fn beginning(
    at: Timestamp,
    Head { number, hash }: Head,
    outgoing: &Outgoing,
) -> impl Iterator<Item = Vec<u8>> {
    let archive = outgoing.archive.clone();
    let compacted = Record::Compacted {
        number,
        hash,
        archive,
    };
    let archived = outgoing.archived.iter().cloned().map(Record::Archived);
    let records = std::iter::once(compacted).chain(archived);
    records.map(move |record| encode(at, record))
}

fn encode(at: Timestamp, record: Record) -> Vec<u8> {
    let payload = serde_json::to_vec(&Entry { at, record }).expect("it has text as keys");
    debug_assert!(payload.len() <= MAX_PAYLOAD, "names are short");
    payload
}

/// Writes the archive, and reads it again; it has no name yet that anybody looks for.
fn write_archive(source: &Source, outgoing: &Outgoing) -> Result<(), CompactError> {
    let dir = &archive::directory(&source.state);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error("make", dir))?;
    archive::remove_parts(dir)?;
    let (part, _) = archive::paths(&source.state, &outgoing.archive);
    let mut options = OpenOptions::new();
    let options = options.write(true).create_new(true).mode(0o600);
    let file = options.open(&part).map_err(io_error("make", &part))?;
    let written = write_and_check(source, outgoing, &file, &part);
    if written.is_err() {
        // What is wrong matters more than what is left behind.
        let _ = fs::remove_file(&part);
    }
    written
}

fn write_and_check(
    source: &Source,
    outgoing: &Outgoing,
    file: &File,
    path: &Path,
) -> Result<(), CompactError> {
    let term = outgoing.term.map_or(0, |term| term.counter);
    source.export(term, &mut BufWriter::new(file))?;
    sync(file, path).map_err(io_error("sync", path))?;
    let written = File::open(path).map_err(io_error("read", path))?;
    let written = source.until_stopped(written);
    as_written(archive::check_read(written, source.id, source.head), path)
}

/// What the check of an archive found, whatever is before it.
fn as_written<T>(checked: Result<T, ImportError>, path: &Path) -> Result<(), CompactError> {
    let path = path.to_owned();
    checked.map_err(|source| CompactError::Archive { path, source })?;
    Ok(())
}

/// The length of all files in a directory, in bytes.
fn size(dir: &Path) -> u64 {
    let sum = || -> io::Result<u64> {
        let mut sum = 0;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            sum += if metadata.is_dir() {
                size(&entry.path())
            } else {
                metadata.len()
            };
        }
        Ok(sum)
    };
    sum().unwrap_or_default()
}

#[cfg(test)]
mod tests;
