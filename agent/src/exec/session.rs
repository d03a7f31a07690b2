//! The controller that is connected: how it is met, whether it is obeyed, and what goes out to it.

use std::collections::VecDeque;

use lockstep_proto::ids::Epoch;
use lockstep_proto::report::Report;
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::{Hello, PROTOCOL_VERSIONS, Welcome};
use lockstep_proto::witness::Head;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Exec, ExecError, Outbound, Refusal, wall_clock};
use crate::faults::planted;
use crate::journal::{AppendError, Need, Record, Seen};

/// How far a term's counter may be ahead of this host's clock, in seconds: ten years. Counters are no
/// more than seconds since 1970; nobody could ever come after one without bounds.
const TERMS_AHEAD: u64 = 10 * 365 * 86_400;

/// A controller that is connected.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) epoch: Epoch,
    pub(super) clock: Clock,
    outbox: mpsc::Sender<Outbound>,
    /// The newest report sent in this session.
    sent: u64,
    /// What goes out before reports.
    pub(super) first: VecDeque<Outbound>,
    /// It was refused, and ends.
    refused: bool,
    /// Why it ends once all reports have gone out.
    last: Option<String>,
}

impl Session {
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

/// A controller's clock, as it was heard at its Welcome.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    pub(super) said: Timestamp,
    heard: Instant,
}

impl Clock {
    pub(super) fn now(self) -> Timestamp {
        let millis = u64::try_from(self.heard.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.said.plus(Period(millis))
    }
}

impl Exec {
    pub(super) fn hello(&self) -> Hello {
        Hello {
            versions: PROTOCOL_VERSIONS,
            host: self.host.config.host.clone(),
            instance: self.instance.clone(),
            boot: self.host.boot.clone(),
            highest_epoch: self.memory.epoch.unwrap_or(Epoch::NONE),
            last_report: self.memory.last_report,
            labels: self.host.config.labels.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            held_rollout: self.memory.hold.as_ref().map(|hold| hold.rollout.clone()),
            acknowledged: self.memory.acknowledged,
        }
    }

    pub(super) fn handle_welcome(
        &mut self,
        welcome: &Welcome,
        outbox: mpsc::Sender<Outbound>,
    ) -> Result<(), ExecError> {
        self.session = Some(Session {
            epoch: welcome.epoch,
            clock: Clock {
                said: welcome.clock,
                heard: Instant::now(),
            },
            outbox,
            sent: welcome.acknowledged,
            first: VecDeque::new(),
            refused: false,
            last: None,
        });
        if planted!(DropLastReport) {
            self.memory.outstanding.pop_back();
        }
        if welcome.acknowledged > self.memory.last_report {
            // INV-2: a loss is detected, never silent.
            if self.is_sealed() == Ok(true) && self.memory.check_epoch(welcome.epoch).is_ok() {
                self.quarantine(welcome.acknowledged)?;
            }
            if self.is_quarantined() {
                return Ok(());
            }
            let why = format!(
                "the controller has {} reports of this agent, its journal has {}: the state \
                 directory was put back to an earlier time, and what was done since is not known \
                 here; move {} aside and start the agent afresh",
                welcome.acknowledged,
                self.memory.last_report,
                self.host.config.state_dir.display()
            );
            self.refuse_session(Refusal::Ahead, why);
            return Ok(());
        }
        let anew = welcome.earlier > 0 && self.memory.is_new();
        if anew && self.memory.check_epoch(welcome.epoch).is_ok() {
            match self.is_sealed() {
                Ok(true) => self.quarantine(welcome.earlier)?,
                Ok(false) => {}
                // Whether this host needs a floor first is not known.
                Err(why) => {
                    self.refuse_session(Refusal::Ahead, why);
                    return Ok(());
                }
            }
        }
        if !self.admit(welcome.epoch)? {
            return Ok(());
        }
        self.handle_acknowledged(welcome.acknowledged);
        tracing::info!(epoch = %welcome.epoch, "connected");
        Ok(())
    }

    pub(super) fn handle_acknowledged(&mut self, number: u64) {
        if number <= self.memory.last_report {
            self.acknowledged |= self.memory.acknowledge(number);
        }
    }

    /// The next records are written with it: it is worth no write of its own.
    pub(super) fn handle_witness(&mut self, head: Head) {
        let Some(session) = &self.session else { return };
        if self.memory.epoch != Some(session.epoch) {
            return;
        }
        let older =
            |seen: &Seen| seen.head.journal == head.journal && seen.head.number >= head.number;
        if self
            .seen
            .as_ref()
            .or(self.memory.seen.as_ref())
            .is_some_and(older)
        {
            return;
        }
        self.seen = Some(Seen {
            term: session.epoch.counter,
            head,
        });
    }

    /// When nothing more comes for a while, what was seen last is written all the same.
    pub(super) fn keep_seen(&mut self) -> Result<(), ExecError> {
        if self.seen.is_none() {
            return Ok(());
        }
        match self.commit(vec![], Need::Opens) {
            Err(AppendError::Full(_)) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Whether a controller of this term may be obeyed; a higher term is durable when this
    /// returns (INV-4).
    pub(super) fn admit(&mut self, epoch: Epoch) -> Result<bool, ExecError> {
        // What came with the message that ended it is not heard either.
        if self.session.as_ref().is_some_and(|session| session.refused) || self.is_quarantined() {
            return Ok(false);
        }
        if let Err(why) = self.memory.check_epoch(epoch) {
            let counter = epoch.counter;
            self.refuse_session(Refusal::Term { counter }, why);
            return Ok(false);
        }
        if let Err(why) = check_ahead(epoch, wall_clock()) {
            let counter = epoch.counter;
            self.refuse_session(Refusal::Term { counter }, why);
            return Ok(false);
        }
        if self
            .session
            .as_ref()
            .is_some_and(|session| session.epoch != epoch)
        {
            let why =
                format!("the controller has welcomed this host with another epoch than {epoch}");
            self.refuse_session(Refusal::OtherTerm, why);
            return Ok(false);
        }
        if planted!(EpochNotWritten) {
            self.memory.epoch = Some(epoch);
        }
        if self.memory.epoch != Some(epoch) {
            self.commit(vec![Record::Epoch(epoch)], Need::Closes)?;
        }
        Ok(true)
    }

    /// Ends the session, once: what else comes in it changes nothing, and a link that does not read
    /// fills no memory.
    pub(super) fn refuse_session(&mut self, kind: Refusal, why: String) {
        if let Some(session) = self.heed_no_more(kind, &why) {
            session.first.push_back(Outbound::Refuse(why));
        }
    }

    /// The same, once all reports have gone out: this controller is obeyed, and shall hear how its
    /// steps have ended, whatever else it asks for.
    pub(super) fn end_session(&mut self, kind: Refusal, why: String) {
        if let Some(session) = self.heed_no_more(kind, &why) {
            session.last = Some(why);
        }
    }

    fn heed_no_more(&mut self, kind: Refusal, why: &str) -> Option<&mut Session> {
        self.session.as_ref().filter(|session| !session.refused)?;
        tracing::error!(why, "the controller is refused");
        self.note_refused(kind);
        let session = self.session.as_mut()?;
        session.refused = true;
        Some(session)
    }

    /// The way out, if there is something to send.
    pub(super) fn outgoing(&self) -> Option<mpsc::Sender<Outbound>> {
        let session = self.session.as_ref()?;
        let waiting = !session.first.is_empty()
            || session.sent < self.memory.last_report
            || session.last.is_some();
        waiting.then(|| session.outbox.clone())
    }

    pub(super) fn next_outbound(&mut self) -> Result<Option<Outbound>, ExecError> {
        let Some(session) = &mut self.session else {
            return Ok(None);
        };
        if let Some(first) = session.first.pop_front() {
            return Ok(Some(first));
        }
        let outstanding = &self.memory.outstanding;
        let index = outstanding.partition_point(|(number, _)| *number <= session.sent);
        let Some((number, position)) = outstanding.get(index).copied() else {
            session.sent = self.memory.last_report;
            return Ok(session.last.take().map(Outbound::Refuse));
        };
        session.sent = number;
        match self.journal.read_linked(position)? {
            (link, Record::Report { number, body }) => {
                let head = Some(crate::audit::head(&self.instance, link));
                let report = Report { number, body, head };
                Ok(Some(Outbound::Report(Box::new(report))))
            }
            (_, other) => unreachable!("{other:?} stands where report {number} was written"),
        }
    }
}

fn check_ahead(epoch: Epoch, wall: Timestamp) -> Result<(), String> {
    if epoch.counter <= (wall.0 / 1000).saturating_add(TERMS_AHEAD) {
        return Ok(());
    }
    Err(format!(
        "the controller claims the term {epoch}, whose counter is years ahead of this host's clock"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_that_nobody_could_come_after_is_refused() {
        // The end of 2026, in milliseconds.
        let wall = Timestamp(1_798_000_000_000);
        let check = |counter| check_ahead(Epoch { counter, id: 1 }, wall);
        check(1).unwrap();
        // One that takes over counts seconds since 1970, by a clock that may be years off.
        check(wall.0 / 1000 + TERMS_AHEAD).unwrap();
        for counter in [wall.0 / 1000 + TERMS_AHEAD + 1, wall.0, u64::MAX] {
            let why = check(counter).unwrap_err();
            assert!(why.contains("years ahead"), "INV-4: {why}");
        }
    }
}
