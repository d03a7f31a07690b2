//! What the agent remembers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lockstep_proto::ids::{BootId, Digest, Epoch, InstanceId, PlanDigest, RolloutId, StepKey};
use lockstep_proto::report::ReportBody;
use lockstep_proto::values::Timestamp;
use lockstep_proto::witness::Head;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::exec::Counted;
use crate::exec::{Raised, Serial, SessionsRefused};
use crate::step::LogMark;

/// The version of this vocabulary. Readers refuse kinds of records that they do not know.
pub(crate) const FORMAT: u32 = 1;

/// A record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Record {
    /// The first record.
    Opened {
        /// [`FORMAT`].
        format: u32,
        /// The domain of the certificates: a journal belongs to one.
        domain: String,
        /// The installation that writes it.
        instance: InstanceId,
    },
    /// A controller's term was obeyed for the first time (INV-4).
    Epoch(Epoch),
    /// The host holds itself for a rollout.
    Held(Held),
    /// A serial of a sealed plan licenses a rollout here, for ever. Written together with the hold.
    Licensed {
        /// The serial.
        of: Serial,
        /// The rollout.
        rollout: RolloutId,
    },
    /// The journal is older than what a controller has acknowledged: no order is taken until it is
    /// anchored.
    Quarantined {
        /// How many reports the controller has.
        acknowledged: u64,
    },
    /// People have signed which serials may come next. What was held before is over, and reports
    /// are numbered anew, under another instance.
    Anchored {
        /// Digest of what they signed.
        floor: Digest,
        /// The lowest serials.
        raised: Raised,
        /// The instance from now on.
        instance: InstanceId,
    },
    /// The rollout has ended, and the hold with it; or it waits, and has freed the host.
    Released {
        /// The rollout.
        rollout: RolloutId,
        /// It waits: it may be held for again.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        comes_back: bool,
    },
    /// An attempt begins: written before its step process starts (INV-1).
    Intent(Intent),
    /// People asked for an attempt to be stopped.
    Cancelled {
        /// The attempt.
        key: StepKey,
    },
    /// A report; for `Finished` also the record of how the attempt ended.
    Report {
        /// Its number.
        number: u64,
        /// What it says.
        body: ReportBody,
    },
    /// Controllers, or what posed as one, were refused.
    SessionsRefused(SessionsRefused),
    /// Reports up to this one are durable at the controller. Losing this record costs nothing.
    Acknowledged {
        /// The number.
        number: u64,
        /// The controller's journal, which reaches them: this one is its witness (INV-11).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<Seen>,
    },
}

/// A controller's journal, as it said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// The controller's term.
    pub(crate) term: u64,
    /// The newest record of its journal.
    pub(crate) head: Head,
}

/// A hold on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// The rollout.
    pub(crate) rollout: RolloutId,
    /// Its plan.
    pub(crate) plan: PlanDigest,
    /// Digest of the file with this host's steps, as it consented to them.
    pub(crate) steps: Digest,
    /// Where the log files that the plan's `check.log` steps name ended at the time of consent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) log_offsets: BTreeMap<PathBuf, LogMark>,
    /// Which time the rollout took its lock; 0 is the first.
    #[serde(default, skip_serializing_if = "is_first")]
    pub(crate) round: u32,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks with a reference"
)]
fn is_first(round: &u32) -> bool {
    *round == 0
}

/// The beginning of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Intent {
    /// The attempt.
    pub(crate) key: StepKey,
    /// The host's state before anything was changed, for the undo.
    pub(crate) before: Value,
    /// The boot in which it began.
    pub(crate) boot: BootId,
    /// When it began, on the host's own clock.
    pub(crate) at: Timestamp,
    /// What the policy's rates count it under; none if none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) counted: Option<Counted>,
}
