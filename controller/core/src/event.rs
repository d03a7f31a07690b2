//! What goes into the coordinator and what comes out.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{
    Digest, Epoch, HostId, InstanceId, LossId, OperatorName, PlanDigest, RolloutId, StepKey,
    StepRef,
};
use lockstep_proto::order::Order;
use lockstep_proto::report::Report;
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};
use serde::Serialize;

use crate::record::{Archived, Entry, NoticeRef};
use crate::refusal::CallsRefused;
use crate::trust::{Grant, Serial, Subject, Wanted};

/// Something that happened outside.
#[derive(Debug, Clone)]
pub enum Event {
    /// An agent's session is up; its `Hello` was valid and its certificate says so.
    HostUp {
        /// The host.
        host: HostId,
        /// The installation of its agent; reports are numbered for each anew.
        instance: InstanceId,
        /// Its labels.
        labels: BTreeMap<String, String>,
        /// Its agent's release.
        agent_version: String,
        /// The rollout that it holds for.
        held: Option<RolloutId>,
    },
    /// An agent's session is gone.
    HostDown {
        /// The host.
        host: HostId,
    },
    /// An agent reported.
    Report {
        /// The host.
        host: HostId,
        /// Its report.
        report: Report,
    },
    /// A message was sent, or could not be.
    NoticeSent {
        /// The rollout.
        rollout: RolloutId,
        /// Which.
        which: NoticeRef,
        /// Why it could not be sent.
        error: Option<String>,
    },
    /// An operator calls.
    Operator {
        /// Who, by certificate.
        operator: OperatorName,
        /// The groups of the certificate.
        groups: Vec<String>,
        /// What for.
        call: Call,
    },
    /// A machine without a certificate asks for one, with a token.
    Join {
        /// SHA-256 of the token.
        token: Digest,
        /// What it asks for; an `Err` says why that can be nothing.
        wanted: Box<Result<Wanted, String>>,
    },
    /// An agent asks for its next certificate.
    Renew {
        /// The host, by certificate.
        host: HostId,
        /// The serial number of that certificate.
        parent: Serial,
        /// When that certificate ends.
        parent_ends: Timestamp,
        /// What it asks for.
        wanted: Box<Wanted>,
    },
    /// A peer was refused something, and that is to be written down now.
    CallsRefused(CallsRefused),
    /// Time has passed: [`crate::Coordinator::next_deadline`] was reached.
    Tick,
}

/// What an operator may ask for.
#[derive(Debug, Clone)]
pub enum Call {
    /// Start a rollout.
    Submit {
        /// Its id, made by the driver.
        rollout: RolloutId,
        /// The plan; the driver has stored its bytes already.
        plan: Arc<SealedPlan>,
        /// Only probe.
        dry_run: bool,
        /// Armoured SSH signatures over the plan's digest.
        signatures: Vec<String>,
    },
    /// Decide at a gate.
    Decide {
        /// The rollout.
        rollout: RolloutId,
        /// The gate; none if only one is open.
        gate: Option<StepRef>,
        /// What was shown to the operator.
        evidence: Digest,
        /// Approve or confirm; otherwise reject.
        approve: bool,
        /// Checklist items; empty means all.
        items: Vec<u32>,
        /// A comment.
        comment: String,
        /// A signed approval: until when it is good, and its armoured SSH signature.
        signed: Option<(Timestamp, String)>,
    },
    /// One of two people who let a gate be met without what it waits for.
    BreakGlass {
        /// The rollout.
        rollout: RolloutId,
        /// The gate; none if only one is open.
        gate: Option<StepRef>,
        /// What was shown to the operator.
        evidence: Digest,
        /// Why that has to be.
        reason: String,
        /// How long the word holds.
        life: Period,
        /// The same signed: until when, and its armoured SSH signature.
        signature: Option<(Timestamp, String)>,
    },
    /// Send nothing new.
    Pause {
        /// The rollout.
        rollout: RolloutId,
    },
    /// Go on: forward, what failed counts as failed; in a rollback, what is not undone is tried
    /// again.
    Resume {
        /// The rollout.
        rollout: RolloutId,
    },
    /// Go on, and give the hosts that failed another attempt, and only them.
    ResumeFailed {
        /// The rollout.
        rollout: RolloutId,
    },
    /// Say what an attempt did whose outcome is unknown, or whose host was lost.
    Resolve {
        /// The rollout.
        rollout: RolloutId,
        /// The host.
        host: HostId,
        /// The step.
        at: StepRef,
        /// Whether it was done there.
        done: bool,
        /// How that is known.
        reason: String,
        /// The attempt that a signed word is about, and its armoured SSH signature.
        signed: Option<(StepKey, String)>,
    },
    /// Accept what an undo would lose, as its refusal has shown it.
    AcceptLoss {
        /// The rollout.
        rollout: RolloutId,
        /// The host.
        host: HostId,
        /// The step.
        at: StepRef,
        /// What exactly.
        loss: LossId,
        /// Why that may be lost.
        reason: String,
        /// The undo that a signed word is about, and its armoured SSH signature.
        signed: Option<(StepKey, String)>,
    },
    /// End it where it stands.
    Cancel {
        /// The rollout.
        rollout: RolloutId,
        /// Why.
        reason: String,
    },
    /// Undo it.
    RollBack {
        /// The rollout.
        rollout: RolloutId,
        /// Why.
        reason: String,
    },
    /// Accept a halted rollout as it is.
    Close {
        /// The rollout.
        rollout: RolloutId,
        /// Why that is acceptable.
        reason: String,
    },
    /// Say who may be.
    Trust(TrustCall),
    /// Forget a host that is gone for good.
    Forget {
        /// The host.
        host: HostId,
    },
    /// Sign the report of an ended rollout.
    SignOff {
        /// The rollout.
        rollout: RolloutId,
        /// The role.
        role: String,
        /// A comment.
        comment: String,
    },
}

/// What an admin may say of who may be.
#[derive(Debug, Clone)]
pub enum TrustCall {
    /// Make a token, which lets a host in once.
    CreateToken {
        /// The host.
        host: HostId,
        /// SHA-256 of the token.
        hash: Digest,
        /// How long it lives.
        life: Period,
    },
    /// Take a token back.
    RevokeToken {
        /// Its name.
        token: String,
    },
    /// Let somebody do nothing any more.
    Suspend {
        /// Who.
        subject: Subject,
        /// Why.
        reason: String,
    },
    /// Lift a suspension.
    Unsuspend {
        /// Who.
        subject: Subject,
    },
}

/// What the driver must do, in this order: first `persist`, as one batch, until it is on the disk;
/// then `send`; then `published`. If persisting fails the process ends, and a restart folds what
/// was persisted (INV-2).
#[derive(Debug, Default)]
pub struct Effects {
    /// Entries for the journal.
    pub persist: Vec<Entry>,
    /// Messages to agents. One to an agent that is not connected is dropped: the coordinator says
    /// it again when the host is up.
    pub send: Vec<(HostId, Message)>,
    /// Messages to people. The driver answers each with [`Event::NoticeSent`].
    pub notify: Vec<Notify>,
    /// New events of rollouts, for whoever watches.
    pub published: Vec<(RolloutId, Arc<RolloutEvent>)>,
    /// Reports in `persist`, by their place there, that answered nothing that was asked of their
    /// host, and how many of the host's did so far. They are acknowledged like all others, and
    /// change nothing.
    pub unasked: Vec<(usize, u64)>,
    /// The answer to an operator's call, or to a wish for a certificate; absent for other events.
    pub answer: Option<Result<Answer, Refused>>,
}

/// A message to an agent.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Every report up to this number is durable.
    Acknowledged(u64),
    /// Asks for consent.
    Offer {
        /// The rollout.
        rollout: RolloutId,
        /// The plan.
        plan: PlanDigest,
        /// The term.
        epoch: Epoch,
        /// Only probes will follow.
        dry_run: bool,
        /// The signatures that came with the plan.
        signatures: Arc<[String]>,
        /// Which time the lock is taken; 0 is the first.
        round: u32,
    },
    /// One step to do now.
    Order(Order),
    /// The rollout has ended, or waits at a gate that frees it: the hold is free.
    Release {
        /// The rollout.
        rollout: RolloutId,
        /// The term.
        epoch: Epoch,
        /// It will be offered again.
        comes_back: bool,
    },
    /// End what is running.
    Cancel {
        /// The rollout.
        rollout: RolloutId,
        /// The term.
        epoch: Epoch,
    },
    /// Say what the host's state is.
    Survey {
        /// The rollout.
        rollout: RolloutId,
        /// The term.
        epoch: Epoch,
    },
}

/// A message to people.
#[derive(Debug, Clone, PartialEq)]
pub struct Notify {
    /// The rollout.
    pub rollout: RolloutId,
    /// Which message.
    pub which: NoticeRef,
    /// A `notify` action, its texts filled in.
    pub action: Action,
}

/// The answer to an operator's call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is done, and durable.
    Done,
    /// The decision is durable; this is still missing at the gate (empty if it is closed).
    Missing(String),
    /// It goes on; one line for each host that is tried again or stays behind.
    Again(Vec<String>),
    /// A token was made.
    Token {
        /// Its name.
        token: String,
        /// When it ends.
        until: Timestamp,
    },
    /// A certificate may be signed.
    Granted(Box<Grant>),
}

/// Another rollout's right to change a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host} is locked by {holder} ({plan}), {state} in phase `{phase}`")]
pub struct Lock {
    /// The host.
    pub host: HostId,
    /// The rollout that has the lock.
    pub holder: RolloutId,
    /// Its plan's name.
    pub plan: String,
    /// Its state.
    pub state: &'static str,
    /// Its phase.
    pub phase: String,
    /// When it was submitted.
    pub since_ms: u64,
    /// When it ends at the latest; none for one that is halted, and so waits for a person.
    pub until_ms: Option<u64>,
}

/// Why an operator's call is refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such rollout.
    #[error("there is no rollout {0}")]
    NotFound(RolloutId),
    /// The rollout's records are in an archive.
    #[error("{0}")]
    Archived(Box<Archived>),
    /// The plan's serial was used.
    #[error("the plan's serial {0} has been used by {1}; compile it again")]
    SerialUsed(u64, RolloutId),
    /// Another rollout has a lock on what this one touches.
    #[error("{0}")]
    Locked(Box<Lock>),
    /// The rollout is not in a state that allows it.
    #[error("{0}")]
    NotNow(String),
    /// The operator may not.
    #[error("{0}")]
    NotAllowed(String),
    /// What was asked for does not fit.
    #[error("{0}")]
    Invalid(String),
}

/// Something that happened in a rollout, as CLI, page and report show it. Which fields are set
/// depends on `kind`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RolloutEvent {
    /// Grows from event to event of a rollout.
    pub number: u64,
    /// When.
    pub at: Timestamp,
    /// What happened.
    pub kind: EventKind,
    /// The rollout's state afterwards.
    pub state: &'static str,
    /// The phase's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// The step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<StepRef>,
    /// The action's name.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub action: &'static str,
    /// The host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostId>,
    /// `do`, `undo` or `probe`.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub direction: &'static str,
    /// The attempt; 0 if the event is not about one.
    pub attempt: u16,
    /// One line for people.
    pub message: String,
    /// More lines.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub detail: Vec<String>,
    /// How long an attempt took, in milliseconds; 0 if not known.
    pub took_ms: u64,
}

/// The kind of an event: the same as in `lockstep.control.v1`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "control.proto documents them")]
pub enum EventKind {
    Submitted,
    Consent,
    PhaseOpened,
    PhaseClosed,
    StepOrdered,
    StepStarted,
    StepOk,
    StepFailed,
    GateOpened,
    GateDecided,
    GateClosed,
    GlassBroken,
    Quarantined,
    RollbackStarted,
    Paused,
    Resumed,
    Ended,
    Host,
    #[default]
    Note,
}
