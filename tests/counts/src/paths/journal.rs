//! Batches of records, made durable.

use lockstep::fuzzing::OpenJournal;

use super::values::entry;

/// What the driver persists together at most.
const BATCH: usize = 1024;

/// Appends batches to a journal on the disk. The store's own threads are counted with it, and what
/// they take varies.
pub(super) fn append(times: u32) {
    let payload = |host| serde_json::to_vec(&entry(host)).expect("it has text as keys");
    let payloads: Vec<Vec<u8>> = (0..BATCH).map(payload).collect();
    let state = tempfile::tempdir().expect("a directory can be made");
    let mut journal = OpenJournal::at(state.path());
    for _ in 0..times {
        journal.append(&payloads);
    }
}
