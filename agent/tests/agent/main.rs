//! The agent as people run it: the real binary, real TLS, real step processes.

mod limits;
mod seal;
mod session;
mod start;
mod step;
mod support;
