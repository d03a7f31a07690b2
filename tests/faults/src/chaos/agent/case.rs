//! One case: a kind of action, a process, a point at which it is killed; and what must hold at
//! the end.

use std::fmt;
use std::fs;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::Direction;
use lockstep_proto::order::Binding;
use lockstep_proto::report::StepOutcome;
use lockstep_proto::seal::SealedPlan;

use super::kinds::Kind;
use super::lab::Lab;
use super::play::{Ended, Play};
use super::world::World;

/// The last point of a step process before it claims its attempt.
pub(super) const BEFORE_CLAIM: u64 = 6;

/// How often the agent's claim is looked for, and for how long.
const POLL: Duration = Duration::from_millis(5);
const CLAIMS_WITHIN: Duration = Duration::from_secs(20);

/// Which process comes to an end, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Case {
    /// The agent, at its N-th point.
    Agent(u64),
    /// The step process of a direction, at its N-th point.
    Step(Direction, u64),
    /// The host is restarted while the step process is at its N-th point.
    Reboot(Direction, u64),
    /// The agent is killed before the step process has claimed, and claims the attempt itself.
    Race,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(point) => write!(f, "agent:{point}"),
            Self::Step(direction, point) => write!(f, "{direction}:{point}"),
            Self::Reboot(direction, point) => write!(f, "reboot-{direction}:{point}"),
            Self::Race => f.write_str("race"),
        }
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        if text == "race" {
            return Ok(Self::Race);
        }
        let (who, point) = text.split_once(':').context("a case is such as `do:12`")?;
        let point = point.parse()?;
        Ok(match who {
            "agent" => Self::Agent(point),
            "do" => Self::Step(Direction::Do, point),
            "undo" => Self::Step(Direction::Undo, point),
            "reboot-do" => Self::Reboot(Direction::Do, point),
            "reboot-undo" => Self::Reboot(Direction::Undo, point),
            _ => bail!("`{who}` is none of agent, do, undo, reboot-do, reboot-undo"),
        })
    }
}

/// A kind whose world is made, with its plan.
pub(super) struct Stage<'a> {
    pub(super) kind: &'a Kind,
    pub(super) plan: SealedPlan,
    pub(super) bindings: Vec<Binding>,
    /// The step in the plan.
    pub(super) step: u16,
    pub(super) action: Action,
}

/// How a run went.
pub(super) struct Run {
    /// None if the agent was killed before the first order, and nothing was ordered.
    pub(super) done: Option<Ended>,
    pub(super) undone: Option<Ended>,
    pub(super) before: World,
    pub(super) after_do: World,
    pub(super) end: World,
    /// What was there when an attempt had ended without an outcome, or the agent had been killed.
    pub(super) between: Vec<(Direction, World)>,
    pub(super) lost: Vec<String>,
    /// The points that were passed: the agent's, and of the step processes.
    pub(super) points: [Vec<String>; 3],
    /// How many of the agent's points come before the first order.
    pub(super) until_consent: u64,
    /// Whether a process was killed, where one should have been.
    pub(super) reached: bool,
}

/// Plays a run; only as far as the consent if `orders` is false.
pub(super) async fn play(
    lab: &mut Lab,
    stage: &Stage<'_>,
    case: Option<Case>,
    orders: bool,
) -> Result<Run> {
    lab.restore()?;
    lab.is_planted = case.is_some();
    if stage.kind.service {
        lab.start_service()?;
    }
    let list = |name: &str| format!("list:{name}");
    let files =
        ["points.list-agent", "points.list-do", "points.list-undo"].map(|name| lab.at(name));
    let agent = match case {
        None => Some(list(&files[0])),
        Some(Case::Agent(point)) => Some(format!("kill:{point}")),
        _ => None,
    };
    lab.plan_points("agent", agent.as_deref())?;
    let step_plan = |lab: &Lab, direction| -> Option<String> {
        match case {
            None if direction == Direction::Do => Some(list(&files[1])),
            None => Some(list(&files[2])),
            Some(Case::Step(of, point)) if of == direction => Some(format!("kill:{point}")),
            Some(Case::Reboot(of, point)) if of == direction => {
                Some(format!("hold:{point}:{}", lab.at("points.held")))
            }
            Some(Case::Race) if direction == Direction::Do => {
                Some(format!("hold:1:{}", lab.at("points.held")))
            }
            _ => None,
        }
    };
    let before = World::look(lab)?;
    let mut play = Play::begin(lab, &stage.plan, stage.bindings.clone())?;
    play.consent().await?;
    let passed = fs::read_to_string(&files[0]).unwrap_or_default();
    let until_consent = u64::try_from(passed.lines().count())?;
    let mut between = vec![];
    let mut directions = vec![Direction::Do, Direction::Undo];
    directions.truncate(match (orders, stage.action.info().undo) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 2,
    });
    let (mut ended, mut after_do, mut missed) = (vec![], None, false);
    for direction in directions {
        let plan = step_plan(play.lab, direction);
        play.lab.plan_points("step", plan.as_deref())?;
        disturb(&mut play, stage, direction, case).await?;
        let look = |lab: &Lab| {
            between.push((direction, World::look(lab)?));
            Ok(())
        };
        let one = play.step(stage.step, direction, look).await?;
        let good = matches!(one.outcome, StepOutcome::Ok { .. });
        ended.push(one);
        if play.lab.awaits_kill("step") {
            // It may be on its way still: its outcome was there before its last points.
            play.lab.steps_end().await?;
            missed |= play.lab.awaits_kill("step");
        }
        if direction == Direction::Do {
            after_do = Some(World::look(play.lab)?);
        }
        if !good {
            break;
        }
    }
    play.release().await?;
    let reached = !missed && !play.lab.awaits_kill("agent");
    let lost = std::mem::take(&mut play.seen.lost);
    lab.kill_agent().await?;
    // One that has left its outcome may still be ending, and so may the one that lost a race.
    lab.steps_end().await?;
    let end = World::look(lab)?;
    let points = files.map(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    });
    let mut ended = ended.into_iter();
    Ok(Run {
        done: ended.next(),
        undone: ended.next(),
        after_do: after_do.unwrap_or_else(|| before.clone()),
        before,
        end,
        between,
        lost,
        points,
        until_consent,
        reached,
    })
}

/// What the test does itself: restart the host, or let a step process race with the agent.
async fn disturb(
    play: &mut Play<'_>,
    stage: &Stage<'_>,
    direction: Direction,
    case: Option<Case>,
) -> Result<()> {
    let key = play.key(stage.step, direction, 1);
    let held = |lab: &Lab| {
        let text = fs::read_to_string(lab.path("points.held"));
        text.map_or(0, |text| text.lines().count())
    };
    match case {
        Some(Case::Reboot(of, point)) if of == direction => {
            play.order_until(&key, |lab| held(lab) == 1).await?;
            play.lab.plan_points("step", None)?;
            play.reboot().await?;
            // The host's own init starts it again, where the step has not begun to change that.
            let begun = stage.action.info().class != Class::Observing && point > BEFORE_CLAIM;
            if stage.kind.service && !begun {
                play.lab.start_service()?;
            }
            Ok(())
        }
        Some(Case::Race) if direction == Direction::Do => {
            play.order_until(&key, |lab| held(lab) == 1).await?;
            play.restart().await?;
            let claim = play.lab.path(&format!("state/steps/{key}/claim"));
            let claimed = async {
                while !claim.exists() {
                    tokio::time::sleep(POLL).await;
                }
            };
            let claimed = tokio::time::timeout(CLAIMS_WITHIN, claimed).await;
            claimed.context("stuck: the agent does not claim what it finds")?;
            play.lab.plan_points("step", None)?;
            Ok(fs::write(play.lab.path("points.go"), "")?)
        }
        _ => Ok(()),
    }
}

/// What is wrong with a run, held against one without a kill.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub(super) double: Vec<String>,
    pub(super) lost: Vec<String>,
    pub(super) wrong: Vec<String>,
    /// The outcome is unknown, and may be.
    pub(super) unknown: bool,
}

/// Holds a run against the recorded one.
pub(super) fn judge(stage: &Stage<'_>, case: Case, run: &Run, recorded: &Run) -> Verdict {
    let mut verdict = Verdict {
        lost: run.lost.clone(),
        ..Verdict::default()
    };
    let may = stage.kind.may_be_unknown;
    let pairs = [
        (Direction::Do, run.done.as_ref(), recorded.done.as_ref()),
        (
            Direction::Undo,
            run.undone.as_ref(),
            recorded.undone.as_ref(),
        ),
    ];
    for (direction, ended, should) in pairs {
        match (ended.map(|ended| &ended.outcome), should) {
            (Some(StepOutcome::Unknown { .. }), _) if may => verdict.unknown = true,
            (Some(StepOutcome::Ok { changed, .. }), Some(should)) => {
                let facts = |ended: &Ended| -> Vec<String> {
                    let kinds = ended.facts.iter().map(|fact| {
                        let fact = serde_json::to_value(fact).unwrap_or_default();
                        fact["kind"].as_str().unwrap_or("?").to_owned()
                    });
                    // Notes are for people: who finds a thing done has less to tell.
                    kinds.filter(|kind| kind != "note").collect()
                };
                let (is, was) = (facts(ended.expect("it is there")), facts(should));
                if is != was && !is_bare(stage, &is) {
                    let what = format!("{direction}: it proved {is:?}, should prove {was:?}");
                    verdict.lost.push(what);
                }
                let same = matches!(&should.outcome,
                    StepOutcome::Ok { changed: was, .. } if was == changed);
                // An undo that finds all undone says so.
                if !same && direction == Direction::Do {
                    let what =
                        format!("{direction}: it says changed: {changed}, and that is wrong");
                    verdict.wrong.push(what);
                }
            }
            (None, _) => {}
            (other, _) => verdict
                .wrong
                .push(format!("{direction}: it ended with {other:?}")),
        }
    }
    verdict.wrong.extend(
        run.end
            .left_over
            .iter()
            .map(|what| format!("left over: {what}")),
    );
    let reboot = matches!(case, Case::Reboot(..));
    if verdict.unknown
        || verdict
            .wrong
            .iter()
            .any(|line| line.contains("it ended with"))
    {
        // It was done or not, and never twice.
        verdict.double.extend(too_often(stage, run, recorded, 0));
        return verdict;
    }
    if run.done.is_none() {
        // Nothing was ordered: the host is as it was.
        let changes = run.end.differences(&run.before);
        verdict.wrong.extend(changes);
        return verdict;
    }
    let differs = |what: &str, is: &World, should: &World| -> Vec<String> {
        let lines = is.differences(should).into_iter();
        lines.map(|line| format!("{what}: {line}")).collect()
    };
    verdict
        .wrong
        .extend(differs("done", &run.after_do, &recorded.after_do));
    verdict
        .wrong
        .extend(differs("end", &run.end, &recorded.end));
    // A restarted host starts its services anew.
    let services = stage.kind.service || stage.kind.action().starts_with("service.");
    if !(reboot && services) {
        let ended = run.done.iter().chain(&run.undone);
        let more = 1 + u64::from(ended.map(|ended| ended.attempts).sum::<u16>());
        verdict.double.extend(too_often(stage, run, recorded, more));
        for (direction, then) in &run.between {
            let (before, later) = match direction {
                Direction::Undo => (&run.after_do, &run.end),
                _ => (&run.before, &run.after_do),
            };
            verdict.double.extend(later.made_again(before, then));
        }
    }
    verdict
}

/// A restart that was settled by what the host shows proves nothing more.
fn is_bare(stage: &Stage<'_>, facts: &[String]) -> bool {
    facts.is_empty() && matches!(stage.action, Action::ServiceRestart(_))
}

/// What was done more often than in the recorded run, or less often.
fn too_often(stage: &Stage<'_>, run: &Run, recorded: &Run, more: u64) -> Vec<String> {
    let mut lines = vec![];
    let names: std::collections::BTreeSet<_> = run
        .end
        .counts
        .keys()
        .chain(recorded.end.counts.keys())
        .collect();
    for name in names {
        let is = run.end.counts.get(name).copied().unwrap_or(0);
        let should = recorded.end.counts.get(name).copied().unwrap_or(0);
        let again = stage.kind.again.iter().any(|again| name.starts_with(again));
        let fine = match (again, more) {
            (_, 0) => is <= should,
            (true, more) => (should..=should * more).contains(&is),
            (false, _) => is == should,
        };
        if !fine {
            lines.push(format!("{name}: {is} times, should be {should}"));
        }
    }
    lines
}
