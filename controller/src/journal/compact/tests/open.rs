//! A journal is compacted while a controller has it open.

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::*;
use crate::journal::Compactable;

impl Life<'_> {
    /// Compacts the journal while it is open; all but the newest rollout go out.
    fn compact(&mut self) -> PathBuf {
        let prepared = self.prepare();
        prepared.check(&self.core, HostInfo::as_recorded).unwrap();
        let archive = prepared.publish().unwrap();
        Compactable::exchange(&mut self.journal).unwrap();
        assert_eq!(self.journal.base(), prepared.archived);
        self.core.archive(prepared.into_archived());
        archive
    }

    fn prepare(&mut self) -> Prepared {
        let source = self.journal.source().unwrap();
        let rollouts = self.core.outgrown(Timestamp(self.now), 0);
        let outgoing = Outgoing::new(&self.core, &source, &rollouts);
        let layout = source.layout;
        let plans = self.core.plans();
        let plan = |digest| plans.get(&digest).cloned();
        prepare(source, outgoing, layout, &plan, usize::MAX).unwrap()
    }

    /// Whether the next controller would know what this one does.
    fn is_what_its_journal_says(&self) {
        let entries =
            read_entries(&payloads_of(&self.journal), self.journal.base().number).unwrap();
        let plan = |plan| self.blobs.plan(plan).unwrap();
        let folded = fold(entries.into_iter().map(Ok), &plan).unwrap();
        let known = |core: &Coordinator| {
            let rollouts: Vec<_> = core.rollouts().map(|id| core.document(id)).collect();
            let hosts = core.all_hosts();
            let hosts: Vec<_> = hosts.map(|(id, info)| (id, info.as_recorded())).collect();
            let archived = [1, 2, 3, 40].map(|serial| core.archived(&rollout(serial)));
            format!("{rollouts:?} {hosts:?} {archived:?} {:?}", core.serials())
        };
        assert_eq!(known(&self.core), known(&folded));
        assert_eq!(self.core.last_at(), folded.last_at());
    }
}

#[test]
fn an_open_journal_is_compacted_and_goes_on() {
    let dir = filled(6);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    let all = payloads_of(&life.journal);
    let archive = life.compact();
    let archived = fs::read_to_string(archive).unwrap();
    assert_eq!(archived.lines().count(), 1 + all.len());
    assert!(payloads_of(&life.journal).len() * 2 < all.len());
    life.is_what_its_journal_says();
    assert!(
        life.core.document(&rollout(7)).is_some(),
        "the newest one stays"
    );
    let used = Refused::SerialUsed(3, rollout(3));
    assert_eq!(life.submit(3), Some(used), "a serial stays used up");
    for serial in 40..44 {
        assert_eq!(life.submit(serial), None);
        assert!(life.core.summary(&rollout(serial)).unwrap().ended);
    }
    life.is_what_its_journal_says();
    life.compact();
    life.is_what_its_journal_says();
    assert_eq!(life.submit(50), None);
    drop(life);
    let found = inspect(state).unwrap();
    assert_eq!(found.broken, None);
    let states: Vec<_> = found.archives.iter().map(|found| &found.state).collect();
    assert_eq!(states, [&ArchiveState::Whole; 2]);
    let mut life = Life::begin(state, 3);
    assert!(life.core.summary(&rollout(50)).unwrap().ended);
    let used = Refused::SerialUsed(42, rollout(42));
    assert_eq!(life.submit(42), Some(used));
}

/// The power goes while a controller compacts its journal, and while it goes on: every record that
/// was acknowledged is in the journal, or in the archive that it goes on from.
#[test]
fn a_controller_that_is_cut_off_as_it_compacts_loses_nothing() {
    let dir = filled(4);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    let mut watch = Watch::begin(state).trusting("snap.");
    let heads = |life: &Life<'_>| life.journal.head();
    let mut acknowledged = vec![heads(&life)];
    life.compact();
    for serial in 40..43 {
        assert_eq!(life.submit(serial), None);
        acknowledged.push(heads(&life));
        watch.acknowledge(acknowledged.len() - 1);
    }
    let moments = watch.end();
    drop(life);
    let whole = Chain::read(state).unwrap();
    let mut random = StdRng::seed_from_u64(5);
    let mut compacted = 0;
    for (turn, moment) in moments.iter().enumerate().step_by(3) {
        let cut = tempfile::tempdir().unwrap();
        moment.cut(&mut random, cut.path());
        drop(SledJournal::open(cut.path()).unwrap());
        let found = Chain::read(cut.path()).unwrap();
        let least = acknowledged[moment.acknowledged];
        let least = whole.records.iter().position(|(head, _)| *head == least);
        assert!(found.records.len() > least.unwrap(), "turn {turn}");
        assert_eq!(found.records[..], whole.records[..found.records.len()]);
        compacted += usize::from(inspect(cut.path()).unwrap().begins_after.is_some());
    }
    assert!(0 < compacted && compacted < moments.len(), "{compacted}");
}

/// Killed just after the two journals have changed places: the next controller acknowledges nothing
/// before that is on the disk.
#[test]
fn a_name_that_may_be_lost_is_made_durable_before_anything_is_acknowledged() {
    let dir = filled(4);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    let prepared = life.prepare();
    prepared.publish().unwrap();
    drop((life, prepared));
    let mut watch = Watch::begin(state).trusting("snap.");
    let (old, new) = (state.join("journal"), state.join("journal.new"));
    renameat_with(CWD, &new, CWD, &old, RenameFlags::EXCHANGE).unwrap();
    let mut journal = SledJournal::open(state).unwrap();
    let said = journal.payloads().next().unwrap().unwrap();
    journal.append(&[said]).unwrap();
    let head = journal.head();
    watch.acknowledge(1);
    drop(journal);
    let mut random = StdRng::seed_from_u64(9);
    for moment in watch.end().iter().filter(|it| it.acknowledged == 1) {
        for _ in 0..8 {
            let cut = tempfile::tempdir().unwrap();
            moment.cut(&mut random, cut.path());
            assert_eq!(SledJournal::open(cut.path()).unwrap().head(), head);
        }
    }
}
