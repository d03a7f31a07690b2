//! Copies are resumed: a real controller on each, with its clone of the fleet. Nobody repairs
//! anything; the rollout must come to the end that the recorded run came to.

use std::collections::VecDeque;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;

use super::check::{self, Kind, Violation};
use super::fleet::{Delivery, Fleet};
use super::place::{Place, Station, alive};
use super::record::{Copy, plan_of};
use super::script::{Played, Variant, play};
use super::simulated::World;

/// A resumed rollout that has not ended by then is stuck: its steps and pauses take 3 s, and what
/// is lost is given up after 20 s, or in a rollback after 40 s.
const WITHIN: Duration = Duration::from_secs(70);

/// One copy, resumed.
#[derive(Debug)]
pub struct Resumed {
    /// Which way the rollout went.
    pub variant: Variant,
    /// The number of the point, from 1.
    pub point: usize,
    /// Its name.
    pub name: String,
    /// From the start of the process to the first session that it welcomed, in milliseconds: by
    /// then it has folded its journal, and its term is on the disk.
    pub welcome_ms: Option<u64>,
    /// From the start of the process until the rollout goes on, in milliseconds: an offer, an
    /// order, a release, an acknowledged report, an answer to a person. None if nothing was left.
    pub resume_ms: Option<u64>,
    /// Whether people typed something: what the recorded run had not got an answer to.
    pub typed: bool,
    /// What was wrong.
    pub violations: Vec<Violation>,
    /// Where the state and the log of a copy with violations are left.
    pub left: Option<PathBuf>,
}

/// Resumes all copies, `parallel` at a time.
pub fn resume_all(
    place: &Place,
    copies: Vec<Copy>,
    parallel: usize,
    tell: impl Fn(&Resumed) + Sync,
) -> Vec<Resumed> {
    let queue = Mutex::new(VecDeque::from(copies));
    let done = Mutex::new(vec![]);
    thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                loop {
                    let next = queue
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .pop_front();
                    let Some(copy) = next else {
                        return;
                    };
                    let resumed = resume(place, copy);
                    tell(&resumed);
                    done.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(resumed);
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|resumed| (resumed.variant, resumed.point));
    done
}

fn resume(place: &Place, copy: Copy) -> Resumed {
    let (variant, point, name) = (copy.variant, copy.point, copy.name.clone());
    let label = copy.state.file_name().map_or_else(String::new, |name| {
        format!("{}-{}", variant.name(), name.to_string_lossy())
    });
    let mut resumed = Resumed {
        variant,
        point,
        name,
        welcome_ms: None,
        resume_ms: None,
        typed: false,
        violations: vec![],
        left: None,
    };
    let dir = place.root.join(&label);
    let run = AssertUnwindSafe(|| run(place, copy, &label, &mut resumed));
    match catch_unwind(run) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let stuck = Violation::new(Kind::Stuck, format!("{error:#}"));
            resumed.violations.push(stuck);
        }
        Err(_) => {
            let broken = Violation::new(Kind::Broken, "the harness panicked; see above");
            resumed.violations.push(broken);
        }
    }
    if resumed.violations.is_empty() {
        // What is left is in the way of nothing.
        let _ = fs::remove_dir_all(&dir);
    } else {
        resumed.left = Some(dir);
    }
    resumed
}

fn run(place: &Place, copy: Copy, label: &str, resumed: &mut Resumed) -> Result<()> {
    let station = place.station(label)?;
    fs::remove_dir(station.state())?;
    fs::rename(&copy.state, station.state())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (address, agents_dial) = watch::channel(None);
        let begun = Instant::now();
        let mut controller = station.start(None, &[])?;
        let fleet = Fleet::start(copy.world, &place.agents, agents_dial, Delivery::Plain);
        let at = match station.address(&mut controller).await {
            Ok(at) => at,
            Err(error) => {
                let broken = Violation::new(Kind::Broken, format!("{error:#}"));
                resumed.violations.push(broken);
                return Ok(());
            }
        };
        address.send_replace(Some(at));
        let mut people = place.people(&station, at).await?;
        let played = play(copy.variant, &mut people, &fleet, WITHIN).await;
        let took = |at: Instant| {
            let took = at.duration_since(begun).as_millis();
            u64::try_from(took).unwrap_or(u64::MAX)
        };
        let typed = station.words.answered();
        let first_answer = typed.first().map(|(_, at)| *at);
        let goes_on = fleet.goes_on().into_iter().chain(first_answer).min();
        resumed.welcome_ms = fleet.first_welcome().map(took);
        resumed.resume_ms = goes_on.map(took);
        resumed.typed = !typed.is_empty();
        if let Err(why) = alive(&mut controller) {
            resumed.violations.push(Violation::new(Kind::Broken, why));
        }
        controller.kill();
        let world = fleet.world();
        drop(fleet);
        let played = match played {
            Ok(played) => played,
            Err(error) => {
                let lost = world.lost.iter();
                let lost = lost.map(|what| Violation::new(Kind::Lost, what));
                resumed.violations.extend(lost);
                return Err(error);
            }
        };
        for (word, _) in typed {
            if copy.answered.contains(&word) {
                let what = format!("`{word}` had been answered, and had to be typed again");
                resumed.violations.push(Violation::new(Kind::Lost, what));
            }
        }
        let found = judge(copy.variant, &station, &world, &played)?;
        resumed.violations.extend(found);
        Ok(())
    })
}

/// What is wrong with a rollout that has ended, on a controller that was killed since.
pub(super) fn judge(
    variant: Variant,
    station: &Station,
    world: &World,
    played: &Played,
) -> Result<Vec<Violation>> {
    let rollout = &played.rollout;
    let mut found = vec![];
    if rollout.state != variant.end() {
        let (state, end, reason) = (&rollout.state, variant.end(), &rollout.reason);
        let what = format!("it ended as {state}, not as {end}: {reason}");
        found.push(Violation::new(Kind::Stuck, what));
    }
    let records = match station.export() {
        Ok(export) => check::records(&export)?,
        Err(error) => {
            found.push(Violation::new(Kind::Broken, format!("{error:#}")));
            return Ok(found);
        }
    };
    let plan = plan_of(&station.state(), &rollout.plan_digest)?;
    found.extend(check::violations(world, &records, plan.plan()));
    if variant == Variant::Rollback {
        found.extend(check::back(&variant.world(), world));
    }
    Ok(found)
}
