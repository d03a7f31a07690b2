//! The world before: made once per kind, by the agent itself where that is the shortest way.

use std::fs;

use anyhow::{Context as _, Result, bail};
use lockstep_proto::action::Action;
use lockstep_proto::ids::Direction;
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage as PlanStage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::StepOutcome;
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};

use super::base::Base;
use super::case::Stage;
use super::kinds::{Base as Data, Kind};
use super::lab::{Lab, copy};
use super::play::Play;

/// Makes the world of a kind and keeps it.
pub(super) async fn make<'a>(lab: &mut Lab, kind: &'a Kind, base: &Base) -> Result<Stage<'a>> {
    lab.has_database = kind.base != Data::None;
    lab.clear()?;
    let app = lab.path("world/app");
    fs::create_dir_all(app.join("shared"))?;
    fs::create_dir_all(app.join("releases/old"))?;
    std::os::unix::fs::symlink("releases/old", app.join("current"))?;
    fs::write(app.join("shared/.env"), "A=1\n")?;
    fs::write(lab.path("world/app.log"), "INFO fine\n")?;
    if kind.releases {
        copy(&base.release_sources(), &app.join("releases"))?;
    }
    if let Some(template) = Base::template(kind.base) {
        lab.make_database(template)?;
    }
    let mut steps: Vec<_> = kind.setup.iter().map(|setup| setup.step(lab)).collect();
    steps.push((kind.action(), (kind.args)(lab)));
    let actions = steps
        .into_iter()
        .map(|(name, args)| {
            let action = Action::deserialize_args(name, args).context("an action's name")?;
            action.with_context(|| format!("the arguments of {name}"))
        })
        .collect::<Result<Vec<_>>>()?;
    let action = actions.last().context("a step")?.clone();
    let step = u16::try_from(kind.setup.len())?;
    let plan = plan(actions)?;
    let mut bindings = vec![];
    if step > 0 {
        let mut play = Play::begin(lab, &plan, vec![])?;
        play.consent().await?;
        for at in 0..step {
            let ended = play.step(at, Direction::Do, |_| Ok(())).await?;
            if !matches!(ended.outcome, StepOutcome::Ok { .. }) {
                bail!("the step before ended with {:?}", ended.outcome);
            }
        }
        play.release().await?;
        bindings = play.bindings();
        lab.kill_agent().await?;
    }
    lab.save()?;
    Ok(Stage {
        kind,
        plan,
        bindings,
        step,
        action,
    })
}

fn plan(actions: Vec<Action>) -> Result<SealedPlan> {
    let steps = actions.into_iter().zip(1..).map(|(action, line)| Step {
        name: None,
        action,
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line,
    });
    let labels = [("role".to_owned(), "app".to_owned())].into();
    let plan = CompiledPlan {
        format: FORMAT,
        plan: "chaos".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::from(u32::MAX) * 1000),
        deadline: Period::seconds(600),
        inputs: [].into(),
        fleet: [("app".to_owned(), Selector { labels })].into(),
        phases: vec![Phase {
            name: "one".into(),
            stages: vec![PlanStage {
                // Of an elected host's steps some may be left out: those before the last one were
                // done under another rollout.
                target: Target::OneOf(vec!["app".into()]),
                strategy: Strategy::All,
                steps: steps.collect(),
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
    seal(plan).context("the plan cannot be sealed")
}
