//! The one task that owns the coordinator and the journal.
//!
//! ```text
//! sessions, operators, notices, the clock -> batch of inputs
//!   -> Coordinator::handle, each
//!   -> Journal::append, once for all of them        INV-2 persisted before sent
//!   -> messages to agents, notices, events, answers, reads; in this order
//! ```
//!
//! It runs on a thread of its own, because an append waits for the disk. If one fails, the driver
//! ends without sending anything of that batch, and the process with it; the next process folds
//! what was persisted.

mod admission;
mod clock;
mod compaction;
mod dues;
mod handle;
mod rates;
mod recovery;
mod room;
mod round;
mod term;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lockstep_core::event::EventKind;
use lockstep_core::trust::{Subject, TrustRecord};
use lockstep_core::{Config, Coordinator, Event, Notify, Record, RecoverError};
use lockstep_proto::ids::{Epoch, HostId, PlanDigest};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1 as wire;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::api::convert;
use crate::faults::planted;
use crate::hub::Hub;
use crate::journal::{AppendError, Journal, OpenError};
use crate::session::registry::Registry;
use crate::suspensions::Suspensions;
pub(crate) use clock::wall_clock;
use clock::{Alarm, Clock};
use compaction::Compaction;
use dues::Dues;
use handle::{Asker, Input};
pub(crate) use handle::{Handle, Stopping};
use rates::Rates;
use round::Round;
pub(crate) use term::taken_over;

/// Inputs that wait for the driver. When it is full, sessions stop reading from their sockets,
/// and HTTP/2's flow control holds the agents back: enough for every tenth of 10,000 agents.
const INPUTS: usize = 1024;

/// Inputs that are persisted together. One batch of 1,024 reports takes about 10 ms on the disk;
/// larger ones would make operators wait.
const BATCH: usize = 1024;

/// A driver that wakes up this much later than it meant to was stopped: the machine, or the
/// process. Agents notice after ten seconds that a controller is gone.
const AWAY: Duration = Duration::from_secs(5);

/// After `Drain`, agents wait at least this long before they dial again.
const RECONNECT_AFTER_MS: u32 = 1000;

/// Why the driver ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriverError {
    /// A batch could not be made durable; nothing of it was sent.
    #[error("a batch could not be made durable, so the controller stops")]
    Append(#[from] AppendError),
    /// Agents have obeyed a newer controller (INV-4).
    #[error("{}", term::superseded(.host, *.theirs, *.ours))]
    Superseded {
        /// The host.
        host: HostId,
        /// The term that its agent has seen.
        theirs: Epoch,
        /// The term of this controller.
        ours: Epoch,
    },
    /// Agents were told of more reports that are durable than this journal has (INV-2).
    #[error(
        "{host} was told that its reports up to {theirs} are durable, and this journal has those \
         up to {ours}: the state directory is an older copy, and what was recorded since is not \
         in it. Nothing was sent to {host}. Put the newest state directory in its place; or, if \
         there is none, start with `--take-over`, which goes on and names what is lost"
    )]
    Outdated {
        /// The host.
        host: HostId,
        /// What its agent was told.
        theirs: u64,
        /// What this journal has.
        ours: u64,
    },
    /// A compacted journal is there, or the one before it; it could not be opened.
    #[error("the journal that was compacted cannot be opened; start the controller again")]
    Compaction(#[source] OpenError),
    /// The thread could not be started, or ended by a panic.
    #[error("the driver's thread has failed: {0}")]
    Thread(String),
}

/// Why a controller cannot go on from its journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// A record of a newer release, or none at all.
    #[error("record {number} of the journal cannot be read by this release")]
    Record {
        /// Its number.
        number: u64,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The records do not fit together.
    #[error(transparent)]
    Recover(#[from] RecoverError),
}

/// What a driver is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    /// The journal, open.
    pub(crate) journal: Box<dyn Journal>,
    /// Live events.
    pub(crate) hub: Hub,
    /// Notices on their way to be sent.
    pub(crate) notices: mpsc::Sender<Notify>,
    /// Who is suspended, for whoever lets people in.
    pub(crate) suspensions: Arc<Suspensions>,
    /// The new term's counter is above this, and above the journal's last one.
    pub(crate) epoch_above: u64,
    /// Whether this one goes on in the place of another one that may still be alive, or from an
    /// older copy of the state.
    pub(crate) take_over: bool,
    /// The group two of whom may break the glass of a gate.
    pub(crate) break_glass: Option<String>,
    /// Who is suspended before anybody is let in.
    pub(crate) suspend: Vec<Subject>,
    /// The journal is compacted once it has more records than this; none: never.
    pub(crate) compact_above: Option<u64>,
}

/// The driver, before it runs.
#[derive(Debug)]
pub(crate) struct Driver {
    coordinator: Coordinator,
    journal: Box<dyn Journal>,
    sessions: Registry,
    hub: Hub,
    notices: mpsc::Sender<Notify>,
    suspensions: Arc<Suspensions>,
    clock: Clock,
    alarm: Alarm,
    epoch: Epoch,
    /// Whether to say in the journal that this term took over.
    take_over: bool,
    /// Whom to suspend before anything else.
    suspend: Vec<Subject>,
    draining: bool,
    stopping: bool,
    /// The journal's disk is full: nothing new begins.
    full: bool,
    /// Hosts that say that this controller is not the newest one.
    doubted_by: BTreeSet<HostId>,
    rates: Rates,
    dues: Dues,
    compaction: Compaction,
    /// Events that the driver owes itself.
    own: VecDeque<Event>,
}

impl Driver {
    /// Recovers the state from the journal and begins a new term. `plan` finds compiled plans.
    pub(crate) fn recover(
        parts: Parts,
        plan: impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
    ) -> Result<Self, StartError> {
        let Parts {
            mut journal,
            hub,
            notices,
            suspensions,
            epoch_above,
            take_over,
            break_glass,
            suspend,
            compact_above,
        } = parts;
        // The term follows from what is found.
        let config = Config {
            epoch: Epoch::NONE,
            break_glass,
        };
        let mut coordinator = recovery::fold(&mut *journal, config, plan)?;
        let clock = Clock::starting_at(coordinator.last_at());
        let last_term = coordinator.last_epoch().map_or(0, |term| term.counter);
        let last_term = last_term.max(epoch_above);
        let epoch = Epoch {
            counter: if take_over {
                taken_over(last_term, clock.now())
            } else {
                last_term.saturating_add(1)
            },
            id: any_number(),
        };
        coordinator.begin_term(epoch);
        let head = journal.head().number;
        tracing::info!(journal = %journal.id(), head, %epoch, "recovered");
        // Before anybody can connect.
        for host in coordinator.trust().joined() {
            suspensions.set_granted(host, coordinator.trust().granted(host));
        }
        suspensions.set(coordinator.trust().banned());
        let compaction = Compaction::new(compact_above, &mut *journal);
        Ok(Self {
            coordinator,
            journal,
            sessions: Registry::default(),
            hub,
            notices,
            suspensions,
            clock,
            alarm: Alarm::default(),
            epoch,
            take_over,
            suspend,
            draining: false,
            stopping: false,
            full: false,
            doubted_by: BTreeSet::new(),
            rates: Rates::default(),
            dues: Dues::default(),
            compaction,
            own: VecDeque::new(),
        })
    }

    /// Runs the driver on a thread of its own until it is stopped. What it ended with comes out
    /// of the receiver; nothing at all after a panic.
    pub(crate) fn spawn(self) -> (Handle, oneshot::Receiver<Result<(), DriverError>>) {
        let (inputs, receiver) = mpsc::channel(INPUTS);
        let (ended, end) = oneshot::channel();
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build();
            let result = match runtime {
                Ok(runtime) => runtime.block_on(self.run(receiver)),
                Err(error) => Err(DriverError::Thread(error.to_string())),
            };
            // Who started the driver may have stopped waiting for it.
            let _ = ended.send(result);
        };
        let thread = thread::Builder::new().name("driver".to_owned());
        match thread.spawn(run) {
            Ok(_) => (Handle { inputs }, end),
            Err(error) => {
                // `ended` went with the closure, so a new pair tells.
                let (failed, end) = oneshot::channel();
                let _ = failed.send(Err(DriverError::Thread(error.to_string())));
                (Handle { inputs }, end)
            }
        }
    }

    /// The driver in the task that polls it, where the test has all of time in its hand.
    #[cfg(feature = "faults")]
    pub(crate) fn here(self) -> (Handle, impl Future<Output = Result<(), DriverError>>) {
        let (inputs, receiver) = mpsc::channel(INPUTS);
        (Handle { inputs }, self.run(receiver))
    }

    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), DriverError> {
        let round = self.begin();
        self.finish(round)?;

        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let asleep = Instant::now();
            let wakes = [
                self.wake_at(),
                self.dues.at(),
                self.compaction.at(&*self.journal),
            ];
            let wake = wakes.into_iter().flatten().min();
            let mut compacted = None;
            tokio::select! {
                // A round looks at deadlines, whatever began it.
                biased;
                prepared = self.compaction.prepared() => compacted = Some(prepared),
                received = inputs.recv_many(&mut batch, BATCH), if self.own.is_empty() => {
                    if received == 0 {
                        break;
                    }
                }
                () = sleep_until(wake) => {}
                () = std::future::ready(()), if !self.own.is_empty() => {}
            }
            if wake.is_some_and(|wake| wake.max(asleep).elapsed() > AWAY) {
                tracing::warn!("the controller was stopped for a while; hosts get time to return");
                self.coordinator.was_away(self.clock.now());
            }
            if let Some(prepared) = compacted {
                self.end_compaction(prepared)?;
                batch.extend(self.compaction.answered_now());
            }
            let heard = !batch.is_empty();
            self.round(&mut batch)?;
            self.tell_what_is_durable(heard);
            self.look_at_length();
            if self.stopping {
                // What was sent before is still received; what comes now is refused.
                inputs.close();
            }
        }
        self.compaction.end();
        self.journal.close();
        Ok(())
    }

    /// Acknowledges what no other message has taken along.
    fn tell_what_is_durable(&mut self, heard: bool) {
        if self
            .dues
            .are_due(Instant::now(), self.sessions.owes(), heard)
        {
            let lost = self.sessions.pay(&self.witnessed()).into_iter();
            self.own.extend(lost.map(|host| Event::HostDown { host }));
        }
    }

    /// The head that reaches all that is durable, for agents to keep.
    fn witnessed(&self) -> wire::Head {
        let head = self.journal.head();
        wire::Head {
            journal: self.journal.id().to_string(),
            number: head.number,
            hash: head.hash.0.to_vec().into(),
        }
    }

    /// When deadlines are looked at next, if nothing else comes before.
    fn wake_at(&self) -> Option<Instant> {
        let deadline = self.coordinator.next_deadline();
        let wake = self.alarm.at(deadline.map(|at| self.clock.instant(at)));
        let look = self.full.then(|| Instant::now() + room::LOOK_EVERY);
        wake.into_iter().chain(look).min()
    }

    /// The first round: the new term, what is outstanding, and what is due.
    fn begin(&mut self) -> Round {
        let mut round = Round::default();
        let now = self.clock.now();
        self.look_for_room(&mut round);
        let effects = self.coordinator.resume(now);
        round.take(&self.sessions, effects);
        if self.take_over {
            let effects = self.coordinator.take_over(now);
            round.take(&self.sessions, effects);
        }
        for subject in std::mem::take(&mut self.suspend) {
            let effects = self
                .coordinator
                .suspend(now, subject, "at the controller's start");
            round.take(&self.sessions, effects);
        }
        if !self.full {
            // What an earlier controller held back.
            self.let_go(&mut round);
        }
        round
    }

    /// One batch: handle each input, persist once, then let the world know.
    fn round(&mut self, batch: &mut Vec<Input>) -> Result<(), DriverError> {
        let mut round = Round::default();
        self.look_for_room(&mut round);
        for event in std::mem::take(&mut self.own) {
            self.handle(&mut round, event);
        }
        for input in batch.drain(..) {
            self.take_input(&mut round, input)?;
        }
        self.settle(&mut round);
        let now = self.clock.now();
        // A stream of inputs must not keep deadlines waiting.
        if self.is_due(now) {
            let before = round.effects.persist.len();
            self.coordinator.take(now, Event::Tick, &mut round.effects);
            self.rest_after(now, round.effects.persist.len() == before);
        } else {
            self.alarm.rang(false);
        }
        round.address(&self.sessions);
        self.finish(round)
    }

    /// Does what follows from what has come, and addresses it to the sessions of this moment.
    fn settle(&mut self, round: &mut Round) {
        self.coordinator
            .settle_up(self.clock.now(), &mut round.effects);
        round.address(&self.sessions);
    }

    fn is_due(&self, now: Timestamp) -> bool {
        self.coordinator.next_deadline().is_some_and(|at| at <= now)
    }

    /// State changes by entries only: a tick without any would be in vain again at once.
    fn rest_after(&mut self, now: Timestamp, nothing_done: bool) {
        let in_vain = nothing_done && self.is_due(now);
        if in_vain {
            tracing::debug!("a deadline has come, but there is nothing to do");
        }
        self.alarm.rang(in_vain);
    }

    fn take_input(&mut self, round: &mut Round, input: Input) -> Result<(), DriverError> {
        match input {
            // The log has it; what is left of the disk is for what runs.
            Input::Event(Event::CallsRefused(_)) if self.full => {}
            Input::Event(event) => self.handle(round, event),
            Input::Call {
                operator,
                groups,
                call,
                answer,
            } => {
                if let Some(refused) = self.refused_for_room(&call) {
                    round.answers.push((answer, Err(refused)));
                    return Ok(());
                }
                let event = Event::Operator {
                    operator,
                    groups,
                    call,
                };
                self.answer(round, event, answer);
            }
            Input::Ask { event, answer } => {
                let (head, now) = (self.journal.head(), self.clock.now());
                if self.compaction.can_wait(&event, head, now) {
                    self.compaction.wait(event, answer);
                    return Ok(());
                }
                if let Some(refused) = self.refused_without_room() {
                    round.answers.push((answer, Err(refused)));
                    return Ok(());
                }
                self.answer(round, event, answer);
            }
            Input::Open {
                hello,
                version,
                candidate,
                admitted,
            } => {
                let host = candidate.host.clone();
                let result = self.open(round, *hello, version, candidate)?;
                round.admitted.push((host, admitted, result));
            }
            // One of a session that is over was not acknowledged: the agent says it again.
            Input::Report {
                host,
                session,
                report,
            } if self.sessions.current(&host) == Some(session) => {
                self.handle(round, Event::Report { host, report });
            }
            Input::Report { .. } => {}
            Input::Closed { host, session } => {
                if self.sessions.closed(&host, session) {
                    self.handle(round, Event::HostDown { host });
                }
            }
            Input::Read(read) => round.reads.push(read),
            Input::Drain => {
                self.draining = true;
                self.compaction.give_up();
                let waited: Vec<Input> = self.compaction.answered_now().collect();
                for input in waited {
                    self.take_input(round, input)?;
                }
                let witnessed = self.witnessed();
                self.sessions.drain(RECONNECT_AFTER_MS, &witnessed);
            }
            Input::Stop => self.stopping = true,
        }
        Ok(())
    }

    fn answer(&mut self, round: &mut Round, event: Event, answer: Asker) {
        self.handle(round, event);
        if let Some(result) = round.effects.answer.take() {
            round.answers.push((answer, result));
        }
    }

    /// What follows from it follows at the end of the round.
    fn handle(&mut self, round: &mut Round, event: Event) {
        self.coordinator
            .take(self.clock.now(), event, &mut round.effects);
        round.address(&self.sessions);
    }

    /// Persists a round, and only then lets anybody know of it (INV-2).
    fn finish(&mut self, round: Round) -> Result<(), DriverError> {
        round.warn_of_unasked();
        let Round {
            effects,
            sends,
            acknowledged,
            answers,
            admitted,
            reads,
        } = round;
        let payloads: Vec<Vec<u8>> = effects
            .persist
            .iter()
            .map(|entry| serde_json::to_vec(entry).expect("a record's maps have text as keys"))
            .collect();
        // Without tests' faults this is the only append.
        if !planted!(SendBeforePersist) {
            self.journal.append(&payloads)?;
        }
        let witnessed = self.witnessed();

        // Before anybody hears that it is so.
        let trust = self.coordinator.trust();
        let mut changed = false;
        for entry in &effects.persist {
            match &entry.record {
                Record::Trust(record) => {
                    changed = true;
                    if let TrustRecord::Renewed { .. } = record {
                        self.compaction.count_renewed();
                    }
                    if let TrustRecord::Enrolled { grant, .. }
                    | TrustRecord::Renewed { grant, .. } = record
                    {
                        let granted = trust.granted(&grant.host);
                        self.suspensions.set_granted(&grant.host, granted);
                    }
                }
                Record::HostForgotten { .. } => changed = true,
                _ => {}
            }
        }
        if changed {
            self.suspensions.set(trust.banned());
        }
        let mut of_unasked = effects.unasked.iter().map(|(index, _)| *index).peekable();
        for (index, entry) in effects.persist.iter().enumerate() {
            let unasked = of_unasked.next_if_eq(&index).is_some();
            let Record::Reported { host, .. } = &entry.record else {
                continue;
            };
            let size = payloads[index].len() as u64;
            let paid = self.rates.pay_report(entry.at, host, size, unasked);
            if let Err(refused) = paid
                && self.sessions.end(host, refused)
            {
                self.own.push_back(Event::HostDown { host: host.clone() });
            }
        }
        for (host, number, upto) in acknowledged {
            self.sessions.owe(&host, number, upto);
        }
        for (host, number, mut message) in sends {
            if says_what_is_durable(&message) {
                message.head = Some(witnessed.clone());
            }
            if self.sessions.send(&host, number, message, &witnessed) {
                self.own.push_back(Event::HostDown { host });
            }
        }
        for notify in effects.notify {
            let (rollout, which) = (notify.rollout.clone(), notify.which);
            if self.notices.try_send(notify).is_err() {
                self.own.push_back(Event::NoticeSent {
                    rollout,
                    which,
                    error: Some("too many messages wait to be sent".to_owned()),
                });
            }
        }
        for (rollout, event) in &effects.published {
            if event.kind == EventKind::Ended {
                tracing::info!(%rollout, state = event.state, why = event.message, "ended");
            }
        }
        for events in effects
            .published
            .chunk_by(|(one, _), (other, _)| one == other)
        {
            let wire = events.iter().map(|(_, event)| convert::event(event));
            self.hub.publish(&events[0].0, wire);
        }
        // Whoever asked may be gone; that changes nothing.
        for (answer, result) in answers {
            let _ = answer.send(result);
        }
        for (host, admitted, result) in admitted {
            // The stream went while it was being admitted, and has no reader to say so.
            if let Err(Ok(number)) = admitted.send(result)
                && self.sessions.closed(&host, number)
            {
                self.own.push_back(Event::HostDown { host });
            }
        }
        for read in reads {
            read(&self.coordinator);
        }
        if planted!(SendBeforePersist) {
            // What is acknowledged would wait past the append.
            let lost = self.sessions.pay(&witnessed).into_iter();
            self.own.extend(lost.map(|host| Event::HostDown { host }));
            self.journal.append(&payloads)?;
        }
        Ok(())
    }
}

fn says_what_is_durable(message: &wire::Down) -> bool {
    use wire::down::Message as Wire;
    matches!(
        message.message,
        Some(Wire::Welcome(_) | Wire::Acknowledged(_) | Wire::Release(_))
    )
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A number that nobody can foretell.
fn any_number() -> u64 {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.random();
    }
    rand::random()
}
