//! A sample of the controller's half of `make chaos`, and proof that it finds what it looks for.

use lockstep_faults::chaos::controller::{Options, Outcome, run, say};
use lockstep_faults::chaos::scenarios::Scenario;
use lockstep_faults::chaos::script::Variant;
use lockstep_tests::planted::{Fault, plant};

/// Neither variants nor scenarios.
fn nothing() -> Options {
    Options {
        variants: vec![],
        scenarios: vec![],
        parallel: 3,
        planted: None,
        ..Options::default()
    }
}

fn play(options: &Options) -> Outcome {
    run(options, &say).expect("chaos can be made")
}

fn must_hold(options: &Options) {
    let outcome = play(options);
    assert!(
        outcome.failures.is_empty(),
        "{}",
        outcome.failures.join("\n")
    );
    assert_eq!(outcome.half.points, outcome.half.resumed);
}

#[test]
fn a_rollout_goes_on_from_wherever_its_controller_is_killed() {
    must_hold(&Options {
        variants: vec![Variant::Forward],
        nth: 23,
        ..nothing()
    });
}

#[test]
fn a_rollback_goes_on_from_wherever_its_controller_is_killed() {
    must_hold(&Options {
        variants: vec![Variant::Rollback],
        nth: 29,
        ..nothing()
    });
}

#[test]
fn of_two_controllers_of_a_rollout_the_older_one_ends() {
    must_hold(&Options {
        scenarios: vec![Scenario::Woken, Scenario::Twins],
        ..nothing()
    });
}

#[test]
fn messages_may_come_again_and_out_of_order() {
    must_hold(&Options {
        scenarios: vec![Scenario::Disorder],
        ..nothing()
    });
}

#[test]
fn what_is_sent_before_it_is_durable_is_found() {
    let outcome = play(&Options {
        variants: vec![Variant::Forward],
        nth: 11,
        planted: Some(Fault::SendBeforePersist.name()),
        keep: false,
        ..nothing()
    });
    let told = outcome
        .failures
        .iter()
        .any(|failure| failure.contains("are durable, and this journal has"));
    assert!(told, "INV-2 was broken, and nobody saw it");
}

#[test]
fn agents_that_obey_an_ended_term_are_found() {
    plant(Some(Fault::AgentIgnoresEpoch));
    let outcome = play(&Options {
        scenarios: vec![Scenario::Woken],
        keep: false,
        ..nothing()
    });
    plant(None);
    let fenced = outcome
        .failures
        .iter()
        .any(|failure| failure.contains("Fenced"));
    assert!(fenced, "INV-4 was broken, and nobody saw it");
}
