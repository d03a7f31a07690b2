//! What the kernel grants the controller's process.

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};

/// No core dump holds the controller's key or a secret (INV-10). The limit does not hold where the
/// kernel pipes cores to a program; that the process cannot be dumped does, and also keeps others
/// of the same user from reading its memory.
pub(crate) fn turn_off_cores() {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let off = setrlimit(Resource::Core, none)
        .and_then(|()| set_dumpable_behavior(DumpableBehavior::NotDumpable));
    if let Err(error) = off {
        tracing::warn!(%error, "core dumps cannot be turned off");
    }
}

/// Each agent is a descriptor: the soft limit of 1,024 would end a fleet's growth early.
pub(crate) fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => tracing::info!(limit = ?limit.maximum, "descriptors"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
}
