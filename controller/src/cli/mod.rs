//! The command line.
mod exit;

/// Runs the command line of this process.
pub(crate) fn main() -> exit::Exit {
    exit::Exit::Done
}
