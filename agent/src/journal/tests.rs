use super::*;
use lockstep_proto::ids::{Epoch, InstanceId, RolloutId};
use tempfile::TempDir;

fn record(counter: u64) -> Record {
    Record::Epoch(Epoch { counter, id: 7 })
}

fn opened() -> Record {
    Record::Opened {
        format: FORMAT,
        domain: "example.org".into(),
        instance: InstanceId::from_random([1; 8]),
    }
}

fn read_all(dir: &Path) -> Result<Vec<Record>, JournalError> {
    let mut records = vec![];
    Journal::open(dir, |_, record| records.push(record))?;
    Ok(records)
}

/// A journal with records 1..=count, one append each.
fn filled(count: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    journal.append(&[opened()], Need::Opens).unwrap();
    for number in 2..=count {
        journal.append(&[record(number)], Need::Opens).unwrap();
    }
    dir
}

fn copy(from: &Path) -> TempDir {
    let to = tempfile::tempdir().unwrap();
    for name in ["journal", "head"] {
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    to
}

#[test]
fn what_was_appended_is_found_again_and_read_by_position() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    assert!(journal.is_empty());
    journal.append(&[opened()], Need::Opens).unwrap();
    let released = Record::Released {
        rollout: RolloutId::from_random([3; 6]),
        comes_back: false,
    };
    let positions = journal
        .append(&[record(2), released.clone()], Need::Closes)
        .unwrap();
    assert_eq!(journal.read(positions[1]).unwrap(), released);
    drop(journal);

    let mut found = vec![];
    let journal = Journal::open(dir.path(), |at, record| found.push((at, record))).unwrap();
    assert_eq!(found.len(), 3);
    assert_eq!(found[2], (positions[1], released.clone()));
    assert_eq!(journal.read(found[2].0).unwrap(), released);
}

#[test]
fn the_first_record_alone_says_where_a_journal_belongs() {
    let none = tempfile::tempdir().unwrap();
    assert_eq!(domain(none.path()), None);
    let dir = filled(3);
    let says = || domain(dir.path());
    assert_eq!(says().as_deref(), Some("example.org"));
    let path = dir.path().join("journal");
    let whole = std::fs::read(&path).unwrap();
    // What follows it is not asked.
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(says().as_deref(), Some("example.org"));
    for broken in [&whole[..40], &whole[..60], &[]] {
        std::fs::write(&path, broken).unwrap();
        assert_eq!(says(), None);
    }
    let at = whole
        .windows(7)
        .position(|part| part == b"example")
        .unwrap();
    let mut other = whole.clone();
    other[at] = b'f';
    std::fs::write(&path, other).unwrap();
    assert_eq!(says(), None);
}

#[test]
fn a_tail_that_nobody_relied_on_may_be_torn_at_any_byte() {
    let dir = filled(3);
    let whole = std::fs::read(dir.path().join("journal")).unwrap();
    let head = std::fs::read(dir.path().join("head")).unwrap();
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    journal.append(&[record(4)], Need::Opens).unwrap();
    drop(journal);
    let longer = std::fs::read(dir.path().join("journal")).unwrap();
    // The power fails before the head is written: it still names record 3.
    for end in whole.len()..longer.len() {
        let torn = copy(dir.path());
        std::fs::write(torn.path().join("head"), &head).unwrap();
        std::fs::write(torn.path().join("journal"), &longer[..end]).unwrap();
        assert_eq!(read_all(torn.path()).unwrap().len(), 3, "at {end}");
        // It goes on as if nothing had been there.
        let mut journal = Journal::open(torn.path(), |_, _| {}).unwrap();
        journal.append(&[record(9)], Need::Opens).unwrap();
        drop(journal);
        assert_eq!(read_all(torn.path()).unwrap()[3], record(9), "at {end}");
    }
    // A whole record beyond the head is kept.
    let torn = copy(dir.path());
    std::fs::write(torn.path().join("head"), &head).unwrap();
    assert_eq!(read_all(torn.path()).unwrap().len(), 4);
}

#[test]
fn a_journal_that_does_not_reach_its_head_is_quarantined_at_every_length() {
    let dir = filled(4);
    let whole = std::fs::read(dir.path().join("journal")).unwrap();
    for end in 0..whole.len() {
        let cut = copy(dir.path());
        std::fs::write(cut.path().join("journal"), &whole[..end]).unwrap();
        let result = read_all(cut.path());
        assert!(
            matches!(result, Err(JournalError::Quarantined { .. })),
            "{end}: {result:?}"
        );
        let left = std::fs::read(cut.path().join("journal")).unwrap();
        assert_eq!(left, &whole[..end], "quarantine changes nothing");
    }
    let lost = copy(dir.path());
    std::fs::remove_file(lost.path().join("journal")).unwrap();
    assert!(matches!(
        read_all(lost.path()),
        Err(JournalError::Quarantined { .. })
    ));
}

#[test]
fn every_flipped_bit_is_found() {
    let dir = filled(4);
    let whole = std::fs::read(dir.path().join("journal")).unwrap();
    let flipped = copy(dir.path());
    for byte in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[byte] ^= 1 << bit;
            std::fs::write(flipped.path().join("journal"), &bytes).unwrap();
            let result = read_all(flipped.path());
            assert!(
                matches!(result, Err(JournalError::Quarantined { .. })),
                "byte {byte} bit {bit}: {result:?}"
            );
        }
    }
}

#[test]
fn one_broken_head_slot_is_survived_and_two_are_not() {
    let dir = filled(4);
    let head = std::fs::read(dir.path().join("head")).unwrap();
    for slot in [0, 4096] {
        let broken = copy(dir.path());
        let mut bytes = head.clone();
        bytes[slot + 20] ^= 1;
        std::fs::write(broken.path().join("head"), &bytes).unwrap();
        assert_eq!(read_all(broken.path()).unwrap().len(), 4);
        // And the next head does not overwrite the only good slot.
        let again = std::fs::read(broken.path().join("head")).unwrap();
        assert_eq!(again[4096 - slot..][..80], head[4096 - slot..][..80]);
    }
    let broken = copy(dir.path());
    std::fs::write(broken.path().join("head"), b"").unwrap();
    assert!(matches!(
        read_all(broken.path()),
        Err(JournalError::Quarantined { .. })
    ));
}

#[test]
fn another_journal_of_the_same_length_is_not_taken_for_this_one() {
    let (one, other) = (filled(3), tempfile::tempdir().unwrap());
    let mut journal = Journal::open(other.path(), |_, _| {}).unwrap();
    journal.append(&[opened()], Need::Opens).unwrap();
    journal
        .append(&[record(8), record(9)], Need::Opens)
        .unwrap();
    std::fs::copy(other.path().join("journal"), one.path().join("journal")).unwrap();
    assert!(matches!(
        read_all(one.path()),
        Err(JournalError::Quarantined { .. })
    ));
}

#[test]
fn an_oversized_record_is_refused_and_changes_nothing() {
    let dir = filled(2);
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    let large = Record::Opened {
        format: FORMAT,
        domain: "x".repeat(MAX_RECORD),
        instance: InstanceId::from_random([1; 8]),
    };
    assert!(matches!(
        journal.append(&[large], Need::Closes),
        Err(AppendError::TooLarge(_))
    ));
    drop(journal);
    assert_eq!(read_all(dir.path()).unwrap().len(), 2);
}

#[test]
fn a_failed_sync_is_not_tried_again() {
    let dir = filled(2);
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    journal.append(&[record(3)], Need::Opens).unwrap();
    // It takes all that is written, and cannot be synchronised.
    journal.file = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let result = journal.append(&[record(4)], Need::Closes);
    assert!(
        matches!(result, Err(AppendError::Fatal { .. })),
        "INV-2: {result:?}"
    );
    let reserve = dir.path().join("reserve").exists();
    assert!(reserve, "the disk is not full: there was no second try");
}

/// After a sync that failed, pages that never came to the disk count as written: one that succeeds
/// later proves something only of what was written anew.
#[test]
fn what_a_failed_sync_may_have_dropped_is_written_again_before_it_is_relied_on() {
    let dir = filled(2);
    let (path, head_path) = (dir.path().join("journal"), dir.path().join("head"));
    let head = std::fs::read(&head_path).unwrap();
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    let relied_on = journal.length;
    let more: Vec<Record> = (3..1000).map(record).collect();
    for batch in more.chunks(100) {
        journal.append(batch, Need::Opens).unwrap();
    }
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    assert!(whole.len() as u64 > relied_on + MAX_RECORD as u64);
    let long_ago = std::time::UNIX_EPOCH;
    let is_written = || {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(read_all(dir.path()).unwrap().len(), 999);
        assert_eq!(std::fs::read(&path).unwrap(), whole, "as it was");
        std::fs::metadata(&path).unwrap().modified().unwrap() != long_ago
    };
    std::fs::write(&head_path, head).unwrap();
    assert!(is_written(), "INV-2");
    assert!(!is_written(), "the head says that all of it is there");
}

/// Journals of earlier formats stay readable: `tests/fixtures/journals/README.md`.
#[test]
fn a_journal_of_format_1_is_read() {
    let fixtures = lockstep_tests::repository().join("tests/fixtures/journals/agent-1");
    for (host, records, reports, head) in [
        (
            "app-1",
            290,
            114,
            "c3807c3ea27a8e9b327305041f0feab296c4a8d825571e9f3d01c7284e4a42cb",
        ),
        (
            "db-1",
            122,
            47,
            "3053e83d552b911ab87cad50a8f7aa226d49bb9f73680749d0de6e3aab54d5e2",
        ),
    ] {
        let dir = copy(&fixtures.join(host));
        let verified = verify(dir.path()).unwrap();
        assert_eq!(verified.broken, None, "{host}");
        assert_eq!(verified.torn, 0, "{host}");
        assert_eq!(hex::encode(verified.last.1), head, "{host}");
        let found = read_all(dir.path()).unwrap();
        assert_eq!(found.len(), records, "{host}");
        let is_report = |record: &&Record| matches!(record, Record::Report { .. });
        assert_eq!(found.iter().filter(is_report).count(), reports, "{host}");
        // It goes on from there.
        let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
        journal.append(&[record(1)], Need::Closes).unwrap();
        drop(journal);
        assert_eq!(read_all(dir.path()).unwrap().len(), records + 1, "{host}");
    }
}
