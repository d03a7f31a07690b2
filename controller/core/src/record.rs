//! What is written to the journal, and so what a controller is after a restart. Recovery is the
//! fold of these records; nothing else is state.

use std::collections::BTreeMap;
use std::fmt;

use lockstep_proto::approval::Signature;
use lockstep_proto::ids::{
    Digest, Direction, Epoch, HostId, InstanceId, LossId, OperatorName, PlanDigest, RolloutId,
    StepRef,
};
use lockstep_proto::report::ReportBody;
use lockstep_proto::values::Timestamp;
use lockstep_proto::witness::Head;
use serde::{Deserialize, Serialize};

use crate::refusal::CallsRefused;
use crate::trust::TrustRecord;

/// A record with its time on the controller's clock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When it was decided. Never before that of an earlier entry.
    pub at: Timestamp,
    /// What.
    pub record: Record,
}

/// The most hosts that one record names: a record fits into 32 KiB whatever the fleet's size.
pub const MAX_HOSTS_PER_RECORD: usize = 400;

/// The persistent vocabulary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// A controller's term began (INV-4).
    TermBegan {
        /// The term.
        epoch: Epoch,
    },
    /// The term took over: it began above every term that a controller of this state may have
    /// begun elsewhere. What agents reported to those is not in this journal.
    TookOver {
        /// The term.
        epoch: Epoch,
    },
    /// Reports that an agent was told are durable, and that this journal lacks: a controller whose
    /// later records are lost had them. They are skipped.
    ReportsLost {
        /// The host.
        host: HostId,
        /// The newest report before them.
        after: u64,
        /// The newest of them.
        through: u64,
    },
    /// The first record of a compacted journal: those up to it went into an archive, whose last
    /// hash is this one.
    Compacted {
        /// The number of the last one.
        number: u64,
        /// Its hash, which this record is chained to.
        hash: Digest,
        /// The archive's file name.
        archive: String,
    },
    /// A rollout that has ended went into an archive. Its serial stays used up.
    Archived(Archived),
    /// Reports of a host up to this one are durable; they are about rollouts in an archive.
    ReportsArchived {
        /// The host.
        host: HostId,
        /// The newest of them.
        through: u64,
    },
    /// A host introduced itself for the first time, or otherwise than before.
    HostSeen {
        /// The host.
        host: HostId,
        /// The installation of its agent. Another one than before numbers its reports anew.
        instance: InstanceId,
        /// Its labels, from its own file.
        labels: BTreeMap<String, String>,
        /// Its agent's release.
        agent_version: String,
    },
    /// A host is gone for good: plans mean it no more, until its agent connects again.
    HostForgotten {
        /// The host.
        host: HostId,
        /// Who said so.
        operator: OperatorName,
        /// Its certificates are void from then on. Not so in records of earlier releases.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        void: bool,
    },
    /// Who may be: tokens, hosts' certificates, suspensions.
    Trust(TrustRecord),
    /// A peer was refused something, once or often.
    CallsRefused(CallsRefused),
    /// A report is durable, and may be acknowledged.
    Reported {
        /// Who reported.
        host: HostId,
        /// The report's number.
        number: u64,
        /// What it says.
        body: ReportBody,
        /// The host's journal when this was its newest record (INV-11).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        head: Option<Head>,
    },
    /// A plan was submitted: its serial is used up, unless it is a dry run.
    Submitted {
        /// The rollout that it licenses.
        rollout: RolloutId,
        /// The compiled plan, kept by its digest.
        plan: PlanDigest,
        /// Who submitted it.
        requester: OperatorName,
        /// Only probe.
        dry_run: bool,
    },
    /// A signature that came with the plan. The hosts judge it; the controller keeps it.
    Signed {
        /// The rollout.
        rollout: RolloutId,
        /// An armoured SSH signature over the plan's digest, of at most 2 KiB.
        signature: String,
    },
    /// Hosts that the plan means, at the time it was submitted. Together these records hold the
    /// matched list.
    Matched {
        /// The rollout.
        rollout: RolloutId,
        /// Hosts.
        hosts: Vec<HostId>,
    },
    /// Every host consented; the first phase may open.
    Consented {
        /// The rollout.
        rollout: RolloutId,
    },
    /// A phase was opened. The number after the last phase is the checks after a rollback.
    PhaseOpened {
        /// The rollout.
        rollout: RolloutId,
        /// The phase.
        phase: u16,
    },
    /// One host was elected for stages with these groups.
    Elected {
        /// The rollout.
        rollout: RolloutId,
        /// The groups, as the plan names them.
        groups: Vec<String>,
        /// The host.
        host: HostId,
    },
    /// A wave of a stage may begin: `wave` is its index.
    WaveOpened {
        /// The rollout.
        rollout: RolloutId,
        /// The phase.
        phase: u16,
        /// The stage's index in the phase.
        stage: u16,
        /// From 0.
        wave: u32,
    },
    /// Every host of the wave is done, or failed within the budget.
    WaveClosed {
        /// The rollout.
        rollout: RolloutId,
    },
    /// Every wave of the stage is closed.
    StageClosed {
        /// The rollout.
        rollout: RolloutId,
    },
    /// The phase is closed on every host that it requires.
    PhaseClosed {
        /// The rollout.
        rollout: RolloutId,
        /// The phase.
        phase: u16,
    },
    /// One step was ordered on these hosts.
    Dispatched {
        /// The rollout.
        rollout: RolloutId,
        /// The step.
        at: StepRef,
        /// Which way.
        direction: Direction,
        /// The attempt.
        attempt: u16,
        /// The hosts.
        hosts: Vec<HostId>,
        /// Agents refuse the order afterwards.
        not_after: Timestamp,
    },
    /// The controller gave up waiting for a host's report on an attempt.
    GivenUp {
        /// The rollout.
        rollout: RolloutId,
        /// The step.
        at: StepRef,
        /// Which way.
        direction: Direction,
        /// The attempt.
        attempt: u16,
        /// The host.
        host: HostId,
        /// Why: whether the host was lost, or the step took too long.
        why: Lost,
    },
    /// A person has said what an attempt did that nothing could prove (INV-1).
    Resolved {
        /// The rollout.
        rollout: RolloutId,
        /// The step.
        at: StepRef,
        /// Which way.
        direction: Direction,
        /// The attempt.
        attempt: u16,
        /// The host.
        host: HostId,
        /// Whether it was done.
        done: bool,
        /// Who said so.
        operator: OperatorName,
        /// How that is known.
        reason: String,
        /// An armoured SSH signature of that word. The hosts judge it; the controller keeps it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
    },
    /// A person has accepted what an undo would lose (INV-6).
    LossAccepted {
        /// The rollout.
        rollout: RolloutId,
        /// The step.
        at: StepRef,
        /// The undo that refused.
        attempt: u16,
        /// The host.
        host: HostId,
        /// What exactly.
        loss: LossId,
        /// Who accepts it.
        operator: OperatorName,
        /// Why.
        reason: String,
        /// An armoured SSH signature of that word. The hosts judge it; the controller keeps it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
    },
    /// A host gets no further orders but its undo.
    Quarantined {
        /// The rollout.
        rollout: RolloutId,
        /// The host.
        host: HostId,
        /// Why.
        why: String,
    },
    /// A gate waits.
    GateOpened {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// What is decided upon: the digest of plan, matched hosts and shown SQL (INV-12).
        evidence: Digest,
        /// Until when.
        until: Timestamp,
    },
    /// Somebody decided at a gate.
    GateDecided {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// Who.
        operator: OperatorName,
        /// The groups of the operator's certificate.
        groups: Vec<String>,
        /// Approved or confirmed; otherwise rejected.
        approve: bool,
        /// Confirmed items, for checklists.
        items: Vec<u32>,
        /// What was shown to whoever decided.
        evidence: Digest,
        /// A comment.
        comment: String,
        /// The signature of an approval. The hosts judge it; the controller keeps it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed: Option<Signature>,
    },
    /// One of two people said that a gate is to be met without what it waits for. Two such words
    /// that hold at the same time do it.
    GlassBroken {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// Who.
        operator: OperatorName,
        /// The group for which that person may say so.
        group: String,
        /// What was shown.
        evidence: Digest,
        /// Why that has to be.
        reason: String,
        /// The word ends by itself then: an hour after it was given at the latest.
        until: Timestamp,
        /// The signature of that word. The hosts judge it; the controller keeps it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed: Option<Signature>,
    },
    /// The rollout frees its lock and its hosts while a gate waits: nothing was changed yet.
    LockReleased {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
    },
    /// What the gate waited for is there, and so are the hosts: the rollout has its lock again.
    /// Hosts are asked for consent anew, and whatever was seen before the gate is looked at again.
    LockTaken {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// Which time; the lock that came with the submission is 0.
        round: u32,
    },
    /// What was decided at a gate is no longer true: the decisions count no more (INV-12).
    GateReopened {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// What is decided upon now.
        evidence: Digest,
        /// Until when.
        until: Timestamp,
        /// What has changed.
        why: String,
    },
    /// A gate is closed.
    GateClosed {
        /// The rollout.
        rollout: RolloutId,
        /// The gate.
        at: StepRef,
        /// Whether the rollout may go on.
        met: bool,
        /// Why.
        why: String,
    },
    /// A message is about to be sent. It is sent at most once: a restart does not send it again.
    NoticeOrdered {
        /// The rollout.
        rollout: RolloutId,
        /// A `notify` step, or else one of the plan's notices.
        which: NoticeRef,
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
    /// Nothing new is sent until resumed.
    Paused {
        /// The rollout.
        rollout: RolloutId,
        /// Who paused it.
        operator: OperatorName,
    },
    /// The rollout goes on. Forward, what failed counts as failed; in a rollback, what is not
    /// undone is tried again.
    Resumed {
        /// The rollout.
        rollout: RolloutId,
        /// Who resumed it.
        operator: OperatorName,
        /// The hosts that failed get another attempt first, and only they.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        failed: bool,
    },
    /// The controller held the rollout back by itself, and lets it go on as it was.
    Unpaused {
        /// The rollout.
        rollout: RolloutId,
        /// Why.
        why: String,
    },
    /// From here on the rollout is undone.
    RollbackStarted {
        /// The rollout.
        rollout: RolloutId,
        /// Why.
        reason: String,
        /// Who asked for it; none if it was a trigger.
        operator: Option<OperatorName>,
    },
    /// Every undo has ended, well or not.
    Undone {
        /// The rollout.
        rollout: RolloutId,
    },
    /// The rollout has ended.
    Ended {
        /// The rollout.
        rollout: RolloutId,
        /// How.
        end: End,
        /// Why, with hosts and steps by name.
        reason: String,
        /// Who ended it; none if it ended by itself.
        operator: Option<OperatorName>,
    },
    /// A halted rollout was accepted as it is: its lock and holds are free.
    Closed {
        /// The rollout.
        rollout: RolloutId,
        /// Who.
        operator: OperatorName,
        /// Why that is acceptable.
        reason: String,
    },
    /// Somebody signed the report.
    SignedOff {
        /// The rollout.
        rollout: RolloutId,
        /// The role.
        role: String,
        /// Who.
        operator: OperatorName,
        /// A comment.
        comment: String,
    },
}

impl Record {
    /// The rollout that the record is about; none for those about hosts and terms.
    pub fn rollout(&self) -> Option<&RolloutId> {
        match self {
            Self::TermBegan { .. }
            | Self::TookOver { .. }
            | Self::ReportsLost { .. }
            | Self::Compacted { .. }
            | Self::ReportsArchived { .. }
            | Self::HostSeen { .. }
            | Self::HostForgotten { .. }
            | Self::Trust(_)
            | Self::CallsRefused(_) => None,
            Self::Archived(archived) => Some(&archived.rollout),
            Self::Reported { body, .. } => Some(match body {
                ReportBody::Consented { rollout, .. }
                | ReportBody::Declined { rollout, .. }
                | ReportBody::Surveyed { rollout, .. } => rollout,
                ReportBody::Started { key } | ReportBody::Finished { key, .. } => &key.rollout,
            }),
            Self::Submitted { rollout, .. }
            | Self::Signed { rollout, .. }
            | Self::Matched { rollout, .. }
            | Self::Consented { rollout }
            | Self::PhaseOpened { rollout, .. }
            | Self::Elected { rollout, .. }
            | Self::WaveOpened { rollout, .. }
            | Self::WaveClosed { rollout }
            | Self::StageClosed { rollout }
            | Self::PhaseClosed { rollout, .. }
            | Self::Dispatched { rollout, .. }
            | Self::GivenUp { rollout, .. }
            | Self::Resolved { rollout, .. }
            | Self::LossAccepted { rollout, .. }
            | Self::Quarantined { rollout, .. }
            | Self::GateOpened { rollout, .. }
            | Self::GateDecided { rollout, .. }
            | Self::GlassBroken { rollout, .. }
            | Self::LockReleased { rollout, .. }
            | Self::LockTaken { rollout, .. }
            | Self::GateReopened { rollout, .. }
            | Self::GateClosed { rollout, .. }
            | Self::NoticeOrdered { rollout, .. }
            | Self::NoticeSent { rollout, .. }
            | Self::Paused { rollout, .. }
            | Self::Resumed { rollout, .. }
            | Self::Unpaused { rollout, .. }
            | Self::RollbackStarted { rollout, .. }
            | Self::Undone { rollout }
            | Self::Ended { rollout, .. }
            | Self::Closed { rollout, .. }
            | Self::SignedOff { rollout, .. } => Some(rollout),
        }
    }
}

/// What a controller still knows of a rollout that went into an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archived {
    /// The rollout.
    pub rollout: RolloutId,
    /// The serial that it used up, for ever; 0 for a dry run, which uses up none.
    pub serial: u64,
    /// Its plan.
    pub plan: PlanDigest,
    /// The plan's name.
    pub name: String,
    /// How it ended.
    pub end: End,
    /// When it was submitted.
    pub submitted: Timestamp,
    /// When it ended.
    pub ended: Timestamp,
    /// The file name of the archive that has its records.
    pub archive: String,
}

impl fmt::Display for Archived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rollout,
            name,
            end,
            archive,
            ..
        } = self;
        write!(
            f,
            "{rollout} ({name}) has ended {} and went into the archive: its records are in the \
             controller's state directory, in `archive/{archive}`",
            end.as_str()
        )
    }
}

/// The longest text of people, reasons and lists of hosts in a record, in bytes: with it, and
/// [`MAX_HOSTS_PER_RECORD`] hosts, every record fits into the journal's 32 KiB.
pub const MAX_TEXT: usize = 4 << 10;

impl Record {
    /// Cuts texts that grow with the fleet; the report has them whole.
    pub(crate) fn shorten(&mut self) {
        let text = match self {
            Self::Quarantined { why, .. }
            | Self::GateClosed { why, .. }
            | Self::GateReopened { why, .. }
            | Self::Trust(TrustRecord::TokenTried { why, .. }) => why,
            Self::GateDecided { comment, .. } | Self::SignedOff { comment, .. } => comment,
            Self::NoticeSent {
                error: Some(error), ..
            } => error,
            Self::RollbackStarted { reason, .. }
            | Self::Ended { reason, .. }
            | Self::Resolved { reason, .. }
            | Self::LossAccepted { reason, .. }
            | Self::GlassBroken { reason, .. }
            | Self::Closed { reason, .. }
            | Self::Trust(TrustRecord::Suspended { reason, .. }) => reason,
            _ => return,
        };
        if text.len() > MAX_TEXT {
            let end = text.floor_char_boundary(MAX_TEXT);
            let cut = text.len() - end;
            text.truncate(end);
            *text = format!("{text} ... and {cut} bytes more: see `lockstep report`");
        }
    }
}

/// Why the controller gave up waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lost {
    /// The host could not be reached.
    Unreachable,
    /// The host was there, but did not report in time.
    TimedOut,
}

/// A message of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoticeRef {
    /// A `notify` step.
    Step(StepRef),
    /// One of the plan's notices, and which time it is sent.
    Plan {
        /// Its index in the plan.
        index: u16,
        /// From 1.
        time: u32,
    },
}

/// How a rollout ended (INV-8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Everything is done on every host.
    Succeeded,
    /// Done, but for hosts that failed within the budget and stay behind.
    Partial,
    /// Every touched host is back where it began.
    RolledBack,
    /// The automatic part has ended; lock and holds stay until people decide.
    Halted,
    /// Ended by people, or before anything happened.
    Cancelled,
}

impl End {
    /// The word used everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Partial => "partial",
            Self::RolledBack => "rolled_back",
            Self::Halted => "halted",
            Self::Cancelled => "cancelled",
        }
    }
}
