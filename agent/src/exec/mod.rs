//! Exec: decides about orders, remembers, and starts step processes. It does none of the work,
//! and holds no connection.
//!
//! ```text
//! Inbound (link) --+
//! events of tasks -+--> handle_* : decide, append to the journal, then act
//! room in outbox --+--> reports, in the order of their numbers, until acknowledged
//! ```
//!
//! One task owns the journal and all decisions; tasks that look at the host or attend an attempt
//! answer with an [`Event`]. An error of the journal ends the daemon: its next start replays.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use lockstep_proto::ids::{Direction, InstanceId, StepKey, StepRef};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::refusals::Ledger;
use lockstep_proto::report::{Failure, ReportBody, StepOutcome};
use lockstep_proto::sshsig::SigningKey;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::identity::{IdentityError, boot_id, private_dir};
use crate::journal::{AppendError, FORMAT, Journal, JournalError, Need, Record, Seen};
use crate::sql::remove_left_over;
use crate::step::{Ended, Job, Keep, StepDir};
use crate::watchdog::{Due, beat};

mod admit;
mod ahead;
mod anchor;
mod answers;
mod approvals;
mod attend;
mod consent;
mod evidence;
mod explain;
mod hold;
mod licences;
mod look;
mod machine;
mod offers;
mod orders;
mod plans;
mod policy;
mod refusals;
mod report;
mod runner;
mod seam;
mod session;
mod tail;
mod unit;

pub(crate) use anchor::{AnchorError, Anchored, anchor};
use answers::Allowance;
pub(crate) use attend::wall_clock;
use attend::{Host, Met, attend};
pub(crate) use evidence::own_key;
pub(crate) use explain::explain;
use hold::{Attempt, Hold};
pub(crate) use licences::{Raised, Serial};
pub(crate) use look::run as look;
use machine::Memory;
use plans::HeldPlan;
#[cfg(feature = "fuzzing")]
pub(crate) use policy::fuzzing as policy_fuzzing;
pub(crate) use policy::{Counted, Policy, check_owner, parse_utc};
pub(crate) use refusals::{Refusal, SessionsRefused};
pub(crate) use runner::Runner;
pub(crate) use seam::{Inbound, LogPiece, Offer, Outbound};
use session::{Clock, Session};

/// Answers of tasks that wait for the journal's owner. A host runs one step at a time and looks
/// at few things beside it.
const EVENTS: usize = 32;

/// Reports that the controller has not acknowledged. Beyond, the stream is ended: a controller
/// that orders and never acknowledges is not well. A plan has far fewer steps.
const OUTSTANDING: usize = 10_000;

/// Why exec ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal cannot be written.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// A directory or the boot's identity cannot be had.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The journal belongs to the agent of another domain.
    #[error(
        "the state directory {state} belongs to the domain {journal}, the certificate to \
         {certificate}; set another `state_dir`, or get a certificate of {journal}"
    )]
    OtherDomain {
        /// The state directory.
        state: std::path::PathBuf,
        /// The domain in the journal.
        journal: String,
        /// The domain in the certificate.
        certificate: String,
    },
    /// The host's own key cannot be had.
    #[error("cannot read or make the host's own key, `evidence.key` in the state directory")]
    Key(#[source] std::io::Error),
    /// The operating system refused.
    #[error("cannot find out how to start step processes")]
    Runner(#[source] std::io::Error),
    /// Processes of an earlier daemon that look at the host do not end.
    #[error("cannot end the looks at the host that an earlier agent began")]
    Looks(#[source] std::io::Error),
}

/// Bytes that nobody can foretell.
fn any_bytes() -> [u8; 8] {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.random(u64::MAX).to_be_bytes();
    }
    rand::random()
}

/// For fuzzers: a journal whose chain holds is folded, whatever it says.
#[cfg(feature = "fuzzing")]
pub(crate) fn fold_fuzzed(records: &[(crate::journal::Link, Record)]) {
    let mut memory = Memory::default();
    for (link, record) in records {
        memory.apply(link.position, record);
    }
}

/// What a task has found out.
#[derive(Debug)]
enum Event {
    /// The state of the host, for a consent or a survey.
    Gathered(Gathered, Result<Vec<Fact>, Failure>),
    /// The state before an attempt.
    Prepared(Box<Order>, Box<Job>, Result<Value, Failure>),
    /// How an attempt ended.
    Ended(StepKey, Box<Ended>),
    /// What a dry run saw.
    Looked(StepKey, Box<Ended>),
}

/// What the host's state was gathered for.
#[derive(Debug)]
enum Gathered {
    Consent(Box<(Offer, HeldPlan)>),
    Survey(lockstep_proto::ids::RolloutId),
}

/// A survey that is under way.
#[derive(Debug)]
struct Surveying {
    rollout: lockstep_proto::ids::RolloutId,
    /// The newest report when the look began.
    since: u64,
    /// It was asked for again, and something has happened since the look began.
    again: bool,
}

/// An attempt that has no intent yet.
#[derive(Debug)]
struct Preparing {
    key: StepKey,
    cancelled: bool,
    /// What it is counted under.
    counted: Option<Counted>,
    /// By this its order becomes too old, whether or not the session lasts.
    clock: Clock,
}

/// The daemon's deciding half.
#[derive(Debug)]
pub(crate) struct Exec {
    host: Rc<Host>,
    /// The host signs with it what its steps prove.
    key: SigningKey,
    instance: InstanceId,
    journal: Journal,
    memory: Memory,
    /// The steps of the rollout that the host holds itself for.
    held: Option<HeldPlan>,
    /// The steps of the plans that were offered for dry runs, the newest first.
    looked_at: Vec<(lockstep_proto::ids::PlanDigest, HeldPlan)>,
    session: Option<Session>,
    /// Offers whose plan has not arrived.
    awaiting_plan: Vec<Offer>,
    /// Offers that are being considered, with the newest epoch that each was made in.
    considering: Vec<Offer>,
    /// How many looks for offers are under way, of those that nobody considers any more too.
    gathering: usize,
    /// Surveys that are under way, one for a rollout.
    surveying: Vec<Surveying>,
    preparing: Option<Preparing>,
    /// The rollout whose end came while an attempt was still running, and whether it comes back.
    release_later: Option<(lockstep_proto::ids::RolloutId, bool)>,
    /// Whether an acknowledgement waits to be written with the next records.
    acknowledged: bool,
    /// What the controller has said of its journal, and is to be written with the next records.
    seen: Option<Seen>,
    /// Sessions that were refused, as far as they are not written.
    refusals: Ledger<Refusal>,
    /// What may be answered of what began nothing.
    allowance: Allowance,
    events: mpsc::Receiver<Event>,
    answers: mpsc::Sender<Event>,
}

impl Exec {
    /// Opens the journal, and takes up again what was running.
    pub(crate) fn open(
        config: &Arc<Config>,
        config_path: &Path,
        domain: &str,
        logs: mpsc::Sender<LogPiece>,
    ) -> Result<Self, ExecError> {
        let state = &config.state_dir;
        private_dir(&StepDir::parent(state))?;
        private_dir(&plans::dir(state))?;
        let mut memory = Memory::default();
        let mut journal = Journal::open(state, |at, record| memory.apply(at, &record))?;
        if journal.is_empty() {
            let opened = Record::Opened {
                format: FORMAT,
                domain: domain.to_owned(),
                instance: InstanceId::from_random(any_bytes()),
            };
            let positions = journal.append(std::slice::from_ref(&opened), Need::Opens)?;
            memory.apply(positions[0], &opened);
        }
        let (journal_domain, instance) = memory
            .opened
            .clone()
            .expect("a journal begins with its opening record");
        if journal_domain != domain {
            return Err(ExecError::OtherDomain {
                state: state.clone(),
                journal: journal_domain,
                certificate: domain.to_owned(),
            });
        }
        let host = Rc::new(Host {
            boot: boot_id(&config.run_dir)?,
            runner: Runner::new(config.steps, config_path).map_err(ExecError::Runner)?,
            looks: Cell::new(0),
            config: config.clone(),
            logs,
        });
        evidence::remove_left_over(state);
        let key = own_key(state).map_err(ExecError::Key)?;
        if let Err(failure) = crate::actions::salt(state) {
            tracing::error!(
                why = failure.message,
                "environment files cannot be compared"
            );
        }
        // Nobody awaits what an earlier daemon was probing for a dry run.
        remove_left_over(&config.run_dir, |of| of.direction == Direction::Probe);
        // A rollout that has ended leaves nothing, even if its end was cut short.
        let held_for = memory.hold.as_ref().map(|hold| &hold.rollout);
        orders::remove_steps(state, |of| Some(of) != held_for);
        plans::remove_left_over(state, held_for);
        crate::identity::remove_left_over(&config.run_dir);
        look::remove_left_over(&config.run_dir);
        let held = memory.hold.as_ref().and_then(|hold| {
            HeldPlan::read(&config.state_dir, &hold.rollout, hold.steps, hold.plan)
                .inspect_err(|error| {
                    tracing::error!(%error, rollout = %hold.rollout, "the steps that this host \
                        consented to cannot be read; its orders are refused");
                })
                .ok()
        });
        let (answers, events) = mpsc::channel(EVENTS);
        tracing::info!(
            host = %config.host,
            %instance,
            boot = %host.boot,
            steps = host.runner.describe(),
            holds = memory.hold.as_ref().map(|hold| tracing::field::display(&hold.rollout)),
            reports = memory.last_report,
            "journal open"
        );
        Ok(Self {
            host,
            key,
            instance,
            journal,
            memory,
            held,
            looked_at: vec![],
            session: None,
            awaiting_plan: vec![],
            considering: vec![],
            gathering: 0,
            surveying: vec![],
            preparing: None,
            release_later: None,
            acknowledged: false,
            seen: None,
            refusals: refusals::ledger(),
            allowance: Allowance::new(tokio::time::Instant::now()),
            events,
            answers,
        })
    }

    /// Runs until `stop`; what is running on the host then goes on without the daemon. Must be
    /// called within a `LocalSet`.
    pub(crate) async fn run(
        mut self,
        mut inbound: mpsc::Receiver<Inbound>,
        stop: CancellationToken,
    ) -> Result<(), ExecError> {
        let Host { runner, config, .. } = &*self.host;
        let ended = runner.end_looks(&config.host).await;
        ended.map_err(ExecError::Looks)?;
        self.take_up();
        let mut due = Due::new();
        loop {
            let (outbox, refusals_due) = (self.outgoing(), self.refusals_due());
            let room = async {
                match outbox {
                    Some(outbox) => outbox.reserve_owned().await.ok(),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    self.write_last_refusals()?;
                    return self.keep_seen();
                }
                () = due.come() => beat(&self.host.config.state_dir),
                // A few a minute, whatever comes.
                () = refusals_due => self.write_refusals()?,
                Some(event) = self.events.recv() => self.handle_event(event)?,
                message = inbound.recv() => match message {
                    Some(message) => self.handle_inbound(message)?,
                    None => return Ok(()),
                },
                permit = room => match permit {
                    Some(permit) => if let Some(next) = self.next_outbound()? {
                        permit.send(next);
                    },
                    None => self.session = None,
                },
            }
        }
    }

    fn key_of(&self, hold: &Hold, at: StepRef, attempt: &Attempt) -> StepKey {
        StepKey {
            rollout: hold.rollout.clone(),
            host: self.host.config.host.clone(),
            at,
            direction: attempt.direction,
            attempt: attempt.number,
        }
    }

    /// Attends again what was running when the daemon ended.
    fn take_up(&self) {
        let Some(hold) = &self.memory.hold else {
            return;
        };
        for (at, attempt) in hold.running() {
            let key = self.key_of(hold, at, attempt);
            tracing::info!(step = %key, "found again");
            if attempt.cancelled {
                // The daemon may have ended between the record and the deed.
                Runner::cancel(&self.host.dir(&key), &self.host.boot);
            }
            let met = if self.is_over(at, attempt) {
                Met::Over
            } else {
                Met::Found
            };
            self.spawn_attend(key, met);
        }
    }

    /// Whether an attempt only observed, and began in an earlier boot.
    fn is_over(&self, at: StepRef, attempt: &Attempt) -> bool {
        let mut steps = self.held.iter().flat_map(|held| &held.steps);
        let step = steps.find(|step| step.at == at);
        let kept = step.is_none_or(|step| Keep::of(&step.action).is_durable());
        let intent = attempt
            .began
            .filter(|_| !kept)
            .and_then(|began| self.journal.read(began).ok());
        match intent {
            Some(Record::Intent(intent)) => intent.boot != self.host.boot,
            _ => false,
        }
    }

    fn spawn_attend(&self, key: StepKey, met: Met) {
        let (host, answers) = (self.host.clone(), self.answers.clone());
        tokio::task::spawn_local(async move {
            let ended = attend(host, key.clone(), met).await;
            let _ = answers.send(Event::Ended(key, Box::new(ended))).await;
        });
    }

    fn handle_event(&mut self, event: Event) -> Result<(), ExecError> {
        match event {
            Event::Gathered(purpose, state) => self.handle_gathered(purpose, state),
            Event::Prepared(order, job, before) => self.handle_prepared(*order, *job, before),
            Event::Ended(key, ended) => self.handle_ended(key, *ended),
            Event::Looked(key, ended) => self.finish_unbegun(key, *ended),
        }
    }

    fn handle_inbound(&mut self, message: Inbound) -> Result<(), ExecError> {
        match message {
            Inbound::Dial(reply) => {
                // The link may have given up meanwhile.
                let _ = reply.send(self.hello());
                Ok(())
            }
            Inbound::Connected { welcome, outbox } => self.handle_welcome(&welcome, outbox),
            Inbound::Disconnected => {
                self.session = None;
                self.awaiting_plan.clear();
                self.keep_seen()
            }
            Inbound::Witness(head) => {
                self.handle_witness(head);
                Ok(())
            }
            Inbound::Acknowledged(number) => {
                self.handle_acknowledged(number);
                Ok(())
            }
            Inbound::Offer(offer) => self.handle_offer(offer),
            Inbound::Plan(digest, content) => self.handle_plan(digest, content),
            Inbound::Order(order) => self.handle_order(*order),
            Inbound::Release {
                rollout,
                epoch,
                comes_back: false,
            } => self.handle_release(rollout, epoch),
            Inbound::Release { rollout, epoch, .. } => self.handle_freed(rollout, epoch),
            Inbound::Cancel(rollout, epoch) => self.handle_cancel(&rollout, epoch),
            Inbound::Survey(rollout, epoch) => self.handle_survey(rollout, epoch),
            Inbound::Refused(why) => {
                self.note_refused(why);
                Ok(())
            }
        }
    }

    /// Appends records and folds them in.
    fn commit(&mut self, mut records: Vec<Record>, need: Need) -> Result<(), AppendError> {
        if self.acknowledged || self.seen.is_some() {
            records.insert(
                0,
                Record::Acknowledged {
                    number: self.memory.acknowledged,
                    seen: self.seen.clone(),
                },
            );
        }
        let positions = self.journal.append(&records, need)?;
        for (position, record) in positions.into_iter().zip(&records) {
            self.memory.apply(position, record);
        }
        self.acknowledged = false;
        self.seen = None;
        if self.memory.outstanding.len() > OUTSTANDING {
            let why = format!("more than {OUTSTANDING} reports are not acknowledged");
            self.refuse_session(Refusal::Unacknowledged, why);
        }
        Ok(())
    }

    /// Makes the report of what began durable; it goes out by itself, and again until it is
    /// acknowledged. See [`Self::answer`] for all others.
    fn report(&mut self, body: ReportBody) -> Result<(), ExecError> {
        let record = self.numbered(body);
        Ok(self.commit(vec![record], Need::Closes)?)
    }

    fn numbered(&self, body: ReportBody) -> Record {
        let mut body = report::fit(body);
        if let Some(hold) = &self.memory.hold {
            evidence::sign(&self.key, hold.plan, &mut body);
        }
        Record::Report {
            number: self.memory.last_report + 1,
            body,
        }
    }

    /// How an attempt that began has ended.
    fn finish(&mut self, key: StepKey, ended: Ended) -> Result<(), ExecError> {
        self.report(finished(key, ended))
    }

    /// Answers an order by which nothing began.
    fn finish_unbegun(&mut self, key: StepKey, ended: Ended) -> Result<(), ExecError> {
        self.answer(finished(key, ended))
    }
}

fn finished(key: StepKey, ended: Ended) -> ReportBody {
    let Ended {
        outcome,
        facts,
        took,
    } = ended;
    match &outcome {
        StepOutcome::Ok { changed, summary } => {
            tracing::info!(step = %key, changed, summary, "ok");
        }
        StepOutcome::Failed(failure) => tracing::warn!(
            step = %key,
            cause = failure.cause.as_str(),
            message = failure.message,
            "failed"
        ),
        StepOutcome::Unknown { why } => tracing::error!(step = %key, why, "unknown"),
    }
    ReportBody::Finished {
        key,
        outcome,
        facts,
        signatures: vec![],
        took,
    }
}
