//! The pinned figures, and what is said of those that are not as pinned.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// How far a path may be from its pin, in percent.
const BOUND: u64 = 3;

/// What decides which instructions the same source becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// What `rustc --version` says.
    compiler: String,
    /// The kind of processor.
    machine: String,
}

impl Made {
    /// This compiler, on this machine.
    pub(crate) fn here() -> Result<Self> {
        let output = Command::new("rustc").arg("--version").output();
        let output = output.context("rustc cannot be asked for its version")?;
        ensure!(output.status.success(), "rustc --version failed");
        let said = String::from_utf8(output.stdout).context("rustc's version is text")?;
        Ok(Self {
            compiler: said.trim().to_owned(),
            machine: std::env::consts::ARCH.to_owned(),
        })
    }
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.compiler, self.machine)
    }
}

/// What one time of a path takes.
#[derive(Debug)]
pub(crate) struct Counted {
    /// The path's name.
    pub(crate) name: &'static str,
    /// So many instructions.
    pub(crate) instructions: u64,
}

impl Counted {
    /// How much of the pinned figure it is.
    #[expect(clippy::cast_precision_loss, reason = "a ratio is for people")]
    pub(crate) fn ratio(&self, pinned: u64) -> f64 {
        self.instructions as f64 / pinned as f64
    }

    /// Whether it is further from its pin than it may be.
    fn is_off(&self, pinned: u64) -> bool {
        self.instructions.abs_diff(pinned) * 100 > pinned * BOUND
    }
}

/// What comes of holding figures against the pinned ones.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// Nothing: another compiler, or another kind of processor, makes other instructions.
    OtherMade,
    /// Every path is within its bound.
    AsPinned,
    /// Some are not: a line for each.
    Off(Vec<String>),
}

/// `pinned.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pins {
    /// What the figures were made with.
    pub(crate) made: Made,
    /// One time of each path.
    instructions: BTreeMap<String, u64>,
}

impl Pins {
    /// Pins these figures.
    pub(crate) fn of(made: Made, counted: &[Counted]) -> Self {
        let figures = counted.iter();
        let instructions = figures
            .map(|path| (path.name.to_owned(), path.instructions))
            .collect();
        Self { made, instructions }
    }

    /// What is pinned for a path.
    pub(crate) fn of_path(&self, name: &str) -> Option<u64> {
        self.instructions.get(name).copied()
    }

    /// Holds figures against the pinned ones, where both were made with the same.
    pub(crate) fn compare(&self, made: &Made, counted: &[Counted]) -> Comparison {
        if *made != self.made {
            return Comparison::OtherMade;
        }
        let findings = self.findings(counted);
        if findings.is_empty() {
            Comparison::AsPinned
        } else {
            Comparison::Off(findings)
        }
    }

    /// Whatever is not as pinned, a line for each. Cheaper paths are among them: under a pin that is
    /// too high, the next change could make them dearer again unseen.
    fn findings(&self, counted: &[Counted]) -> Vec<String> {
        let of_path = |path: &Counted| {
            let name = path.name;
            let Some(pinned) = self.of_path(name) else {
                return Some(format!("{name} has no pinned figure"));
            };
            path.is_off(pinned).then(|| {
                let way = if path.instructions > pinned {
                    "dearer"
                } else {
                    "cheaper"
                };
                let percent = (path.ratio(pinned) - 1.0).abs() * 100.0;
                format!("{name} is {percent:.1} % {way} than pinned, and {BOUND} % is allowed")
            })
        };
        let gone = |name: &&String| counted.iter().all(|path| path.name != name.as_str());
        let gone = self.instructions.keys().filter(gone);
        let gone = gone.map(|name| format!("{name} is pinned, and no path any more"));
        counted.iter().filter_map(of_path).chain(gone).collect()
    }

    /// What the repository has.
    pub(crate) fn load() -> Result<Self> {
        let file = file();
        let name = || file.display().to_string();
        let text = fs::read(&file).with_context(name)?;
        serde_json::from_slice(&text).with_context(name)
    }

    /// Writes them into the repository.
    pub(crate) fn save(&self) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        let file = file();
        fs::write(&file, text).with_context(|| file.display().to_string())
    }
}

fn file() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "pinned.json"].iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(compiler: &str) -> Made {
        Made {
            compiler: compiler.to_owned(),
            machine: "x86_64".to_owned(),
        }
    }

    fn counted(instructions: u64) -> Counted {
        Counted {
            name: "fold",
            instructions,
        }
    }

    /// Against a pin of 10,000, with the compiler that the pin was made with.
    fn compared(instructions: u64) -> Comparison {
        let pins = Pins::of(made("rustc 1.95.0"), &[counted(10_000)]);
        pins.compare(&made("rustc 1.95.0"), &[counted(instructions)])
    }

    fn off(finding: &str) -> Comparison {
        Comparison::Off(vec![finding.to_owned()])
    }

    #[test]
    fn what_is_within_the_bound_is_as_pinned() {
        for instructions in [9_700, 10_000, 10_300] {
            assert_eq!(compared(instructions), Comparison::AsPinned);
        }
    }

    #[test]
    fn a_path_that_is_dearer_is_found() {
        let dearer = off("fold is 5.0 % dearer than pinned, and 3 % is allowed");
        assert_eq!(compared(10_500), dearer);
        assert!(matches!(compared(10_301), Comparison::Off(_)));
    }

    #[test]
    fn a_path_that_is_cheaper_wants_a_new_pin() {
        let cheaper = off("fold is 50.0 % cheaper than pinned, and 3 % is allowed");
        assert_eq!(compared(5_000), cheaper);
        assert!(matches!(compared(9_699), Comparison::Off(_)));
    }

    #[test]
    fn figures_of_another_compiler_or_machine_are_not_compared() {
        let pins = Pins::of(made("rustc 1.95.0"), &[counted(10_000)]);
        let other = [
            made("rustc 1.96.0"),
            Made {
                machine: "aarch64".to_owned(),
                ..made("rustc 1.95.0")
            },
        ];
        for other in other {
            let compared = pins.compare(&other, &[counted(20_000)]);
            assert_eq!(compared, Comparison::OtherMade);
        }
    }

    #[test]
    fn a_path_without_a_pin_and_a_pin_without_a_path_are_found() {
        let other = Counted {
            name: "event",
            ..counted(1)
        };
        let pins = Pins::of(made("rustc 1.95.0"), &[counted(10_000)]);
        assert_eq!(
            pins.findings(&[other]),
            [
                "event has no pinned figure",
                "fold is pinned, and no path any more"
            ]
        );
    }

    #[test]
    fn the_repository_pins_every_path_and_no_other() {
        let pins = Pins::load().unwrap();
        let pinned = pins.instructions.keys().map(String::as_str);
        let mut paths = crate::paths::PATHS.map(|path| path.name);
        paths.sort_unstable();
        assert_eq!(pinned.collect::<Vec<&str>>(), paths);
    }
}
