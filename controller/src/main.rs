//! `lockstep`: the controller and its command line in one binary.
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
mod hub;
mod identity;
mod journal;
mod logs;
mod notify;
mod pki;
mod secrets;
mod session;
mod tls;

use std::process::ExitCode;

// Of the allocators that were measured it alone gives memory back after 10,000 agents have left;
// the unit file sets its decay times.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    // Before anything else: whatever speaks TLS in this process uses this one provider.
    rustls::crypto::ring::default_provider()
        .install_default()
        .expect("no other provider was installed before");
    cli::main().into()
}
