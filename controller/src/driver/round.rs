//! What one batch of inputs leads to.

use lockstep_core::{Answer, Effects, Message, Record, Refused};
use lockstep_proto::ids::HostId;
use tokio::sync::oneshot;
use tonic::Status;

use super::handle::Read;
use crate::session::registry::{self, Registry, SessionNumber};

/// Who waits to be admitted.
pub(super) type Admitted = oneshot::Sender<Result<SessionNumber, Status>>;

/// An answer, and who waits for it.
pub(super) type Owed<T> = (oneshot::Sender<T>, T);

/// What one batch leads to.
#[derive(Default)]
pub(super) struct Round {
    /// All of them, but for the messages to agents.
    pub(super) effects: Effects,
    pub(super) sends: Vec<(HostId, SessionNumber, registry::Down)>,
    /// Reports of sessions that will be durable, up to these.
    pub(super) acknowledged: Vec<(HostId, SessionNumber, u64)>,
    pub(super) answers: Vec<Owed<Result<Answer, Refused>>>,
    pub(super) admitted: Vec<(HostId, Admitted, Result<SessionNumber, Status>)>,
    pub(super) reads: Vec<Read>,
}

impl Round {
    /// Adds effects.
    pub(super) fn take(&mut self, sessions: &Registry, effects: Effects) {
        let Effects {
            persist,
            send,
            notify,
            published,
            unasked,
            answer,
        } = effects;
        debug_assert!(answer.is_none() && unasked.is_empty(), "of one event only");
        self.effects.persist.extend(persist);
        self.effects.send.extend(send);
        self.effects.notify.extend(notify);
        self.effects.published.extend(published);
        self.address(sessions);
    }

    /// Addresses the messages of an input to the sessions of this moment: a later one of the same
    /// host, admitted in the same batch, begins with its own `Welcome`.
    pub(super) fn address(&mut self, sessions: &Registry) {
        for (host, message) in self.effects.send.drain(..) {
            let Some(number) = sessions.current(&host) else {
                continue;
            };
            match message {
                Message::Acknowledged(upto) => self.acknowledged.push((host, number, upto)),
                message => {
                    let message = Box::new(registry::from_message(message));
                    self.sends.push((host, number, message));
                }
            }
        }
    }

    /// A host that does nothing else must not fill the log.
    pub(super) fn warn_of_unasked(&self) {
        let Effects {
            persist, unasked, ..
        } = &self.effects;
        for (index, times) in unasked.iter().filter(|(_, times)| times.is_power_of_two()) {
            let Record::Reported { host, .. } = &persist[*index].record else {
                continue;
            };
            tracing::warn!(
                %host, times,
                "the agent reports what nobody has ordered, or what is known already: this is \
                 recorded and changes nothing. A controller from a backup sees it at first; \
                 otherwise look at the host"
            );
        }
    }
}
