//! `make skew`: fleets of two releases, this one and the previous one (`tests/previous`).
//!
//! `skew [WORD...]` runs only the stories with one of the words in their names.
#![allow(clippy::print_stdout, reason = "it says what it is at")]

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use lockstep_tests::binaries::Binaries;
use lockstep_tests::previous::Previous;
use lockstep_tests::skew::{self, Releases, Story};
use lockstep_tests::target;
use serde_json::{Value, json};

/// Says that it is meant to be left out where the previous release cannot be had.
const LEAVE_OUT: &str = "LOCKSTEP_LEAVE_OUT";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("skew: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let begun = Instant::now();
    let old = match Previous::build(|what| println!("skew: {what}"))? {
        Ok(old) => old,
        Err(why) => {
            write(&json!({"left_out": why}))?;
            println!("skew: ALL OF IT IS LEFT OUT, and nothing was shown: {why}");
            let asked = std::env::var_os(LEAVE_OUT).is_some_and(|value| value == "skew");
            if !asked {
                println!("skew: fetch the whole history, or leave it out with {LEAVE_OUT}=skew");
            }
            return Ok(asked);
        }
    };
    let new = Binaries::find()?;
    let releases = Releases { old, new };
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut stories = skew::all();
    stories.retain(|story| words.is_empty() || words.iter().any(|word| story.name.contains(word)));
    let told: Vec<Value> = stories.iter().map(|story| tell(story, &releases)).collect();
    let failed = told.iter().filter(|story| story["ok"] == false).count();
    let report = json!({
        "previous": releases.old.commit,
        "stories": told,
        "failed": failed,
        "seconds": begun.elapsed().as_secs(),
    });
    write(&report)?;
    println!(
        "skew: {} stories, {failed} failed, {} seconds",
        stories.len(),
        begun.elapsed().as_secs()
    );
    Ok(failed == 0 && !stories.is_empty())
}

fn tell(story: &Story, releases: &Releases) -> Value {
    let begun = Instant::now();
    println!("skew: {}", story.name);
    let told = (story.run)(releases);
    let (saw, failure) = match told {
        Ok(saw) => (saw, None),
        Err(error) => (vec![], Some(format!("{error:#}"))),
    };
    for line in saw.iter().chain(&failure) {
        println!("  {line}");
    }
    let seconds = begun.elapsed().as_secs();
    println!(
        "  {} after {seconds} s",
        if failure.is_none() { "ok" } else { "FAILED" }
    );
    json!({
        "name": story.name,
        "ok": failure.is_none(),
        "saw": saw,
        "failure": failure,
        "seconds": seconds,
    })
}

fn write(report: &Value) -> Result<()> {
    let reports = target().join("reports");
    fs::create_dir_all(&reports)?;
    Ok(fs::write(
        reports.join("skew.json"),
        format!("{report:#}\n"),
    )?)
}
