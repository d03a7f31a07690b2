//! Causes in fixed words: whatever ends a rollout is one of six classes (INV-8).

use lockstep_proto::report::Cause;

use super::Outcome;
use crate::record::Lost;

/// The class of a cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// The host's agent could not be reached.
    AgentLost,
    /// Something took longer than it may.
    TimedOut,
    /// A step was tried, and failed.
    StepFailed,
    /// A check, an assertion or a comparison was not met.
    CheckUnmet,
    /// The agent refused.
    Refused,
    /// Nobody knows what was done.
    Unknown,
}

impl Class {
    /// The words used everywhere.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::AgentLost => "agent lost",
            Self::TimedOut => "timed out",
            Self::StepFailed => "step failed",
            Self::CheckUnmet => "check unmet",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
        }
    }

    /// The class of an attempt that did not succeed; none of one that did.
    pub(crate) fn of(outcome: &Outcome) -> Option<Self> {
        Some(match outcome {
            Outcome::Ok { .. } => return None,
            Outcome::Failed(failure) => match failure.cause {
                Cause::TimedOut => Self::TimedOut,
                Cause::CheckUnmet => Self::CheckUnmet,
                Cause::Refused => Self::Refused,
                Cause::Step | Cause::Host | Cause::Cancelled | Cause::Interrupted => {
                    Self::StepFailed
                }
            },
            Outcome::Unknown { .. } => Self::Unknown,
            Outcome::Lost(Lost::Unreachable) => Self::AgentLost,
            Outcome::Lost(Lost::TimedOut) => Self::TimedOut,
        })
    }

    /// The class of a host's silence.
    pub(crate) fn of_silence(connected: bool) -> Self {
        if connected {
            Self::TimedOut
        } else {
            Self::AgentLost
        }
    }
}

/// `step failed`, `step failed (interrupted)`: the class, and the finer word where there is one.
pub(super) fn say_cause(outcome: &Outcome) -> String {
    let class = Class::of(outcome).map_or("ok", Class::as_str);
    match outcome {
        Outcome::Failed(failure) if failure.cause.as_str() != class => {
            format!("{class} ({})", failure.cause.as_str())
        }
        _ => class.to_owned(),
    }
}
