//! `make redteam`: a thief of the controller against a real agent, a hostile agent against a real
//! controller, and hostile load on every socket. The figures go to `target/reports/redteam.json`.
//!
//! `redteam [PART...]` plays only some: `thief`, `liar`, `load`.
#![allow(clippy::print_stdout, reason = "it says what it is at")]

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use lockstep_tests::redteam;
use lockstep_tests::target;
use serde_json::{Value, json};

/// A name, what it is, and what plays it.
type Part = (
    &'static str,
    &'static str,
    fn() -> Result<(Value, Result<()>)>,
);

const PARTS: [Part; 3] = [
    (
        "thief",
        "a thief of the controller, against a real agent",
        redteam::stolen_controller,
    ),
    (
        "liar",
        "a hostile host, against a real controller",
        redteam::hostile_host,
    ),
    (
        "load",
        "hostile load, against a real controller and a real agent's socket",
        || redteam::hostile_load(redteam::WHOLE),
    ),
];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("redteam: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let begun = Instant::now();
    let mut report = json!({});
    let mut good = true;
    let words: Vec<String> = std::env::args().skip(1).collect();
    for (name, title, play) in PARTS {
        if !words.is_empty() && !words.iter().any(|word| word == name) {
            continue;
        }
        println!("redteam: {title}");
        let (figures, judged) = play()?;
        good &= tell(&mut report, figures, judged);
    }
    report["seconds"] = json!(begun.elapsed().as_secs());
    let reports = target().join("reports");
    fs::create_dir_all(&reports)?;
    let path = reports.join("redteam.json");
    fs::write(&path, format!("{report:#}\n"))?;
    println!("redteam: {}", path.display());
    Ok(good)
}

/// Takes figures into the report, and says them and what is wrong.
fn tell(report: &mut Value, figures: Value, judged: Result<()>) -> bool {
    if let (Value::Object(report), Value::Object(figures)) = (report, figures) {
        for (name, value) in figures {
            println!("  {name}: {value}");
            report.insert(name, value);
        }
    }
    match judged {
        Ok(()) => true,
        Err(error) => {
            println!("  FAILED: {error:#}");
            false
        }
    }
}
