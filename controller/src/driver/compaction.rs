//! A start reads the whole journal, so a journal that has grown long is made shorter while the
//! controller runs: rollouts that have ended go into an archive, as `lockstep journal compact` does it.
//!
//! ```text
//! calm for a while -> another thread: archive, shorter journal beside the journal
//!   -> nothing recorded since? the two change places, and the driver lets go of what went out
//!   -> else what was made is thrown away, and made again later
//! ```
//!
//! Certificates of a large fleet are renewed all the time: that is no unrest, and waits meanwhile.
//! The driver itself waits for the comparison and the exchange: no longer than a start on what stays.

use std::error::Error;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lockstep_core::Event;
use lockstep_core::coordinator::HostInfo;
use lockstep_proto::values::{Period, Timestamp};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::handle::{Asker, Input};
use super::{Driver, DriverError};
use crate::journal::compact::{CompactError, Outgoing, Prepared, prepare};
use crate::journal::{Head, Journal};

/// A controller is calm if hardly anything was recorded for so long: then probably nothing is while
/// the journal is compacted, and whoever waited for the end of a rollout knows it.
const CALM: Duration = Duration::from_secs(15);

/// Hardly anything, in records; renewed certificates do not count.
const HARDLY_ANY: u64 = 64;

/// A certificate that lives for as long as this can be renewed later: an agent that is not answered
/// for 20 seconds asks again within a minute.
const CAN_WAIT: Period = Period::seconds(3 * 60);

/// Renewals that wait at once.
const WAITING: usize = 1024;

/// After one that came to nothing the next one begins so much later.
const AGAIN: Duration = Duration::from_mins(1);

/// After the next one that came to nothing twice that, and so on, up to this.
const AGAIN_AT_MOST: Duration = Duration::from_hours(1);

/// When the journal is compacted, and what is being done about it.
#[derive(Debug)]
pub(super) struct Compaction {
    /// The journal may have so many records; none: it is never compacted.
    above: Option<u64>,
    /// The records, without renewals, when it was last calm or began to be, and since when it is.
    newest: u64,
    since: Instant,
    /// After one that came to nothing: not before then, and how long that was.
    not_before: Instant,
    waited: Duration,
    running: Option<Running>,
    /// Certificates that were renewed by this process.
    renewed: u64,
    /// What was asked for while it is compacted, and is answered afterwards.
    waiting: Vec<(Event, Asker)>,
}

/// Compacting writes the whole journal once more: that is worth it if no more of so many records stay.
fn worth(records: u64) -> u64 {
    records / 4 * 3
}

/// A compaction on its thread.
#[derive(Debug)]
struct Running {
    /// The newest record that it takes along.
    head: Head,
    prepared: oneshot::Receiver<Result<Prepared, CompactError>>,
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Compaction {
    pub(super) fn new(above: Option<u64>, journal: &mut dyn Journal) -> Self {
        let now = Instant::now();
        Self {
            above: above.filter(|_| journal.compactable().is_some()),
            newest: 0,
            since: now,
            not_before: now,
            waited: Duration::ZERO,
            running: None,
            renewed: 0,
            waiting: vec![],
        }
    }

    /// When one begins, if it is calm until then; none if the journal is short.
    pub(super) fn at(&self, journal: &dyn Journal) -> Option<Instant> {
        let records = journal.head().number - journal.base().number;
        let due = records > self.above? && self.running.is_none();
        due.then(|| self.not_before.max(self.since + CALM))
    }

    /// A certificate's renewal was recorded.
    pub(super) fn count_renewed(&mut self) {
        self.renewed += 1;
    }

    /// Whether to answer this once the journal is compacted: that would be in vain otherwise.
    pub(super) fn can_wait(&self, event: &Event, head: Head, now: Timestamp) -> bool {
        let (Event::Renew { parent_ends, .. }, Some(running)) = (event, &self.running) else {
            return false;
        };
        let compacts = self.above.is_some() && running.head == head;
        compacts && self.waiting.len() < WAITING && parent_ends.since(now) > CAN_WAIT
    }

    /// Has it wait.
    pub(super) fn wait(&mut self, event: Event, answer: Asker) {
        self.waiting.retain(|(_, answer)| !answer.is_closed());
        self.waiting.push((event, answer));
    }

    /// What has waited, and is still waited for.
    pub(super) fn answered_now(&mut self) -> impl Iterator<Item = Input> {
        let waited = self.waiting.drain(..);
        let waited = waited.filter(|(_, answer)| !answer.is_closed());
        waited.map(|(event, answer)| Input::Ask { event, answer })
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

    /// Nothing is begun any more, and what is being done comes to nothing, soon.
    pub(super) fn give_up(&mut self) {
        self.above = None;
        if let Some(running) = &self.running {
            running.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Ends what is being done: nobody else has the journal afterwards. Answers with what came of it.
    pub(super) fn end(&mut self) -> Option<CompactError> {
        self.give_up();
        let mut running = self.running.take()?;
        // A panic is in the log.
        let _ = running.thread.join();
        match running.prepared.try_recv().ok()? {
            Ok(prepared) => {
                prepared.discard();
                None
            }
            Err(error) => Some(error),
        }
    }

    fn try_again_after(&mut self, wait: Duration) {
        self.waited = wait.clamp(AGAIN, AGAIN_AT_MOST);
        self.not_before = Instant::now() + self.waited;
    }

    fn not_worth_it(&mut self) {
        self.try_again_after(self.waited * 2);
        tracing::info!(
            again_in_s = self.waited.as_secs(),
            "the journal has grown long, and hardly anything of it may go out"
        );
    }

    fn failed(&mut self, error: &CompactError) {
        self.try_again_after(self.waited * 2);
        let error = error as &dyn Error;
        tracing::error!(
            error,
            again_in_s = self.waited.as_secs(),
            "the journal has grown long, and could not be compacted; it is as it was"
        );
    }
}

impl Driver {
    /// Begins a compaction if it is time for one.
    pub(super) fn look_at_length(&mut self) {
        let now = Instant::now();
        let compaction = &mut self.compaction;
        let newest = self.journal.head().number - compaction.renewed;
        if newest - compaction.newest > HARDLY_ANY {
            (compaction.newest, compaction.since) = (newest, now);
        }
        if compaction.at(&*self.journal).is_none_or(|at| at > now) {
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
            compaction.not_worth_it();
            return Ok(());
        }
        if self.full || !source.has_room()? {
            return Err(CompactError::NoRoom(source.state()));
        }
        // If most of the records are of hosts, that is found out on the way.
        let at_most = usize::try_from(worth(records)).unwrap_or(usize::MAX);
        let outgoing = Outgoing::new(&self.coordinator, &source, &rollouts);
        let plans = self.coordinator.plans();
        let (head, stop) = (source.head, source.stopper());
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
            head,
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
            Ok(prepared) if self.compaction.above.is_none() => {
                prepared.discard();
                return Ok(());
            }
            Ok(prepared) if prepared.archived == self.journal.head() => prepared,
            Ok(outdated) => {
                outdated.discard();
                tracing::info!(
                    "the journal has grown long, and is compacted later: something was recorded \
                     meanwhile"
                );
                self.compaction.try_again_after(self.compaction.waited * 2);
                return Ok(());
            }
            Err(CompactError::InVain) => {
                self.compaction.not_worth_it();
                return Ok(());
            }
            Err(_) if self.compaction.above.is_none() => return Ok(()),
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
            // The journal has what the archive has. It cannot be exchanged the next time either.
            let _ = fs::remove_file(archive);
            self.compaction.above = None;
            return Ok(());
        }
        self.compaction.waited = Duration::ZERO;
        let records = prepared.records;
        let archived = prepared.into_archived();
        tracing::info!(
            archive = %archive.display(),
            rollouts = archived.len(),
            records,
            "the journal had grown long: rollouts that have ended went into an archive"
        );
        self.coordinator.archive(archived);
        let newest = self.journal.head().number - self.compaction.renewed;
        (self.compaction.newest, self.compaction.since) = (newest, Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
