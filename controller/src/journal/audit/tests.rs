use lockstep_proto::ids::Epoch;
use lockstep_proto::values::Timestamp;
use lockstep_tests::storm::{figures, storm};
use rand::Rng as _;
use rand::rngs::StdRng;

use super::*;

/// Cases, unless asked otherwise with `LOCKSTEP_STORM=1000`.
const SAMPLE: u64 = 100;

const RECORDS: u64 = 60;

fn entry(number: u64) -> Entry {
    let epoch = Epoch {
        counter: number,
        id: number,
    };
    Entry {
        at: Timestamp(number),
        record: Record::TermBegan { epoch },
    }
}

/// A journal as somebody chains it who may write it.
fn chained(id: JournalId, entries: &[Entry]) -> Chain {
    let mut head = id.anchor();
    let records = entries.iter().map(|entry| {
        head = head.next(&serde_json::to_vec(entry).unwrap());
        (head, entry.clone())
    });
    Chain {
        id,
        base: id.anchor(),
        records: records.collect(),
    }
}

fn told(chain: &Chain, number: u64) -> Witness {
    let (head, _) = chain.records[usize::try_from(number).unwrap() - 1];
    Witness {
        by: "app-1".into(),
        term: 1,
        head: witness::Head {
            journal: chain.id.to_string(),
            number: head.number,
            hash: head.hash,
        },
    }
}

/// Changes entries as somebody would who hides one; answers with the first that is another one.
fn edit(random: &mut StdRng, entries: &mut Vec<Entry>) -> (&'static str, u64) {
    let at = random.random_range(0..entries.len() - 1);
    let kind = match random.random_range(0..6) {
        0 => {
            entries[at].at.0 ^= 1 << random.random_range(0..20);
            "changed"
        }
        1 => {
            entries.remove(at);
            "deleted"
        }
        2 => {
            entries.swap(at, at + 1);
            "reordered"
        }
        3 => {
            entries.insert(at, entry(1000));
            "spliced"
        }
        4 => {
            entries.clear();
            "compacted"
        }
        _ => {
            entries.truncate(at);
            "cut"
        }
    };
    (kind, at as u64 + 1)
}

/// A journal that says of all records through one that they are in an archive, which is nowhere.
fn compacted(id: JournalId, through: u64) -> Chain {
    let base = Head {
        number: through,
        hash: lockstep_proto::ids::Digest::of(b"anything"),
    };
    let record = Record::Compacted {
        number: base.number,
        hash: base.hash,
        archive: "x".to_owned(),
    };
    let entry = Entry {
        at: Timestamp(1),
        record,
    };
    Chain {
        id,
        base,
        records: vec![(base.next(&serde_json::to_vec(&entry).unwrap()), entry)],
    }
}

#[test]
fn a_journal_that_is_chained_anew_is_found_by_its_witness() {
    let id = JournalId([3; 16]);
    let entries: Vec<Entry> = (1..=RECORDS).map(entry).collect();
    let original = chained(id, &entries);
    let mut found = std::collections::BTreeMap::<&str, u64>::new();
    storm(SAMPLE, |case, random| {
        let mut edited = entries.clone();
        let (kind, first) = edit(random, &mut edited);
        let forged = match kind {
            "compacted" => compacted(id, first),
            _ => chained(id, &edited),
        };
        if kind == "compacted" {
            let gone: Vec<Witness> = (1..=first).map(|number| told(&original, number)).collect();
            let judgement = forged.judge(&gone);
            assert_eq!(judgement.not_here, first, "{case}");
            assert_eq!(judgement.not_held as u64, first - 1, "{case}");
            assert!(
                judgement.why().is_some(),
                "{case}: the base is not the record"
            );
            *found.entry(kind).or_default() += 1;
            return;
        }
        let newest = random.random_range(first..=RECORDS);
        let some: Vec<u64> = (0..3).map(|_| random.random_range(1..=newest)).collect();
        let numbers = some.into_iter().chain([newest]);
        let witnesses: Vec<Witness> = numbers.map(|number| told(&original, number)).collect();

        let judgement = forged.judge(&witnesses);
        let why = judgement.why();
        let why = why.unwrap_or_else(|| panic!("{case}: {kind} from {first} on is not found"));
        assert!(judgement.through < first, "{case}: {why}");
        assert_eq!(original.judge(&witnesses).why(), None, "{case}");

        // Nobody was told of what was changed: then it is said that nobody was.
        let early: Vec<Witness> = (1..first).map(|number| told(&original, number)).collect();
        let judgement = forged.judge(&early);
        assert_eq!(judgement.why(), None, "{case}");
        let unwitnessed = judgement.unwitnessed_from();
        assert_eq!(unwitnessed, (kind != "cut").then_some(first), "{case}");
        *found.entry(kind).or_default() += 1;
    });
    figures(
        "audit-controller",
        &serde_json::json!({"found": found, "missed": 0}),
    );
}
