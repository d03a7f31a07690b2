//! The agent as people run it: the real binary, real TLS, real step processes.

mod limits;
mod session;
mod start;
mod step;
mod support;
