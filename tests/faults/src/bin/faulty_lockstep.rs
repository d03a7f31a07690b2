//! The controller and its command line, with points at which tests kill it.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep::main()
}
