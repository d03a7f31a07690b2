use lockstep_proto::ids::{Epoch, InstanceId, RolloutId};
use lockstep_tests::storm::{figures, storm};
use rand::Rng as _;
use rand::rngs::StdRng;
use tempfile::TempDir;

use super::*;
use crate::journal::{FORMAT, Journal, Need};

/// Cases, unless asked otherwise with `LOCKSTEP_STORM=1000`.
const SAMPLE: u64 = 100;

const RECORDS: u64 = 40;

fn instance() -> InstanceId {
    InstanceId::from_random([1; 8])
}

fn record(number: u64) -> Record {
    match number {
        1 => Record::Opened {
            format: FORMAT,
            domain: "example.org".into(),
            instance: instance(),
        },
        number if number % 3 == 0 => Record::Released {
            rollout: RolloutId::from_random([u8::try_from(number).unwrap(); 6]),
            comes_back: false,
        },
        counter => Record::Epoch(Epoch { counter, id: 7 }),
    }
}

fn written(records: &[Record]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
    for record in records {
        journal
            .append(std::slice::from_ref(record), Need::Closes)
            .unwrap();
    }
    dir
}

fn witnesses(state: &Path, of: impl Fn(u64) -> bool) -> Vec<Witness> {
    let mut witnesses = vec![];
    journal::walk(state, |link, _| {
        if of(link.number) {
            witnesses.push(Witness {
                by: "controller".into(),
                term: 0,
                head: head(&instance(), link),
            });
        }
    })
    .unwrap();
    witnesses
}

/// Changes records as somebody would who hides one; answers with the first that is another one.
fn edit(random: &mut StdRng, records: &mut Vec<Record>) -> (&'static str, u64) {
    // Not the first, which names the journal.
    let at = random.random_range(1..records.len() - 1);
    let kind = match random.random_range(0..5) {
        0 => {
            records[at] = Record::Epoch(Epoch {
                counter: 1000,
                id: 0,
            });
            "changed"
        }
        1 => {
            records.remove(at);
            "deleted"
        }
        2 => {
            records.swap(at, at + 1);
            "reordered"
        }
        3 => {
            records.insert(at, record(1000));
            "spliced"
        }
        _ => {
            records.truncate(at);
            "cut"
        }
    };
    (kind, at as u64 + 1)
}

#[test]
fn a_journal_that_is_chained_anew_is_found_by_its_witness() {
    let records: Vec<Record> = (1..=RECORDS).map(record).collect();
    let original = written(&records);
    let mut found = std::collections::BTreeMap::<&str, u64>::new();
    storm(SAMPLE, |case, random| {
        let mut edited = records.clone();
        let (kind, first) = edit(random, &mut edited);
        let forged = written(&edited);
        let newest = random.random_range(first..=RECORDS);
        let some: Vec<u64> = (0..3).map(|_| random.random_range(1..=newest)).collect();
        let told = witnesses(original.path(), |number| {
            number == newest || some.contains(&number)
        });

        let audited = audit(forged.path(), &told).unwrap();
        assert_eq!(audited.verified.broken, None, "{case}: whole by itself");
        let why = audited.judgement.why();
        let why = why.unwrap_or_else(|| panic!("{case}: {kind} from {first} on is not found"));
        assert!(audited.judgement.through < first, "{case}: {why}");

        // Nobody was told of what was changed: then it is said that nobody was.
        let early = witnesses(original.path(), |number| number < first && number % 5 == 0);
        let judgement = audit(forged.path(), &early).unwrap().judgement;
        assert_eq!(judgement.why(), None, "{case}");
        let unwitnessed = judgement.unwitnessed_from().unwrap_or(u64::MAX);
        let cut = kind == "cut" && unwitnessed == u64::MAX;
        assert!(unwitnessed <= first || cut, "{case}: {unwitnessed} {first}");
        *found.entry(kind).or_default() += 1;
    });
    assert_eq!(audit(original.path(), &[]).unwrap().judgement.why(), None);
    figures("audit-agent", &json!({"found": found, "missed": 0}));
}

#[test]
fn a_file_that_is_edited_is_found_without_a_witness() {
    let records: Vec<Record> = (1..=RECORDS).map(record).collect();
    let dir = written(&records);
    let path = dir.path().join("journal");
    let bytes = std::fs::read(&path).unwrap();
    let mut ends = vec![];
    let mut at = 0;
    while at < bytes.len() {
        let length = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        at += 44 + (length & !(1 << 31)) as usize;
        ends.push(at);
    }
    storm(SAMPLE, |case, random| {
        let frame = |index: usize| {
            let begin = if index == 0 { 0 } else { ends[index - 1] };
            bytes[begin..ends[index]].to_vec()
        };
        let mut frames: Vec<Vec<u8>> = (0..ends.len()).map(frame).collect();
        let at = random.random_range(0..frames.len() - 1);
        match random.random_range(0..5) {
            0 => {
                let byte = random.random_range(0..frames[at].len());
                frames[at][byte] ^= 1 << random.random_range(0..8);
            }
            1 => _ = frames.remove(at),
            2 => frames.swap(at, at + 1),
            3 => {
                let other = frames[random.random_range(0..frames.len())].clone();
                frames.insert(at, other);
            }
            _ => frames.truncate(at),
        }
        std::fs::write(&path, frames.concat()).unwrap();
        let broken = audit(dir.path(), &[]).unwrap().verified.broken;
        let broken = broken.unwrap_or_else(|| panic!("{case} is not found"));
        let first = broken.record.expect("its first record is named");
        assert!(first <= at as u64 + 2, "{case}: {first}, changed at {at}");
    });
}

#[test]
fn a_journal_that_was_anchored_goes_on_under_another_name() {
    let other = InstanceId::from_random([2; 8]);
    let mut records: Vec<Record> = (1..=RECORDS).map(record).collect();
    records.push(Record::Anchored {
        floor: Digest::of(b"a floor"),
        raised: serde_json::from_value(json!({"fleet": "prod", "serials": {}})).unwrap(),
        instance: other.clone(),
    });
    records.push(record(3));
    let dir = written(&records);
    let last = RECORDS + 2;
    let mut told = witnesses(dir.path(), |number| number == 5 || number == last);
    told[1].head.journal = other.to_string();
    let judgement = audit(dir.path(), &told).unwrap().judgement;
    assert_eq!((judgement.why(), judgement.through), (None, last));
    told[1].head.number += 1;
    assert!(audit(dir.path(), &told).unwrap().judgement.why().is_some());
}
