use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_core::trust::{Serial, TrustRecord, Wanted};
use lockstep_core::{Call, Event, Message, Refused, TrustCall};
use lockstep_proto::action::Action;
use lockstep_proto::action::check::{Port, PortState};
use lockstep_proto::ids::{Digest, InstanceId};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_tests::power::Watch;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

use super::super::contract::copy;
use super::super::offline::{self, inspect, read_entries};
use super::*;
use crate::journal::archive::ArchiveState;
use crate::journal::audit::Chain;

mod open;

const HOSTS: [&str; 3] = ["app-1", "app-2", "db-1"];

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn plan(serial: u64) -> Arc<SealedPlan> {
    let step = |line| Step {
        name: None,
        action: Action::CheckPort(Port {
            port: 8000,
            expect: PortState::default(),
        }),
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line,
    };
    let labels = BTreeMap::new();
    let all = Selector { labels };
    let compiled = CompiledPlan {
        format: FORMAT,
        plan: "ports".into(),
        serial,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX / 2),
        deadline: Period::seconds(600),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([("all".to_owned(), all)]),
        phases: vec![Phase {
            name: "look".into(),
            stages: vec![Stage {
                target: Target::Groups(vec!["all".into()]),
                strategy: Strategy::All,
                steps: (1..5).map(step).collect(),
            }],
            deadline: None,
            planned: None,
        }],
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    };
    Arc::new(seal::seal(compiled).unwrap())
}

/// A controller's life without its shell: every entry goes into a journal.
struct Life<'a> {
    state: &'a Path,
    journal: SledJournal,
    blobs: Blobs,
    core: Coordinator,
    now: u64,
    reports: BTreeMap<HostId, u64>,
}

impl<'a> Life<'a> {
    fn begin(state: &'a Path, term: u64) -> Self {
        let journal = SledJournal::open(state).unwrap();
        let blobs = Blobs::open(state.join("blobs")).unwrap();
        let payloads: Vec<Vec<u8>> = journal.payloads().map(Result::unwrap).collect();
        let entries = read_entries(&payloads, 0).unwrap();
        let now = entries.last().map_or(1_000, |entry| entry.at.0);
        let epoch = Epoch {
            counter: term,
            id: 7,
        };
        let core = Coordinator::recover(
            Config {
                epoch,
                break_glass: None,
            },
            entries,
            |plan| blobs.plan(plan).unwrap(),
        );
        let mut life = Self {
            state,
            journal,
            blobs,
            core: core.unwrap(),
            now,
            reports: BTreeMap::new(),
        };
        let effects = life.core.resume(Timestamp(now));
        life.take(effects);
        for name in HOSTS {
            let instance = InstanceId::from_random([1; 8]);
            let known = life.core.acknowledged(&host(name), &instance);
            life.reports.insert(host(name), known);
            life.event(Event::HostUp {
                host: host(name),
                instance,
                labels: BTreeMap::new(),
                agent_version: "0.1.0".into(),
                held: None,
            });
        }
        life
    }

    fn event(&mut self, event: Event) -> Option<Refused> {
        self.now += 10;
        let effects = self.core.handle(Timestamp(self.now), event);
        self.take(effects)
    }

    /// Persists, and answers every message as an agent on which all goes well.
    fn take(&mut self, effects: lockstep_core::Effects) -> Option<Refused> {
        let entries = effects.persist.iter();
        let payloads: Vec<Vec<u8>> = entries
            .map(|entry| serde_json::to_vec(entry).unwrap())
            .collect();
        self.journal.append(&payloads).unwrap();
        for (host, message) in effects.send {
            match message {
                Message::Offer { rollout, plan, .. } => {
                    let state = vec![];
                    self.report(
                        &host,
                        ReportBody::Consented {
                            rollout,
                            plan,
                            state,
                            round: 0,
                        },
                    );
                }
                Message::Order(order) => {
                    let key = order.key.clone();
                    self.report(&host, ReportBody::Started { key: key.clone() });
                    let outcome = StepOutcome::Ok {
                        changed: false,
                        summary: "the port listens".repeat(20),
                    };
                    self.report(
                        &host,
                        ReportBody::Finished {
                            key,
                            outcome,
                            facts: vec![],
                            signatures: vec![],
                            took: Period(5),
                        },
                    );
                }
                _ => {}
            }
        }
        effects.answer.and_then(Result::err)
    }

    fn report(&mut self, host: &HostId, body: ReportBody) {
        let number = self.reports[host] + 1;
        self.reports.insert(host.clone(), number);
        let head = None;
        let report = Report { number, body, head };
        self.event(Event::Report {
            host: host.clone(),
            report,
        });
    }

    fn submit(&mut self, serial: u8) -> Option<Refused> {
        let plan = plan(u64::from(serial));
        self.blobs.store_plan(&plan, "").unwrap();
        self.event(Event::Operator {
            operator: "olga".into(),
            groups: vec![],
            call: Call::Submit {
                rollout: rollout(serial),
                plan,
                dry_run: false,
                signatures: vec![],
            },
        })
    }
}

fn rollout(serial: u8) -> RolloutId {
    RolloutId::from_random([serial; 6])
}

/// A journal with so many rollouts that have ended, and one that is paused.
fn filled(ended: u8) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    live(dir.path(), 1..=ended, 1);
    dir
}

/// A term with these rollouts; the last one's successor waits for a person.
fn live(state: &Path, serials: std::ops::RangeInclusive<u8>, term: u64) {
    let waiting = serials.end() + 1;
    let mut life = Life::begin(state, term);
    for serial in serials {
        assert_eq!(life.submit(serial), None);
        let summary = life.core.summary(&rollout(serial)).unwrap();
        assert!(summary.ended && !summary.open, "{summary:?}");
    }
    // Nobody answers for this one any more.
    let plan = plan(u64::from(waiting));
    life.blobs.store_plan(&plan, "").unwrap();
    let call = Call::Submit {
        rollout: rollout(waiting),
        plan,
        dry_run: true,
        signatures: vec![],
    };
    let effects = life.core.handle(
        Timestamp(life.now),
        Event::Operator {
            operator: "olga".into(),
            groups: vec![],
            call,
        },
    );
    let quiet = lockstep_core::Effects {
        send: vec![],
        ..effects
    };
    life.take(quiet);
    assert!(life.state.join("journal").exists());
}

fn keep_newest(keep: usize) -> Which {
    Which {
        older_than: None,
        keep: Some(keep),
    }
}

fn payloads(state: &Path) -> Vec<Vec<u8>> {
    payloads_of(&SledJournal::open(state).unwrap())
}

fn payloads_of(journal: &SledJournal) -> Vec<Vec<u8>> {
    journal.payloads().map(Result::unwrap).collect()
}

#[test]
fn a_compacted_journal_says_the_same_and_the_archive_has_the_rest() {
    let dir = filled(12);
    let state = dir.path();
    let before = inspect(state).unwrap();
    let all = payloads(state);
    let audited = Chain::read(state).unwrap();
    let done = compact(state, keep_newest(2)).unwrap();
    assert_eq!(done.rollouts.len(), 10);
    let with_archive = Chain::read(state).unwrap();
    assert_eq!(with_archive.id, audited.id);
    let (same, new) = with_archive.records.split_at(audited.records.len());
    assert_eq!(same, audited.records);
    assert_eq!(new.len(), payloads(state).len());
    assert_eq!(Some(done.archived), before.last);

    let after = inspect(state).unwrap();
    assert_eq!(after.broken, None);
    assert_eq!((after.id, after.begins_after), (before.id, before.last));
    let [archive] = &after.archives[..] else {
        panic!("{after:?}");
    };
    assert_eq!(archive.state, ArchiveState::Whole);
    let text = fs::read_to_string(done.archive.unwrap()).unwrap();
    assert_eq!(text.lines().count(), all.len() + 1);
    let kept = payloads(state);
    assert!(
        kept.len() * 3 < all.len(),
        "{} of {}",
        kept.len(),
        all.len()
    );
    // But for what stands for those that went out, every record is one of before.
    let new = kept.iter().filter(|payload| !all.contains(payload)).count();
    assert_eq!(new, 1 + 10, "newer reports count for the hosts");

    // The next controller refuses what was done, and goes on with what waits.
    let mut life = Life::begin(state, 2);
    assert_eq!(
        life.submit(1),
        Some(Refused::SerialUsed(1, rollout(1))),
        "one serial licenses one rollout for ever"
    );
    let asked = Event::Operator {
        operator: "olga".into(),
        groups: vec![],
        call: Call::Pause {
            rollout: rollout(1),
        },
    };
    let said = life.event(asked).unwrap().to_string();
    assert!(said.contains(&archive.name), "{said}");
    assert!(life.core.document(&rollout(11)).is_some());
    let waited = life.core.summary(&rollout(13)).unwrap();
    assert_eq!(waited.state, "succeeded", "it has gone on");
    assert_eq!(life.submit(40), None);
    assert!(life.core.summary(&rollout(40)).unwrap().ended);
    drop(life);

    // The chain goes on over further ones, and through an export and an import.
    live(state, 41..=44, 3);
    compact(state, keep_newest(1)).unwrap();
    let found = inspect(state).unwrap();
    assert_eq!(found.broken, None);
    let states: Vec<_> = found.archives.iter().map(|found| &found.state).collect();
    assert_eq!(states, [&ArchiveState::Whole; 2]);
    let mut text = vec![];
    offline::export(state, &mut text).unwrap();
    let moved = tempfile::tempdir().unwrap();
    copy(&state.join("blobs"), &moved.path().join("blobs"));
    let imported = offline::import(moved.path(), &mut &text[..], 0).unwrap();
    assert!(imported.missing_plans.is_empty());
    let mut life = Life::begin(moved.path(), imported.term.counter + 1);
    for serial in [1, 10, 11, 41] {
        let used = Refused::SerialUsed(u64::from(serial), rollout(serial));
        assert_eq!(life.submit(serial), Some(used));
    }
}

#[test]
fn what_is_not_long_over_stays() {
    let dir = filled(3);
    let before = payloads(dir.path());
    let nothing = compact(dir.path(), keep_newest(3)).unwrap();
    assert_eq!((nothing.archive, nothing.rollouts.len()), (None, 0));
    let young = Which {
        older_than: Some(Period(u64::MAX)),
        keep: None,
    };
    assert!(compact(dir.path(), young).unwrap().archive.is_none());
    assert_eq!(payloads(dir.path()), before);
    assert!(!dir.path().join("archive").exists());
    let old = Which {
        older_than: Some(Period::seconds(1)),
        keep: None,
    };
    assert_eq!(compact(dir.path(), old).unwrap().rollouts.len(), 3);
}

#[test]
fn an_archive_that_was_changed_or_moved_is_said() {
    let dir = filled(5);
    let archive = compact(dir.path(), keep_newest(0))
        .unwrap()
        .archive
        .unwrap();
    let text = fs::read_to_string(&archive).unwrap();
    for (what, changed) in [
        ("a letter", text.replacen("olga", "olgb", 1)),
        (
            "a line",
            text.replacen("{\"number\":9,", "{\"number\":8,", 1),
        ),
        ("the end", text[..text.len() / 2].to_owned()),
    ] {
        assert_ne!(changed, text, "{what}");
        fs::write(&archive, changed).unwrap();
        let found = inspect(dir.path()).unwrap();
        let state = &found.archives[0].state;
        assert!(
            matches!(state, ArchiveState::Broken(_)),
            "{what}: {state:?}"
        );
        assert_eq!(found.broken, None, "{what}: the journal itself is whole");
    }
    fs::remove_file(&archive).unwrap();
    let found = inspect(dir.path()).unwrap();
    assert_eq!(found.archives[0].state, ArchiveState::Elsewhere);
}

/// A beginning that was cut off is no compaction.
#[test]
fn a_journal_without_its_beginning_is_not_taken_for_a_compacted_one() {
    let dir = filled(2);
    let id = inspect(dir.path()).unwrap().id.unwrap();
    let all = payloads(dir.path());
    let anchor = id.anchor();
    let base = all[..4]
        .iter()
        .fold(anchor, |head, payload| head.next(payload));
    let cut = tempfile::tempdir().unwrap();
    let made = SledJournal::make(cut.path(), id, Some((base, &all[4])), |journal| {
        journal
            .append(&all[5..])
            .map(|_| ())
            .map_err(CompactError::from)
    });
    assert!(
        matches!(made, Err(CompactError::Open(OpenError::Quarantined { .. }))),
        "{made:?}"
    );
}

/// The power goes at any moment: the journal is the old one or the new one, and nothing that the
/// new one lacks is missing in the archive.
#[test]
fn a_compaction_that_is_cut_off_has_happened_or_not() {
    let dir = filled(4);
    let state = dir.path();
    let before = payloads(state);
    let watch = Watch::begin(state).trusting("snap.");
    compact(state, keep_newest(1)).unwrap();
    let moments = watch.end();
    let after = payloads(state);
    let mut random = StdRng::seed_from_u64(3);
    let mut found = [0; 2];
    for turn in 0..60 {
        // Every moment once, and the last ones, at which the two change places, more often.
        let moment = match moments.get(turn) {
            Some(moment) => moment,
            None => moments[moments.len() - 4..].choose(&mut random).unwrap(),
        };
        let cut = tempfile::tempdir().unwrap();
        moment.cut(&mut random, cut.path());
        let is = payloads(cut.path());
        let new = is == after;
        assert!(new || is == before, "turn {turn}: {} records", is.len());
        found[usize::from(new)] += 1;
        if new {
            let found = inspect(cut.path()).unwrap();
            assert_eq!(found.archives[0].state, ArchiveState::Whole, "turn {turn}");
        }
        // What was left behind is in nobody's way.
        compact(cut.path(), keep_newest(1)).unwrap();
        assert_eq!(payloads(cut.path()).len(), after.len(), "turn {turn}");
    }
    assert!(
        found[0] > 0 && found[1] > 0,
        "{found:?} of {}",
        moments.len()
    );
}

#[test]
fn certificates_that_have_ended_go_out_and_who_may_be_stays() {
    const HOUR: u64 = 3_600_000;
    let dir = filled(3);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    let hash = Digest::of(b"the token");
    let call = |call| Event::Operator {
        operator: "ada".into(),
        groups: vec![],
        call: Call::Trust(call),
    };
    let create = TrustCall::CreateToken {
        host: host("web-1"),
        hash,
        life: Period(HOUR / 10),
    };
    assert_eq!(life.event(call(create)), None);
    let serial = |number: u8| Serial::from_bytes(&[0x40, number]);
    let wanted = |number: u8| Wanted {
        host: host("web-1"),
        key: Digest::of(&[number]),
        serial: serial(number),
        life: Period(HOUR),
    };
    let join = Event::Join {
        token: hash,
        wanted: Box::new(Ok(wanted(1))),
    };
    assert_eq!(life.event(join), None);
    let renew = |life: &mut Life<'_>, parent: u8, key: u8| {
        life.event(Event::Renew {
            host: host("web-1"),
            parent: serial(parent),
            parent_ends: Timestamp(life.now + HOUR / 2),
            wanted: Box::new(wanted(key)),
        })
    };
    for number in 2..30 {
        life.now += HOUR / 2;
        assert_eq!(renew(&mut life, number - 1, number), None);
    }
    let suspend = TrustCall::Suspend {
        subject: "operator:olga".parse().unwrap(),
        reason: "has left".into(),
    };
    assert_eq!(life.event(call(suspend)), None);
    let (banned, now) = (life.core.trust().banned(), Timestamp(life.now));
    let before = life.core.trust().as_of(now);
    drop(life);

    compact(state, keep_newest(1)).unwrap();
    let entries = read_entries(&payloads(state), 0).unwrap();
    let renewals = entries
        .iter()
        .filter(|entry| matches!(&entry.record, Record::Trust(TrustRecord::Renewed { .. })));
    assert!((1..4).contains(&renewals.count()));
    let mut life = Life::begin(state, 3);
    assert_eq!(life.core.trust().as_of(now), before);
    assert_eq!(life.core.trust().banned(), banned);
    assert!(life.core.trust().is_enrolled(&host("web-1")));
    // A copy of the last but one certificate is still found.
    let copy = renew(&mut life, 28, 99);
    assert!(copy.unwrap().to_string().contains("two machines"));
}

#[test]
fn a_host_of_which_nothing_is_left_is_in_nobodys_way() {
    const HOUR: u64 = 3_600_000;
    let dir = filled(3);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    // Both had their certificates by hand, and were never seen; one is gone for good.
    for (name, number) in [("web-1", 1), ("web-2", 2)] {
        let serial = |more: u8| Serial::from_bytes(&[0x40 + more, number]);
        let renew = Event::Renew {
            host: host(name),
            parent: serial(0),
            parent_ends: Timestamp(life.now + HOUR),
            wanted: Box::new(Wanted {
                host: host(name),
                key: Digest::of(&[number]),
                serial: serial(1),
                life: Period(HOUR),
            }),
        };
        assert_eq!(life.event(renew), None);
    }
    let forget = |life: &mut Life<'_>| {
        life.event(Event::Operator {
            operator: "ada".into(),
            groups: vec![],
            call: Call::Forget {
                host: host("web-2"),
            },
        })
    };
    assert_eq!(forget(&mut life), None);
    drop(life);
    let kept = |state: &Path| {
        let entries = read_entries(&payloads(state), 0).unwrap();
        let about = |record: &Record| match record {
            Record::Trust(TrustRecord::Renewed { .. }) => Some("renewed"),
            Record::HostForgotten { .. } => Some("forgotten"),
            _ => None,
        };
        let about = entries.iter().filter_map(|entry| about(&entry.record));
        about.collect::<Vec<_>>()
    };
    let whole = ["renewed", "renewed", "forgotten"];
    compact(state, keep_newest(2)).unwrap();
    assert_eq!(kept(state), whole, "the certificates have not ended");

    let mut life = Life::begin(state, 3);
    life.now += 3 * HOUR;
    assert_eq!(life.submit(20), None);
    drop(life);
    compact(state, keep_newest(1)).unwrap();
    assert_eq!(kept(state), [""; 0]);
    let mut life = Life::begin(state, 4);
    assert!(forget(&mut life).is_some(), "there is no such host");
}

#[test]
fn what_nobody_asked_for_goes_out_too() {
    let dir = filled(3);
    let state = dir.path();
    let mut life = Life::begin(state, 2);
    for _ in 0..3 {
        let (rollout, state) = (rollout(1), vec![]);
        life.report(&host(HOSTS[0]), ReportBody::Surveyed { rollout, state });
    }
    drop(life);
    compact(state, keep_newest(1)).unwrap();
    assert_eq!(inspect(state).unwrap().broken, None);
}
