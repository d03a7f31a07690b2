//! The agent and its step process, killed at a sample of their writes; and faults that this finds.

use lockstep_faults::chaos::agent::{AgentFigures, Options, run};

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

/// The cases of a kind at these points, with a fault planted.
fn planted(fault: &str, kind: &str, point: &str) -> AgentFigures {
    let options = Options {
        kinds: vec![kind.to_owned()],
        point: Some(point.to_owned()),
        planted: Some(fault.to_owned()),
        workers: 1,
        ..options()
    };
    run(&options).unwrap()
}

#[test]
fn a_claimed_attempt_that_is_executed_is_found() {
    let figures = planted("ExecuteClaimed", "exec.run", "race");
    assert_eq!(figures.double_effects, 1, "{figures:?}");
}

#[test]
fn a_forgotten_outcome_is_found() {
    let figures = planted(
        "ForgetOutcome",
        "release.activate",
        "agent:step process: started",
    );
    assert!(figures.agent_ok < figures.agent_points, "{figures:?}");
}

#[test]
fn an_attempt_that_is_settled_without_asking_the_host_is_found() {
    let figures = planted("SettleWithoutProbe", "env.render", "do:file: renamed");
    assert!(figures.agent_ok < figures.agent_points, "{figures:?}");
}

#[test]
fn an_intent_that_comes_after_the_start_is_found() {
    let figures = planted(
        "IntentAfterStart",
        "env.render",
        "agent:journal: to be written",
    );
    assert!(figures.agent_ok < figures.agent_points, "{figures:?}");
}
