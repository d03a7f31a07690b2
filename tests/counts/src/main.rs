//! Instructions of the hot paths, held against those that are pinned: whoever makes one dearer
//! hears of it, on any machine and however busy it is.
//!
//! ```text
//! counts                   every path under valgrind, beside pinned.json
//! counts pin               the same, and pinned.json is written anew
//! counts path NAME TIMES   one path so many times; started by the other two
//! ```
//!
//! A path runs twice, with different TIMES: the difference of the instructions by the difference of
//! the times is what one time takes, and what the program does before its path is left out.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it prints what it found"
)]

mod paths;
mod pins;
mod table;
mod valgrind;

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use paths::PATHS;
use pins::{Comparison, Counted, Made, Pins};

// As in the product: what a path allocates is part of what it takes.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("counts: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => compare(),
        ["pin"] => pin(),
        ["path", name, times] => {
            let path = PATHS.iter().find(|path| path.name == *name);
            let path = path.with_context(|| format!("there is no path `{name}`"))?;
            (path.run)(times.parse().context("TIMES is a number")?);
            Ok(true)
        }
        _ => bail!("counts [pin | path NAME TIMES]"),
    }
}

/// Counts every path, and holds it against its pin.
fn compare() -> Result<bool> {
    let pins = Pins::load()?;
    let counted = count()?;
    print!("{}", table::of(&counted, &pins));
    let made = Made::here()?;
    match pins.compare(&made, &counted) {
        Comparison::AsPinned => println!("counts: {} paths are as pinned", counted.len()),
        Comparison::OtherMade => println!(
            "counts: not compared, for the pinned figures are of {}, and these of {made}",
            pins.made
        ),
        Comparison::Off(findings) => {
            for finding in findings {
                println!("FAIL counts: {finding}");
            }
            println!("counts: if this is meant, run `make counts-pin` and commit what it writes");
            return Ok(false);
        }
    }
    Ok(true)
}

/// Counts every path, and pins what it takes.
fn pin() -> Result<bool> {
    let made = Made::here()?;
    let counted = count()?;
    // What was pinned before is of interest, if there is anything.
    if let Ok(before) = Pins::load() {
        print!("{}", table::of(&counted, &before));
    }
    Pins::of(made, &counted).save()?;
    println!("counts: {} paths are pinned", counted.len());
    Ok(true)
}

fn count() -> Result<Vec<Counted>> {
    let count = |path: &paths::Path| -> Result<Counted> {
        Ok(Counted {
            name: path.name,
            instructions: valgrind::of_one_time(path)?,
        })
    };
    PATHS.iter().map(count).collect()
}
