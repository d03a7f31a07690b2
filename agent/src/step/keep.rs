//! What of an attempt's files outlives a power loss.

use lockstep_proto::action::Action;

/// How an attempt's files are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// On the disk, each before the next is relied on.
    Durably,
    /// For this boot: every process sees them, and a power loss may tear or lose any of them.
    ///
    /// An attempt that only observes has no effect that could come twice (INV-1), and its process
    /// does not outlive the boot. The journal alone outlives it: an intent of an earlier boot with no
    /// end says that the attempt began and has no proof, which is all that is true of it then. Exec
    /// says so without a look at these files, but for an outcome that is whole.
    ThisBoot,
}

impl Keep {
    /// How those of an attempt at this action are.
    pub(crate) fn of(action: &Action) -> Self {
        if action.changes() {
            Self::Durably
        } else {
            Self::ThisBoot
        }
    }

    pub(crate) fn is_durable(self) -> bool {
        self == Self::Durably
    }
}
