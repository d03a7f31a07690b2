//! The agent, with points at which tests kill it.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep_agent::main()
}
