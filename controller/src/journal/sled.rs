//! The journal on disk, in sled 0.34.
//!
//! ```text
//! STATE/                 locked (flock) by the one controller that runs on it
//! STATE/journal/store/   sled: one tree, "m" = format and id, "r" + number = hash and payload
//! STATE/journal/head     the head, in two slots (see `head.rs`)
//! STATE/journal.check/   a copy, while it is looked at before anything is started
//! STATE/journal.new/     a journal that is being made
//! ```
//!
//! What sled alone does not give, and this file adds:
//! - `flush` hands bytes to the kernel (`sync_file_range`), which does not survive a power loss:
//!   each batch ends with `fdatasync` of sled's file, and then of the head.
//! - Truncated or bit-flipped files open as if nothing were missing, or panic: a copy is opened
//!   first, in a thread whose panic is caught, and must reach the head.
//! - Items over a quarter of a segment go to files that are never synced: a leaf holds up to 17
//!   records of 32 KiB, so segments have 4 MiB.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{FlockOperation, flock};

use super::head::{HeadError, HeadFile, Stored};
use super::{AppendError, FORMAT, Head, Journal, JournalId, OpenError, chain};

/// sled's page cache, in bytes. Recovery streams, and running only appends: a small one will do.
const CACHE: u64 = 16 << 20;

/// sled's segments, in bytes: see above.
const SEGMENT: usize = 4 << 20;

const META: &[u8] = b"m";
const RECORD: u8 = b'r';

/// The journal on disk.
#[derive(Debug)]
pub(crate) struct SledJournal {
    dir: PathBuf,
    db: sled::Db,
    /// sled's own file, opened once more to be synced.
    store: File,
    head_file: HeadFile,
    id: JournalId,
    head: Head,
    /// An append has begun and not come to its end.
    poisoned: bool,
    /// Held for as long as the journal is open.
    _lock: File,
}

impl SledJournal {
    /// Opens the journal in a state directory, or makes it if there is none.
    pub(crate) fn open(state: &Path) -> Result<Self, OpenError> {
        let lock = lock(state)?;
        let dir = state.join("journal");
        let check = state.join("journal.check");
        let new = state.join("journal.new");
        for leftover in [&check, &new] {
            remove_all(leftover)?;
        }
        if !dir.exists() {
            create(&new)?;
            fs::rename(&new, &dir).map_err(io_error("make", &dir))?;
            sync_directory(state)?;
        }
        Self::open_existing(dir, &check, lock)
    }

    fn open_existing(dir: PathBuf, check: &Path, lock: File) -> Result<Self, OpenError> {
        let quarantined = |what: String| OpenError::Quarantined {
            dir: dir.clone(),
            what,
        };
        let (mut head_file, stored) = match HeadFile::open(&dir.join("head")) {
            Ok(found) => found,
            Err(HeadError::Format(found)) => return Err(OpenError::Format { dir, found }),
            Err(error) => return Err(quarantined(error.to_string())),
        };
        let store_dir = dir.join("store");
        let store_path = store_dir.join("db");
        // Opened before sled, which would make an empty file where one was lost.
        let store = match File::open(&store_path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(quarantined("its store is missing".to_owned()));
            }
            Err(source) => return Err(io_error("open", &store_path)(source)),
        };

        copy_all(&store_dir, check)?;
        let seen = look(check.to_owned(), stored).map_err(&quarantined)?.1;
        remove_all(check)?;

        let (db, head) = look(store_dir, stored).map_err(&quarantined)?;
        if head != seen {
            let what = format!(
                "it ends at record {}, but a copy of it at record {}",
                head.number, seen.number
            );
            return Err(quarantined(what));
        }
        // Records beyond the head were written, but not acknowledged: from here on they count,
        // and so they must be on the disk.
        store.sync_all().map_err(io_error("sync", &store_path))?;
        if head != stored.head {
            let write = head_file.write(Stored { head, ..stored });
            write.map_err(io_error("write the head of", &dir))?;
        }
        Ok(Self {
            dir,
            db,
            store,
            head_file,
            id: stored.id,
            head,
            poisoned: false,
            _lock: lock,
        })
    }

    fn try_append(&mut self, batch: sled::Batch, head: Head) -> Result<(), AppendError> {
        let failed = |what| {
            move |source| AppendError::Store {
                what,
                source: io::Error::other(source),
            }
        };
        let io_failed = |what| move |source| AppendError::Store { what, source };
        self.db
            .apply_batch(batch)
            .map_err(failed("write a batch"))?;
        self.db.flush().map_err(failed("flush a batch"))?;
        self.store.sync_data().map_err(io_failed("sync a batch"))?;
        let stored = Stored { id: self.id, head };
        let written = self.head_file.write(stored);
        written.map_err(io_failed("write its head"))
    }
}

impl Journal for SledJournal {
    fn id(&self) -> JournalId {
        self.id
    }

    fn head(&self) -> Head {
        self.head
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError> {
        if self.poisoned {
            return Err(AppendError::Poisoned);
        }
        let heads = chain(self.head, payloads)?;
        let Some(&last) = heads.last() else {
            return Ok(self.head);
        };
        let mut batch = sled::Batch::default();
        for (head, payload) in heads.iter().zip(payloads) {
            let mut value = Vec::with_capacity(head.hash.0.len() + payload.len());
            value.extend_from_slice(&head.hash.0);
            value.extend_from_slice(payload);
            batch.insert(&record_key(head.number), value);
        }
        self.poisoned = true;
        self.try_append(batch, last)?;
        self.poisoned = false;
        self.head = last;
        Ok(last)
    }

    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_> {
        let unreadable = |error: sled::Error| OpenError::Quarantined {
            dir: self.dir.clone(),
            what: format!("a record cannot be read: {error}"),
        };
        let records = self.db.scan_prefix([RECORD]);
        Box::new(records.map(move |record| {
            let (_, value) = record.map_err(unreadable)?;
            // The length was checked when the chain was.
            Ok(value.get(32..).unwrap_or_default().to_vec())
        }))
    }

    fn close(self: Box<Self>) {
        // sled flushes and syncs as it is dropped; the lock goes last.
        drop(self);
    }
}

fn record_key(number: u64) -> [u8; 9] {
    let mut key = [RECORD; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

fn settings(dir: &Path) -> sled::Config {
    sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE)
        .segment_size(SEGMENT)
        .flush_every_ms(None)
}

/// Makes a journal without records, durable but for its name.
fn create(dir: &Path) -> Result<(), OpenError> {
    let store_dir = dir.join("store");
    make_directory(&store_dir)?;
    let failed = |error: sled::Error| OpenError::Io {
        what: "make",
        path: store_dir.clone(),
        source: io::Error::other(error),
    };
    let id = JournalId::random();
    let db = settings(&store_dir).open().map_err(failed)?;
    let mut meta = FORMAT.to_be_bytes().to_vec();
    meta.extend_from_slice(&id.0);
    db.insert(META, meta).map_err(failed)?;
    db.flush().map_err(failed)?;
    drop(db);
    let store_path = store_dir.join("db");
    let store = File::open(&store_path).map_err(io_error("open", &store_path))?;
    store.sync_all().map_err(io_error("sync", &store_path))?;
    sync_directory(&store_dir)?;

    let head_path = dir.join("head");
    let stored = Stored {
        id,
        head: id.anchor(),
    };
    HeadFile::create(&head_path, stored).map_err(io_error("make", &head_path))?;
    sync_directory(dir)
}

/// Opens sled in a directory and follows the whole chain. What goes wrong is said in words, a
/// panic of sled's included.
fn look(dir: PathBuf, stored: Stored) -> Result<(sled::Db, Head), String> {
    let looking = thread::Builder::new()
        .name("journal-check".to_owned())
        .spawn(move || {
            let db = settings(&dir).open();
            let db = db.map_err(|error| format!("its store cannot be opened: {error}"))?;
            let head = follow(&db, stored)?;
            Ok((db, head))
        });
    let looking = looking.map_err(|error| format!("it cannot be looked at: {error}"))?;
    looking.join().unwrap_or_else(|panic| {
        let panic = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        let reason = panic.unwrap_or("no reason given");
        Err(format!("its store cannot be read: {reason}"))
    })
}

/// Follows the chain from the anchor; it must pass through the stored head.
fn follow(db: &sled::Db, stored: Stored) -> Result<Head, String> {
    let unreadable = |error: sled::Error| format!("its store cannot be read: {error}");
    let meta = db.get(META).map_err(unreadable)?;
    let expected = [&FORMAT.to_be_bytes()[..], &stored.id.0].concat();
    match meta {
        None => return Err("its store has lost its first key".to_owned()),
        Some(meta) if *meta != expected[..] => {
            return Err("its store and its head file are not of the same journal".to_owned());
        }
        Some(_) => {}
    }
    let mut head = stored.id.anchor();
    for record in db.scan_prefix([RECORD]) {
        let (key, value) = record.map_err(unreadable)?;
        let number = head.number + 1;
        if *key != record_key(number) {
            return Err(format!(
                "record {number} is missing, though later ones are there"
            ));
        }
        let (hash, payload) = value
            .split_at_checked(32)
            .ok_or_else(|| format!("record {number} is cut short"))?;
        head = head.next(payload);
        if head.hash.0 != hash {
            return Err(format!(
                "record {number} is not what was written: its hash differs"
            ));
        }
        if number == stored.head.number && head != stored.head {
            return Err(format!(
                "record {number} is not the one that was acknowledged"
            ));
        }
    }
    if head.number < stored.head.number {
        return Err(format!(
            "its records end at {}, but those up to {} were acknowledged",
            head.number, stored.head.number
        ));
    }
    Ok(head)
}

/// Takes the state directory for this process; the kernel frees it when the process is gone,
/// however it ends.
fn lock(state: &Path) -> Result<File, OpenError> {
    make_directory(state)?;
    let dir = File::open(state).map_err(io_error("open", state))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse {
            dir: state.to_owned(),
        }),
        Err(error) => Err(io_error("lock", state)(error.into())),
    }
}

fn make_directory(dir: &Path) -> Result<(), OpenError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error("make", dir))
}

fn sync_directory(dir: &Path) -> Result<(), OpenError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(io_error("sync", dir))
}

fn remove_all(dir: &Path) -> Result<(), OpenError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

fn copy_all(from: &Path, to: &Path) -> Result<(), OpenError> {
    make_directory(to)?;
    for entry in fs::read_dir(from).map_err(io_error("read", from))? {
        let entry = entry.map_err(io_error("read", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            copy_all(&source, &target)?;
        } else {
            fs::copy(&source, &target).map_err(io_error("copy", &source))?;
        }
    }
    Ok(())
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { what, path, source }
}
