use std::fs;
use std::path::Path;

use lockstep_core::refusal::{Caller, CallsRefused, Why};
use lockstep_core::trust::Subject;
use lockstep_proto::values::Timestamp;

use super::super::handle::Input;
use super::super::tests::{candidate, hello, parts};
use super::super::{Parts, oneshot};
use super::*;
use crate::journal::memory::Memory;
use crate::journal::offline::inspect;
use crate::journal::sled::SledJournal;

/// A driver on a state directory that has begun its term.
fn driver(state: &Path) -> Driver {
    let parts = Parts {
        journal: Box::new(SledJournal::open(state).unwrap()),
        compact_above: Some(20),
        ..parts(&Memory::default(), &Arc::default())
    };
    let mut driver = Driver::recover(parts, |_| None).unwrap();
    let round = driver.begin();
    driver.finish(round).unwrap();
    driver
}

fn take(driver: &mut Driver, inputs: Vec<Input>) {
    driver.round(&mut { inputs }).unwrap();
}

fn refused(count: u64) -> Input {
    Input::Event(lockstep_core::Event::CallsRefused(CallsRefused {
        who: Caller::Nobody,
        call: "Submit".to_owned(),
        why: Why::Certificate,
        count,
        since: Timestamp(0),
    }))
}

fn host_comes(number: u64) -> Input {
    let host = format!("app-{number}");
    let (candidate, _) = candidate(&host);
    Input::Open {
        hello: Box::new(hello(&host)),
        version: 1,
        candidate,
        admitted: oneshot::channel().0,
    }
}

async fn compact(driver: &mut Driver) {
    driver.begin_compaction().unwrap();
    let prepared = driver.compaction.prepared().await;
    driver.end_compaction(prepared).unwrap();
}

/// What a compaction leaves behind that did not come to its end: nothing.
fn is_as_it_was(state: &Path) {
    let archives = fs::read_dir(state.join("archive"));
    assert_eq!(archives.map_or(0, Iterator::count), 0);
    assert!(!state.join("journal.new").exists());
}

#[tokio::test]
async fn a_long_journal_is_compacted_once_nothing_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (0..3).map(host_comes).collect());
    assert_eq!(driver.compaction.at(&*driver.journal), None, "it is short");
    take(&mut driver, (1..100).map(refused).collect());
    let begun = Instant::now();
    driver.look_at_length();
    let at = driver.compaction.at(&*driver.journal).unwrap();
    assert!(at >= begun + CALM);
    assert!(driver.compaction.running.is_none(), "something may come");
    driver.compaction.since = begun - CALM;
    // A few records more are as good as none.
    take(&mut driver, vec![refused(7)]);
    driver.look_at_length();
    assert!(driver.compaction.running.is_some());
    let prepared = driver.compaction.prepared().await;
    let head = driver.journal.head();
    driver.end_compaction(prepared).unwrap();

    assert_eq!(driver.journal.base(), head, "the chain goes on");
    assert!(driver.journal.head().number < head.number + 10);
    assert_eq!(driver.compaction.at(&*driver.journal), None);
    assert_eq!(driver.coordinator.hosts().count(), 3);
    take(&mut driver, vec![host_comes(7)]);
    let head = driver.journal.head();
    driver.journal.close();
    let found = inspect(dir.path()).unwrap();
    assert_eq!((found.broken, found.last), (None, Some(head)));
    let parts = Parts {
        journal: Box::new(SledJournal::open(dir.path()).unwrap()),
        ..parts(&Memory::default(), &Arc::default())
    };
    let next = Driver::recover(parts, |_| None).unwrap();
    assert_eq!(next.coordinator.hosts().count(), 4);
}

#[tokio::test]
async fn what_is_recorded_meanwhile_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    driver.begin_compaction().unwrap();
    take(&mut driver, vec![host_comes(1)]);
    let prepared = driver.compaction.prepared().await;
    let head = driver.journal.head();
    driver.end_compaction(prepared).unwrap();
    assert_eq!(driver.journal.head(), head);
    assert_eq!(driver.journal.base().number, 0);
    is_as_it_was(dir.path());
    let at = driver.compaction.at(&*driver.journal).unwrap();
    assert!(at > Instant::now() + CALM, "not at once again");

    compact(&mut driver).await;
    assert_eq!(driver.journal.base(), head);
    assert_eq!(driver.coordinator.hosts().count(), 1);
}

#[tokio::test]
async fn a_journal_of_which_most_would_stay_is_left_until_it_is_longer() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (0..30).map(host_comes).collect());
    compact(&mut driver).await;
    assert_eq!(driver.journal.base().number, 0);
    is_as_it_was(dir.path());
    let at = driver.compaction.at(&*driver.journal).unwrap();
    assert!(at > Instant::now() + CALM, "not at once again");
    take(&mut driver, (1..40).map(refused).collect());
    compact(&mut driver).await;
    assert!(driver.journal.base().number > 0);
}

#[tokio::test]
async fn a_compaction_that_fails_changes_nothing_and_is_tried_later() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("archive"), "in its way").unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    for _ in 0..12 {
        let before = Instant::now();
        compact(&mut driver).await;
        let again = driver.compaction.at(&*driver.journal).unwrap() - before;
        assert!((AGAIN..AGAIN_AT_MOST + AGAIN).contains(&again), "{again:?}");
    }
    assert_eq!(driver.journal.base().number, 0);
    take(&mut driver, vec![host_comes(1)]);
    fs::remove_file(dir.path().join("archive")).unwrap();
    // The archive is there already, and the journal cannot be made.
    let check = dir.path().join("journal.check");
    fs::write(&check, "in its way").unwrap();
    compact(&mut driver).await;
    assert_eq!(driver.journal.base().number, 0);
    is_as_it_was(dir.path());
    fs::remove_file(check).unwrap();
    compact(&mut driver).await;
    assert!(driver.journal.base().number > 0);
}

#[tokio::test]
async fn where_nothing_can_be_exchanged_the_journal_goes_on_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    driver.begin_compaction().unwrap();
    let prepared = driver.compaction.prepared().await;
    fs::remove_dir_all(dir.path().join("journal.new")).unwrap();
    let head = driver.journal.head();
    driver.end_compaction(prepared).unwrap();
    assert_eq!(driver.journal.head(), head);
    assert_eq!(driver.journal.base().number, 0);
    is_as_it_was(dir.path());
    assert_eq!(driver.compaction.at(&*driver.journal), None, "not again");
    take(&mut driver, vec![host_comes(1)]);
    let head = driver.journal.head();
    driver.journal.close();
    let found = inspect(dir.path()).unwrap();
    assert_eq!((found.broken, found.last), (None, Some(head)));
}

#[tokio::test]
async fn a_journal_that_would_say_something_else_does_not_take_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    driver.begin_compaction().unwrap();
    let prepared = driver.compaction.prepared().await;
    // As if a record that counts had been left out.
    let host = Subject::Host("app-1".parse().unwrap());
    let now = driver.clock.now();
    driver.coordinator.suspend(now, host, "stolen");
    driver.end_compaction(prepared).unwrap();
    assert_eq!(driver.journal.base().number, 0);
    is_as_it_was(dir.path());
}

#[tokio::test]
async fn a_controller_that_ends_meanwhile_leaves_its_journal_to_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut former = driver(dir.path());
    take(&mut former, (1..3000).map(refused).collect());
    let head = former.journal.head();
    former.begin_compaction().unwrap();
    let Some(CompactError::Export(stopped)) = former.compaction.end() else {
        panic!("it was not stopped");
    };
    assert!(
        stopped.to_string().contains("go on compacting"),
        "{stopped}"
    );
    former.journal.close();
    let next = driver(dir.path());
    assert_eq!(next.journal.head().number, head.number + 1, "its term");
    assert_eq!(next.journal.base().number, 0);
}
