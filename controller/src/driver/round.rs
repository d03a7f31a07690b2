//! What one batch of inputs leads to.

use std::collections::{HashMap, HashSet};

use lockstep_core::{Answer, Effects, Entry, Message, Notify, Record, Refused, RolloutEvent};
use lockstep_proto::ids::{HostId, RolloutId};
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
    pub(super) persist: Vec<Entry>,
    /// Which of them are reports that answer nothing.
    pub(super) unasked: HashSet<usize>,
    pub(super) sends: Vec<(HostId, SessionNumber, registry::Down)>,
    /// Where in `sends` a session is told which of its reports are durable.
    acknowledged: HashMap<SessionNumber, usize>,
    pub(super) notify: Vec<Notify>,
    pub(super) published: Vec<(RolloutId, RolloutEvent)>,
    pub(super) answers: Vec<Owed<Result<Answer, Refused>>>,
    pub(super) admitted: Vec<(HostId, Admitted, Result<SessionNumber, Status>)>,
    pub(super) reads: Vec<Read>,
}

impl Round {
    /// Adds effects. Messages are meant for the sessions of this moment: a later one of the same
    /// host, admitted in the same batch, begins with its own `Welcome`.
    pub(super) fn take(&mut self, sessions: &Registry, effects: Effects) {
        let Effects {
            persist,
            send,
            notify,
            published,
            unasked,
            answer,
        } = effects;
        debug_assert!(answer.is_none(), "calls take their answer out first");
        for (index, entry) in (self.persist.len()..).zip(&persist) {
            let by = |host: &HostId| unasked.iter().any(|(it, _)| it == host);
            if matches!(&entry.record, Record::Reported { host, .. } if by(host)) {
                self.unasked.insert(index);
            }
        }
        self.persist.extend(persist);
        // A host that does nothing else must not fill the log.
        for (host, times) in unasked.iter().filter(|(_, times)| times.is_power_of_two()) {
            tracing::warn!(
                %host, times,
                "the agent reports what nobody has ordered, or what is known already: this is \
                 recorded and changes nothing. A controller from a backup sees it at first; \
                 otherwise look at the host"
            );
        }
        for (host, message) in send {
            let Some(number) = sessions.current(&host) else {
                continue;
            };
            let acknowledges = matches!(message, Message::Acknowledged(_));
            let message = Box::new(registry::from_message(message));
            // A session with many reports in one batch is told once, of the newest.
            if acknowledges && let Some(place) = self.acknowledged.get(&number) {
                self.sends[*place].2 = message;
                continue;
            }
            if acknowledges {
                self.acknowledged.insert(number, self.sends.len());
            }
            self.sends.push((host, number, message));
        }
        self.notify.extend(notify);
        self.published.extend(published);
    }
}
