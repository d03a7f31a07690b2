//! Ways in for fuzzers: parsers that are no part of an interface, each with what must hold of
//! whatever it takes. Nothing of it is in binaries for users, which are built without the feature
//! `fuzzing`.
//!
//! Each function takes bytes as they come from elsewhere, and panics where a promise is broken.

pub use crate::cli::fuzzing::{documents, events, findings, plan_summary, text};
pub use crate::enroll::fuzzing::{certificate_of, csr, csr_of};
pub use crate::identity::fuzzing::{certificate_name, san};
pub use crate::journal::fuzzing::{export, export_of, head_slot};
pub use crate::session::fuzzing::report;
