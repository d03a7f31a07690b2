//! Records of the journal, written and read.

use std::hint::black_box;

use lockstep_core::Entry;
use lockstep_proto::json;

use super::values::entry;

/// Entries to payloads.
pub(super) fn encode(times: u32) {
    let entry = entry(1);
    for _ in 0..times {
        let payload = serde_json::to_vec(black_box(&entry));
        black_box(payload.expect("it has text as keys"));
    }
}

/// Payloads to entries.
pub(super) fn decode(times: u32) {
    let payload = serde_json::to_vec(&entry(1)).expect("it has text as keys");
    for _ in 0..times {
        let entry: Entry = json::read(black_box(&payload)).expect("just written");
        black_box(entry);
    }
}
