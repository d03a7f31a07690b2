//! What was counted, as people read it.

use std::fmt::Write as _;

use crate::pins::{Counted, Pins};

/// Each path with its figure, the pinned one, and the ratio of the two.
pub(crate) fn of(counted: &[Counted], pins: &Pins) -> String {
    let mut table = row("path", "instructions", "pinned", "ratio");
    for path in counted {
        let pinned = pins.of_path(path.name);
        let ratio = pinned.map(|pinned| format!("{:.3}", path.ratio(pinned)));
        table += &row(
            path.name,
            &path.instructions.to_string(),
            &pinned.map_or_else(|| "-".to_owned(), |pinned| pinned.to_string()),
            &ratio.unwrap_or_else(|| "-".to_owned()),
        );
    }
    table
}

fn row(path: &str, instructions: &str, pinned: &str, ratio: &str) -> String {
    let mut row = String::new();
    writeln!(row, "{path:<16}{instructions:>14}{pinned:>14}{ratio:>9}").expect("into memory");
    row
}
