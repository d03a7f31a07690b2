//! Ways in for fuzzers: parsers that are no part of an interface, each with what must hold of
//! whatever it takes. Nothing of it is in binaries for users, which are built without the feature
//! `fuzzing`.
//!
//! Each function takes bytes as they come from elsewhere, and panics where a promise is broken. Two
//! more lead into hot paths, for whoever counts what they take.

pub use crate::cli::fuzzing::{documents, events, findings, plan_summary, text};
pub use crate::enroll::fuzzing::{certificate_of, csr, csr_of};
pub use crate::identity::fuzzing::{certificate_name, san};
pub use crate::journal::fuzzing::{Batches, export, export_of, head_slot};
pub use crate::session::fuzzing::report;

/// An event as it goes to whoever watches.
pub fn wire_event(
    event: &lockstep_core::RolloutEvent,
) -> lockstep_proto::wire::control_v1::RolloutEvent {
    crate::api::convert::event(event)
}
