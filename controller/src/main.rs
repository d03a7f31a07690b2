//! Lockstep.
mod config;
mod journal;
mod pki;
fn main() {}
