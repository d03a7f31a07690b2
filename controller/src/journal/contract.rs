//! What every journal keeps, run over each of them; then what only the one on disk can lose. Many
//! more faults are in `sled/storms.rs`.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::head::HeadFile;
use super::memory::Memory;
use super::offline::inspect;
use super::sled::SledJournal;
use super::{AppendError, Journal, Layout, MAX_PAYLOAD, OpenError};

fn payload(number: usize) -> Vec<u8> {
    format!("record {number} {}", "x".repeat(number % 700)).into_bytes()
}

/// What cannot be packed.
pub(super) fn noise(random: &mut StdRng, size: usize) -> Vec<u8> {
    let mut noise = vec![0; size];
    random.fill(&mut noise[..]);
    noise
}

pub(super) fn payloads(range: std::ops::Range<usize>) -> Vec<Vec<u8>> {
    range.map(payload).collect()
}

pub(super) fn contents(journal: &dyn Journal) -> Vec<Vec<u8>> {
    journal.payloads().map(Result::unwrap).collect()
}

/// The suite: `open` opens the same journal again and again.
fn keeps_the_contract(open: &dyn Fn() -> Box<dyn Journal>) {
    let journal = open();
    let (id, anchor) = (journal.id(), journal.head());
    assert_eq!(anchor, id.anchor(), "an empty journal's head is its anchor");
    assert!(contents(&*journal).is_empty());
    journal.close();

    let mut journal = open();
    assert_eq!(journal.id(), id, "the id stays");
    assert_eq!(
        journal.append(&[]).unwrap(),
        anchor,
        "nothing changes nothing"
    );
    let head = journal.append(&payloads(0..3)).unwrap();
    let expected = payloads(0..3)
        .iter()
        .fold(anchor, |head, payload| head.next(payload));
    assert_eq!(head, expected, "records are chained");
    assert_eq!(journal.head(), head);
    let largest = vec![b'y'; MAX_PAYLOAD];
    let refused = journal.append(&[payload(3), vec![0; MAX_PAYLOAD + 1]]);
    assert!(matches!(
        refused,
        Err(AppendError::TooLarge { number: 5, .. })
    ));
    assert_eq!(
        journal.head(),
        head,
        "a refused batch leaves nothing behind"
    );
    journal.append(std::slice::from_ref(&largest)).unwrap();
    journal.append(&payloads(3..500)).unwrap();
    let head = journal.head();
    journal.close();

    let mut journal = open();
    assert_eq!(journal.head(), head, "the head is found again");
    let mut all = payloads(0..3);
    all.push(largest);
    all.extend(payloads(3..500));
    assert_eq!(contents(&*journal), all, "in the order of their appending");
    journal.append(&payloads(500..501)).unwrap();
    drop(journal);
    let journal = open();
    assert_eq!(journal.head().number, 502, "a drop loses nothing");
    assert_eq!(contents(&*journal).last(), Some(&payload(500)));
}

#[test]
fn the_journal_in_memory_keeps_the_contract() {
    let memory = Memory::default();
    keeps_the_contract(&|| Box::new(memory.open()));
}

#[test]
fn the_journal_on_disk_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    keeps_the_contract(&|| Box::new(SledJournal::open(dir.path()).unwrap()));
}

#[test]
fn a_journal_of_an_earlier_release_keeps_the_contract_and_its_layout() {
    let dir = tempfile::tempdir().unwrap();
    drop(SledJournal::open_or_make(dir.path(), Layout::Records).unwrap());
    keeps_the_contract(&|| Box::new(SledJournal::open(dir.path()).unwrap()));
    // So the release that made it can go on with it.
    let stored = HeadFile::read(&dir.path().join("journal/head")).unwrap();
    assert_eq!(stored.layout, Layout::Records);
}

#[test]
fn two_controllers_never_share_a_state_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = SledJournal::open(dir.path()).unwrap();
    assert!(matches!(
        SledJournal::open(dir.path()),
        Err(OpenError::InUse { .. })
    ));
    Box::new(first).close();
    SledJournal::open(dir.path()).unwrap();
}

#[test]
fn large_records_do_not_leave_the_synced_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = SledJournal::open(dir.path()).unwrap();
    let random = &mut StdRng::seed_from_u64(1);
    for _ in 0..200 {
        let batch = [(); 3].map(|()| noise(random, MAX_PAYLOAD));
        journal.append(&batch).unwrap();
    }
    let blobs = dir.path().join("journal/store/blobs");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
}

/// A journal with records in several batches, closed, and its state directory.
pub(super) fn filled() -> (tempfile::TempDir, Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = SledJournal::open(dir.path()).unwrap();
    for batch in 0..10 {
        let batch = payloads(batch * 20..(batch + 1) * 20);
        journal.append(&batch).unwrap();
    }
    drop(journal);
    (dir, payloads(0..200))
}

pub(super) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Opens a damaged copy of a state directory: it must hold everything, or say that it does not,
/// and leave the files as they were. An inspection says the same. Answers whether it is whole.
pub(super) fn is_whole_or_quarantined(
    original: &Path,
    records: &[Vec<u8>],
    what: &str,
    damage: impl FnOnce(&Path),
) -> bool {
    let dir = tempfile::tempdir().unwrap();
    copy(original, dir.path());
    damage(dir.path());
    let before = files(dir.path());
    let inspection = inspect(dir.path());
    assert!(before == files(dir.path()), "{what}: inspecting changed it");
    match SledJournal::open(dir.path()) {
        Ok(journal) => {
            assert!(
                contents(&journal) == records,
                "{what}: opened as if nothing were missing"
            );
            let inspection = inspection.unwrap();
            assert_eq!(inspection.broken, None, "{what}");
            assert_eq!(inspection.last, Some(journal.head()), "{what}");
            true
        }
        Err(OpenError::Quarantined { what: why, .. }) => {
            assert!(before == files(dir.path()), "{what}: changed it");
            let broken = inspection.unwrap().broken;
            assert!(broken.is_some(), "{what}: only opening says {why}");
            false
        }
        // A head of another format is one that this release does not know.
        Err(OpenError::Format { .. }) => false,
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Everything in a directory, with its content.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            let content = fs::read(&path).unwrap();
            found.insert(path, content);
        }
    }
    found
}

type Damage = fn(&Path);

#[test]
fn a_lost_store_or_head_is_never_started_over() {
    let (original, records) = filled();
    let lost: [(&str, Damage); 4] = [
        ("no store", |dir| {
            fs::remove_dir_all(dir.join("journal/store")).unwrap();
        }),
        ("no file", |dir| {
            fs::remove_file(dir.join("journal/store/db")).unwrap();
        }),
        ("no head", |dir| {
            fs::remove_file(dir.join("journal/head")).unwrap();
        }),
        ("an empty head", |dir| {
            fs::write(dir.join("journal/head"), []).unwrap();
        }),
    ];
    for (what, damage) in lost {
        let whole = is_whole_or_quarantined(original.path(), &records, what, damage);
        assert!(!whole, "{what}");
    }
}

#[test]
fn a_head_beyond_the_records_is_refused() {
    let (original, records) = filled();
    let older = tempfile::tempdir().unwrap();
    copy(original.path(), older.path());
    let mut journal = SledJournal::open(original.path()).unwrap();
    journal.append(&payloads(200..201)).unwrap();
    drop(journal);
    // An older store came back from a backup, and the head did not.
    let head = fs::read(original.path().join("journal/head")).unwrap();
    let whole = is_whole_or_quarantined(older.path(), &records, "old store", |dir| {
        fs::write(dir.join("journal/head"), &head).unwrap();
    });
    assert!(!whole);
}

#[test]
fn records_of_another_journal_are_refused() {
    let (one, records) = filled();
    let (other, _) = filled();
    let whole = is_whole_or_quarantined(one.path(), &records, "exchanged", |dir| {
        fs::copy(other.path().join("journal/head"), dir.join("journal/head")).unwrap();
    });
    assert!(!whole);
}

#[test]
fn a_batch_beyond_the_head_is_there_as_a_whole_or_not_at_all() {
    let (original, acknowledged) = filled();
    let head = fs::read(original.path().join("journal/head")).unwrap();
    let store = original.path().join("journal/store/db");
    let before = used_bytes(&store);
    let mut journal = SledJournal::open(original.path()).unwrap();
    // Several values of the store.
    let random = &mut StdRng::seed_from_u64(1);
    let batch: Vec<Vec<u8>> = (0..60).map(|_| noise(random, 3000)).collect();
    journal.append(&batch).unwrap();
    drop(journal);
    let after = used_bytes(&store);
    let mut found = [0; 2];
    for part in 0..=20 {
        let cut = before + (after - before) * part / 20;
        let dir = tempfile::tempdir().unwrap();
        copy(original.path(), dir.path());
        // The power went before the batch was acknowledged.
        fs::write(dir.path().join("journal/head"), &head).unwrap();
        let file = OpenOptions::new()
            .write(true)
            .open(dir.path().join("journal/store/db"));
        file.unwrap().set_len(cut).unwrap();
        let Ok(journal) = SledJournal::open(dir.path()) else {
            continue;
        };
        let contents = contents(&journal);
        assert_eq!(contents[..200], acknowledged[..], "cut at {cut}");
        match contents.len() {
            200 => found[0] += 1,
            260 => found[1] += 1,
            other => panic!("cut at {cut}: {other} records, a part of the batch"),
        }
    }
    assert!(found[1] > 0, "the whole batch was never found: {found:?}");
}

/// Where the last byte of a file is that is not zero.
pub(super) fn used_bytes(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    u64::try_from(last + 1).unwrap()
}
