//! Core dumps are off in the daemon and in step processes: one would hold their secrets (INV-10).
//!
//! The limit of zero passes on to every program that a step starts. What a program handles may still
//! leave it by other ways than a core file; that is the program's affair.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Turns them off for this process and, where that is possible, for who may attach to it.
pub(crate) fn off() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    // The limit does not hold where the kernel pipes cores to a program; this does. It also keeps
    // others of the same user from reading the process's memory and environment.
    if sees_others() {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    }
    Ok(())
}

/// Whether /proc shows this process what it must see of the agent's other processes: whether they
/// are alive. Where /proc is mounted with `hidepid`, and the agent is not root, it shows those only
/// that may be dumped: then an attempt would be taken for gone while it runs (INV-1), and that
/// weighs more.
fn sees_others() -> bool {
    std::fs::metadata("/proc/1/stat").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_cores_is_still_seen() {
        off().unwrap();
        assert_eq!(rustix::process::getrlimit(Resource::Core).current, Some(0));
        let own = rustix::process::getpid().as_raw_nonzero();
        assert!(std::fs::read_to_string(format!("/proc/{own}/stat")).is_ok());
        assert!(std::env::current_exe().is_ok());
    }
}
