//! The step process: claims one attempt, does it, and leaves an outcome that outlives everybody.

mod context;

pub(crate) use context::{Context, StepLog, failure};
