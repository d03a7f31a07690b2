//! Generated plans: what a host's simulated hands can do.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::plan::{
    Batch, CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

use crate::dice::Dice;

fn action(name: &str, args: serde_json::Value) -> Action {
    let action = Action::deserialize_args(name, args).expect("a known action");
    action.expect("valid arguments")
}

/// Few names, so that steps meet on them: stop and start of one service, releases of one link.
fn step(dice: &Dice, serial: u64) -> Step {
    let service = format!("web-{}", dice.roll(2));
    let action = match dice.roll(10) {
        0 => action("check.disk", json!({"path": "/", "free": "1B"})),
        1 | 2 => action("exec.run", json!({"name": "mark", "argv": ["/bin/mark"]})),
        3 => action("service.restart", json!({"service": service})),
        4 | 5 => action("service.stop", json!({"service": service})),
        6 => action("service.start", json!({"service": service})),
        _ => {
            let release = format!("r{serial}-{}", dice.roll(3));
            action(
                "release.activate",
                json!({"app": "app", "release": release}),
            )
        }
    };
    Step {
        name: None,
        action,
        timeout: Period::seconds(dice.between(10, 30)),
        undo: Undo::Auto,
        line: 1,
    }
}

fn stage(dice: &Dice, serial: u64, waves: bool) -> Stage {
    let group = if dice.percent(75) { "app" } else { "db" };
    let target = match dice.roll(5) {
        0 => Target::OneOf(vec!["app".into()]),
        1 => Target::Groups(vec!["app".into(), "db".into()]),
        _ => Target::Groups(vec![group.into()]),
    };
    let small = |most| u32::try_from(dice.roll(most)).expect("small");
    let strategy = match dice.roll(3) {
        0 if waves => Strategy::Rolling {
            batch: Batch::Hosts(1 + small(2)),
            max_failures: small(2),
            pause: Period::seconds(dice.roll(4)),
        },
        1 if waves => Strategy::Canary {
            first: Batch::Hosts(1),
            soak: Period::seconds(dice.roll(6)),
        },
        _ => Strategy::All,
    };
    let steps = (0..=dice.roll(2)).map(|_| step(dice, serial)).collect();
    Stage {
        target,
        strategy,
        steps,
    }
}

/// The plan of a serial.
pub(crate) fn plan(dice: &Dice, serial: u64) -> CompiledPlan {
    let mut phases: Vec<Phase> = (0..dice.between(2, 4))
        .map(|index| {
            let waves = dice.percent(40);
            let count = if waves { 1 } else { 1 + dice.roll(2) };
            Phase {
                name: format!("p{index}"),
                stages: (0..count).map(|_| stage(dice, serial, waves)).collect(),
                deadline: dice
                    .percent(15)
                    .then(|| Period::seconds(dice.between(60, 400))),
                planned: None,
            }
        })
        .collect();
    // Every host has something to consent to.
    phases[0].stages[0].target = Target::Groups(vec!["app".into(), "db".into()]);
    let selector = |role: &str| Selector {
        labels: BTreeMap::from([("role".to_owned(), role.to_owned())]),
    };
    CompiledPlan {
        format: FORMAT,
        plan: "simulated".into(),
        serial,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX / 2),
        deadline: Period::seconds(dice.between(400, 900)),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([
            ("app".to_owned(), selector("app")),
            ("db".to_owned(), selector("db")),
        ]),
        phases,
        after_rollback: None,
        max_failures: dice
            .percent(30)
            .then(|| u32::try_from(dice.roll(2)).expect("small")),
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    }
}
