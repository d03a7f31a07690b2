//! `sim`: the simulation over many seeds, with the faults that are planted to see that it finds
//! them; and one seed again, step by step.

#![allow(clippy::print_stdout, reason = "it is a command line")]

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use clap::{Parser, Subcommand};
use lockstep_sim::{EFFECTIVE, Options, Outcome, run, shrink};
use lockstep_tests::planted::Fault;
use serde_json::{Value, json};

/// Seeds that a planted fault has to be found within.
const PLANTED_WITHIN: u64 = 400;

/// Lockstep in one thread, under faults.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run many seeds, then plant each fault until it is found. Ends with 1 if a promise was
    /// broken, or a planted fault was not found.
    Run {
        /// How many seeds.
        #[arg(long, default_value_t = 2000)]
        seeds: u64,
        /// The first seed.
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// Threads.
        #[arg(long, default_value_t = 2)]
        threads: u64,
        /// What the pure core's own seeds have left here goes into the report: that some were
        /// run, and none violated anything.
        #[arg(long)]
        core: Option<PathBuf>,
        /// Where the figures go.
        #[arg(long)]
        report: Option<PathBuf>,
    },
    /// Walk through one seed: every event, and what was violated.
    Replay {
        /// The seed.
        seed: u64,
        /// Faults that are left out, by number.
        #[arg(long, value_delimiter = ',')]
        without: Vec<usize>,
        /// A fault that is planted in the product.
        #[arg(long)]
        planted: Option<String>,
        /// Wait for Enter after each event.
        #[arg(long)]
        step: bool,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run {
            seeds,
            from,
            threads,
            core,
            report,
        } => {
            let start = Instant::now();
            let core_seeds = match core.as_deref().map_or(Ok(0), core_seeds) {
                Ok(count) => count,
                Err(why) => {
                    println!("the core's seeds were not run: {why}");
                    return ExitCode::FAILURE;
                }
            };
            let figures = Figures::gather(from..from + seeds, threads);
            figures.tell(core_seeds, start.elapsed().as_secs_f64(), report.as_deref())
        }
        Command::Replay {
            seed,
            without,
            planted,
            step,
        } => {
            let planted = planted.map(|name| Fault::named(&name).ok_or(name));
            let planted = match planted.transpose() {
                Ok(planted) => planted,
                Err(name) => {
                    let names: Vec<String> = Fault::ALL.iter().map(|it| it.name()).collect();
                    println!(
                        "`{name}` is no planted fault; there are {}",
                        names.join(", ")
                    );
                    return ExitCode::from(2);
                }
            };
            let options = Options {
                seed,
                without: without.into_iter().collect(),
                planted,
            };
            replay(&options, step)
        }
    }
}

/// How many seeds the core has run.
fn core_seeds(path: &Path) -> Result<u64, String> {
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| told(&error))?;
    let ran: Value = serde_json::from_str(&text).map_err(|error| told(&error))?;
    let count = |name: &str| ran[name].as_u64();
    match (count("seeds"), count("violations")) {
        (Some(seeds), Some(0)) if seeds > 0 => Ok(seeds),
        _ => Err(told(&ran)),
    }
}

/// What came of all seeds.
#[derive(Debug, Default)]
struct Figures {
    seeds: u64,
    faults: u64,
    /// Of one seed, the fewest.
    fewest: Option<usize>,
    violations: u64,
    ends: BTreeMap<String, u64>,
    unknown: BTreeMap<String, u64>,
    /// Each planted fault, with the seed that found it, and what it found.
    planted: BTreeMap<String, Option<(u64, String)>>,
}

impl Figures {
    fn gather(seeds: std::ops::Range<u64>, threads: u64) -> Self {
        let figures = Mutex::new(Self::default());
        let (next_seed, next_fault) = (AtomicU64::new(seeds.start), AtomicUsize::new(0));
        let work = || {
            let alone = || figures.lock().expect("nobody panics with the figures");
            loop {
                let seed = next_seed.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end {
                    break;
                }
                let options = Options {
                    seed,
                    ..Options::default()
                };
                let outcome = run(&options);
                alone().add(&outcome);
                if !outcome.violations.is_empty() {
                    tell_violation(&options, outcome);
                }
            }
            while let Some(fault) = Fault::ALL.get(next_fault.fetch_add(1, Ordering::Relaxed)) {
                if fault.needs_processes() {
                    continue;
                }
                let by = find(*fault);
                let shown = match &by {
                    Some((seed, what)) => format!("found by seed {seed}: {what}"),
                    None => format!("NOT FOUND: nothing broke {}", fault.breaks().join(" or ")),
                };
                println!("planted {}: {shown}", fault.name());
                alone().planted.insert(fault.name(), by);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
        figures
            .into_inner()
            .expect("nobody panics with the figures")
    }

    fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.faults += outcome.faults as u64;
        self.fewest = Some(
            self.fewest
                .map_or(outcome.faults, |it| it.min(outcome.faults)),
        );
        self.violations += outcome.violations.len() as u64;
        for (end, count) in &outcome.ends {
            *self.ends.entry(end.clone()).or_default() += count;
        }
        for (action, count) in &outcome.unknown {
            *self.unknown.entry(action.clone()).or_default() += count;
        }
    }

    fn tell(&self, core_seeds: u64, seconds: f64, report: Option<&Path>) -> ExitCode {
        let caught = self.planted.values().flatten().count();
        let planted = self.planted.iter().map(|(name, by)| {
            let by = by.as_ref();
            let by = by.map(|(seed, what)| json!({"seed": seed, "violation": what}));
            (name.clone(), json!(by))
        });
        let planted: serde_json::Map<String, Value> = planted.collect();
        let figures = json!({
            "seeds": self.seeds,
            "faults": self.faults,
            "violations": self.violations,
            "planted_bugs": self.planted.len(),
            "caught": caught,
            "core_seeds": core_seeds,
            "fewest_faults_of_a_seed": self.fewest,
            "ends": self.ends,
            "unknown": self.unknown,
            "planted": planted,
            "seconds": seconds.round(),
        });
        println!("{figures}");
        let written = report.map_or(Ok(()), |path| {
            std::fs::create_dir_all(path.parent().unwrap_or_else(|| Path::new(".")))?;
            std::fs::write(path, format!("{figures:#}\n"))
        });
        if let Err(error) = written {
            println!("the report cannot be written: {error}");
            return ExitCode::FAILURE;
        }
        let fewest = self.fewest.unwrap_or(0);
        if fewest < EFFECTIVE {
            println!("a seed had only {fewest} faults that took effect, not {EFFECTIVE}");
        }
        if self.violations > 0 || caught < self.planted.len() || fewest < EFFECTIVE {
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }
}

/// The first seed that finds a planted fault, by the promise that it breaks.
fn find(fault: Fault) -> Option<(u64, String)> {
    (0..PLANTED_WITHIN).find_map(|seed| {
        let options = Options {
            seed,
            planted: Some(fault),
            ..Options::default()
        };
        // What is broken without it is no proof.
        let bare = Options {
            planted: None,
            ..options.clone()
        };
        let outcome = run(&options);
        let what = fault.shown(&outcome.violations)?;
        let fine = run(&bare).violations.is_empty();
        fine.then(|| (seed, what.clone()))
    })
}

/// A violation, with the fewest faults that lead to it and how to see it again.
fn tell_violation(options: &Options, first: Outcome) {
    let (least, shortest) = shrink(options, first);
    let without: Vec<String> = least.without.iter().map(ToString::to_string).collect();
    println!("seed {}, its shortest event log:", options.seed);
    for line in &shortest.log {
        println!("  {line}");
    }
    for violation in &shortest.violations {
        println!("seed {}: {violation}", options.seed);
    }
    println!(
        "to walk through it: make sim-replay SEED={} WITHOUT={}",
        options.seed,
        without.join(",")
    );
}

fn replay(options: &Options, step: bool) -> ExitCode {
    let outcome = run(options);
    let mut lines = io::stdin().lock().lines();
    for line in &outcome.log {
        if step {
            print!("{line} ");
            let _ = io::stdout().flush();
            // At the end of the input the rest is shown at once.
            let _ = lines.next();
        } else {
            println!("{line}");
        }
    }
    for violation in &outcome.violations {
        println!("violated: {violation}");
    }
    println!("{} faults, {:?}", outcome.faults, outcome.ends);
    if outcome.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
