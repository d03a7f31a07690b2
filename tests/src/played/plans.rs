//! Plans for played controllers.

use lockstep_proto::action::{Action, Site};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::Value;

/// A plan named `test` with these actions, for hosts with the label `role=app`. Each action that runs
/// on the controller is a phase of its own, as is what lies between two of them.
pub fn compiled(actions: &[(&str, Value)]) -> CompiledPlan {
    let mut phases: Vec<Phase> = vec![];
    for ((name, args), line) in actions.iter().zip(1..) {
        let action = Action::deserialize_args(name, args.clone());
        let action = action
            .unwrap_or_else(|| panic!("there is no action {name}"))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let target = match action.info().site {
            Site::Host => Target::Groups(vec!["app".into()]),
            Site::Controller => Target::Controller,
        };
        let step = Step {
            name: None,
            action,
            timeout: Period::seconds(30),
            undo: Undo::Auto,
            line,
        };
        match phases.last_mut().map(|phase| &mut phase.stages[0]) {
            Some(stage) if stage.target == target => stage.steps.push(step),
            _ => phases.push(Phase {
                name: format!("phase-{}", phases.len()),
                stages: vec![Stage {
                    target,
                    strategy: Strategy::All,
                    steps: vec![step],
                }],
                deadline: None,
                planned: None,
            }),
        }
    }
    let labels = [("role".to_owned(), "app".to_owned())].into();
    CompiledPlan {
        format: FORMAT,
        plan: "test".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::from(u32::MAX) * 1000),
        deadline: Period::seconds(600),
        inputs: [].into(),
        fleet: [("app".to_owned(), Selector { labels })].into(),
        phases,
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    }
}
