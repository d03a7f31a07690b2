//! Ends what a test started, when the test has ended. See `lockstep_tests::reaper`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    lockstep_tests::reaper::main(&arguments)
}
