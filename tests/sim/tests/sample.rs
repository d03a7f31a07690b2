//! A sample of the simulation; `make sim` runs thousands of seeds, and plants every fault.

use lockstep_sim::{EFFECTIVE, Options, Outcome, run};
use lockstep_tests::planted::Fault;

fn seed(seed: u64) -> Outcome {
    run(&Options {
        seed,
        ..Options::default()
    })
}

#[test]
fn promises_hold_under_faults() {
    for number in 0..24 {
        let outcome = seed(number);
        assert!(
            outcome.violations.is_empty(),
            "{:#?}; to walk through it: make sim-replay SEED={number}",
            outcome.violations
        );
        assert!(outcome.faults >= EFFECTIVE, "{} faults", outcome.faults);
    }
}

#[test]
fn the_same_seed_gives_the_same_events() {
    for number in [3, 11] {
        assert_eq!(seed(number).log, seed(number).log);
    }
}

/// The quick ones: the others are planted by `make sim`.
#[test]
fn planted_faults_are_found() {
    for fault in [
        Fault::ReuseStepKey,
        Fault::OpenPhaseEarly,
        Fault::DropLastReport,
        Fault::AgentSkipsSync,
    ] {
        let planted = |seed| Options {
            seed,
            planted: Some(fault),
            ..Options::default()
        };
        let found = (0..40).any(|seed| fault.shown(&run(&planted(seed)).violations).is_some());
        assert!(found, "{} is not found", fault.name());
    }
}
