//! Generated plans.

use super::*;

/// A small generator of our own: the world must not depend on proptest's shrinking order.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }

    pub(super) fn percent(&mut self, percent: u64) -> bool {
        self.roll(100) < percent
    }
}

fn action(name: &str, args: serde_json::Value) -> Action {
    Action::deserialize_args(name, args)
        .expect("a known action")
        .expect("valid arguments")
}

fn check(dice: &mut Dice) -> Step {
    let action = if dice.percent(50) {
        action("check.disk", serde_json::json!({"path": "/", "free": "1B"}))
    } else {
        let url = "http://127.0.0.1:8000/";
        let args = serde_json::json!({"url": url, "method": "POST"});
        action("check.http", args)
    };
    Step {
        name: None,
        action,
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line: 1,
    }
}

fn step(dice: &mut Dice) -> Step {
    let action = match dice.roll(7) {
        0 => action("check.disk", serde_json::json!({"path": "/", "free": "1B"})),
        1 => action("exec.run", serde_json::json!({"name": "x", "argv": ["x"]})),
        6 => action("service.restart", serde_json::json!({"service": "web"})),
        2 | 3 => action("service.stop", serde_json::json!({"service": "web"})),
        _ => action(
            "release.activate",
            serde_json::json!({"app": "a", "release": "r"}),
        ),
    };
    Step {
        name: None,
        action,
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line: 1,
    }
}

fn stage(dice: &mut Dice, rolling: bool) -> Stage {
    let group = if dice.percent(70) { "app" } else { "db" };
    let target = match dice.roll(5) {
        0 => Target::OneOf(vec![group.into()]),
        1 => Target::Groups(vec!["app".into(), "db".into()]),
        _ => Target::Groups(vec![group.into()]),
    };
    let strategy = match dice.roll(3) {
        0 if rolling => Strategy::Rolling {
            batch: Batch::Percent(u32::try_from(1 + dice.roll(100)).unwrap()),
            max_failures: u32::try_from(dice.roll(3)).unwrap(),
            pause: Period::seconds(dice.roll(20)),
        },
        1 if rolling => Strategy::Canary {
            first: Batch::Hosts(1),
            soak: Period::seconds(dice.roll(60)),
        },
        _ => Strategy::All,
    };
    let steps = (0..=dice.roll(3)).map(|_| step(dice)).collect();
    Stage {
        target,
        strategy,
        steps,
    }
}

pub(super) fn plan(dice: &mut Dice) -> CompiledPlan {
    let phases = (0..=dice.roll(5))
        .map(|index| {
            let rolling = dice.percent(40);
            let count = if rolling { 1 } else { 1 + dice.roll(2) };
            Phase {
                name: format!("p{index}"),
                stages: (0..count).map(|_| stage(dice, rolling)).collect(),
                deadline: dice
                    .percent(20)
                    .then(|| Period::seconds(60 + dice.roll(600))),
                planned: None,
            }
        })
        .collect();
    let selector = |role: &str| Selector {
        labels: BTreeMap::from([("role".into(), role.into())]),
    };
    CompiledPlan {
        format: 1,
        plan: "generated".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX),
        deadline: Period::seconds(600 + dice.roll(3600)),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([
            ("app".into(), selector("app")),
            ("db".into(), selector("db")),
        ]),
        phases,
        after_rollback: dice.percent(25).then(|| Phase {
            name: "after_rollback".into(),
            stages: vec![Stage {
                target: Target::Groups(vec!["app".into()]),
                strategy: Strategy::All,
                steps: vec![check(dice)],
            }],
            deadline: None,
            planned: None,
        }),
        max_failures: dice
            .percent(30)
            .then(|| u32::try_from(dice.roll(3)).unwrap()),
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    }
}
