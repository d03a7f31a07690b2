//! `lockstep-agent`: the small binary on every host.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep_agent::main()
}
