use std::fs;
use std::path::Path;

use lockstep_core::refusal::{Caller, CallsRefused, Why};
use lockstep_core::trust::{Serial, Subject, Wanted};
use lockstep_core::{Answer, Refused};
use lockstep_proto::ids::{Digest, HostId};

use super::super::handle::Input;
use super::super::tests::{candidate, hello, parts};
use super::super::{Parts, mpsc, oneshot};
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
    Input::Event(Event::CallsRefused(CallsRefused {
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

/// A host asks for its next certificate, with one that lives for so long yet.
fn renew(
    driver: &Driver,
    number: u8,
    left: Period,
) -> (Input, oneshot::Receiver<Result<Answer, Refused>>) {
    let host: HostId = format!("app-{number}").parse().unwrap();
    let (answer, answered) = oneshot::channel();
    let event = Event::Renew {
        host: host.clone(),
        parent: Serial::from_bytes(&[1, number]),
        parent_ends: driver.clock.now().plus(left),
        wanted: Box::new(Wanted {
            host,
            key: Digest::of(&[number]),
            serial: Serial::from_bytes(&[2, number]),
            life: Period::seconds(3600),
        }),
    };
    (Input::Ask { event, answer }, answered)
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
async fn certificates_are_renewed_once_the_journal_is_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    let half_an_hour = Period::seconds(1800);
    let (before, answered) = renew(&driver, 1, half_an_hour);
    take(&mut driver, vec![before]);
    assert!(answered.await.unwrap().is_ok(), "nothing is compacted");

    driver.begin_compaction().unwrap();
    let (waits, mut answered) = renew(&driver, 2, half_an_hour);
    let (gone, _) = renew(&driver, 3, half_an_hour);
    take(&mut driver, vec![waits, gone]);
    assert!(answered.try_recv().is_err(), "it is compacted");
    let prepared = driver.compaction.prepared().await;
    let head = driver.journal.head();
    driver.end_compaction(prepared).unwrap();
    assert_eq!(driver.journal.base(), head);
    let waited: Vec<Input> = driver.compaction.answered_now().collect();
    assert_eq!(waited.len(), 1, "whoever is gone will ask again");
    take(&mut driver, waited);
    assert!(answered.await.unwrap().is_ok());

    take(&mut driver, (1..30).map(refused).collect());
    driver.begin_compaction().unwrap();
    let (urgent, answered) = renew(&driver, 4, Period::seconds(60));
    take(&mut driver, vec![urgent]);
    assert!(answered.await.unwrap().is_ok(), "its certificate ends");
    let (late, answered) = renew(&driver, 5, half_an_hour);
    take(&mut driver, vec![late]);
    assert!(answered.await.unwrap().is_ok(), "it is in vain already");
    driver.compaction.end();
}

#[tokio::test]
async fn a_driver_answers_what_has_waited_for_its_compaction() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    driver.look_at_length();
    driver.compaction.since = Instant::now().checked_sub(CALM).unwrap();
    let (waits, answered) = renew(&driver, 1, Period::seconds(1800));
    let (inputs, receiver) = mpsc::channel(1);
    let asks = async {
        // After the round of this one it is compacted.
        let (read, was_read) = oneshot::channel();
        let read = Input::Read(Box::new(|_| read.send(()).unwrap()));
        inputs.send(read).await.ok().unwrap();
        was_read.await.unwrap();
        inputs.send(waits).await.ok().unwrap();
        assert!(answered.await.unwrap().is_ok());
        drop(inputs);
    };
    let (ended, ()) = tokio::join!(driver.run(receiver), asks);
    ended.unwrap();
    let journal = SledJournal::open(dir.path()).unwrap();
    assert!(journal.base().number > 0, "it was compacted");
}

#[tokio::test]
async fn a_controller_that_drains_compacts_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    take(&mut driver, (1..30).map(refused).collect());
    driver.begin_compaction().unwrap();
    let (waits, answered) = renew(&driver, 1, Period::seconds(1800));
    take(&mut driver, vec![waits, Input::Drain]);
    assert!(answered.await.unwrap().is_ok(), "connections end with it");
    let prepared = driver.compaction.prepared().await;
    driver.end_compaction(prepared).unwrap();
    is_as_it_was(dir.path());
    driver.compaction.since = Instant::now().checked_sub(CALM).unwrap();
    driver.look_at_length();
    assert!(driver.compaction.running.is_none());
}

#[tokio::test]
async fn a_fleet_that_renews_its_certificates_is_calm() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = driver(dir.path());
    driver.look_at_length();
    let calm_since = driver.compaction.since;
    let count = u8::try_from(HARDLY_ANY).unwrap() + 1;
    let renewals = (0..count).map(|number| renew(&driver, number, Period::seconds(60)).0);
    let renewals: Vec<Input> = renewals.collect();
    take(&mut driver, renewals);
    driver.look_at_length();
    assert_eq!(driver.compaction.since, calm_since);
    take(&mut driver, (0..=HARDLY_ANY).map(refused).collect());
    driver.look_at_length();
    assert!(driver.compaction.since > calm_since);
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
