//! The agent and its step process, killed at a sample of their writes; and faults that this finds.

use lockstep_faults::chaos::agent::{AgentFigures, Options, run};
use lockstep_tests::planted::Fault;

fn options() -> Options {
    Options::sample(env!("CARGO_BIN_EXE_faulty-lockstep-agent").into())
}

#[test]
fn whatever_is_killed_an_effect_is_made_once_and_no_result_is_lost() {
    let figures = run(&options()).unwrap();
    assert!(figures.violations.is_empty(), "{:#?}", figures.violations);
    assert_eq!(figures.agent_ok, figures.agent_points);
    assert!(figures.agent_points > 60, "{figures:?}");
    // Nothing can prove what a blind action did, nor what a server created without an answer.
    let unknown: Vec<_> = figures.unknown.keys().map(String::as_str).collect();
    assert!(
        unknown
            .iter()
            .all(|kind| ["exec.run", "check.http"].contains(kind)),
        "{unknown:?}"
    );
}

/// The cases of a kind at these points.
fn cases(kind: &str, point: &str) -> Options {
    Options {
        kinds: vec![kind.to_owned()],
        point: Some(point.to_owned()),
        workers: 1,
        ..options()
    }
}

/// The same, with a fault planted.
fn planted(fault: Fault, kind: &str, point: &str) -> AgentFigures {
    let options = Options {
        planted: Some(fault.name()),
        ..cases(kind, point)
    };
    run(&options).unwrap()
}

/// Whether a violation says this.
fn is_found(figures: &AgentFigures, words: &str) {
    let mut found = figures.violations.iter();
    assert!(found.any(|line| line.contains(words)), "{figures:#?}");
}

#[test]
fn a_claimed_attempt_that_is_executed_is_found() {
    let figures = planted(Fault::ExecuteClaimed, "exec.run", "race");
    assert_eq!(figures.double_effects, 1, "{figures:?}");
}

#[test]
fn a_forgotten_outcome_is_found() {
    let point = "agent:step process: started";
    let figures = planted(Fault::ForgetOutcome, "release.activate", point);
    is_found(&figures, "the step process ended without an outcome");
}

#[test]
fn an_attempt_that_is_settled_without_asking_the_host_is_found() {
    let figures = planted(Fault::SettleWithoutProbe, "env.render", "do:file: renamed");
    is_found(&figures, "it says changed: false, and that is wrong");
}

#[test]
fn an_intent_that_comes_after_the_start_is_found() {
    let point = "agent:journal: to be written";
    let figures = planted(Fault::IntentAfterStart, "env.render", point);
    is_found(&figures, "should be 644");
}

#[test]
fn an_attempt_that_is_settled_while_its_programs_run_is_found() {
    let (kind, point) = ("exec.run:slow", "do:program: started");
    let figures = run(&cases(kind, point)).unwrap();
    assert_eq!(figures.violations, Vec::<String>::new());
    assert_eq!(figures.agent_points, 1, "{figures:#?}");
    let figures = planted(Fault::SettleTooEarly, kind, point);
    is_found(&figures, "left over: /usr/bin/python3");
}
