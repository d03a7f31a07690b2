//! Many faults, each over a journal that was written by the real code. A sample runs always;
//! `LOCKSTEP_STORM=1000` says how many.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use lockstep_tests::disk::SmallDisk;
use lockstep_tests::power::{Moment, Watch};
use lockstep_tests::storm::{figures, storm};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use super::super::contract::{
    contents, copy, filled, is_whole_or_quarantined, noise, payloads, used_bytes,
};
use super::*;

/// The files that a journal has, as paths from the state directory.
fn its_files(state: &Path) -> Vec<PathBuf> {
    let journal = state.join("journal");
    let mut found = vec![journal.join("head")];
    for entry in fs::read_dir(journal.join("store")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    let relative = found
        .iter()
        .map(|path| path.strip_prefix(state).unwrap().to_owned());
    relative.collect()
}

/// A journal that was opened a second time: it has an index of sled's, too.
fn reopened() -> (tempfile::TempDir, Vec<Vec<u8>>) {
    let (dir, mut records) = filled();
    let mut journal = SledJournal::open(dir.path()).unwrap();
    let more = payloads(200..260);
    for payload in &more {
        journal.append(std::slice::from_ref(payload)).unwrap();
    }
    records.extend(more);
    drop(journal);
    let files = its_files(dir.path());
    let has_index = files
        .iter()
        .any(|path| path.to_string_lossy().contains("snap."));
    assert!(has_index, "{files:?}");
    (dir, records)
}

#[test]
fn a_torn_tail_is_never_taken_for_the_end() {
    let (original, records) = reopened();
    let files = its_files(original.path());
    let mut whole = 0;
    let mut cases = 0;
    storm(40, |case, random| {
        let store = random.random_bool(0.7);
        let path = if store {
            Path::new("journal/store/db")
        } else {
            files.choose(random).unwrap().as_path()
        };
        let used = used_bytes(&original.path().join(path));
        // Most tears are short; sled's file ends with unused space, so they go through the rest.
        let most = if random.random_bool(0.5) {
            used
        } else {
            used.min(300)
        };
        let left = used - random.random_range(1..=most);
        let what = format!("{case}: {} cut at {left} of {used}", path.display());
        let is_whole = is_whole_or_quarantined(original.path(), &records, &what, |dir| {
            let file = OpenOptions::new().write(true).open(dir.join(path));
            file.unwrap().set_len(left).unwrap();
        });
        whole += u32::from(is_whole);
        cases += 1;
    });
    assert!(whole < cases, "no tear was noticed");
    let found = json!({"cases": cases, "whole": whole, "quarantined": cases - whole});
    figures("journal-controller-torn", &found);
}

#[test]
fn a_flipped_bit_is_never_overlooked() {
    let (original, records) = reopened();
    let files = its_files(original.path());
    let (mut quarantined, mut cases) = (0, 0);
    storm(40, |case, random| {
        let store = random.random_bool(0.7);
        let path = if store {
            Path::new("journal/store/db")
        } else {
            files.choose(random).unwrap().as_path()
        };
        let used = used_bytes(&original.path().join(path));
        let at = random.random_range(0..used);
        let bit = random.random_range(0..8);
        let what = format!("{case}: {} bit {bit} at {at}", path.display());
        let is_whole = is_whole_or_quarantined(original.path(), &records, &what, |dir| {
            let options = OpenOptions::new()
                .read(true)
                .write(true)
                .open(dir.join(path));
            let file = options.unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            byte[0] ^= 1 << bit;
            file.write_all_at(&byte, at).unwrap();
        });
        quarantined += u32::from(!is_whole);
        cases += 1;
    });
    assert!(quarantined > 0, "no flip met anything");
    let whole = cases - quarantined;
    let found = json!({"cases": cases, "whole": whole, "quarantined": quarantined});
    figures("journal-controller-flipped", &found);
}

#[test]
fn an_older_head_costs_nothing_and_older_files_are_refused() {
    let (now, records) = reopened();
    let (old, _) = filled();
    let journal = SledJournal::open(now.path()).unwrap();
    let id = journal.id();
    drop(journal);
    // The same journal at an earlier time: made by cutting off what came later.
    let earlier = tempfile::tempdir().unwrap();
    SledJournal::make(earlier.path(), id, None, |journal| {
        journal.append(&records[..120]).unwrap();
        Ok::<_, OpenError>(())
    })
    .unwrap();
    let head = "journal/head";
    let whole = is_whole_or_quarantined(now.path(), &records, "older head", |dir| {
        fs::copy(earlier.path().join(head), dir.join(head)).unwrap();
    });
    assert!(whole);
    let whole = is_whole_or_quarantined(now.path(), &records, "older store", |dir| {
        fs::remove_dir_all(dir.join("journal/store")).unwrap();
        copy(
            &earlier.path().join("journal/store"),
            &dir.join("journal/store"),
        );
    });
    assert!(!whole);
    let whole = is_whole_or_quarantined(now.path(), &records, "another store", |dir| {
        fs::remove_dir_all(dir.join("journal/store")).unwrap();
        copy(
            &old.path().join("journal/store"),
            &dir.join("journal/store"),
        );
    });
    assert!(!whole);
}

/// Some appends, and the moments at which the power may have gone.
struct Lived {
    moments: Vec<Moment>,
    records: Vec<Vec<u8>>,
    /// How many records there were after each append.
    ends: Vec<usize>,
}

impl Lived {
    /// Opens a journal with these records, and appends three times. Its first opening, and what
    /// happens before it, are among the moments.
    fn new(
        random: &mut StdRng,
        dir: &Path,
        before: &[Vec<u8>],
        skipped: Option<&'static str>,
    ) -> Self {
        // sled syncs an index before it gives it its name.
        let mut watch = Watch::begin(dir).trusting("snap.").skipping(skipped);
        watch.acknowledge(before.len());
        let mut journal = SledJournal::open(dir).unwrap();
        let mut records = contents(&journal);
        assert!(records == before);
        let mut ends = vec![];
        for _ in 0..3 {
            // Sometimes enough to begin another segment of sled's.
            let large = random.random_bool(0.05);
            let size = random.random_range(1..if large { 140 } else { 8 });
            let batch: Vec<Vec<u8>> = (0..size)
                .map(|_| {
                    let most = if large { 30_000 } else { 900 };
                    let size = random.random_range(1..most);
                    noise(random, size)
                })
                .collect();
            journal.append(&batch).unwrap();
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
        found: Result<&[Vec<u8>], &OpenError>,
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

fn read_all(state: &Path) -> Result<Vec<Vec<u8>>, OpenError> {
    Ok(contents(&SledJournal::open(state)?))
}

/// One life after the other, on disks that lose their power.
struct Lives {
    dir: tempfile::TempDir,
    before: Vec<Vec<u8>>,
}

impl Lives {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
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
        if self.before.iter().map(Vec::len).sum::<usize>() > 200_000 {
            *self = Self::new();
        }
        let state = |dir: &tempfile::TempDir| dir.path().join("state");
        let lived = Lived::new(random, &state(&self.dir), &self.before, skipped);
        let moment = lived.moments.choose(random).expect("there is the end");
        let cut = Self::new().dir;
        moment.cut(random, &state(&cut));
        let watch = Watch::begin(&state(&cut)).trusting("snap.");
        let watch = watch.skipping(skipped);
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
    storm(12, |case, random| {
        let all = lives.round(random, None);
        let all = all.unwrap_or_else(|why| panic!("{case}: {why}"));
        counts[usize::from(all)] += 1;
    });
    let [without, with] = counts;
    assert!(without > 0, "{counts:?}");
    let found = json!({"cuts": 2 * (without + with), "lost": 0, "under_way_found": with});
    figures("journal-controller-power", &found);
}

#[test]
fn a_sync_that_is_left_out_is_noticed() {
    for skipped in ["db", "head", "conf", "store", "state"] {
        let noticed = (0..100).any(|seed| {
            let random = &mut StdRng::seed_from_u64(seed);
            Lives::new().round(random, Some(skipped)).is_err()
        });
        assert!(noticed, "nothing was lost without the syncs of {skipped}");
    }
}

/// The controller is killed before an append is synced, recovers, and then the power goes.
#[test]
fn what_was_found_after_a_kill_is_not_lost_with_the_power() {
    let (original, acknowledged) = filled();
    let later = tempfile::tempdir().unwrap();
    copy(original.path(), later.path());
    let mut journal = SledJournal::open(later.path()).unwrap();
    journal.append(&payloads(200..230)).unwrap();
    drop(journal);
    storm(6, |case, random| {
        let dir = tempfile::tempdir().unwrap();
        copy(original.path(), dir.path());
        let mut watch = Watch::begin(dir.path()).trusting("snap.");
        // What the killed one wrote, not synced; the head is the older one.
        let store = dir.path().join("journal/store");
        for file in fs::read_dir(&store).unwrap() {
            // Its own directories are empty.
            let _ = fs::remove_file(file.unwrap().path());
        }
        copy(
            &later.path().join("journal/store"),
            &dir.path().join("journal/store"),
        );
        let journal = SledJournal::open(dir.path()).unwrap();
        let found = contents(&journal);
        assert!(
            found.len() == 230 && found.starts_with(&acknowledged),
            "{case}"
        );
        watch.acknowledge(found.len());
        let moments = watch.end();
        drop(journal);
        let cut = tempfile::tempdir().unwrap();
        moments.last().unwrap().cut(random, cut.path());
        let journal = SledJournal::open(cut.path());
        let again = contents(&journal.unwrap_or_else(|error| panic!("{case}: {error}")));
        assert!(again == found, "{case}: {} of {}", again.len(), found.len());
    });
}

/// A file that takes what is written, and fails when it is to be synced or written.
fn failing(device: &str) -> File {
    OpenOptions::new().write(true).open(device).unwrap()
}

#[test]
fn a_failing_disk_is_said_and_costs_nothing_that_was_acknowledged() {
    // /dev/null cannot be synced; /dev/full takes nothing at all.
    for (what, device) in [
        ("sync a batch", "/dev/null"),
        ("write its head", "/dev/null"),
        ("write its head", "/dev/full"),
    ] {
        let (dir, mut records) = filled();
        let mut journal = SledJournal::open(dir.path()).unwrap();
        match what {
            "sync a batch" => journal.store = failing(device),
            _ => journal.head_file.fail(failing(device)),
        }
        let head = journal.head();
        let more = payloads(200..203);
        let result = journal.append(&more);
        assert!(
            matches!(result, Err(AppendError::Store { what: said, .. }) if said == what),
            "{result:?}"
        );
        assert_eq!(journal.head(), head, "nothing more is acknowledged");
        let result = journal.append(&more);
        assert!(matches!(result, Err(AppendError::Poisoned)), "{result:?}");
        drop(journal);
        // sled keeps its lock until the process ends, so this is a copy.
        let next = tempfile::tempdir().unwrap();
        copy(dir.path(), next.path());
        let found = contents(&SledJournal::open(next.path()).unwrap());
        if found.len() > records.len() {
            records.extend(more);
        }
        assert!(
            found == records,
            "{what} on {device}: {} found",
            found.len()
        );
    }
}

/// No space in the middle of an append: the process ends, and the next one finds what counts.
#[test]
fn a_full_disk_costs_nothing_that_was_acknowledged() {
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(place.path().join("disk"), 64) else {
        return;
    };
    let mut refused = 0;
    for leaving in [0, 1, 2, 5, 17, 100, 300, 600].map(|pages| pages * 4096) {
        let state = disk.path().join(format!("state-{leaving}"));
        let mut journal = SledJournal::open(&state).unwrap();
        let mut acknowledged = payloads(0..50);
        journal.append(&acknowledged).unwrap();
        // Without what is set aside, sled itself meets the end of the disk.
        Reserve::give_back(&state.join("journal/store/db")).unwrap();
        journal.reserve.fail(failing("/dev/null"));
        disk.fill(leaving);
        let batch = vec![noise(&mut StdRng::seed_from_u64(1), 30_000); 20];
        let failed = loop {
            match journal.append(&batch) {
                Ok(_) => acknowledged.extend(batch.iter().cloned()),
                Err(error) => break error,
            }
        };
        assert!(matches!(failed, AppendError::Store { .. }), "{failed:?}");
        refused += 1;
        drop(journal);
        // A start needs room for its copy, and says so.
        disk.free();
        // sled keeps its lock until the process ends, so this is a copy.
        let next = tempfile::tempdir().unwrap();
        copy(&state, next.path());
        let found = read_all(next.path()).unwrap();
        let more = found
            .strip_prefix(&acknowledged[..])
            .expect("what counts is there");
        assert!(more.is_empty() || more == batch, "{leaving} bytes left");
        fs::remove_dir_all(&state).unwrap();
    }
    assert_eq!(refused, 8);
}

/// What is set aside is there when the disk is full: reports of running steps are still recorded,
/// a controller starts on what it left, and only then nothing more is taken.
#[test]
fn a_full_disk_leaves_room_for_what_is_running() {
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(place.path().join("disk"), 96) else {
        return;
    };
    let state = disk.path().join("state");
    let mut journal = SledJournal::open(&state).unwrap();
    assert!(journal.has_room());
    let mut acknowledged = payloads(0..50);
    journal.append(&acknowledged).unwrap();
    disk.fill(0);
    assert!(!journal.has_room(), "nothing new may begin");
    let report = noise(&mut StdRng::seed_from_u64(1), 900);
    for _ in 0..1000 {
        journal.append(std::slice::from_ref(&report)).unwrap();
        acknowledged.push(report.clone());
    }
    assert!(!journal.has_room());
    drop(journal);

    // A start looks at a copy first: what is set aside makes room for that, too.
    let mut journal = SledJournal::open(&state).unwrap();
    assert_eq!(contents(&journal), acknowledged);
    assert!(!journal.has_room());
    let batch = vec![noise(&mut StdRng::seed_from_u64(1), 30_000); 20];
    let mut more = 0;
    let failed = loop {
        match journal.append(&batch) {
            Ok(_) => acknowledged.extend(batch.iter().cloned()),
            Err(error) => break error,
        }
        more += 1;
        assert!(more < 1000, "the disk has an end");
    };
    assert!(matches!(failed, AppendError::Full), "{failed:?}");
    assert!(more > 10, "{more} batches from the reserve");

    // Nothing was begun that could not be ended: with room it goes on.
    disk.free();
    assert!(journal.has_room());
    journal.append(&batch).unwrap();
    acknowledged.extend(batch);
    drop(journal);
    assert_eq!(read_all(&state).unwrap(), acknowledged);
}

#[test]
fn a_start_without_room_for_its_look_says_so() {
    let place = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(place.path().join("disk"), 64) else {
        return;
    };
    let state = disk.path().join("state");
    let mut journal = SledJournal::open(&state).unwrap();
    journal.append(&payloads(0..50)).unwrap();
    drop(journal);
    Reserve::give_back(&state.join("journal/store/db")).unwrap();
    disk.fill(0);
    let error = SledJournal::open(&state).unwrap_err();
    assert!(
        matches!(error, OpenError::Io { what: "copy", .. }) && error.is_full_disk(),
        "{error:?}"
    );
    disk.free();
    assert_eq!(read_all(&state).unwrap(), payloads(0..50));
}

/// A copy of it was followed when it was opened; what is read afterwards is followed once more.
#[test]
fn what_changes_after_the_look_is_found() {
    type Change = fn(&sled::Db);
    let (original, records) = filled();
    let changes: [(&str, Change); 4] = [
        ("its hash differs", |db| {
            let (key, value) = db.scan_prefix([RECORD]).nth(1).unwrap().unwrap();
            let mut value = value.to_vec();
            *value.last_mut().unwrap() ^= 1;
            db.insert(key, value).unwrap();
        }),
        ("on cannot be unpacked", |db| {
            let (key, value) = db.scan_prefix([RECORD]).nth(1).unwrap().unwrap();
            db.insert(key, &value[..value.len() / 2]).unwrap();
        }),
        ("is missing, though later ones are there", |db| {
            let (key, _) = db.scan_prefix([RECORD]).nth(1).unwrap().unwrap();
            db.remove(key).unwrap();
        }),
        ("it ends at record", |db| {
            db.pop_max().unwrap();
        }),
    ];
    for (said, change) in changes {
        let dir = tempfile::tempdir().unwrap();
        copy(original.path(), dir.path());
        let journal = SledJournal::open(dir.path()).unwrap();
        assert!(ends_at(journal.db(), journal.layout, journal.head).is_ok());
        change(journal.db());
        let (good, bad): (Vec<_>, Vec<_>) = journal.payloads().partition(Result::is_ok);
        assert!(good.len() < records.len(), "{said}");
        let [Err(OpenError::Quarantined { what, .. })] = &bad[..] else {
            panic!("{said}: {bad:?}");
        };
        assert!(what.contains(said), "{what}");
    }
    let journal = SledJournal::open(original.path()).unwrap();
    for head in [
        journal.base.next(b"another"),
        Head {
            number: journal.head.number,
            ..journal.base
        },
    ] {
        assert!(ends_at(journal.db(), journal.layout, head).is_err());
    }
}
