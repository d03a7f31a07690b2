//! Lockstep's agent: one small binary on every host.
//!
//! ```text
//! controller <--- TLS 1.3, agent dials ---> link
//!                                            |  Inbox / Outbox: domain types only
//!                                           exec      consent, policy, journal, order of steps
//!                                            |  job file, claim, outcome file
//!                                       step process  one action, in a session or unit of its own
//!                                            |
//!                                           host
//! ```
//!
//! The link carries, exec decides and remembers, step processes act. Exec may be killed at any
//! instant: what is running goes on without it, and is found again.
//!
//! Promises kept here: INV-1 once (`step::claim`, `exec::settle`), INV-2 durable (`journal`), INV-4
//! fenced and the order of steps (`exec::machine`), INV-9 consent (`exec::policy`,
//! `exec::consent`), INV-10 secrets (resolved in step processes only). Start reading in
//! `exec::machine`.

mod actions;
mod config;
mod process;
mod sql;
mod step;
#[cfg(test)]
mod testing;

fn main() {}
