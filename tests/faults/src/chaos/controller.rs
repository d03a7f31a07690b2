//! The controller's half: every point of every variant, then the scenarios.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use super::check::{Kind, Violation};
use super::place::Place;
use super::record::{Recording, millis, record};
use super::report::Half;
use super::resume::{Resumed, resume_all};
use super::scenarios::{self, Scenario};
use super::script::Variant;

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which ways the rollout goes.
    pub variants: Vec<Variant>,
    /// Every `nth` point.
    pub nth: usize,
    /// Only this point.
    pub point: Option<usize>,
    /// Which scenarios.
    pub scenarios: Vec<Scenario>,
    /// Copies that are resumed at a time.
    pub parallel: usize,
    /// A fault that is planted in every controller, by name.
    pub planted: Option<String>,
    /// Whether the state and the logs of what failed are left.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            variants: Variant::ALL.to_vec(),
            nth: 1,
            point: None,
            scenarios: Scenario::ALL.to_vec(),
            parallel: 6,
            planted: std::env::var("LOCKSTEP_PLANTED").ok(),
            keep: true,
        }
    }
}

/// The half's figures, and what is to be said about what went wrong.
#[derive(Debug)]
pub struct Outcome {
    /// Figures.
    pub half: Half,
    /// Each violation, with how to run it again.
    pub failures: Vec<String>,
}

/// Runs the half. `tell` hears how it goes on, for people.
pub fn run(options: &Options, tell: &(dyn Fn(&str) + Sync)) -> Result<Outcome> {
    let begun = Instant::now();
    let root = tempfile::Builder::new().prefix("chaos").tempdir()?;
    let place = Place::make(
        root.path(),
        &Variant::Forward.world(),
        options.planted.clone(),
    )?;
    let mut outcome = Collected::default();
    for variant in &options.variants {
        let since = Instant::now();
        let nth = if options.point.is_some() {
            1
        } else {
            options.nth
        };
        let mut recording = record(&place, *variant, nth)
            .with_context(|| format!("the recorded run `{}` failed", variant.name()))?;
        if let Some(point) = options.point {
            recording.copies.retain(|copy| copy.point == point);
            if recording.copies.is_empty() {
                bail!("`{}` has {} points", variant.name(), recording.points);
            }
        }
        outcome.points.insert(variant.name(), recording.points);
        tell(&format!(
            "{}: {} points, {} copies, {} ms",
            variant.name(),
            recording.points,
            recording.copies.len(),
            millis(since)
        ));
        outcome.resume(&place, recording, options.parallel, tell);
    }
    for scenario in &options.scenarios {
        let since = Instant::now();
        let (seen, violations) = scenarios::run(&place, *scenario);
        tell(&format!(
            "{}: {seen}, {} ms",
            scenario.name(),
            millis(since)
        ));
        outcome.scenario(*scenario, &seen, violations);
    }
    if options.keep && !outcome.failures.is_empty() {
        let kept = root.keep();
        tell(&format!("what failed is left in {}", kept.display()));
    }
    Ok(outcome.conclude(millis(begun)))
}

#[derive(Debug, Default)]
struct Collected {
    points: BTreeMap<&'static str, usize>,
    resumed: Vec<Resumed>,
    scenarios: BTreeMap<&'static str, String>,
    violations: Vec<Violation>,
    failures: Vec<String>,
}

impl Collected {
    fn resume(
        &mut self,
        place: &Place,
        recording: Recording,
        parallel: usize,
        tell: &(dyn Fn(&str) + Sync),
    ) {
        let (variant, all) = (recording.variant, recording.copies.len());
        for violation in recording.violations {
            let name = variant.name();
            let again = format!("chaos --variant {name}");
            self.failures
                .push(format!("{name}, recorded: {violation}; again: {again}"));
            self.violations.push(violation);
        }
        let done = AtomicUsize::new(0);
        let resumed = resume_all(place, recording.copies, parallel, |resumed| {
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(50) || done == all {
                tell(&format!("{}: {done} of {all} resumed", variant.name()));
            }
            for violation in &resumed.violations {
                tell(&failure(resumed, violation));
            }
        });
        for one in &resumed {
            let violations = one.violations.iter();
            self.failures
                .extend(violations.map(|violation| failure(one, violation)));
            self.violations.extend(one.violations.iter().cloned());
        }
        self.resumed.extend(resumed);
    }

    fn scenario(&mut self, scenario: Scenario, seen: &str, violations: Vec<Violation>) {
        let name = scenario.name();
        self.scenarios.insert(name, seen.to_owned());
        for violation in violations {
            let again = format!("chaos --scenario {name}");
            self.failures
                .push(format!("{name}: {violation}; again: {again}"));
            self.violations.push(violation);
        }
    }

    fn conclude(self, took_ms: u64) -> Outcome {
        let of = |kinds: &[Kind]| {
            let mine = self
                .violations
                .iter()
                .filter(|violation| kinds.contains(&violation.kind));
            mine.count() as u64
        };
        let copies = self.resumed.len() as u64;
        let resumed = self
            .resumed
            .iter()
            .filter(|one| one.violations.is_empty())
            .count() as u64;
        let sorted = |of: fn(&Resumed) -> Option<u64>| {
            let mut times: Vec<u64> = self.resumed.iter().filter_map(of).collect();
            times.sort_unstable();
            times
        };
        let times = sorted(|one| one.resume_ms);
        let welcomes = sorted(|one| one.welcome_ms);
        let typed = self.resumed.iter().filter(|one| one.typed).count();
        let cuts = self
            .resumed
            .iter()
            .filter(|one| one.name.ends_with("power cut"))
            .count();
        let more = BTreeMap::from([
            (
                "points_by_variant".to_owned(),
                serde_json::json!(self.points),
            ),
            ("power_cuts".to_owned(), cuts.into()),
            (
                "copies_in_which_people_typed_what_was_not_answered".to_owned(),
                typed.into(),
            ),
            (
                "copies_in_which_nothing_was_left".to_owned(),
                (self.resumed.len() - times.len()).into(),
            ),
            (
                "first_welcome_p99_ms".to_owned(),
                percentile(&welcomes, 99).into(),
            ),
            ("resume_p50_ms".to_owned(), percentile(&times, 50).into()),
            ("resume_max_ms".to_owned(), percentile(&times, 100).into()),
            ("scenarios".to_owned(), serde_json::json!(self.scenarios)),
            ("took_s".to_owned(), (took_ms / 1000).into()),
        ]);
        Outcome {
            half: Half {
                points: copies,
                resumed,
                double_effects: of(&[Kind::Double]),
                lost_results: of(&[Kind::Lost]),
                unknown: of(&[Kind::Unknown]),
                stuck: of(&[Kind::Stuck]),
                other_violations: of(&[Kind::Barrier, Kind::Fenced, Kind::Undo, Kind::Broken]),
                resume_p99_ms: percentile(&times, 99),
                more,
            },
            failures: self.failures,
        }
    }
}

/// So many of 100 are at most this.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}

fn failure(resumed: &Resumed, violation: &Violation) -> String {
    let (variant, point, name) = (resumed.variant.name(), resumed.point, &resumed.name);
    let left = resumed
        .left
        .as_ref()
        .map_or_else(PathBuf::new, Clone::clone);
    format!(
        "{variant}, point {point} ({name}): {violation}; state and log: {}; again: chaos \
         --variant {variant} --point {point}",
        left.display()
    )
}

/// Says a line on standard error.
pub fn say(line: &str) {
    // Nobody listens: that changes nothing.
    let _ = writeln!(std::io::stderr(), "{line}");
}
