//! The agent's half of chaos: for every action, the agent and the step process are killed before
//! and after each of their writes, on real processes.
//!
//! ```text
//! kinds   every action, with the world that it finds
//! lab     a worker's host: directories, agent, service, database; put back before each case
//! play    the controller's side: orders, orders again, takes reports
//! case    one kill, and what must hold at the end
//! world   what there is on the host, and how often it was done
//! ```
//!
//! A run without a kill is recorded first: it lists the points, and says how the host must look.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::ids::Direction;
use lockstep_tests::reaper::Reaper;
use serde::Serialize;

mod base;
mod case;
mod kinds;
mod lab;
mod play;
mod stage;
mod things;
mod world;

use case::Case;
use kinds::{ASKED_FOR, KINDS, Kind, SAMPLE};
use lab::{Lab, Parts};

/// Of so many cases, one may be missed.
const ALL_NOT_REACHED: u64 = 33;

/// The same of each kind, and one more.
const KIND_NOT_REACHED: u64 = 20;

/// What is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The agent with points.
    pub agent: PathBuf,
    /// Only these kinds; all if it is empty.
    pub kinds: Vec<String>,
    /// Only this case, such as `agent:12`, `do:3`, `undo:4`, `reboot-do:5`, `race`; or all cases at
    /// points of a name, such as `do:claim: made`.
    pub point: Option<String>,
    /// Every n-th point only.
    pub every: usize,
    /// How many hosts at a time.
    pub workers: usize,
    /// A fault that is planted in the agent, by name; the recorded run is without it.
    pub planted: Option<String>,
    /// Whether each case is said.
    pub verbose: bool,
}

impl Options {
    /// All kinds and all points.
    pub fn whole(agent: PathBuf) -> Self {
        Self {
            agent,
            kinds: vec![],
            point: None,
            every: 1,
            workers: 4,
            planted: None,
            verbose: false,
        }
    }

    /// A few kinds and a few points, in less than a minute.
    pub fn sample(agent: PathBuf) -> Self {
        Self {
            kinds: SAMPLE.iter().map(|&name| name.to_owned()).collect(),
            every: 9,
            workers: 2,
            ..Self::whole(agent)
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct AgentFigures {
    /// Cases: one kill each, that came to pass.
    pub agent_points: u64,
    /// Cases that ended as they should.
    pub agent_ok: u64,
    /// Effects that were made twice, or by a run that did not say so.
    pub double_effects: u64,
    /// Results that were lost, came twice, or prove less than they should.
    pub lost_results: u64,
    /// Cases that ended unknown, by kind: only those may of which nothing can prove what they did.
    pub unknown: BTreeMap<String, u64>,
    /// Cases that did not come to an end.
    pub stuck: u64,
    /// Cases whose host is not as it should be at the end.
    pub wrong: u64,
    /// Cases that count for nothing, by kind: their point was not passed this time.
    pub not_reached: BTreeMap<String, u64>,
    /// Cases by kind, as `agent_points`.
    pub by_kind: BTreeMap<String, u64>,
    /// One line for each violation, with how to run it again.
    pub violations: Vec<String>,
    /// How long it took.
    pub seconds: u64,
}

impl AgentFigures {
    fn add(&mut self, kind: &str, case: Case, ended: Result<Option<case::Verdict>>) {
        if matches!(ended, Ok(None)) {
            *self.not_reached.entry(kind.to_owned()).or_default() += 1;
            return;
        }
        self.agent_points += 1;
        *self.by_kind.entry(kind.to_owned()).or_default() += 1;
        let again = format!("chaos --agent {kind} --point {case}");
        let mut say = |what: &str, line: &str| {
            let line = format!("{kind} {case}: {what}: {line}\n    again: {again}");
            self.violations.push(line);
        };
        match ended {
            Err(error) => {
                let line = format!("{error:#}");
                self.stuck += u64::from(line.contains("stuck"));
                self.wrong += u64::from(!line.contains("stuck"));
                say("failed", &line);
            }
            Ok(None) => {}
            Ok(Some(verdict)) => {
                for line in &verdict.double {
                    say("double effect", line);
                }
                for line in &verdict.lost {
                    say("lost", line);
                }
                for line in &verdict.wrong {
                    say("wrong", line);
                }
                self.double_effects += u64::from(!verdict.double.is_empty());
                self.lost_results += u64::from(!verdict.lost.is_empty());
                self.wrong += u64::from(!verdict.wrong.is_empty());
                if verdict.unknown {
                    *self.unknown.entry(kind.to_owned()).or_default() += 1;
                }
                let fine = verdict.double.is_empty()
                    && verdict.lost.is_empty()
                    && verdict.wrong.is_empty();
                self.agent_ok += u64::from(fine);
            }
        }
    }

    /// Kills that do not come to pass prove nothing: where points move a little, few are missed.
    fn check_reached(&mut self) {
        let all: u64 = self.not_reached.values().sum();
        if all * ALL_NOT_REACHED > self.agent_points {
            let cases = self.agent_points;
            let line = format!("{all} kills did not come to pass, beside {cases} that did");
            self.violations.push(line);
        }
        for (kind, count) in &self.not_reached {
            let cases = self.by_kind.get(kind).copied().unwrap_or(0);
            if count * KIND_NOT_REACHED > cases + KIND_NOT_REACHED {
                let line =
                    format!("{kind}: {count} kills did not come to pass, beside {cases} that did");
                self.violations.push(line);
            }
        }
    }
}

/// Runs all cases.
pub fn run(options: &Options) -> Result<AgentFigures> {
    let began = Instant::now();
    let chosen = |kind: &&Kind| {
        let named = |name: &String| *name == kind.name;
        options.kinds.is_empty() || options.kinds.iter().any(named)
    };
    let asked_for = if options.kinds.is_empty() {
        &[]
    } else {
        ASKED_FOR
    };
    let kinds: VecDeque<&Kind> = KINDS.iter().chain(asked_for).filter(chosen).collect();
    ensure!(
        !kinds.is_empty(),
        "no kind is called so; there are: {}",
        KINDS
            .iter()
            .map(|kind| kind.name)
            .collect::<Vec<_>>()
            .join(", ")
    );
    let root = tempfile::Builder::new()
        .prefix("lockstep-chaos-")
        .tempdir()?;
    // Whoever ends this process ends what it has started, too.
    let _reaper = Reaper::of_cluster(root.path())?;
    let base = base::Base::make(root.path(), kinds.iter().copied())?;
    let (queue, figures) = (Mutex::new(kinds), Mutex::new(AgentFigures::default()));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.workers)
            .map(|worker| {
                let (base, queue, figures) = (&base, &queue, &figures);
                scope.spawn(move || work(worker, options, base, queue, figures))
            })
            .collect();
        for worker in workers {
            worker.join().expect("no worker panics")?;
        }
        anyhow::Ok(())
    })?;
    let mut figures = figures.into_inner().expect("no worker panics");
    figures.check_reached();
    figures.seconds = began.elapsed().as_secs();
    Ok(figures)
}

/// Takes one kind after the other.
fn work(
    worker: usize,
    options: &Options,
    base: &base::Base,
    queue: &Mutex<VecDeque<&Kind>>,
    figures: &Mutex<AgentFigures>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let mut lab = Lab::new(Parts {
            root: base.root(),
            worker,
            agent: &options.agent,
            postgres: base.postgres(),
            planted: options.planted.clone(),
        })
        .await?;
        loop {
            let next = queue.lock().expect("no worker panics").pop_front();
            let Some(kind) = next else { return Ok(()) };
            let ended = one_kind(&mut lab, kind, options, base, figures).await;
            lab.kill_agent().await?;
            if let Err(error) = ended {
                let mut figures = figures.lock().expect("no worker panics");
                figures.wrong += 1;
                let line = format!("{}: cannot be recorded: {error:#}", kind.name);
                say(&line);
                say(&lab.log());
                figures.violations.push(line);
            }
        }
    })
}

async fn one_kind(
    lab: &mut Lab,
    kind: &Kind,
    options: &Options,
    base: &base::Base,
    figures: &Mutex<AgentFigures>,
) -> Result<()> {
    let began = Instant::now();
    let stage = stage::make(lab, kind, base).await?;
    let recorded = case::play(lab, &stage, None, true)
        .await
        .context("without a kill")?;
    if options.verbose {
        say(&format!(
            "{}: {:?}\n{}\nthen\n{}",
            kind.name,
            recorded.done,
            recorded.after_do.text(),
            recorded.end.text()
        ));
    }
    let [agent, done, undone] = &recorded.points;
    let claim = done.get(usize::try_from(case::BEFORE_CLAIM - 1)?);
    ensure!(
        claim.is_some_and(|point| point == "claim: to be made"),
        "the step process makes its claim elsewhere: {done:?}"
    );
    let cases = match &options.point {
        Some(point) => chosen(point, &recorded.points)?,
        None => cases([agent.len(), done.len(), undone.len()], options.every),
    };
    let count = cases.len();
    for case in cases {
        let began = Instant::now();
        // What is killed before the first order knows nothing of the action: where the step takes
        // long, its host only has to come to the consent.
        let early = matches!(case, Case::Agent(at) if at <= recorded.until_consent);
        let orders = !(early && kind.takes_long());
        let played = case::play(lab, &stage, Some(case), orders).await;
        let ended = match played {
            Ok(run) if !run.reached => Ok(None),
            Ok(run) => Ok(Some(case::judge(&stage, case, &run, &recorded))),
            Err(error) => {
                lab.kill_agent().await?;
                Err(error)
            }
        };
        let mut figures = figures.lock().expect("no worker panics");
        let before = figures.violations.len();
        figures.add(kind.name, case, ended);
        if options.verbose {
            let took = began.elapsed().as_millis();
            say(&format!(
                "{} {case} {} ({took} ms)",
                kind.name,
                point(&recorded, case)
            ));
        }
        for line in &figures.violations[before..] {
            say(&format!("{line}\n    at: {}", point(&recorded, case)));
        }
        if options.verbose && figures.violations.len() > before {
            say(&lab.log());
        }
    }
    let points = [agent.len(), done.len(), undone.len()];
    say(&format!(
        "{}: {count} cases in {} s (points of the agent, do, undo: {points:?})",
        kind.name,
        began.elapsed().as_secs()
    ));
    Ok(())
}

/// The name of a case's point.
fn point(recorded: &case::Run, case: Case) -> &str {
    let [agent, done, undone] = &recorded.points;
    let (list, at) = match case {
        Case::Agent(at) => (agent, at),
        Case::Step(Direction::Undo, at) | Case::Reboot(Direction::Undo, at) => (undone, at),
        Case::Step(_, at) | Case::Reboot(_, at) => (done, at),
        Case::Race => return "both before the claim",
    };
    let at = usize::try_from(at).unwrap_or(0);
    list.get(at.wrapping_sub(1)).map_or("", String::as_str)
}

/// The case that is named, or those at the points that are.
fn chosen(text: &str, [agent, done, undone]: &[Vec<String>; 3]) -> Result<Vec<Case>> {
    let refused = match text.parse() {
        Ok(case) => return Ok(vec![case]),
        Err(refused) => refused,
    };
    let (who, name) = text.split_once(':').unwrap_or((text, ""));
    let points = match who {
        "agent" => agent,
        "do" => done,
        "undo" => undone,
        _ => return Err(refused),
    };
    let named = (1..).zip(points).filter(|(_, point)| *point == name);
    let cases: Vec<_> = named
        .map(|(at, _)| format!("{who}:{at}").parse())
        .collect::<Result<_>>()?;
    ensure!(
        !cases.is_empty(),
        "there is no point `{name}` in {points:?}"
    );
    Ok(cases)
}

/// All cases of a kind with that many points.
fn cases([agent, done, undone]: [usize; 3], every: usize) -> Vec<Case> {
    let number = |at: usize| u64::try_from(at).expect("few points");
    let every = every.max(1);
    let mut cases: Vec<Case> = (1..=agent)
        .step_by(every)
        .map(|at| Case::Agent(number(at)))
        .collect();
    for (direction, points) in [(Direction::Do, done), (Direction::Undo, undone)] {
        let all = (1..=points).step_by(every);
        cases.extend(all.map(|at| Case::Step(direction, number(at))));
        if points > 0 {
            let middle = points / 2;
            cases.push(Case::Reboot(direction, number(middle.max(8).min(points))));
        }
    }
    // Before the claim is there.
    cases.push(Case::Reboot(Direction::Do, case::BEFORE_CLAIM));
    cases.push(Case::Race);
    cases
}

/// For whoever watches.
#[expect(clippy::print_stderr, reason = "a program's output")]
fn say(line: &str) {
    eprintln!("{line}");
}
