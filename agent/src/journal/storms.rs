//! Many faults, each over a journal that was written by the real code. A sample runs always;
//! `LOCKSTEP_STORM=1000` says how many.

use lockstep_proto::ids::{Epoch, InstanceId, RolloutId};
use lockstep_tests::disk::SmallDisk;
use lockstep_tests::power::{Moment, Watch};
use lockstep_tests::storm::{figures, storm};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// Cases of each kind, unless asked otherwise.
const SAMPLE: u64 = 100;

fn opened() -> Record {
    Record::Opened {
        format: FORMAT,
        domain: "example.org".into(),
        instance: InstanceId::from_random([1; 8]),
    }
}

fn record(counter: u64) -> Record {
    if counter.is_multiple_of(3) {
        let rollout = RolloutId::from_random([3; 6]);
        Record::Released {
            rollout,
            comes_back: false,
        }
    } else {
        Record::Epoch(Epoch { counter, id: 7 })
    }
}

/// What is on the disk.
#[derive(Clone, PartialEq, Eq)]
struct Files {
    journal: Option<Vec<u8>>,
    head: Option<Vec<u8>>,
}

impl Files {
    fn read(dir: &Path) -> Self {
        let read = |name| std::fs::read(dir.join(name)).ok();
        Self {
            journal: read("journal"),
            head: read("head"),
        }
    }

    fn write(&self, dir: &Path) {
        for (name, bytes) in [("journal", &self.journal), ("head", &self.head)] {
            match bytes {
                Some(bytes) => std::fs::write(dir.join(name), bytes).unwrap(),
                None => _ = std::fs::remove_file(dir.join(name)),
            }
        }
    }
}

fn read_all(dir: &Path) -> Result<Vec<Record>, JournalError> {
    let mut records = vec![];
    Journal::open(dir, |_, record| records.push(record))?;
    Ok(records)
}

/// A journal's life: what was on the disk after each append, with the records acknowledged then.
struct Life {
    dir: TempDir,
    moments: Vec<(Files, usize)>,
    records: Vec<Record>,
}

impl Life {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
        let mut records = vec![opened()];
        journal.append(&records, Need::Opens).unwrap();
        let mut moments = vec![(Files::read(dir.path()), 1)];
        for append in 1..30_u64 {
            let batch: Vec<Record> = (0..=append % 4).map(|n| record(append * 10 + n)).collect();
            journal.append(&batch, Need::Closes).unwrap();
            records.extend(batch);
            moments.push((Files::read(dir.path()), records.len()));
        }
        Self {
            dir,
            moments,
            records,
        }
    }

    fn last(&self) -> &Files {
        &self.moments.last().expect("there is a first one").0
    }

    /// A damaged journal is found whole, or is quarantined and left as it is; `verify` says the
    /// same, and before that. Answers whether it was whole.
    fn is_whole_or_quarantined(&self, case: &str, damaged: &Files) -> bool {
        let dir = self.dir.path();
        damaged.write(dir);
        let verified = verify(dir).unwrap();
        assert!(Files::read(dir) == *damaged, "{case}: verify changed it");
        match read_all(dir) {
            Ok(found) => {
                assert!(found == self.records, "{case}: {} found", found.len());
                assert_eq!(verified.broken, None, "{case}");
                assert_eq!(verified.last.0, self.records.len() as u64, "{case}");
                true
            }
            Err(JournalError::Quarantined { why, .. }) => {
                let left = Files::read(dir);
                assert!(left.journal == damaged.journal, "{case}: changed");
                let broken = verified.broken.unwrap_or_else(|| panic!("{case}: {why}"));
                assert_eq!(broken.why, why, "{case}");
                if let Some(record) = broken.record {
                    assert!(why.contains(&(record - 1).to_string()) || why.contains("record"));
                    assert!(record <= self.records.len() as u64, "{case}: {why}");
                }
                false
            }
            Err(error) => panic!("{case}: {error}"),
        }
    }
}

#[test]
fn a_torn_tail_is_never_taken_for_the_end() {
    let life = Life::new();
    let (mut whole, mut cases) = ([0, 0], 0);
    storm(SAMPLE, |case, random| {
        let mut files = life.last().clone();
        let of_head = random.random_bool(0.2);
        let file = if of_head {
            &mut files.head
        } else {
            &mut files.journal
        };
        let bytes = file.as_mut().unwrap();
        // Most tears are short.
        let most = if random.random_bool(0.5) {
            bytes.len()
        } else {
            200
        };
        let cut = random.random_range(1..=most);
        bytes.truncate(bytes.len() - cut);
        whole[usize::from(of_head)] += u32::from(life.is_whole_or_quarantined(case, &files));
        cases += 1;
    });
    assert_eq!(whole[0], 0, "records that were torn off were not missed");
    let whole = whole[1];
    let found = json!({"cases": cases, "whole": whole, "quarantined": cases - whole});
    figures("journal-agent-torn", &found);
}

#[test]
fn a_flipped_bit_is_never_overlooked() {
    let life = Life::new();
    let mut whole_and_not = [0, 0];
    storm(SAMPLE, |case, random| {
        let mut files = life.last().clone();
        let of_head = random.random_bool(0.2);
        let file = if of_head {
            &mut files.head
        } else {
            &mut files.journal
        };
        let bytes = file.as_mut().unwrap();
        let at = random.random_range(0..bytes.len());
        bytes[at] ^= 1 << random.random_range(0..8);
        let whole = life.is_whole_or_quarantined(case, &files);
        assert_eq!(
            whole, of_head,
            "{case}: one slot is enough, no record is too many"
        );
        whole_and_not[usize::from(!whole)] += 1;
    });
    let [whole, quarantined] = whole_and_not;
    let found = json!({"cases": whole + quarantined, "whole": whole, "quarantined": quarantined});
    figures("journal-agent-flipped", &found);
}

#[test]
fn an_older_head_costs_nothing_and_older_records_are_refused() {
    let life = Life::new();
    for (moment, _) in &life.moments {
        let last = life.last();
        let head = moment.head.clone();
        let journal = moment.journal.clone();
        let case = "an older head";
        let older = Files {
            head,
            ..last.clone()
        };
        assert!(life.is_whole_or_quarantined(case, &older));
        let case = "older records";
        let older = Files {
            journal,
            ..last.clone()
        };
        let whole = life.is_whole_or_quarantined(case, &older);
        assert_eq!(whole, older == *last);
    }
}

#[test]
fn a_lost_file_is_never_made_anew() {
    let life = Life::new();
    let last = life.last();
    for lost in [None, Some(vec![])] {
        let (journal, head) = (lost.clone(), lost);
        let without = Files {
            journal,
            ..last.clone()
        };
        assert!(!life.is_whole_or_quarantined("no records", &without));
        let without = Files {
            head,
            ..last.clone()
        };
        assert!(!life.is_whole_or_quarantined("no head", &without));
    }
    // Two faults at once: the head is no help, and not even the first record is whole.
    let mut files = last.clone();
    files.journal.as_mut().unwrap()[60] ^= 1;
    for slot in [0, 4096] {
        files.head.as_mut().unwrap()[slot + 20] ^= 1;
    }
    assert!(!life.is_whole_or_quarantined("both", &files));
}

/// Some appends, and the moments at which the power may have gone.
struct Lived {
    moments: Vec<Moment>,
    records: Vec<Record>,
    /// How many records there were after each append.
    ends: Vec<usize>,
}

impl Lived {
    /// Opens a journal with these records, and appends three times.
    fn new(
        random: &mut StdRng,
        dir: &Path,
        before: &[Record],
        skipped: Option<&'static str>,
    ) -> Self {
        let mut watch = Watch::begin(dir).skipping(skipped);
        let mut records = before.to_vec();
        let mut ends = vec![];
        watch.acknowledge(records.len());
        let mut journal = Journal::open(dir, |_, _| {}).unwrap();
        for _ in 0..3 {
            let batch: Vec<Record> = if journal.is_empty() {
                vec![opened()]
            } else {
                let size = random.random_range(1..6);
                (0..size).map(|_| record(random.random())).collect()
            };
            journal.append(&batch, Need::Closes).unwrap();
            records.extend(batch);
            ends.push(records.len());
            watch.acknowledge(records.len());
        }
        Self {
            moments: watch.end(),
            records,
            ends,
        }
    }

    /// What is found has all that was acknowledged, and of the append that was under way all or
    /// nothing. Says whether it has the latter.
    fn check(
        &self,
        acknowledged: usize,
        found: Result<&[Record], &JournalError>,
    ) -> Result<bool, String> {
        let found = found.map_err(ToString::to_string)?;
        let count = found.len();
        let under_way = self.ends.iter().find(|end| **end > acknowledged);
        let all = under_way.is_some_and(|end| count == *end);
        if !self.records.starts_with(found) {
            return Err("other records were found".to_owned());
        }
        if !all && count != acknowledged {
            return Err(format!("{count} were found, {acknowledged} acknowledged"));
        }
        Ok(all)
    }
}

/// One life after the other, on disks that lose their power.
struct Lives {
    dir: TempDir,
    before: Vec<Record>,
}

impl Lives {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let before = vec![];
        Self { dir, before }
    }

    /// Appends, then a power loss at any moment of them, then a recovery, with another loss in it.
    /// Says whether the append that was under way was found; an error is a loss.
    fn round(
        &mut self,
        random: &mut StdRng,
        skipped: Option<&'static str>,
    ) -> Result<bool, String> {
        if self.before.len() > 60 {
            *self = Self::new();
        }
        let state = |dir: &TempDir| dir.path().join("state");
        let lived = Lived::new(random, &state(&self.dir), &self.before, skipped);
        let moment = lived.moments.choose(random).expect("there is the end");
        let cut = Self::new().dir;
        moment.cut(random, &state(&cut));
        let watch = Watch::begin(&state(&cut)).skipping(skipped);
        let found = read_all(&state(&cut));
        let recovery = watch.end();
        let all = lived.check(moment.acknowledged, found.as_deref())?;

        let again = Self::new().dir;
        let at = random.random_range(0..recovery.len());
        recovery[at].cut(random, &state(&again));
        let found_again = read_all(&state(&again));
        lived.check(moment.acknowledged, found_again.as_deref())?;
        let found_again = found_again.expect("it was checked");
        if at == recovery.len() - 1 && found_again != found.expect("it was checked") {
            return Err("what was found in the recovery is lost after it".to_owned());
        }
        self.before = found_again;
        self.dir = again;
        Ok(all)
    }
}

#[test]
fn no_acknowledged_record_is_lost_with_the_power() {
    let mut counts = [0; 2];
    let mut lives = Lives::new();
    storm(SAMPLE, |case, random| {
        let all = lives.round(random, None);
        let all = all.unwrap_or_else(|why| panic!("{case}: {why}"));
        counts[usize::from(all)] += 1;
    });
    let [without, with] = counts;
    assert!(without > 0 && with > 0, "{counts:?}");
    let found = json!({"cuts": 2 * (without + with), "lost": 0, "under_way_found": with});
    figures("journal-agent-power", &found);
}

#[test]
fn a_sync_that_is_left_out_is_noticed() {
    for skipped in ["journal", "head", "state"] {
        let noticed = (0..300).any(|seed| {
            let random = &mut StdRng::seed_from_u64(seed);
            Lives::new().round(random, Some(skipped)).is_err()
        });
        assert!(noticed, "nothing was lost without the syncs of {skipped}");
    }
}

/// The agent is killed before an append is synced, recovers, and then the power goes.
#[test]
fn what_was_found_after_a_kill_is_not_lost_with_the_power() {
    let life = Life::new();
    storm(SAMPLE, |case, random| {
        let dir = tempfile::tempdir().unwrap();
        let at = random.random_range(1..life.moments.len());
        life.moments[at - 1].0.write(dir.path());
        let mut watch = Watch::begin(dir.path());
        let written = life.moments[at].0.journal.as_ref().unwrap();
        std::fs::write(dir.path().join("journal"), written).unwrap();
        let found = read_all(dir.path()).unwrap();
        assert_eq!(found.len(), life.moments[at].1, "{case}");
        watch.acknowledge(found.len());
        let cut = tempfile::tempdir().unwrap();
        watch.end().last().unwrap().cut(random, cut.path());
        let again = read_all(cut.path()).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert!(again == found, "{case}: {} of {}", again.len(), found.len());
    });
}

/// A file that takes what is written, and fails when it is to be synced or written.
fn failing(how: &str) -> File {
    OpenOptions::new().write(true).open(how).unwrap()
}

#[test]
fn a_failing_disk_is_said_and_costs_nothing_that_was_acknowledged() {
    // /dev/null cannot be synced; /dev/full takes nothing at all.
    for (what, device) in [
        ("records", "/dev/null"),
        ("head", "/dev/null"),
        ("head", "/dev/full"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), |_, _| {}).unwrap();
        journal.append(&[opened()], Need::Opens).unwrap();
        journal.append(&[record(1)], Need::Opens).unwrap();
        match what {
            "records" => journal.file = failing(device),
            _ => journal.head.fail(failing(device)),
        }
        let result = journal.append(&[record(2), record(4)], Need::Closes);
        assert!(
            matches!(result, Err(AppendError::Fatal { .. })),
            "{what}: {result:?}"
        );
        drop(journal);
        let found = read_all(dir.path()).unwrap();
        // Of what was not acknowledged, all is there or nothing.
        let expected = if what == "head" { 4 } else { 2 };
        assert_eq!(found.len(), expected, "{what} on {device}");
        assert_eq!(found[..2], [opened(), record(1)]);
    }
}

/// No space for any part of an append: nothing of it is there, and it goes on once there is room.
#[test]
fn a_full_disk_costs_nothing_that_was_acknowledged() {
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(place.path().join("state"), 8) else {
        return;
    };
    let mut acknowledged = vec![opened()];
    let mut journal = Journal::open(disk.path(), |_, _| {}).unwrap();
    journal.append(&acknowledged, Need::Opens).unwrap();
    let mut refused = 0;
    for leaving in (0..40).map(|pages| pages * 4096) {
        let batch: Vec<Record> = (0..300).map(|n| record(leaving + n)).collect();
        disk.fill(leaving);
        // What has ended may be recorded from the reserve; then that is gone, and nothing fits.
        for need in [Need::Opens, Need::Closes, Need::Closes] {
            match journal.append(&batch, need) {
                Ok(_) => {
                    assert_eq!(need, Need::Closes, "a full disk takes nothing new");
                    acknowledged.extend(batch.iter().cloned());
                }
                Err(AppendError::Full(_)) => refused += 1,
                Err(error) => panic!("{leaving} bytes left: {error}"),
            }
        }
        // A crash on the full disk changes nothing.
        drop(journal);
        let mut found = vec![];
        let opened = Journal::open(disk.path(), |_, record| found.push(record));
        journal = opened.unwrap();
        assert!(found == acknowledged, "{leaving} bytes left");
        disk.free();
        journal.append(&[record(leaving)], Need::Opens).unwrap();
        acknowledged.push(record(leaving));
        if acknowledged.len() > 20_000 {
            break;
        }
    }
    assert!(refused > 20, "{refused}");
}
