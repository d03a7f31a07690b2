//! Whether a store holds what was written: its chain, record by record.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use super::super::disk::io_error;
use super::super::head::Stored;
use super::super::{Broken, Head, JournalId, Layout, OpenError, begins_after};
use super::values::{CutShort, Value};
use super::{META, RECORD, number_of, record_key, settings};

/// How far a chain holds.
#[derive(Debug)]
pub(in crate::journal) struct Followed {
    pub(in crate::journal) id: JournalId,
    /// How its records lie in the store.
    pub(in crate::journal) layout: Layout,
    /// What the first record is chained to: the anchor, or the end of an archive.
    pub(in crate::journal) base: Head,
    /// The last record that is what was written.
    pub(in crate::journal) head: Head,
    /// Why it is the last one, if it should not be.
    pub(in crate::journal) broken: Option<Broken>,
}

/// A chain that holds to its end.
pub(in crate::journal) fn whole(
    (db, followed): (sled::Db, Followed),
) -> Result<(sled::Db, Followed), Unread> {
    match followed.broken {
        None => Ok((db, followed)),
        Some(broken) => Err(Unread::Broken(broken)),
    }
}

/// Why a chain was not followed to its end.
#[derive(Debug)]
pub(in crate::journal) enum Unread {
    /// The journal is not what was written.
    Broken(Broken),
    /// The operating system refuses, which says nothing about the journal.
    Refused(io::Error),
}

impl Unread {
    /// For the journal in this directory.
    pub(in crate::journal) fn of(self, dir: &Path) -> OpenError {
        match self {
            Self::Broken(broken) => OpenError::Quarantined {
                dir: dir.to_owned(),
                what: broken.what,
            },
            Self::Refused(source) => io_error("read the records of", dir)(source),
        }
    }
}

/// What sled says of a store. Its own findings about files are errors without a number.
fn store_error(what: &str, error: sled::Error) -> Unread {
    match error {
        sled::Error::Io(error) if error.raw_os_error().is_some() => Unread::Refused(error),
        error => unreadable(format!("its store cannot be {what}: {error}")),
    }
}

/// Opens sled in a directory and follows the whole chain.
pub(super) fn look(dir: PathBuf, stored: Option<Stored>) -> Result<(sled::Db, Followed), Unread> {
    caught(dir, move |db| follow(db, stored))
}

/// Opens sled in a directory and looks at it. What goes wrong is said in words, a panic of sled's
/// included.
pub(super) fn caught<T: Send + 'static>(
    dir: PathBuf,
    look: impl FnOnce(&sled::Db) -> Result<T, Unread> + Send + 'static,
) -> Result<(sled::Db, T), Unread> {
    let looking = thread::Builder::new()
        .name("journal-check".to_owned())
        .spawn(move || {
            let db = settings(&dir).open();
            let db = db.map_err(|error| store_error("opened", error))?;
            let seen = look(&db)?;
            Ok((db, seen))
        });
    let looking = looking.map_err(Unread::Refused)?;
    looking.join().unwrap_or_else(|panic| {
        let panic = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        let reason = panic.unwrap_or("no reason given");
        Err(unreadable(format!("its store cannot be read: {reason}")))
    })
}

pub(in crate::journal) fn unreadable(what: String) -> Unread {
    Unread::Broken(Broken { record: None, what })
}

/// Follows the chain from the anchor; it must pass through the stored head, if there is one.
fn follow(db: &sled::Db, stored: Option<Stored>) -> Result<Followed, Unread> {
    let unread = |error| store_error("read", error);
    let meta = db.get(META).map_err(unread)?;
    let meta = meta.as_deref().and_then(read_meta);
    let (layout, id) =
        meta.ok_or_else(|| unreadable("its store has lost its first key".to_owned()))?;
    if stored.is_some_and(|stored| (stored.layout, stored.id) != (layout, id)) {
        let what = "its store and its head file are not of the same journal";
        return Err(unreadable(what.to_owned()));
    }
    let base = match db.scan_prefix([RECORD]).next() {
        None => id.anchor(),
        Some(first) => {
            let (key, value) = first.map_err(unread)?;
            compacted_base(layout, &key, &value).unwrap_or_else(|| id.anchor())
        }
    };
    let mut head = base;
    let mut broken = None;
    for pair in db.scan_prefix([RECORD]) {
        let (key, value) = pair.map_err(unread)?;
        let value = Value::of(layout, &value);
        if let Err(what) = follow_value(&mut head, &key, &value, stored) {
            let record = Some(head.number + 1);
            broken = Some(Broken { record, what });
            break;
        }
    }
    let acknowledged = stored.map_or(0, |stored| stored.head.number);
    if broken.is_none() && head.number < acknowledged {
        broken = Some(Broken {
            record: Some(head.number + 1),
            what: format!(
                "its records end at {}, but those up to {acknowledged} were acknowledged",
                head.number
            ),
        });
    }
    Ok(Followed {
        id,
        layout,
        base,
        head,
        broken,
    })
}

fn read_meta(meta: &[u8]) -> Option<(Layout, JournalId)> {
    let (format, id) = meta.split_first_chunk()?;
    let layout = Layout::of_format(u32::from_be_bytes(*format))?;
    Some((layout, JournalId(id.try_into().ok()?)))
}

/// What a compacted journal's first record is chained to; none if it is no such record.
fn compacted_base(layout: Layout, key: &[u8], value: &[u8]) -> Option<Head> {
    let value = Value::of(layout, value);
    let (_, payload) = value.records().next()?.ok()?;
    let (base, _) = begins_after(payload)?;
    (*key == record_key(base.number + 1)).then_some(base)
}

/// Moves the head over the records of one value, or to the last one before what is wrong with them.
pub(super) fn follow_value(
    head: &mut Head,
    key: &[u8],
    value: &Value<'_>,
    stored: Option<Stored>,
) -> Result<(), String> {
    let number = head.number + 1;
    if !value.is_readable() {
        let first = number_of(key).unwrap_or(number);
        return Err(format!("the records from {first} on cannot be unpacked"));
    }
    if *key != record_key(number) {
        return Err(format!(
            "record {number} is missing, though later ones are there"
        ));
    }
    for record in value.records() {
        let number = head.number + 1;
        let (hash, payload) = record.map_err(|CutShort| format!("record {number} is cut short"))?;
        let next = head.next(payload);
        if next.hash.0 != hash {
            return Err(format!(
                "record {number} is not what was written: its hash differs"
            ));
        }
        if stored.is_some_and(|stored| stored.head.number == number && stored.head != next) {
            return Err(format!(
                "record {number} is not the one that was acknowledged"
            ));
        }
        *head = next;
    }
    Ok(())
}

/// The payloads of a store that was followed, from the first on.
pub(in crate::journal) fn payloads(
    db: &sled::Db,
    layout: Layout,
) -> impl Iterator<Item = Result<Vec<u8>, sled::Error>> + use<> {
    db.scan_prefix([RECORD]).flat_map(move |pair| match pair {
        Ok((_, value)) => {
            let payloads = payloads_of(&Value::of(layout, &value));
            payloads.into_iter().map(Ok).collect()
        }
        Err(error) => vec![Err(error)],
    })
}

pub(super) fn payloads_of(value: &Value<'_>) -> Vec<Vec<u8>> {
    let records = value.records().map_while(Result::ok);
    records.map(|(_, payload)| payload.to_vec()).collect()
}

/// Whether a store whose copy was followed ends where the copy did.
pub(super) fn ends_at(db: &sled::Db, layout: Layout, seen: Head) -> Result<(), Unread> {
    let last = db.scan_prefix([RECORD]).next_back().transpose();
    let last = last.map_err(|error| store_error("read", error))?;
    let end = last.and_then(|(key, value)| {
        let first = number_of(&key)?;
        let value = Value::of(layout, &value);
        let (place, record) = value.records().enumerate().last()?;
        let (hash, _) = record.ok()?;
        Some((first + u64::try_from(place).ok()?, hash.to_vec()))
    });
    match end {
        None if seen.number == 0 => Ok(()),
        Some((number, hash)) if number == seen.number && hash == seen.hash.0 => Ok(()),
        end => {
            let number = end.map_or(0, |(number, _)| number);
            Err(unreadable(ends_elsewhere(number, seen)))
        }
    }
}

pub(super) fn ends_elsewhere(found: u64, seen: Head) -> String {
    format!(
        "it ends at record {found}, but a copy of it at record {}",
        seen.number
    )
}
