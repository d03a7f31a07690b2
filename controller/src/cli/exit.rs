//! How the process ends: what scripts may rely on.

use std::process::ExitCode;

use crate::app::ServeError;

/// The exit codes. Their numbers never change; `docs/cli.md` explains them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done; a rollout that was waited for has succeeded.
    Done = 0,
    /// The rollout has ended `rolled_back` or `halted`.
    Failed = 1,
    /// The command line or the plan is not valid; nothing was submitted.
    Usage = 2,
    /// The controller cannot be reached, or one of the two does not trust the other.
    Unreachable = 3,
    /// A fault of Lockstep's, or of this machine: files, memory, output.
    Internal = 4,
    /// The rollout has ended `partial`: done, but for hosts within its failure budget.
    Partial = 5,
    /// The rollout has ended `cancelled`, or a person answered no.
    Cancelled = 6,
    /// Interrupted while waiting; the rollout goes on without this process.
    Detached = 7,
    /// The controller answered, and refused.
    Refused = 8,
    /// `serve`: a person must look at the state directory; a restart does not help.
    State = 10,
    /// `serve`: the journal could not be written; a restart finds out what was.
    Journal = 11,
    /// `serve`: another controller has the state directory, or took over.
    Superseded = 12,
}

impl Exit {
    /// The exit code of a rollout's state.
    pub(crate) fn of_state(state: &str) -> Self {
        match state {
            "succeeded" => Self::Done,
            "partial" => Self::Partial,
            "rolled_back" | "halted" => Self::Failed,
            "cancelled" => Self::Cancelled,
            _ => Self::Detached,
        }
    }

    /// The exit code that a controller ends with.
    pub(crate) fn of_controller(error: &ServeError) -> Self {
        match error.exit_code() {
            2 => Self::Usage,
            10 => Self::State,
            11 => Self::Journal,
            12 => Self::Superseded,
            _ => Self::Internal,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Whether a rollout in this state has ended.
pub(crate) fn is_end(state: &str) -> bool {
    matches!(
        state,
        "succeeded" | "partial" | "rolled_back" | "halted" | "cancelled"
    )
}
