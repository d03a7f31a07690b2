//! Chaos on real processes, enumerated: a reference rollout is killed at every write of the
//! controller, and every action at every write of the agent and its step process.
//!
//! ```text
//! controller  record: points -> copies of the disk, clones of the fleet
//!             resume: a controller on each copy -> end, ledger, journal -> violations
//!             scenarios: two controllers, partitions, disorderly networks
//! agent       every point of every action                               see `agent`
//! both        target/reports/chaos.json
//! ```
//!
//! Start with [`controller::run`].

pub mod agent;
pub mod check;
pub mod controller;
pub mod fleet;
pub mod net;
pub mod place;
pub mod record;
pub mod report;
pub mod resume;
pub mod scenarios;
pub mod script;
pub mod simulated;
