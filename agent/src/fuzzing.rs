//! Ways in for fuzzers: parsers that are no part of an interface, each with what must hold of
//! whatever it takes. Nothing of it is in binaries for users, which are built without the feature
//! `fuzzing`.
//!
//! Each function takes bytes as they come from elsewhere, and panics where a promise is broken.

pub use crate::bridge::fuzzing::{bridge_to_exec, bridge_to_link};
pub use crate::exec::policy_fuzzing::{policy, policy_patterns};
pub use crate::journal::fuzzing::journal;
pub use crate::secrets::vault_fuzzing::vault_answer;
pub use crate::tls::fuzzing::{certificate_name, san};
