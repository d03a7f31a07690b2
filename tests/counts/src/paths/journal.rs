//! Batches of records, as they go to the store. What the store does with them is left out: its
//! threads do as much of it as their turns allow, and no two machines agree.

use lockstep::fuzzing::Batches;

use super::values::entry;

/// What the driver persists together at most.
const BATCH: usize = 1024;

/// Chains batches of payloads, and makes them into values.
pub(super) fn make(times: u32) {
    let payload = |host| serde_json::to_vec(&entry(host)).expect("it has text as keys");
    let payloads: Vec<Vec<u8>> = (0..BATCH).map(payload).collect();
    let mut batches = Batches::default();
    for _ in 0..times {
        batches.make(&payloads);
    }
}
