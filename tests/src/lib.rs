//! The harness of Lockstep's stories: whole fleets on one machine, made of the real binaries.
//!
//! ```text
//! Cluster::builder() ── a private directory
//!    ├── PostgreSQL, a cluster of its own, on a free port of loopback
//!    ├── certificates from `lockstep pki`
//!    ├── `lockstep serve` on port 0
//!    ├── `lockstep-agent run` for each host: db-1, app-1, app-2
//!    └── the employee system, which the example's own plans install and deploy
//! ```
//!
//! Everything that a cluster starts ends with it: in order when the value is dropped, by the
//! [`reaper`] when the test is killed. Waiting is level-triggered ([`wait`]), and says at the end what
//! it saw last. Start with [`cluster::Cluster`].

pub mod binaries;
pub mod cluster;
pub mod daemon;
pub mod disk;
pub mod example;
pub mod fleet;
pub mod hosts;
pub mod mail;
pub mod memory;
pub mod operator;
pub mod planted;
pub mod played;
pub mod points;
pub mod postgres;
pub mod power;
pub mod previous;
pub mod processes;
pub mod reaper;
pub mod redteam;
pub mod skew;
pub mod snapshot;
pub mod storm;
pub mod story;
pub mod timeline;
pub mod wait;

use std::path::{Path, PathBuf};

/// The root of the repository: examples, units and fixtures are read from there.
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the crate lies in the repository")
        .to_owned()
}

/// Where builds put what they make; reports and caches of the stories go there.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}

/// Whether this process may become other users and mount file systems.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
