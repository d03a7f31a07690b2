//! Reports: what an agent says happened. Numbered without gaps; kept by the agent until the
//! controller has acknowledged them as durable.

use serde::{Deserialize, Serialize};

use crate::ids::{PlanDigest, RolloutId, StepKey, StepRef};
use crate::order::Fact;
use crate::values::Period;
use crate::witness::Head;

/// The largest report in its JSON form, in bytes. Journals keep values up to 32 KiB, so an agent
/// shortens last lines, then notes, before it journals a larger one.
pub const MAX_REPORT_BYTES: usize = 30 << 10;

/// A numbered report.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// From 1, for the life of the agent's installation.
    pub number: u64,
    /// What happened.
    pub body: ReportBody,
    /// The agent's journal when this was its newest record; none from an agent that does not say.
    pub head: Option<Head>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportBody {
    /// The agent holds the plan, holds each of its steps allowed, and holds itself for the
    /// rollout (for a dry run: without the hold).
    Consented {
        /// The rollout.
        rollout: RolloutId,
        /// The plan.
        plan: PlanDigest,
        /// The host's state before anything happened.
        state: Vec<Fact>,
        /// Which time the rollout took its lock, as the offer said; 0 is the first.
        #[serde(default, skip_serializing_if = "is_zero")]
        round: u32,
    },
    /// The agent refuses the plan; nothing has happened.
    Declined {
        /// The rollout.
        rollout: RolloutId,
        /// Why, and which steps.
        refusals: Vec<Refusal>,
    },
    /// The intent of an attempt is durable, and its step process starts.
    Started {
        /// Which attempt.
        key: StepKey,
    },
    /// An attempt has ended.
    Finished {
        /// Which attempt.
        key: StepKey,
        /// How.
        outcome: StepOutcome,
        /// What it proved.
        facts: Vec<Fact>,
        /// How long it ran.
        took: Period,
        /// For each fact the host's signature in hexadecimal, empty for those that are not signed;
        /// none at all if none is.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        signatures: Vec<String>,
    },
    /// The host's state, asked for at the end of a rollback.
    Surveyed {
        /// The rollout.
        rollout: RolloutId,
        /// The state.
        state: Vec<Fact>,
    },
}

/// What an agent notes instead of its state when it is asked for it and holds for another rollout, or
/// for none: nothing of the rollout runs there, and no order of it is obeyed any more.
pub const HOLDS_NOT: &str = "this host does not hold for the rollout";

/// Why an agent refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The step; none if the whole plan is refused.
    pub at: Option<StepRef>,
    /// Why, with what to change.
    pub reason: String,
}

/// How an attempt ended on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// The effect is there.
    Ok {
        /// Whether the attempt made it; if it was there before, there is nothing to undo.
        changed: bool,
        /// One line for people.
        summary: String,
    },
    /// The attempt failed; the effect may be there in part.
    Failed(Failure),
    /// There is no proof either way; a person decides.
    Unknown {
        /// What is known.
        why: String,
    },
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The class of cause.
    pub cause: Cause,
    /// What happened, as a sentence fragment.
    pub message: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The last lines of output.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
    /// Whether the attempt may have changed something before it failed.
    pub changed: bool,
}

/// The class of a failure's cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The action failed.
    Step,
    /// It took longer than its timeout.
    TimedOut,
    /// A check or an assertion was not met.
    CheckUnmet,
    /// The agent refused the order: policy, epoch, expiry, order of steps.
    Refused,
    /// Something the action needs is missing on the host: a tool, space, a secret, a right.
    Host,
    /// People asked for it to be stopped.
    Cancelled,
    /// The step process died, and the host was asked what is there: another attempt is safe.
    Interrupted,
}

impl Cause {
    /// The words used on screens.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Step => "step failed",
            Self::TimedOut => "timed out",
            Self::CheckUnmet => "check unmet",
            Self::Refused => "refused",
            Self::Host => "host not ready",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }
}
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks with a reference"
)]
fn is_zero(round: &u32) -> bool {
    *round == 0
}
