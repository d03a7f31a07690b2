//! A start reads the whole journal, so a journal that has grown long is made shorter while the
//! controller runs: rollouts that have ended go into an archive, as `lockstep journal compact` does it.
//!
//! ```text
//! nothing recorded for a while -> another thread: archive, shorter journal beside the journal
//!   -> nothing recorded since? the two change places, and the driver lets go of what went out
//!   -> else what was made is thrown away, and made again later
//! ```
//!
//! The driver itself waits only for the exchange, which takes as long as a start on what stays.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lockstep_core::coordinator::HostInfo;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Driver, DriverError};
use crate::journal::Journal;
use crate::journal::compact::{CompactError, Outgoing, Prepared, prepare};

/// Nothing was recorded for so long: probably nothing is while the journal is compacted.
const QUIET: Duration = Duration::from_secs(5);

/// After one that came to nothing the next one begins so much later, and twice that after the
/// next one, and so on.
const AGAIN: Duration = Duration::from_mins(1);
const AGAIN_AT_MOST: Duration = Duration::from_hours(6);

/// When the journal is compacted, and what is being done about it.
#[derive(Debug)]
pub(super) struct Compaction {
    /// The journal may have so many records; none: it is never compacted.
    above: Option<u64>,
    /// Of what it had when that was last looked at, so much stayed, or would have.
    stayed: u64,
    /// The newest record when somebody last looked, and since when it is.
    newest: u64,
    since: Instant,
    /// After one that came to nothing: not before then, and how long that was.
    not_before: Instant,
    waited: Duration,
    running: Option<Running>,
}

/// Compacting writes the whole journal once more: that is worth it if no more of so many records stay.
fn worth(records: u64) -> u64 {
    records / 4 * 3
}

/// A compaction on its thread.
#[derive(Debug)]
struct Running {
    prepared: oneshot::Receiver<Result<Prepared, CompactError>>,
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Compaction {
    pub(super) fn new(above: Option<u64>, journal: &mut dyn Journal) -> Self {
        let now = Instant::now();
        Self {
            above: above.filter(|_| journal.compactable().is_some()),
            stayed: 0,
            newest: 0,
            since: now,
            not_before: now,
            waited: Duration::ZERO,
            running: None,
        }
    }

    /// When one begins, if nothing is recorded until then; none if the journal is short.
    pub(super) fn at(&self, journal: &dyn Journal) -> Option<Instant> {
        let records = journal.head().number - journal.base().number;
        let worth_it = self.stayed <= worth(records) && self.running.is_none();
        let due = records > self.above? && worth_it;
        due.then(|| self.not_before.max(self.since + QUIET))
    }

    /// Waits for the thread, if there is one.
    pub(super) async fn prepared(&mut self) -> Result<Prepared, CompactError> {
        let Some(running) = &mut self.running else {
            return std::future::pending().await;
        };
        let prepared = (&mut running.prepared).await;
        self.running = None;
        // A thread that says nothing has panicked.
        prepared.unwrap_or(Err(CompactError::Thread))
    }

    /// Ends what is being done: nobody else has the journal afterwards.
    pub(super) fn end(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop.store(true, Ordering::Relaxed);
            // What it says is in the log.
            let _ = running.thread.join();
        }
    }

    /// Nothing was changed; the next one is tried later.
    fn came_to_nothing(&mut self) {
        self.stayed = 0;
        self.waited = (self.waited * 2).clamp(AGAIN, AGAIN_AT_MOST);
        self.not_before = Instant::now() + self.waited;
    }

    fn failed(&mut self, error: &CompactError) {
        self.came_to_nothing();
        let error = error as &dyn Error;
        tracing::error!(
            error,
            "the journal has grown long, and could not be compacted; it is as it was"
        );
    }
}

impl Driver {
    /// Begins a compaction if it is time for one.
    pub(super) fn look_at_length(&mut self) {
        let (newest, now) = (self.journal.head().number, Instant::now());
        let compaction = &mut self.compaction;
        if newest != compaction.newest {
            (compaction.newest, compaction.since) = (newest, now);
        }
        if compaction.at(&*self.journal).is_none_or(|at| at > now) {
            return;
        }
        if self.full {
            compaction.came_to_nothing();
            return;
        }
        if let Err(error) = self.begin_compaction() {
            self.compaction.failed(&error);
        }
    }

    fn begin_compaction(&mut self) -> Result<(), CompactError> {
        let compaction = &mut self.compaction;
        let (Some(above), Some(journal)) = (compaction.above, self.journal.compactable()) else {
            return Ok(());
        };
        let source = journal.source()?;
        let records = source.count();
        // The other half is for what comes.
        let rollouts = self.coordinator.outgrown(self.clock.now(), above / 2);
        let stays = self.coordinator.records_but_of(&rollouts);
        if stays > worth(records) {
            compaction.stayed = stays;
            return Ok(());
        }
        // If most of the records are of hosts, that is found out on the way.
        let at_most = usize::try_from(worth(records)).unwrap_or(usize::MAX);
        compaction.stayed = records;
        let outgoing = Outgoing::new(&self.coordinator, &source, &rollouts);
        let plans = self.coordinator.plans();
        let stop = source.stopper();
        // An earlier release that can read it can read it afterwards.
        let layout = source.layout;
        let (sender, prepared) = oneshot::channel();
        let run = move || {
            let plan = |digest| plans.get(&digest).cloned();
            // Whoever waited for it may have ended.
            let _ = sender.send(prepare(source, outgoing, layout, &plan, at_most));
        };
        let thread = thread::Builder::new().name("compaction".to_owned());
        let thread = thread.spawn(run).map_err(|_| CompactError::Thread)?;
        compaction.running = Some(Running {
            prepared,
            thread,
            stop,
        });
        Ok(())
    }

    /// Goes on with the shorter journal, if it is there and is still all of the longer one.
    pub(super) fn end_compaction(
        &mut self,
        prepared: Result<Prepared, CompactError>,
    ) -> Result<(), DriverError> {
        let prepared = match prepared {
            Ok(prepared) if prepared.archived == self.journal.head() => prepared,
            Ok(outdated) => {
                outdated.discard();
                self.compaction.came_to_nothing();
                return Ok(());
            }
            Err(CompactError::InVain) => return Ok(()),
            Err(error) => {
                self.compaction.failed(&error);
                return Ok(());
            }
        };
        let published = prepared.check(&self.coordinator, HostInfo::as_recorded);
        let archive = match published.and_then(|()| prepared.publish()) {
            Ok(archive) => archive,
            Err(error) => {
                prepared.discard();
                self.compaction.failed(&error);
                return Ok(());
            }
        };
        let journal = self.journal.compactable().expect("it was compacted");
        journal.exchange().map_err(DriverError::Compaction)?;
        if self.journal.base() != prepared.archived {
            self.compaction.came_to_nothing();
            return Ok(());
        }
        self.compaction.stayed = prepared.records;
        self.compaction.waited = Duration::ZERO;
        let archived = prepared.into_archived();
        tracing::info!(
            archive = %archive.display(),
            rollouts = archived.len(),
            records = self.compaction.stayed,
            "the journal had grown long: rollouts that have ended went into an archive"
        );
        self.coordinator.archive(archived);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
