//! The paths that are counted: what the controller does for each order, report, record and event of
//! a fleet of thousands.
//!
//! A path makes its input before anything else, and the same whatever TIMES is.

mod fold;
mod journal;
mod records;
mod values;
mod wire;

/// One path.
pub(crate) struct Path {
    /// Its name.
    pub(crate) name: &'static str,
    /// Runs it so many times.
    pub(crate) run: fn(u32),
    /// The smaller number of times that it runs.
    pub(crate) few: u32,
    /// The larger one: the more it is, the less a start that differs a little weighs.
    pub(crate) many: u32,
}

/// All of them.
pub(crate) const PATHS: [Path; 7] = [
    path("order_encode", wire::encode_orders, 1_000, 11_000),
    path("report_decode", wire::decode_reports, 1_000, 6_000),
    path("report_fold", fold::fold_reports, 100, 900),
    path("record_encode", records::encode, 1_000, 11_000),
    path("record_decode", records::decode, 1_000, 6_000),
    path("event", wire::encode_events, 1_000, 21_000),
    path("journal_batch", journal::make, 5, 25),
];

const fn path(name: &'static str, run: fn(u32), few: u32, many: u32) -> Path {
    Path {
        name,
        run,
        few,
        many,
    }
}

/// A number of times, where a number of things is meant.
fn number(times: u32) -> usize {
    times.try_into().expect("a machine of 32 bits at least")
}
