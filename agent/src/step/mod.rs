//! The step process: claims one attempt, does it, and leaves an outcome that outlives everybody.
//!
//! ```text
//! steps/<key>/  job.json       what to do; there before exec writes the intent
//!               claim          linked, whole, by whoever is first to settle what happens: the step
//!                              process before it acts, or exec so that it never will (INV-1)
//!               outcome.json   how it ended; whole or absent
//!               log            output, followed by exec
//!               output         what the step process itself said, such as a panic
//!               cancel         asks it to stop
//!               files/         the action's own, of one that changes something
//! ```
//!
//! Whether they outlive a power loss, [`Keep`] says.

mod claim;
mod context;
mod job;
mod keep;
mod run;

pub(crate) use claim::{Claim, Claimed};
pub(crate) use context::{Context, LAST_LINES, LogMark, StepLog, changed, failure, hinted};
pub(crate) use job::{Ended, Job, StepDir};
pub(crate) use keep::Keep;
#[cfg(feature = "faults")]
pub(crate) use run::perform;
pub(crate) use run::{StepExit, run, would};
