//! What a controller knows, out of its journal. One thread reads and decodes while another folds:
//! nobody is orchestrated until both are through.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use lockstep_core::{Config, Coordinator, Entry};
use lockstep_proto::ids::PlanDigest;
use lockstep_proto::json;
use lockstep_proto::seal::SealedPlan;

use super::StartError;
use crate::faults::planted;
use crate::journal::Journal;

/// Entries that are handed over together, and how many such parts may wait to be folded: a few
/// megabytes.
const PART: usize = 512;
const PARTS: usize = 8;

/// Folds the whole journal. `plan` finds compiled plans.
pub(super) fn fold(
    journal: &mut dyn Journal,
    config: Config,
    plan: impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
) -> Result<Coordinator, StartError> {
    let (sender, parts) = sync_channel(PARTS);
    // Faults are planted for a thread.
    let forget_last = planted!(ForgetLastRecord);
    thread::scope(|scope| {
        let reading = scope.spawn(move || read(journal, &sender, forget_last));
        let folded = Coordinator::recover(config, parts.into_iter().flatten(), plan);
        // What could not be read comes before what could not be folded without it.
        reading
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok(folded?)
    })
}

fn read(
    journal: &mut dyn Journal,
    parts: &SyncSender<Vec<Entry>>,
    forget_last: bool,
) -> Result<(), StartError> {
    let first = journal.base().number + 1;
    let mut part = Vec::with_capacity(PART);
    for (payload, number) in journal.payloads().zip(first..) {
        let entry = json::read(&payload?);
        let entry = entry.map_err(|source| StartError::Record { number, source })?;
        if part.len() == PART {
            let full = std::mem::replace(&mut part, Vec::with_capacity(PART));
            // Nobody folds any more: that has failed, and says why.
            if parts.send(full).is_err() {
                return Ok(());
            }
        }
        part.push(entry);
    }
    if forget_last {
        part.pop();
    }
    let _ = parts.send(part);
    Ok(())
}
