//! `lockstep`: the controller and its command line in one binary.

use std::process::ExitCode;

// Of the allocators that were measured it alone gives memory back after 10,000 agents have left;
// the unit file sets its decay times.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    lockstep::main()
}
