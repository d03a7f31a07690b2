//! Many cases of one fault: a sample always, and as many as `LOCKSTEP_STORM` says.

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::Value;

fn asked() -> Option<u64> {
    let asked = std::env::var("LOCKSTEP_STORM").ok()?;
    Some(asked.parse().expect("LOCKSTEP_STORM is a number"))
}

/// Runs numbered cases, so many unless asked otherwise. Each has random numbers of its own seed:
/// what fails once fails again.
pub fn storm(sample: u64, mut case: impl FnMut(&str, &mut StdRng)) {
    for seed in 0..asked().unwrap_or(sample) {
        case(&format!("case {seed}"), &mut StdRng::seed_from_u64(seed));
    }
}

/// Writes the figures of a storm that was asked for to `target/reports/NAME.json`.
pub fn figures(name: &str, figures: &Value) {
    if asked().is_none() {
        return;
    }
    let reports = crate::target().join("reports");
    let path = reports.join(format!("{name}.json"));
    std::fs::create_dir_all(&reports).expect("the reports' directory can be made");
    std::fs::write(&path, format!("{figures:#}\n")).expect("a report can be written");
}
