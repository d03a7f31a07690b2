//! The controller and its command line: everything of the binary but its allocator.
//!
//! ```text
//! lockstep serve      app, driver, session, api, journal       the controller
//! lockstep apply ...  cli                                      everything else, for operators
//! ```

mod api;
mod app;
mod blobs;
mod cli;
mod config;
mod driver;
mod enroll;
mod faults;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod hub;
mod identity;
mod journal;
mod limits;
mod logs;
mod notify;
mod pki;
mod rates;
mod refusals;
mod secrets;
mod session;
#[cfg(feature = "faults")]
pub mod simulation;
mod suspensions;
mod tls;

use std::process::ExitCode;

/// The whole program.
pub fn main() -> ExitCode {
    // Before anything else: whatever speaks TLS in this process uses this one provider.
    rustls::crypto::ring::default_provider()
        .install_default()
        .expect("no other provider was installed before");
    cli::main().into()
}
