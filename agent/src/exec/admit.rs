//! How often and when the host's policy lets steps begin (INV-9): asked for each attempt, and
//! written into its intent, so that a restart forgets nothing.

use lockstep_proto::ids::{Direction, StepKey};
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Period;

use super::consent::HeldStep;
use super::machine::refused;
use super::policy::{Counted, Moment, Policy, Refused};
use super::{Exec, wall_clock};
use crate::journal::Intent;
use crate::step::hinted;

impl Exec {
    /// Refuses an attempt that may not begin now, saying when it may. Says what the others are
    /// counted under. What was done may be undone at any time.
    pub(super) fn admit_step(
        &self,
        policy: &Policy,
        key: &StepKey,
        step: &HeldStep,
    ) -> Result<Option<Counted>, Failure> {
        if key.direction == Direction::Undo {
            return Ok(None);
        }
        let now = self.moment();
        match policy.admit(&step.action, &self.memory.begun, &now) {
            Ok(rules) if rules.is_empty() => Ok(None),
            Ok(rules) => Ok(Some(Counted {
                rules,
                uptime: now.uptime,
            })),
            Err(Refused::Never(why)) => Err(refused(
                why,
                "the policy was changed after this host had consented",
            )),
            Err(Refused::Later(why)) => Err(hinted(
                Cause::Refused,
                why,
                "go on with the rollout then; who owns the host can change `per_hour` and \
                 `windows` in its policy",
            )),
        }
    }

    fn moment(&self) -> Moment {
        Moment {
            wall: wall_clock(),
            uptime: uptime(),
            boot: self.host.boot.clone(),
        }
    }
}

/// When an attempt began that is counted.
pub(super) fn began(intent: &Intent, counted: &Counted) -> Moment {
    Moment {
        wall: intent.at,
        uptime: counted.uptime,
        boot: intent.boot.clone(),
    }
}

/// Since the boot, with the time that the host was suspended.
fn uptime() -> Period {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return Period(world.wall_clock());
    }
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(clock.tv_sec).unwrap_or(0);
    let millis = u64::try_from(clock.tv_nsec / 1_000_000).unwrap_or(0);
    Period(seconds * 1000 + millis)
}
