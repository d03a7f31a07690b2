//! Rollouts that go out of the journal, and hosts that come back to them.

use super::cancel::{back, cancel};
use super::levers::run;
use super::*;

/// A plan that nobody signs off.
fn unsigned(serial: u64, steps: Vec<Step>) -> CompiledPlan {
    CompiledPlan {
        signoff: vec![],
        ..plan(serial, vec![on("app", steps)])
    }
}

/// A fleet of one host on which this many rollouts have succeeded, a minute each.
fn after(rollouts: u8) -> Fleet {
    let mut fleet = Fleet::new(&["a"]);
    for number in 1..=rollouts {
        let plan = unsigned(u64::from(number), vec![stop()]);
        fleet.submit(number, plan).unwrap();
        fleet.consent(number, "a", vec![]);
        fleet.finish("a", ok(), vec![]);
        assert_eq!(fleet.state(number), "succeeded");
        fleet.now += 60_000;
    }
    fleet
}

fn outgrown(fleet: &Fleet, records: u64) -> Vec<RolloutId> {
    fleet.coordinator.outgrown(Timestamp(fleet.now), records)
}

fn archive(fleet: &mut Fleet, rollouts: &[RolloutId]) {
    let archived = rollouts.iter();
    let archived = archived.filter_map(|id| fleet.coordinator.as_archived(id, "archive.jsonl"));
    fleet.coordinator.archive(archived.collect());
}

#[test]
fn the_oldest_go_out_and_the_newest_one_stays() {
    let mut fleet = after(4);
    let of_one = fleet.coordinator.records_but_of(&[2, 3, 4].map(rollout));
    assert!(of_one > 4, "{of_one}");
    assert_eq!(outgrown(&fleet, 0), [1, 2, 3].map(rollout));
    assert_eq!(outgrown(&fleet, of_one), [1, 2, 3].map(rollout));
    assert_eq!(outgrown(&fleet, 2 * of_one), [1, 2].map(rollout));
    assert_eq!(outgrown(&fleet, 4 * of_one), []);

    // One that goes on stays, whatever its size.
    fleet.submit(5, unsigned(5, vec![stop()])).unwrap();
    assert_eq!(outgrown(&fleet, 0), [1, 2, 3].map(rollout));
    let due = fleet.coordinator.next_deadline();
    assert!(due.is_some(), "it waits for the host's consent");
    archive(&mut fleet, &[1, 2, 3].map(rollout));
    assert_eq!(fleet.coordinator.next_deadline(), due);
    let known: Vec<_> = fleet.coordinator.rollouts().cloned().collect();
    assert_eq!(known, [4, 5].map(rollout));
    fleet.consent(5, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(5), "succeeded", "it has gone on");
    assert!(matches!(
        fleet.call(
            "olga",
            &[],
            Call::Pause {
                rollout: rollout(2)
            }
        ),
        Err(Refused::Archived(_))
    ));
}

#[test]
fn one_that_waits_for_a_person_never_goes_out() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.finish("a", failed(), vec![]);
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(60 * 60);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    assert_eq!(fleet.coordinator.over(), []);
}

#[test]
fn one_of_which_a_host_may_still_speak_stays_for_a_day() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.submit(1, unsigned(1, vec![run()])).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.consent(1, "b", vec![]);
    fleet.event(Event::HostDown { host: host("a") });
    cancel(&mut fleet);
    fleet.consent(9, "b", vec![]);
    let close = |number, reason: &str| Call::Cancel {
        rollout: rollout(number),
        reason: reason.into(),
    };
    fleet.call("olga", &[], close(9, "nor that")).unwrap();
    assert_eq!(outgrown(&fleet, 0), []);
    fleet.now += 24 * 60 * 60 * 1000;
    assert_eq!(outgrown(&fleet, 0), [rollout(1)]);
}

#[test]
fn one_that_is_not_signed_off_stays_and_what_counts_of_a_halted_one_is_when_it_was_closed() {
    let mut fleet = after(1);
    let mut signed = unsigned(2, vec![stop()]);
    signed.signoff = vec!["dba".into()];
    fleet.submit(2, signed).unwrap();
    fleet.consent(2, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.submit(3, unsigned(3, vec![stop()])).unwrap();
    fleet.consent(3, "a", vec![]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(outgrown(&fleet, 0), [rollout(1)]);
    fleet.now += 30 * 24 * 60 * 60 * 1000;
    assert_eq!(outgrown(&fleet, 0), [1, 2].map(rollout));

    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.event(Event::HostDown { host: host("a") });
    fleet.later(60 * 60);
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    let close = Call::Close {
        rollout: rollout(1),
        reason: "by hand".into(),
    };
    fleet.call("olga", &[], close).unwrap();
    let over = fleet.coordinator.over();
    assert_eq!(over, [(Timestamp(fleet.now), &rollout(1))]);
}

#[test]
fn a_host_that_holds_for_one_that_went_out_lets_go_and_only_a_cancelled_one_is_stopped() {
    let mut fleet = after(2);
    assert_eq!(back(&mut fleet, "a", Some(rollout(1))), ["release"]);
    archive(&mut fleet, &[rollout(1)]);
    assert_eq!(back(&mut fleet, "a", Some(rollout(1))), ["release"]);

    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![run()])]);
    fleet.event(Event::HostDown { host: host("a") });
    cancel(&mut fleet);
    archive(&mut fleet, &[rollout(1)]);
    let sent = back(&mut fleet, "a", Some(rollout(1)));
    assert_eq!(sent, ["cancel", "release"]);
}
