use std::path::Path;

use lockstep_core::{Config, Coordinator};
use lockstep_proto::ids::{OperatorName, RolloutId};
use serde_json::Value;

use super::super::contract::copy;
use super::*;
use crate::blobs::Blobs;

fn entry(at: u64, record: Record) -> Vec<u8> {
    let at = Timestamp(at);
    serde_json::to_vec(&Entry { at, record }).unwrap()
}

fn began(at: u64, counter: u64) -> Vec<u8> {
    let epoch = Epoch { counter, id: 7 };
    entry(at, Record::TermBegan { epoch })
}

fn plan() -> PlanDigest {
    Digest::of(b"a plan")
}

/// A state directory whose controller has begun three terms, and taken a plan in the second.
fn filled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = SledJournal::open(dir.path()).unwrap();
    journal.append(&[began(1, 1)]).unwrap();
    let submitted = Record::Submitted {
        rollout: RolloutId::from_random([3; 6]),
        plan: plan(),
        requester: operator(),
        dry_run: false,
    };
    journal
        .append(&[began(20, 2), entry(21, submitted)])
        .unwrap();
    for at in 0..600 {
        let rollout = RolloutId::from_random([3; 6]);
        let paused = Record::Paused {
            rollout,
            operator: operator(),
        };
        journal.append(&[entry(30 + at, paused)]).unwrap();
    }
    journal.append(&[began(900, 5)]).unwrap();
    dir
}

fn operator() -> OperatorName {
    "olga".parse().unwrap()
}

fn exported(state: &Path) -> String {
    let mut text = Vec::new();
    export(state, &mut text).unwrap();
    String::from_utf8(text).unwrap()
}

fn payloads(state: &Path) -> Vec<Vec<u8>> {
    let journal = SledJournal::open(state).unwrap();
    journal.payloads().map(Result::unwrap).collect()
}

fn import_text(state: &Path, text: &str) -> Result<Imported, ImportError> {
    import(state, &mut text.as_bytes(), 0)
}

#[test]
fn an_import_is_the_exported_journal_and_a_term_above_it() {
    let old = filled();
    let text = exported(old.path());
    let new = tempfile::tempdir().unwrap();
    let imported = import_text(new.path(), &text).unwrap();
    let (before, after) = (payloads(old.path()), payloads(new.path()));
    assert_eq!(after[..before.len()], before);
    assert_eq!(after.len(), before.len() + 2);
    let last: Entry = serde_json::from_slice(&after[before.len()]).unwrap();
    let Record::TermBegan { epoch } = last.record else {
        panic!("{last:?}");
    };
    assert_eq!(last.at, Timestamp(900), "time does not go back");
    assert_eq!(epoch, imported.term);
    let took_over: Entry = serde_json::from_slice(after.last().unwrap()).unwrap();
    assert_eq!(took_over.record, Record::TookOver { epoch });
    let old_journal = SledJournal::open(old.path()).unwrap();
    assert_eq!(imported.id, old_journal.id());
    assert_eq!(imported.exported, old_journal.head());
    // Whatever the old controller goes on with, the next one here is above its term.
    let restarted = Epoch {
        counter: 1_000_000,
        id: 9,
    };
    assert!(!restarted.is_current(epoch), "INV-4");

    // An import may be exported again.
    let third = tempfile::tempdir().unwrap();
    import_text(third.path(), &exported(new.path())).unwrap();
    assert_eq!(payloads(third.path()).len(), after.len() + 2);
}

#[test]
fn an_import_begins_above_the_term_that_it_is_told() {
    let old = filled();
    let new = tempfile::tempdir().unwrap();
    let text = exported(old.path());
    let above = u64::MAX / 2;
    let imported = import(new.path(), &mut text.as_bytes(), above).unwrap();
    assert_eq!(imported.term.counter, above + 1);
}

#[test]
fn plans_that_are_not_there_are_named() {
    let old = filled();
    let text = exported(old.path());
    let new = tempfile::tempdir().unwrap();
    assert_eq!(
        import_text(new.path(), &text).unwrap().missing_plans,
        [plan()]
    );
    let new = tempfile::tempdir().unwrap();
    let blobs = new.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    fs::write(blobs.join(plan().hex()), b"a plan").unwrap();
    assert!(
        import_text(new.path(), &text)
            .unwrap()
            .missing_plans
            .is_empty()
    );
}

#[test]
fn an_export_can_be_verified_without_lockstep() {
    use sha2::Digest as _;

    let old = filled();
    let text = exported(old.path());
    let mut lines = text.lines();
    let header: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    let digits = |value: &Value| {
        let text = value.as_str().unwrap();
        hex::decode(text.strip_prefix("sha256:").unwrap_or(text)).unwrap()
    };
    let mut hash = sha2::Sha256::new();
    hash.update(b"lockstep journal\0\0\0\x01");
    hash.update(digits(&header["journal"]));
    let mut before = hash.finalize().to_vec();
    assert_eq!(before, digits(&header["anchor"]));
    let mut count = 0_u64;
    for line in lines {
        let record: Value = serde_json::from_str(line).unwrap();
        count += 1;
        assert_eq!(record["number"], count);
        let mut hash = sha2::Sha256::new();
        hash.update(&before);
        hash.update(count.to_be_bytes());
        hash.update(record["payload"].as_str().unwrap());
        before = hash.finalize().to_vec();
        assert_eq!(before, digits(&record["hash"]));
    }
    assert_eq!(header["records"], count);
    assert_eq!(digits(&header["head"]), before);
    assert_eq!(header["term"], 5);
}

/// Every line of an export, changed in some way, is refused, and nothing is left of it.
#[test]
fn a_changed_export_is_refused_as_a_whole() {
    let old = filled();
    let text = exported(old.path());
    let lines: Vec<&str> = text.lines().collect();
    let refused = |what: &str, lines: &[&str], record: Option<u64>| {
        let new = tempfile::tempdir().unwrap();
        let error = import_text(new.path(), &lines.join("\n")).unwrap_err();
        let found = match &error {
            ImportError::Broken { record, .. } => Some(*record),
            ImportError::NotAnExport { .. } => None,
            error => panic!("{what}: {error}"),
        };
        assert_eq!(found, record, "{what}: {error}");
        assert_eq!(fs::read_dir(new.path()).unwrap().count(), 0, "{what}");
    };
    refused("nothing", &[], None);
    refused("no header", &lines[1..], None);
    refused("only the header", &lines[..1], Some(1));
    refused("cut", &lines[..400], Some(400));
    refused(
        "one twice",
        &[&lines[..300], &lines[299..]].concat(),
        Some(300),
    );
    refused(
        "one missing",
        &[&lines[..300], &lines[301..]].concat(),
        Some(300),
    );
    let last = lines.len() - 1;
    let more = [&lines[..], &lines[last..]].concat();
    refused("one more", &more, Some(u64::try_from(last).unwrap() + 1));
    for (what, line, from, to, record) in [
        ("a payload", 100, "olga", "0lga", Some(100)),
        ("a hash", 100, "sha256:", "sha256:00", None),
        (
            "a number",
            100,
            "\"number\":100",
            "\"number\":101",
            Some(100),
        ),
        ("half a line", 100, "payload", "pay", None),
        (
            "the format",
            0,
            "lockstep.journal/1",
            "lockstep.journal/2",
            None,
        ),
        (
            "the journal's format",
            0,
            "\"journal_format\":1",
            "\"journal_format\":2",
            None,
        ),
        (
            "the count",
            0,
            "\"records\":604",
            "\"records\":603",
            Some(603),
        ),
    ] {
        let changed = lines[line].replacen(from, to, 1);
        assert_ne!(changed, lines[line], "{what}");
        let mut lines = lines.clone();
        lines[line] = &changed;
        refused(what, &lines, record);
    }
    let mut other: Value = serde_json::from_str(lines[0]).unwrap();
    other["journal"] = "00112233445566778899aabbccddeeff".into();
    let other = other.to_string();
    refused("another id", &[&[&*other], &lines[1..]].concat(), None);
}

#[test]
fn an_import_never_mixes_with_what_is_there() {
    let old = filled();
    let text = exported(old.path());
    let before = payloads(old.path());
    assert!(matches!(
        import_text(old.path(), &text),
        Err(ImportError::NotEmpty { name, .. }) if name == "journal"
    ));
    assert_eq!(payloads(old.path()), before);
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("photos"), "").unwrap();
    assert!(matches!(
        import_text(other.path(), &text),
        Err(ImportError::NotEmpty { name, .. }) if name == "photos"
    ));
}

#[test]
fn a_journal_in_use_is_left_alone() {
    let old = filled();
    let journal = SledJournal::open(old.path()).unwrap();
    assert!(matches!(inspect(old.path()), Err(OpenError::InUse { .. })));
    assert!(matches!(
        export(old.path(), &mut Vec::new()),
        Err(ExportError::Open(OpenError::InUse { .. }))
    ));
    drop(journal);
    let nothing = tempfile::tempdir().unwrap();
    assert!(matches!(
        inspect(nothing.path()),
        Err(OpenError::None { .. })
    ));
    assert_eq!(fs::read_dir(nothing.path()).unwrap().count(), 0);
}

/// Where a record was changed in a store that opens.
fn change(state: &Path, number: u64, value: Option<&[u8]>) {
    let db = ::sled::Config::new()
        .path(state.join("journal/store"))
        .segment_size(4 << 20)
        .open()
        .unwrap();
    let mut key = vec![b'r'];
    key.extend_from_slice(&number.to_be_bytes());
    match value {
        Some(value) => db.insert(key, value).unwrap(),
        None => db.remove(key).unwrap(),
    };
    db.flush().unwrap();
}

#[test]
fn the_first_broken_record_is_named() {
    let old = filled();
    let found = inspect(old.path()).unwrap();
    assert_eq!(found.broken, None);
    assert_eq!(found.last, found.acknowledged);
    assert_eq!(found.last.unwrap().number, 604);
    let whole = found.id;

    change(old.path(), 604, None);
    let found = inspect(old.path()).unwrap();
    assert_eq!(found.broken.unwrap().record, Some(604));
    assert_eq!(found.last.unwrap().number, 603);
    assert_eq!(found.acknowledged.unwrap().number, 604);

    change(old.path(), 77, Some(&[0; 50]));
    let found = inspect(old.path()).unwrap();
    assert_eq!(found.broken.unwrap().record, Some(77));
    assert_eq!(found.last.unwrap().number, 76);

    change(old.path(), 7, None);
    assert_eq!(inspect(old.path()).unwrap().broken.unwrap().record, Some(7));

    // Without its head file a journal still says whose it is, and how far its chain holds.
    fs::write(old.path().join("journal/head"), []).unwrap();
    let found = inspect(old.path()).unwrap();
    assert_eq!(found.id, whole);
    assert_eq!(found.acknowledged, None);
    let broken = found.broken.unwrap();
    assert!(broken.what.contains("head file"), "{broken}");
    assert_eq!(broken.record, Some(7));

    let mut text = Vec::new();
    assert!(matches!(
        export(old.path(), &mut text),
        Err(ExportError::Open(OpenError::Quarantined { .. }))
    ));
    assert!(text.is_empty(), "a broken journal is not exported in part");
    let left = fs::read_dir(old.path()).unwrap().count();
    assert_eq!(left, 1, "nothing is left beside the journal");
}

/// Journals of earlier formats stay readable: `tests/fixtures/journals/README.md`.
#[test]
fn a_journal_of_format_1_is_read_folded_and_moved() {
    let fixtures = lockstep_tests::repository().join("tests/fixtures/journals");
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures.join("controller-1"), dir.path());
    let found = inspect(dir.path()).unwrap();
    assert_eq!(found.broken, None);
    let head = "696 sha256:62649d0819a33ebf25791c861f72fd717956c65edba8a53d05a138b33e239efa";
    assert_eq!(found.last.unwrap().to_string(), head);

    let fold = |state: &Path| {
        let entries = payloads(state);
        let entries = entries
            .iter()
            .map(|payload| serde_json::from_slice::<Entry>(payload).unwrap());
        let blobs = Blobs::open(state.join("blobs")).unwrap();
        let epoch = Epoch { counter: 9, id: 9 };
        Coordinator::recover(
            Config {
                epoch,
                break_glass: None,
            },
            entries,
            |digest| blobs.plan(digest).unwrap(),
        )
        .unwrap()
    };
    let coordinator = fold(dir.path());
    let states: Vec<String> = coordinator
        .rollouts()
        .map(|rollout| coordinator.document(rollout).unwrap()["state"].to_string())
        .collect();
    let expected = ["\"succeeded\"", "\"succeeded\"", "\"rolled_back\""];
    assert_eq!(states, expected);
    assert_eq!(coordinator.hosts().count(), 3);

    let new = tempfile::tempdir().unwrap();
    copy(
        &fixtures.join("controller-1/blobs"),
        &new.path().join("blobs"),
    );
    let imported = import_text(new.path(), &exported(dir.path())).unwrap();
    assert!(imported.missing_plans.is_empty());
    assert_eq!(imported.exported.to_string(), head);
    assert_eq!(fold(new.path()).rollouts().count(), 3);
}
