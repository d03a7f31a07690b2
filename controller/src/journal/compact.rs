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
//! old one; then the two change places in one step. Whatever ends it before, the old journal is
//! whole; afterwards, the new one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, BufWriter};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_core::trust::TrustRecord;
use lockstep_core::{Archived, Config, Coordinator, End, Entry, Record, RecoverError};
use lockstep_proto::ids::{Epoch, HostId, RolloutId};
use lockstep_proto::values::{Period, Timestamp};

use super::archive;
use super::disk::{io_error, sync, sync_directory};
use super::offline::{ExportError, ImportError, Offline, Records, read_entries};
use super::sled::SledJournal;
use super::{AppendError, Head, Journal as _, MAX_PAYLOAD, OpenError};
use crate::blobs::{BlobError, Blobs};
use crate::driver::wall_clock;

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

/// A journal that cannot be compacted. It is as it was.
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
    let records = journal.read_all()?;
    let lock = journal.into_lock();
    let Records {
        id,
        base,
        head,
        ref payloads,
        ref entries,
    } = records;
    let blobs = Blobs::open(state.join("blobs"))?;
    let before = fold(entries, &blobs)?;
    let goes_out = choose(&before, entries, which);
    let mut compacted = Compacted {
        archive: None,
        archived: head,
        rollouts: goes_out.clone(),
        records: payloads.len() as u64,
        bytes_before: size(&state.join("journal")),
        bytes_after: size(&state.join("journal")),
    };
    if goes_out.is_empty() {
        return Ok(compacted);
    }

    let name = format!("journal-{}-{}.jsonl", base.number + 1, head.number);
    let kept = keep(&before, &records, &goes_out, &name);
    let folded = fold(&read_entries(&kept, head.number)?, &blobs)?;
    let last = entries.last().map_or(Timestamp(0), |entry| entry.at);
    compare(&before, &folded, &goes_out, last)?;

    let path = archive::directory(state).join(&name);
    write_archive(&records, &path)?;
    archive::check(&path, id, head).map_err(|source| CompactError::Archive {
        path: path.clone(),
        source,
    })?;
    let (first, rest) = kept.split_first().expect("its first record says so");
    let first = Some((head, first.as_slice()));
    SledJournal::build(state, &lock, id, first, |new| {
        for batch in rest.chunks(BATCH) {
            new.append(batch)?;
        }
        Ok::<_, CompactError>(())
    })?;
    SledJournal::exchange(state, &lock)?;
    compacted.archive = Some(path);
    compacted.records = kept.len() as u64;
    compacted.bytes_after = size(&state.join("journal"));
    Ok(compacted)
}

fn fold(entries: &[Entry], blobs: &Blobs) -> Result<Coordinator, CompactError> {
    let epoch = Epoch::NONE;
    // A plan that cannot be read is missing, which the fold says by name.
    let plan = |digest| blobs.plan(digest).ok().flatten();
    let folded = Coordinator::recover(
        Config {
            epoch,
            break_glass: None,
        },
        entries.iter().cloned(),
        plan,
    )?;
    Ok(folded)
}

/// The rollouts that go out, in the order of their submission.
fn choose(folded: &Coordinator, entries: &[Entry], which: Which) -> Vec<RolloutId> {
    let last = entries.last().map_or(Timestamp(0), |entry| entry.at);
    let now = wall_clock().max(last);
    let unsent = unsent(entries);
    let mut ended: Vec<(Timestamp, RolloutId)> = folded
        .rollouts()
        .filter(|rollout| !unsent.contains(*rollout))
        .filter_map(|rollout| folded.summary(rollout))
        .filter(|summary| summary.ended && !summary.open)
        .filter_map(|summary| Some((summary.ended_at?, summary.rollout)))
        .collect();
    ended.sort();
    ended.reverse();
    let newest = ended.iter().enumerate();
    let goes_out: BTreeSet<&RolloutId> = newest
        .filter(|(place, (ended_at, _))| {
            let old = which
                .older_than
                .is_some_and(|age| now.since(*ended_at) > age);
            old || which.keep.is_some_and(|keep| *place >= keep)
        })
        .map(|(_, (_, rollout))| rollout)
        .collect();
    let in_order = folded.rollouts();
    in_order
        .filter(|rollout| goes_out.contains(rollout))
        .cloned()
        .collect()
}

/// Rollouts of which a message was about to be sent: the next controller says what became of it.
fn unsent(entries: &[Entry]) -> BTreeSet<RolloutId> {
    let mut open = BTreeSet::new();
    for entry in entries {
        match &entry.record {
            Record::NoticeOrdered { rollout, which } => _ = open.insert((rollout, *which)),
            Record::NoticeSent { rollout, which, .. } => _ = open.remove(&(rollout, *which)),
            _ => {}
        }
    }
    open.into_iter()
        .map(|(rollout, _)| rollout.clone())
        .collect()
}

/// The records of the new journal.
fn keep(
    folded: &Coordinator,
    records: &Records,
    goes_out: &[RolloutId],
    archive: &str,
) -> Vec<Vec<u8>> {
    let Records {
        head,
        payloads,
        entries,
        ..
    } = records;
    let goes_out: BTreeSet<&RolloutId> = goes_out.iter().collect();
    // Times never go back, so what is said first has the time of the first record.
    let at = entries.first().map_or(Timestamp(0), |entry| entry.at);
    let mut kept = vec![Some(encode(
        at,
        Record::Compacted {
            number: head.number,
            hash: head.hash,
            archive: archive.to_owned(),
        },
    ))];
    let last = entries.last().map_or(at, |entry| entry.at);
    let ends = ends(entries);
    let serials: HashMap<&RolloutId, u64> = folded
        .serials()
        .iter()
        .map(|(serial, rollout)| (rollout, *serial))
        .collect();
    for rollout in folded
        .rollouts()
        .filter(|rollout| goes_out.contains(rollout))
    {
        let summary = folded.summary(rollout).expect("it is one of them");
        kept.push(Some(encode(
            at,
            Record::Archived(Archived {
                rollout: rollout.clone(),
                serial: serials.get(rollout).copied().unwrap_or(0),
                plan: summary.digest,
                name: summary.plan,
                end: ends[rollout],
                submitted: summary.submitted,
                ended: summary.ended_at.expect("only what has ended goes out"),
                archive: archive.to_owned(),
            }),
        )));
    }

    let newest = |wanted: fn(&Record) -> bool| {
        let found = entries.iter().rposition(|entry| wanted(&entry.record));
        found.unwrap_or(usize::MAX)
    };
    let last_term = newest(|record| matches!(record, Record::TermBegan { .. }));
    let last_take_over = newest(|record| matches!(record, Record::TookOver { .. }));
    // Where the newest of a host's reports is counted that are only counted.
    let mut counted: HashMap<&HostId, usize> = HashMap::new();
    // Hosts of which something is left.
    let mut named: HashSet<&HostId> = HashSet::new();
    for (index, entry) in entries.iter().enumerate() {
        let out = entry
            .record
            .rollout()
            .is_some_and(|rollout| goes_out.contains(rollout));
        let said = match &entry.record {
            // The archive has them.
            Record::Compacted { .. } | Record::CallsRefused(_) => continue,
            Record::TermBegan { .. } if index != last_term => continue,
            Record::TookOver { .. } if index != last_take_over => continue,
            Record::Reported { host, number, .. } if out => {
                let place = kept.len();
                forget(&mut kept, counted.insert(host, place));
                let (host, through) = (host.clone(), *number);
                encode(entry.at, Record::ReportsArchived { host, through })
            }
            Record::Trust(record) if !folded.trust().is_of_use(record, last) => continue,
            // Its certificates have ended, and it was never seen.
            Record::HostForgotten { host, .. } if !named.contains(host) => continue,
            _ if out && !matches!(entry.record, Record::Archived(_)) => continue,
            record => {
                match record {
                    Record::ReportsArchived { host, .. } => {
                        let place = kept.len();
                        forget(&mut kept, counted.insert(host, place));
                    }
                    Record::Reported { host, .. } | Record::ReportsLost { host, .. } => {
                        forget(&mut kept, counted.remove(host));
                    }
                    // Another installation counts anew: what was counted before stays said.
                    Record::HostSeen { host, .. } => {
                        counted.remove(host);
                        named.insert(host);
                    }
                    Record::Trust(
                        TrustRecord::Enrolled { grant, .. } | TrustRecord::Renewed { grant, .. },
                    ) => _ = named.insert(&grant.host),
                    _ => {}
                }
                payloads[index].clone()
            }
        };
        kept.push(Some(said));
    }
    kept.into_iter().flatten().collect()
}

/// A later record says more.
fn forget(kept: &mut [Option<Vec<u8>>], place: Option<usize>) {
    if let Some(place) = place {
        kept[place] = None;
    }
}

/// How each rollout ended last.
fn ends(entries: &[Entry]) -> BTreeMap<RolloutId, End> {
    let ends = entries.iter().filter_map(|entry| match &entry.record {
        Record::Ended { rollout, end, .. } => Some((rollout.clone(), *end)),
        _ => None,
    });
    ends.collect()
}

fn encode(at: Timestamp, record: Record) -> Vec<u8> {
    let payload = serde_json::to_vec(&Entry { at, record }).expect("it has text as keys");
    debug_assert!(payload.len() <= MAX_PAYLOAD, "names are short");
    payload
}

/// What a controller is after the new journal must be what it was, but for what went out.
fn compare(
    before: &Coordinator,
    after: &Coordinator,
    goes_out: &[RolloutId],
    last: Timestamp,
) -> Result<(), CompactError> {
    let differs = |what: &dyn std::fmt::Display| Err(CompactError::Differs(what.to_string()));
    if before.last_epoch() != after.last_epoch() || before.took_over() != after.took_over() {
        return differs(&"the term");
    }
    if before.serials() != after.serials() {
        return differs(&"the serials");
    }
    // What has ended says nothing any more.
    if before.trust().as_of(last) != after.trust().as_of(last) {
        return differs(&"who may be");
    }
    // What nobody had asked for went out with the rest.
    let hosts = |folded: &Coordinator| {
        let hosts = folded.all_hosts().map(|(host, info)| {
            let mut info = info.clone();
            info.unasked = 0;
            (host, info)
        });
        format!("{:?}", hosts.collect::<Vec<_>>())
    };
    if hosts(before) != hosts(after) {
        return differs(&"the hosts");
    }
    for rollout in before.rollouts() {
        if goes_out.contains(rollout) {
            if after.archived(rollout).is_none() {
                return differs(rollout);
            }
        } else if before.document(rollout) != after.document(rollout) {
            return differs(rollout);
        }
    }
    Ok(())
}

/// Writes the archive, durable under its name. One that a compaction left that was ended is the
/// same, or is found not to be when it is verified.
fn write_archive(records: &Records, path: &Path) -> Result<(), CompactError> {
    if path.exists() {
        return Ok(());
    }
    let dir = path.parent().expect("it lies in the archives' directory");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error("make", dir))?;
    let part = path.with_extension("part");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(&part).map_err(io_error("make", &part))?;
    let written = records.write(&mut BufWriter::new(&file));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written.map_err(io_error("write", &part))?;
    sync(&file, &part).map_err(io_error("sync", &part))?;
    fs::rename(&part, path).map_err(io_error("make", path))?;
    sync_directory(dir)?;
    if let Some(state) = dir.parent() {
        sync_directory(state)?;
    }
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
