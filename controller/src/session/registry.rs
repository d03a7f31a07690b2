//! The sessions that are up: one for each host, owned by the driver.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use lockstep_core::Message;
use lockstep_proto::ids::{HostId, InstanceId};
use lockstep_proto::wire::agent_v1 as wire;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Messages that wait for one agent. A host has one order at a time, an acknowledgement before it or
/// now and then, and after a reconnect an offer and what is outstanding; an agent that lets so many
/// pile up does not read. Room is taken as it is used, 32 at a time.
pub(crate) const QUEUE: usize = 64;

/// A message on its way down. Boxed, because a channel reserves room for 32 of them: 256 bytes
/// for an idle agent instead of 8 KiB.
pub(crate) type Down = Box<wire::Down>;

/// Tells one session from the next one of the same host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SessionNumber(u64);

/// The end of a session, decided by one side of it and noticed by the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending {
    token: CancellationToken,
    status: Arc<OnceLock<Status>>,
}

impl Ending {
    /// Ends the session with a status; the first one counts.
    pub(crate) fn end(&self, status: Status) {
        let _ = self.status.set(status);
        self.token.cancel();
    }

    /// Ends the session without an error.
    pub(crate) fn end_well(&self) {
        self.token.cancel();
    }

    /// Resolves when the session is to end.
    pub(crate) fn token(&self) -> &CancellationToken {
        &self.token
    }

    /// The error that it ended with.
    pub(crate) fn status(&self) -> Option<Status> {
        self.status.get().cloned()
    }
}

/// A session that wants to be admitted.
#[derive(Debug)]
pub(crate) struct Candidate {
    /// The host, by certificate.
    pub(crate) host: HostId,
    /// Which installation of the agent.
    pub(crate) instance: InstanceId,
    /// Where it dials from.
    pub(crate) peer: SocketAddr,
    /// The way down.
    pub(crate) queue: mpsc::Sender<Down>,
    /// How it is ended.
    pub(crate) ending: Ending,
}

#[derive(Debug)]
struct Session {
    number: SessionNumber,
    instance: InstanceId,
    peer: SocketAddr,
    queue: mpsc::Sender<Down>,
    ending: Ending,
    /// The newest report that is durable, if the agent has not been told.
    owed: Option<u64>,
}

/// All sessions.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    sessions: HashMap<HostId, Session>,
    last: u64,
    /// Sessions that are owed an acknowledgement, or were a moment ago.
    owing: Vec<(HostId, SessionNumber)>,
}

impl Registry {
    /// Admits a session. One of the same agent instance replaces the older one at once; another
    /// instance under the same name is refused, because one of the two is not what it says.
    pub(crate) fn admit(&mut self, candidate: Candidate) -> Result<SessionNumber, Status> {
        let Candidate {
            host,
            instance,
            peer,
            queue,
            ending,
        } = candidate;
        if let Some(older) = self.sessions.get(&host) {
            if older.instance != instance {
                tracing::error!(
                    %host, %instance, %peer, connected_instance = %older.instance,
                    connected_peer = %older.peer,
                    "two agents claim the same host: the later one is refused. Two machines have \
                     the same certificate, or an agent was installed anew while the old one runs"
                );
                return Err(Status::already_exists(format!(
                    "another agent ({}) is connected as {host} from {}; end it, or give this \
                     machine a certificate of its own",
                    older.instance, older.peer
                )));
            }
            tracing::info!(%host, %peer, "the agent has connected again; its older session ends");
            let status = Status::aborted("the same agent has connected again");
            older.ending.end(status);
        }
        self.last += 1;
        let number = SessionNumber(self.last);
        self.sessions.insert(
            host,
            Session {
                number,
                instance,
                peer,
                queue,
                ending,
                owed: None,
            },
        );
        Ok(number)
    }

    /// The number of the session that a message to a host would take now.
    pub(crate) fn current(&self, host: &HostId) -> Option<SessionNumber> {
        self.sessions.get(host).map(|session| session.number)
    }

    /// Whether another installation of the agent is connected under this host's name.
    pub(crate) fn is_taken(&self, host: &HostId, instance: &InstanceId) -> bool {
        let session = self.sessions.get(host);
        session.is_some_and(|session| session.instance != *instance)
    }

    /// Notes that an agent's reports up to this one are durable. It is told with the next message
    /// to it, or by [`Self::pay`]: most often an order follows, and both go out as one packet.
    pub(crate) fn owe(&mut self, host: &HostId, number: SessionNumber, upto: u64) {
        if let Some(session) = self.sessions.get_mut(host)
            && session.number == number
            && session.owed.replace(upto).is_none()
        {
            self.owing.push((host.clone(), number));
        }
    }

    /// Whether anybody may be owed an acknowledgement.
    pub(crate) fn owes(&self) -> bool {
        !self.owing.is_empty()
    }

    /// Tells every agent what it is owed. Returns the hosts that have lost their session.
    pub(crate) fn pay(&mut self, witnessed: &wire::Head) -> Vec<HostId> {
        let mut lost = Vec::new();
        for (host, number) in std::mem::take(&mut self.owing) {
            if self.hand_over(&host, number, None, witnessed) {
                lost.push(host);
            }
        }
        lost
    }

    /// Hands a message to a session, if that is still the host's, after the acknowledgement that it
    /// is owed. An agent that does not read loses its session: it connects again, and is told what
    /// is outstanding. Returns whether the host has lost its session.
    #[must_use]
    pub(crate) fn send(
        &mut self,
        host: &HostId,
        number: SessionNumber,
        message: Down,
        witnessed: &wire::Head,
    ) -> bool {
        self.hand_over(host, number, Some(message), witnessed)
    }

    fn hand_over(
        &mut self,
        host: &HostId,
        number: SessionNumber,
        message: Option<Down>,
        witnessed: &wire::Head,
    ) -> bool {
        let session = self.sessions.get_mut(host);
        let Some(session) = session.filter(|session| session.number == number) else {
            return false;
        };
        let owed = session.owed.take().map(|upto| {
            Box::new(wire::Down {
                message: Some(wire::down::Message::Acknowledged(upto)),
                head: Some(witnessed.clone()),
            })
        });
        let mut messages = owed.into_iter().chain(message);
        match messages.try_for_each(|message| session.queue.try_send(message)) {
            Ok(()) => false,
            // The stream is gone; a session whose stream went while it was being admitted has no
            // reader to say so.
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.sessions.remove(host);
                true
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(%host, peer = %session.peer, "the agent does not read what it is \
                    sent; its session ends");
                let why = format!("{QUEUE} messages wait for this agent; connect again");
                session.ending.end(Status::resource_exhausted(why));
                self.sessions.remove(host);
                true
            }
        }
    }

    /// Ends a host's session. Returns whether it had one.
    #[must_use]
    pub(crate) fn end(&mut self, host: &HostId, status: Status) -> bool {
        let session = self.sessions.remove(host);
        if let Some(session) = &session {
            session.ending.end(status);
        }
        session.is_some()
    }

    /// Forgets a session that is gone. Returns whether it was still the host's.
    pub(crate) fn closed(&mut self, host: &HostId, number: SessionNumber) -> bool {
        let current = self.current(host) == Some(number);
        if current {
            self.sessions.remove(host);
        }
        current
    }

    /// Tells every agent what it is owed and to come back later, and ends its session.
    pub(crate) fn drain(&mut self, reconnect_after_ms: u32, witnessed: &wire::Head) {
        // Who has lost its session has so anyway.
        let _ = self.pay(witnessed);
        for (_, session) in self.sessions.drain() {
            let drain = wire::Drain { reconnect_after_ms };
            let message = wire::down::Message::Drain(drain);
            // One whose queue is full finds out by the end of its stream.
            let _ = session.queue.try_send(Box::new(down(message)));
            session.ending.end_well();
        }
    }
}

/// Puts a message into its envelope.
pub(crate) fn down(message: wire::down::Message) -> wire::Down {
    wire::Down {
        message: Some(message),
        head: None,
    }
}

/// A message of the coordinator's as it goes over the wire.
pub(crate) fn from_message(message: Message) -> wire::Down {
    use wire::down::Message as Wire;
    down(match message {
        Message::Acknowledged(number) => Wire::Acknowledged(number),
        Message::Offer {
            rollout,
            plan,
            epoch,
            dry_run,
            signatures,
            round,
        } => Wire::Offer(wire::Offer {
            rollout: rollout.into(),
            plan_digest: plan.0.to_vec().into(),
            epoch: Some(epoch.into()),
            dry_run,
            signatures: signatures.iter().map(|it| it.clone().into()).collect(),
            round,
        }),
        Message::Order(order) => Wire::Order(order.into()),
        Message::Release {
            rollout,
            epoch,
            comes_back,
        } => Wire::Release(wire::Release {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
            comes_back,
        }),
        Message::Cancel { rollout, epoch } => Wire::Cancel(wire::Cancel {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
        }),
        Message::Survey { rollout, epoch } => Wire::Survey(wire::Survey {
            rollout: rollout.into(),
            epoch: Some(epoch.into()),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(instance: u8) -> (Candidate, mpsc::Receiver<Down>, Ending) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let ending = Ending::default();
        let candidate = Candidate {
            host: "app-1".parse().unwrap(),
            instance: InstanceId::from_random([instance; 8]),
            peer: "127.0.0.1:1".parse().unwrap(),
            queue,
            ending: ending.clone(),
        };
        (candidate, receiver, ending)
    }

    fn acknowledged() -> wire::Down {
        from_message(Message::Acknowledged(1))
    }

    #[test]
    fn the_same_instance_replaces_its_session_and_another_one_is_refused() {
        let host = "app-1".parse().unwrap();
        let mut registry = Registry::default();
        let (first, mut first_queue, first_ending) = candidate(1);
        let first = registry.admit(first).unwrap();
        let (other, _, _) = candidate(2);
        let refused = registry.admit(other).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::AlreadyExists);
        assert!(!first_ending.token().is_cancelled());

        let (second, mut second_queue, _) = candidate(1);
        let second = registry.admit(second).unwrap();
        assert_eq!(first_ending.status().unwrap().code(), tonic::Code::Aborted);
        // What was meant for the older session does not reach the newer one.
        let head = wire::Head::default();
        assert!(!registry.send(&host, first, acknowledged().into(), &head));
        assert!(second_queue.try_recv().is_err());
        assert!(first_queue.try_recv().is_err());
        assert!(!registry.send(&host, second, acknowledged().into(), &head));
        assert!(second_queue.try_recv().is_ok());
        // The older one's end does not end the newer one.
        assert!(!registry.closed(&host, first));
        assert!(registry.closed(&host, second));
    }

    #[test]
    fn an_agent_that_does_not_read_loses_its_session() {
        let host = "app-1".parse().unwrap();
        let mut registry = Registry::default();
        let (candidate, _queue, ending) = candidate(1);
        let number = registry.admit(candidate).unwrap();
        let head = wire::Head::default();
        for _ in 0..QUEUE {
            assert!(!registry.send(&host, number, acknowledged().into(), &head));
        }
        assert!(registry.send(&host, number, acknowledged().into(), &head));
        let status = ending.status().unwrap();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(registry.current(&host), None);
    }

    #[test]
    fn what_is_owed_goes_first_and_without_room_for_it_nothing_goes() {
        let host = "app-1".parse().unwrap();
        let head = wire::Head::default();
        let drain = || Box::new(down(wire::down::Message::Drain(wire::Drain::default())));
        for (waiting, handed_over) in [(QUEUE - 2, 2), (QUEUE - 1, 1), (QUEUE, 0)] {
            let mut registry = Registry::default();
            let (candidate, mut queue, _) = candidate(1);
            let number = registry.admit(candidate).unwrap();
            for _ in 0..waiting {
                assert!(!registry.send(&host, number, acknowledged().into(), &head));
            }
            registry.owe(&host, number, 7);
            let lost = registry.send(&host, number, drain(), &head);
            assert_eq!(lost, handed_over < 2);

            let all: Vec<_> = std::iter::from_fn(|| queue.try_recv().ok()).collect();
            let owed = wire::Down {
                message: Some(wire::down::Message::Acknowledged(7)),
                head: Some(head.clone()),
            };
            let both = [Box::new(owed), drain()];
            assert_eq!(all[waiting..], both[..handed_over]);
        }
    }
}
