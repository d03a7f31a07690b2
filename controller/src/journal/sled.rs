//! The journal on disk, in sled 0.34.
//!
//! ```text
//! STATE/                 locked (flock) by the one controller that runs on it
//! STATE/journal/store/   sled: one tree, "m" = layout and id, "r" + number = records (`values.rs`)
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
//! - Its settings are never synced, and neither is the directory in which it renames its
//!   snapshots: both are after each opening.
//! - Items over a quarter of a segment go to files that are never synced: a leaf holds up to 17
//!   records of 32 KiB, so segments have 4 MiB.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::disk::{io_error, sync, sync_directory, sync_files, write_again};
use super::head::{HeadError, HeadFile, Stored};
use super::reserve::Reserve;
use super::source::Source;
use super::{AppendError, Compactable, Head, Journal, JournalId, Layout, OpenError, chain};
use crate::faults::reached;

mod follow;
mod values;

pub(super) use follow::{Followed, Unread, payloads, unreadable, whole};
use follow::{caught, ends_at, ends_elsewhere, follow_value, look, payloads_of};
use values::{Value, values};

/// sled's page cache, in bytes. Recovery streams, and running only appends: a small one will do.
const CACHE: u64 = 16 << 20;

/// sled's segments, in bytes: see above.
const SEGMENT: usize = 4 << 20;

/// sled's own file in a journal's directory.
pub(super) const STORE_FILE: &str = "store/db";

const META: &[u8] = b"m";
const RECORD: u8 = b'r';

/// The journal on disk.
#[derive(Debug)]
pub(crate) struct SledJournal {
    dir: PathBuf,
    /// There until the end.
    db: Option<sled::Db>,
    /// sled's own file, opened once more to be synced.
    store: File,
    head_file: HeadFile,
    reserve: Reserve,
    id: JournalId,
    layout: Layout,
    base: Head,
    head: Head,
    /// An append has begun and not come to its end.
    poisoned: bool,
    /// Of the state directory, held for as long as the journal is open.
    lock: File,
}

impl SledJournal {
    /// Opens the journal in a state directory, or makes it if there is none.
    pub(crate) fn open(state: &Path) -> Result<Self, OpenError> {
        Self::open_or_make(state, Layout::Bundles)
    }

    /// The same; a new one gets this layout.
    pub(super) fn open_or_make(state: &Path, layout: Layout) -> Result<Self, OpenError> {
        let lock = lock(state)?;
        let dir = state.join("journal");
        let check = state.join("journal.check");
        let new = state.join("journal.new");
        for leftover in [&check, &new] {
            remove_all(leftover)?;
        }
        if !dir.exists() {
            create(&new, JournalId::random(), layout, None)?;
            publish(&new, state)?;
        }
        Self::open_named(state, lock)
    }

    /// Opens the journal under its name.
    fn open_named(state: &Path, lock: File) -> Result<Self, OpenError> {
        let check = state.join("journal.check");
        let journal = Self::open_existing(state.join("journal"), &check, lock)?;
        // Whoever gave it its name may have been killed before that was on the disk.
        sync_directory(state)?;
        Ok(journal)
    }

    /// Makes a journal of this id in a state directory that has none, with what `fill` appends:
    /// all of it, or no journal at all. A compacted one begins with its first record, after
    /// another head than the anchor.
    pub(super) fn make<E: From<OpenError>>(
        state: &Path,
        id: JournalId,
        first: Option<(Head, &[u8])>,
        fill: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let lock = lock(state)?;
        Self::build(state, &lock, (id, Layout::Bundles), first, fill)?;
        publish(&state.join("journal.new"), state)?;
        Ok(())
    }

    /// Makes the whole of a journal as `journal.new`, durable but for its name.
    pub(super) fn build<E: From<OpenError>>(
        state: &Path,
        lock: &File,
        (id, layout): (JournalId, Layout),
        first: Option<(Head, &[u8])>,
        fill: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        let lock = lock.try_clone().map_err(io_error("lock", state))?;
        let new = state.join("journal.new");
        remove_all(&new)?;
        create(&new, id, layout, first)?;
        let filled = Self::open_existing(new.clone(), &state.join("journal.check"), lock)
            .map_err(E::from)
            .and_then(|mut journal| fill(&mut journal));
        if filled.is_err() {
            // What is wrong matters more than what is left behind.
            let _ = remove_all(&new);
        }
        filled
    }

    /// Puts `journal.new` in the place of the journal, in one step: whenever the power goes, one
    /// of the two is there. The former one is removed.
    pub(super) fn exchange(state: &Path, _lock: &File) -> Result<(), OpenError> {
        swap(state)?;
        sync_directory(state)?;
        reached("exchange: durable");
        remove_all(&state.join("journal.new"))
    }

    fn open_existing(dir: PathBuf, check: &Path, lock: File) -> Result<Self, OpenError> {
        let quarantined = |what: String| OpenError::Quarantined {
            dir: dir.clone(),
            what,
        };
        let (mut head_file, stored) = match HeadFile::open(&dir.join("head")) {
            Ok(found) => found,
            Err(HeadError::Format(found)) => return Err(OpenError::Format { dir, found }),
            Err(error) => return Err(error.of(&dir)),
        };
        let store_dir = dir.join("store");
        let store_path = dir.join(STORE_FILE);
        // Opened before sled, which would make an empty file where one was lost.
        let store = match File::open(&store_path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(quarantined("its store is missing".to_owned()));
            }
            Err(source) => return Err(io_error("open", &store_path)(source)),
        };

        let refused = |unread: Unread| unread.of(&dir);
        let seen = copy_to_look(&store_dir, &store_path, check)?.look(Some(stored));
        let Followed {
            base, head: seen, ..
        } = seen.and_then(whole).map_err(refused)?.1;
        // Whoever wrote it may have been killed before it was synced, or the sync may have failed,
        // and sled keeps an index of what it finds now.
        if seen != stored.head {
            write_again(&store_path).map_err(io_error("write", &store_path))?;
        }
        sync(&store, &store_path).map_err(io_error("sync", &store_path))?;
        let db = caught(store_dir.clone(), move |db| {
            ends_at(db, stored.layout, seen)
        })
        .map_err(refused)?
        .0;
        // Records beyond the head were written, but not acknowledged: from here on they count,
        // and so they must be on the disk.
        sync_files(&store_dir)?;
        let head = seen;
        if head != stored.head {
            let write = head_file.write(Stored { head, ..stored });
            write.map_err(io_error("write the head of", &dir))?;
        }
        let reserve = Reserve::new(&store_path).map_err(io_error("set space aside for", &dir))?;
        Ok(Self {
            dir,
            db: Some(db),
            store,
            head_file,
            reserve,
            id: stored.id,
            layout: stored.layout,
            base,
            head,
            poisoned: false,
            lock,
        })
    }

    /// The state directory.
    fn state(&self) -> &Path {
        self.dir.parent().expect("it lies in its state directory")
    }

    fn db(&self) -> &sled::Db {
        self.db.as_ref().expect("it goes with the journal")
    }

    fn try_append(&mut self, batch: sled::Batch, head: Head) -> Result<(), AppendError> {
        let failed = |what| {
            move |source| AppendError::Store {
                what,
                source: io::Error::other(source),
            }
        };
        let io_failed = |what| move |source| AppendError::Store { what, source };
        let db = self.db();
        reached("append: begins");
        db.apply_batch(batch).map_err(failed("write a batch"))?;
        reached("append: applied");
        db.flush().map_err(failed("flush a batch"))?;
        reached("append: flushed");
        let path = self.dir.join(STORE_FILE);
        sync(&self.store, &path).map_err(io_failed("sync a batch"))?;
        reached("append: synced");
        let stored = Stored {
            id: self.id,
            layout: self.layout,
            head,
        };
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

    fn base(&self) -> Head {
        self.base
    }

    fn append(&mut self, payloads: &[Vec<u8>]) -> Result<Head, AppendError> {
        if self.poisoned {
            return Err(AppendError::Poisoned);
        }
        let heads = chain(self.head, payloads)?;
        let Some(&last) = heads.last() else {
            return Ok(self.head);
        };
        let bytes: usize = payloads.iter().map(Vec::len).sum();
        if !self.reserve.can_take(bytes as u64) {
            return Err(AppendError::Full);
        }
        let batch = batch(self.layout, &heads, payloads);
        self.poisoned = true;
        self.try_append(batch, last)?;
        self.poisoned = false;
        self.head = last;
        Ok(last)
    }

    fn has_room(&mut self) -> bool {
        self.reserve.has_room()
    }

    /// Follows the chain once more: what was looked at before was a copy.
    fn payloads(&self) -> Box<dyn Iterator<Item = Result<Vec<u8>, OpenError>> + '_> {
        let quarantined = |what: String| OpenError::Quarantined {
            dir: self.dir.clone(),
            what,
        };
        let mut head = self.base;
        let mut values = self.db().scan_prefix([RECORD]);
        let mut next = move || match values.next() {
            None if head == self.head => None,
            None => Some(Err(quarantined(ends_elsewhere(head.number, self.head)))),
            Some(Err(error)) => Some(Err(quarantined(format!("it cannot be read: {error}")))),
            Some(Ok((key, value))) => {
                let value = Value::of(self.layout, &value);
                let followed = follow_value(&mut head, &key, &value, None);
                let payloads = payloads_of(&value);
                Some(followed.map(|()| payloads).map_err(quarantined))
            }
        };
        let mut ended = false;
        let values = std::iter::from_fn(move || {
            let value = (!ended).then(&mut next)?;
            ended |= value.as_ref().is_none_or(Result::is_err);
            value
        });
        Box::new(values.flat_map(|value| match value {
            Ok(payloads) => payloads.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        }))
    }

    fn compactable(&mut self) -> Option<&mut dyn Compactable> {
        Some(self)
    }

    fn close(self: Box<Self>) {
        // sled flushes and syncs as it is dropped; the lock goes last.
        drop(self);
    }
}

impl Compactable for SledJournal {
    fn source(&self) -> Result<Source, OpenError> {
        let state = self.state();
        let lock = self.lock.try_clone().map_err(io_error("lock", state))?;
        Ok(Source {
            state: state.to_owned(),
            id: self.id,
            base: self.base,
            head: self.head,
            db: self.db().clone(),
            layout: self.layout,
            lock,
            stop: Arc::default(),
        })
    }

    fn exchange(&mut self) -> Result<(), OpenError> {
        let state = self.state().to_owned();
        let lock = self.lock.try_clone().map_err(io_error("lock", &state))?;
        // sled writes by name until it is gone.
        self.poisoned = true;
        drop(self.db.take());
        let swapped = swap(&state);
        // Nothing is appended before the name is on the disk.
        *self = Self::open_named(&state, lock)?;
        reached("exchange: durable");
        if let Err(error) = swapped {
            let error = &error as &dyn std::error::Error;
            tracing::error!(
                error,
                "the compacted journal cannot take the place of the old one"
            );
        }
        // What is left is removed before the next one is made.
        let _ = remove_all(&state.join("journal.new"));
        Ok(())
    }
}

impl Drop for SledJournal {
    fn drop(&mut self) {
        if self.poisoned {
            // sled would write and sync once more, and panic where that fails: what is on the
            // disk now is what the next process finds out.
            std::mem::forget(self.db.take());
        }
    }
}

/// Records that are appended together, as the store takes them.
pub(super) fn batch(layout: Layout, heads: &[Head], payloads: &[Vec<u8>]) -> sled::Batch {
    let mut batch = sled::Batch::default();
    for (first, value) in values(layout, heads, payloads) {
        batch.insert(&record_key(first), value);
    }
    batch
}

fn record_key(number: u64) -> [u8; 9] {
    let mut key = [RECORD; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The number in a key.
fn number_of(key: &[u8]) -> Option<u64> {
    let number = key.strip_prefix(&[RECORD])?.try_into().ok()?;
    Some(u64::from_be_bytes(number))
}

fn settings(dir: &Path) -> sled::Config {
    sled::Config::new()
        .path(dir)
        .cache_capacity(CACHE)
        .segment_size(SEGMENT)
        .flush_every_ms(None)
}

/// Makes a journal with one record, if it has a first one, durable but for its name.
fn create(
    dir: &Path,
    id: JournalId,
    layout: Layout,
    first: Option<(Head, &[u8])>,
) -> Result<(), OpenError> {
    let store_dir = dir.join("store");
    make_directory(&store_dir)?;
    let failed = |error: sled::Error| OpenError::Io {
        what: "make",
        path: store_dir.clone(),
        source: io::Error::other(error),
    };
    let db = settings(&store_dir).open().map_err(failed)?;
    let mut meta = layout.format().to_be_bytes().to_vec();
    meta.extend_from_slice(&id.0);
    db.insert(META, meta).map_err(failed)?;
    let mut head = id.anchor();
    if let Some((base, payload)) = first {
        head = base.next(payload);
        for (first, value) in values(layout, &[head], &[payload]) {
            db.insert(record_key(first), value).map_err(failed)?;
        }
    }
    db.flush().map_err(failed)?;
    drop(db);
    sync_files(&store_dir)?;

    let head_path = dir.join("head");
    let stored = Stored { id, layout, head };
    HeadFile::create(&head_path, stored).map_err(io_error("make", &head_path))?;
    sync_directory(dir)
}

/// Exchanges the names of the journal and of `journal.new`; after an error they are as they were.
fn swap(state: &Path) -> Result<(), OpenError> {
    let (dir, new) = (state.join("journal"), state.join("journal.new"));
    sync_directory(state)?;
    renameat_with(CWD, &new, CWD, &dir, RenameFlags::EXCHANGE)
        .map_err(|error| io_error("exchange", &dir)(error.into()))?;
    reached("exchange: named");
    Ok(())
}

/// Gives a journal that was made its name.
fn publish(new: &Path, state: &Path) -> Result<(), OpenError> {
    let dir = state.join("journal");
    reached("create: made");
    fs::rename(new, &dir).map_err(io_error("make", &dir))?;
    reached("create: named");
    sync_directory(state)?;
    reached("create: durable");
    Ok(())
}

/// A copy of a store. On a full disk, what is set aside for the journal makes room for it.
fn copy_to_look(store: &Path, file: &Path, at: &Path) -> Result<Copied, OpenError> {
    let full = match Copied::make(store, at) {
        Err(error) if error.is_full_disk() => error,
        made => return made,
    };
    tracing::warn!("the disk is full: what is set aside is used to look at the journal");
    Reserve::give_back(file).map_err(|_| full)?;
    Copied::make(store, at)
}

/// A copy of a store, there as long as this value. sled may repair it as it likes.
#[derive(Debug)]
pub(super) struct Copied(PathBuf);

impl Copied {
    pub(super) fn make(store: &Path, at: &Path) -> Result<Self, OpenError> {
        remove_all(at)?;
        let copied = Self(at.to_owned());
        copy_all(store, at)?;
        Ok(copied)
    }

    /// Opens the copy and follows its chain.
    pub(super) fn look(&self, stored: Option<Stored>) -> Result<(sled::Db, Followed), Unread> {
        look(self.0.clone(), stored)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        // A copy that is left is removed before the next one is made.
        let _ = remove_all(&self.0);
    }
}

/// Takes the state directory for this process; the kernel frees it when the process is gone,
/// however it ends.
fn lock(state: &Path) -> Result<File, OpenError> {
    make_directory(state)?;
    lock_existing(state)
}

/// The same for a directory that must be there.
pub(super) fn lock_existing(state: &Path) -> Result<File, OpenError> {
    let dir = File::open(state).map_err(io_error("open", state))?;
    let owner = dir.metadata().map_err(io_error("open", state))?.uid();
    let own = rustix::process::geteuid().as_raw();
    if owner != own {
        let dir = state.to_owned();
        return Err(OpenError::NotOwner { dir, owner, own });
    }
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

#[cfg(test)]
mod storms;
