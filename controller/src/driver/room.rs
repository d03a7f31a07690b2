//! A full disk: running steps are still recorded, from what the journal has set aside; nothing new
//! begins, and people are told why. What was held back goes on as soon as there is room again.

use std::time::Duration;

use lockstep_core::{Call, Refused, TrustCall};

use super::{Driver, Round};

/// How often a controller with a full disk looks for room.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

const WHY: &str = "the disk of its state directory is full, and nothing new begins until there \
                   is room";

impl Driver {
    /// Holds everything back when the disk becomes full, and lets it go when there is room.
    pub(super) fn look_for_room(&mut self, round: &mut Round) {
        let full = !self.journal.has_room();
        if full == self.full {
            return;
        }
        self.full = full;
        if full {
            tracing::error!(
                "the disk of the state directory is full: running steps are still recorded, and \
                 nothing new begins; make room"
            );
            let effects = self.coordinator.hold_back(self.clock.now(), WHY);
            round.take(&self.sessions, effects);
        } else {
            tracing::info!("there is room again on the disk of the state directory");
            self.let_go(round);
        }
    }

    /// Lets go what was held back, by this process or one before it.
    pub(super) fn let_go(&mut self, round: &mut Round) {
        let why = "there is room on the controller's disk";
        let effects = self.coordinator.let_go(self.clock.now(), why);
        round.take(&self.sessions, effects);
    }

    /// Why a call has to wait for room; none for those that begin nothing.
    pub(super) fn refused_for_room(&self, call: &Call) -> Option<Refused> {
        let begins = match call {
            Call::Submit { .. }
            | Call::Resume { .. }
            | Call::ResumeFailed { .. }
            | Call::RollBack { .. }
            | Call::Trust(TrustCall::CreateToken { .. }) => true,
            Call::Decide { .. }
            | Call::BreakGlass { .. }
            | Call::Pause { .. }
            | Call::Resolve { .. }
            | Call::AcceptLoss { .. }
            | Call::Cancel { .. }
            | Call::Close { .. }
            | Call::Forget { .. }
            | Call::Trust(_)
            | Call::SignOff { .. } => false,
        };
        self.refused_without_room().filter(|_| begins)
    }

    /// Why whatever is new has to wait for room.
    pub(super) fn refused_without_room(&self) -> Option<Refused> {
        self.full.then(|| {
            Refused::NotNow(format!(
                "the controller takes nothing new: {WHY}; make room on it and try again"
            ))
        })
    }
}
