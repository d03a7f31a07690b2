//! What others take for the same on such a machine.
//!
//! Measured before, and not in this run: 50 hosts on one machine of two cores, connections warm where
//! they can be, wall time in seconds of the command that a person types.
//!
//! | | a task without effect | four tasks | four tasks in waves of ten |
//! |---|---|---|---|
//! | Ansible | 0.96 | 32 | 30 |
//! | Salt | 2.3 | 8.1 | 12 |
//! | pyinfra | 0.82 | 1.7 | 4.0 |

/// The best of them, in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rivals {
    /// A task that changes nothing.
    pub(crate) nothing: f64,
    /// A port is looked at, a file written, a command run, the file looked at.
    pub(crate) four_steps: f64,
    /// The same, ten hosts after the other ten.
    pub(crate) waves: f64,
}

/// The best of each row of the table: pyinfra in all of them.
pub(crate) const BEST: Rivals = Rivals {
    nothing: 0.82,
    four_steps: 1.7,
    waves: 4.0,
};
