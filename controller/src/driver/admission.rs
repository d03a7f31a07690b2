//! Who gets a session.

use lockstep_core::Event;
use lockstep_proto::wire::{Hello, Welcome, agent_v1 as wire};
use tonic::Status;

use super::handle::Stopping;
use super::round::Round;
use super::{Driver, DriverError};
use crate::session::registry::{self, Candidate, SessionNumber};

impl Driver {
    /// Admits a session, or says why not.
    pub(super) fn open(
        &mut self,
        round: &mut Round,
        hello: Hello,
        version: u32,
        candidate: Candidate,
    ) -> Result<Result<SessionNumber, Status>, DriverError> {
        let host = candidate.host.clone();
        // Whoever was let in a moment before the suspension was known is seen here.
        if let Some(suspension) = self.coordinator.trust().suspension(&host) {
            let why = format!("{host} is suspended: {}", suspension.reason);
            return Ok(Err(Status::permission_denied(why)));
        }
        if let Err(refused) = self.rates.may_open(self.clock.now(), &host) {
            return Ok(Err(refused));
        }
        // What follows from what came before is for the session of before: the new one begins with
        // its welcome.
        self.settle(round);
        if !self.epoch.is_current(hello.highest_epoch) && heeds_terms() {
            return self.meet_term(&host, hello.highest_epoch).map(Err);
        }
        if self.draining {
            return Ok(Err(Stopping.into()));
        }
        let acknowledged = self.coordinator.acknowledged(&host, &hello.instance);
        let lost = if heeds_terms() {
            self.find_lost(&hello)?
        } else {
            Ok(None)
        };
        let lost = match lost {
            Ok(lost) => lost,
            Err(refused) => return Ok(Err(refused)),
        };
        self.doubted_by.remove(&host);
        let known = self.coordinator.host(&host);
        let anew = known.is_some_and(|info| info.instance != hello.instance);
        let taken = self.sessions.is_taken(&host, &hello.instance);
        if !taken && (anew || hello.last_report < acknowledged) {
            tracing::warn!(%host, anew, acknowledged, "the agent has lost its journal");
            if let Some(rollout) = self.coordinator.locked_by(&host) {
                return Ok(Err(Status::failed_precondition(format!(
                    "{host}'s agent lost its journal in the middle of {rollout}, and could do a \
                     step twice. Put the agent's state directory back, or end {rollout} first"
                ))));
            }
        }
        let known = self.coordinator.host(&host);
        let is_news = known.is_none_or(|info| {
            (&info.instance, &info.labels, &info.agent_version)
                != (&hello.instance, &hello.labels, &hello.agent_version)
        });
        if is_news && let Err(refused) = self.rates.may_change(self.clock.now(), &host) {
            return Ok(Err(refused));
        }
        let replaced = self.sessions.current(&host).is_some();
        let number = match self.sessions.admit(candidate) {
            Ok(number) => number,
            Err(refused) => return Ok(Err(refused)),
        };
        if replaced {
            self.handle(round, Event::HostDown { host: host.clone() });
        }
        let welcome = Welcome {
            version,
            epoch: self.epoch,
            clock: self.clock.now(),
            acknowledged: lost.unwrap_or(acknowledged),
            earlier: self.coordinator.earlier(&host, &hello.instance),
        };
        let welcome = wire::down::Message::Welcome(welcome.into());
        let welcome = Box::new(registry::down(welcome));
        round.sends.push((host.clone(), number, welcome));
        let event = Event::HostUp {
            host: host.clone(),
            instance: hello.instance,
            labels: hello.labels,
            agent_version: hello.agent_version,
            held: hello.held_rollout,
        };
        self.handle(round, event);
        if let Some(through) = lost {
            let now = self.clock.now();
            let effects = self.coordinator.skip_lost_reports(now, &host, through);
            round.take(&self.sessions, effects);
        }
        Ok(Ok(number))
    }
}

/// Whether this controller gives way to a higher term. A test's may not: then it is for the agents
/// to refuse it.
fn heeds_terms() -> bool {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        return world.heeds_terms();
    }
    true
}
