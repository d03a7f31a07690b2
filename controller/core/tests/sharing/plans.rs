//! Plans that look, ask and change something, by the dice.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::plan::{
    CompiledPlan, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

/// Draws of one seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }
}

fn step(name: &str, args: serde_json::Value) -> Step {
    Step {
        name: None,
        action: Action::deserialize_args(name, args).unwrap().unwrap(),
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line: 1,
    }
}

/// Waits for people or for time; often it frees the hosts meanwhile.
fn gate(dice: &mut Dice) -> (Target, Vec<Step>) {
    let lock = if dice.percent(80) { "release" } else { "hold" };
    let gate = if dice.percent(70) {
        let from = json!({"dba": 1 + dice.roll(2)});
        let args = json!({"from": from, "timeout": "10m", "lock": lock});
        step("gate.approval", args)
    } else {
        step("gate.wait", json!({"for": "2m", "lock": lock}))
    };
    (Target::Controller, vec![gate])
}

/// Perhaps looks, asks, looks and asks again, changes something; some rollouts do not ask.
pub(crate) fn plan(dice: &mut Dice, serial: u64) -> CompiledPlan {
    let group = ["one", "two", "all"][usize::try_from(dice.roll(3)).unwrap()];
    let on = |steps| (Target::Groups(vec![group.into()]), steps);
    let mut stages = vec![];
    let look = || step("check.disk", json!({"path": "/", "free": "1B"}));
    if dice.percent(60) {
        stages.push(on(vec![look()]));
    }
    if dice.percent(70) {
        stages.push(gate(dice));
        if dice.percent(40) {
            if dice.percent(60) {
                stages.push(on(vec![look()]));
            }
            stages.push(gate(dice));
        }
    }
    stages.push(on(vec![step("service.stop", json!({"service": "web"}))]));
    let phases = stages.into_iter().enumerate();
    let phases = phases.map(|(index, (target, steps))| Phase {
        name: format!("p{index}"),
        stages: vec![Stage {
            target,
            strategy: Strategy::All,
            steps,
        }],
        deadline: None,
        planned: None,
    });
    let selector = |label: &str| Selector {
        labels: BTreeMap::from([(label.to_owned(), "yes".to_owned())]),
    };
    CompiledPlan {
        format: 1,
        plan: "shared".into(),
        serial,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX),
        deadline: Period::seconds(3600),
        inputs: BTreeMap::new(),
        fleet: ["one", "two", "all"]
            .map(|name| (name.to_owned(), selector(name)))
            .into(),
        phases: phases.collect(),
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    }
}
