//! Who is suspended, for whoever lets people in; and the connections that are up, so that those of
//! a suspended one are cut.
//!
//! ```text
//! driver: persisted -> set -> every new call and handshake asks      (why)
//!                          -> peers that are connected are told      (Peer::cut)
//! ```
//!
//! What is set was persisted before. A connection is entered before it is asked about, so that
//! none slips through between the two.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use lockstep_core::trust::{Banned, Serial, Subject};
use lockstep_proto::ids::HostId;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::identity::{Identity, Peer};

/// The operators' revocation list, as their issuer's holder wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OperatorList {
    /// Certificates that are void.
    pub(crate) serials: BTreeSet<Serial>,
    /// When the list ends: from then on nothing is known of any operator's certificate.
    pub(crate) ends: Option<SystemTime>,
}

/// Who is suspended, and who is connected.
#[derive(Debug, Default)]
pub(crate) struct Suspensions {
    banned: ArcSwap<Banned>,
    /// The only certificates of hosts that have joined with a token: those that were granted.
    granted: Mutex<HashMap<HostId, BTreeSet<Serial>>>,
    operators: ArcSwap<OperatorList>,
    live: Mutex<HashMap<u64, Peer>>,
    entered: AtomicU64,
    changed: Notify,
}

impl Suspensions {
    /// Takes what is durable, and cuts whoever is connected and may not be.
    pub(crate) fn set(&self, banned: Banned) {
        if **self.banned.load() == banned {
            return;
        }
        self.banned.store(Arc::new(banned));
        self.cut();
        self.changed.notify_waiters();
    }

    /// Takes the only certificates that a host may have, and cuts whoever has its name and
    /// another one; none says that it may have any that its issuer made.
    pub(crate) fn set_granted(&self, host: &HostId, granted: Option<BTreeSet<Serial>>) {
        // Nothing that holds the lock leaves the map half changed.
        let mut all = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        match granted {
            Some(granted) => all.insert(host.clone(), granted),
            None => all.remove(host),
        };
        drop(all);
        self.cut_where(|peer| match peer.identity() {
            Identity::Agent(name) if name == host => self.why_peer(peer),
            _ => None,
        });
    }

    /// Takes the operators' revocation list.
    pub(crate) fn set_operators(&self, list: OperatorList) {
        self.operators.store(Arc::new(list));
        self.cut();
    }

    /// Cuts whoever is connected and for whom there is a reason. Who connects meanwhile is for the
    /// caller to find.
    pub(crate) fn cut_where(&self, why: impl Fn(&Peer) -> Option<String>) {
        // Reasons may take long to find, and others come and go.
        let live: Vec<Peer> = self.live().values().cloned().collect();
        for peer in live {
            if let Some(why) = why(&peer) {
                say_cut(&peer, &why);
                peer.cut(why);
            }
        }
    }

    /// Resolves when who is suspended has changed.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    fn cut(&self) {
        self.cut_where(|peer| self.why_peer(peer));
    }

    fn why_peer(&self, peer: &Peer) -> Option<String> {
        self.why(peer.identity(), peer.serial())
    }

    /// Why somebody may do nothing; none if that is not so.
    pub(crate) fn why(&self, identity: &Identity, serial: &Serial) -> Option<String> {
        let banned = self.banned.load();
        // Nearly always.
        let nobody = banned.subjects.is_empty() && banned.replaced.is_empty();
        if !nobody {
            let name = match identity {
                Identity::Agent(host) => Some(Subject::Host(host.clone())),
                Identity::Operator { name, .. } => Some(Subject::Operator(name.clone())),
                Identity::Nobody => None,
            };
            let subjects = name.into_iter().chain([Subject::Serial(serial.clone())]);
            for subject in subjects {
                if let Some(reason) = banned.subjects.get(&subject) {
                    return Some(format!("{subject} is suspended: {reason}"));
                }
            }
            if matches!(identity, Identity::Agent(_)) && banned.replaced.contains(serial) {
                let why = "this certificate is void: the host was forgotten, or another machine \
                           has joined under its name since";
                return Some(why.to_owned());
            }
        }
        if let Identity::Agent(host) = identity {
            let granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
            let granted = granted.get(host);
            if granted.is_some_and(|granted| !granted.contains(serial)) {
                let why = "a machine has joined under this host's name with a token: only the \
                           certificates that the controller has given it since are good";
                return Some(why.to_owned());
            }
        }
        let Identity::Operator { .. } = identity else {
            return None;
        };
        let operators = self.operators.load();
        if operators.serials.contains(serial) {
            return Some("the certificate was revoked by its issuer".to_owned());
        }
        let ended = operators.ends.filter(|ends| *ends <= SystemTime::now());
        ended.map(|_| {
            "the operators' revocation list has ended, so that no operator's certificate can be \
             trusted; put a newer one in place of `operator_crl`"
                .to_owned()
        })
    }

    /// Remembers a peer that is connected, for as long as the value lives. The peer is told at
    /// once if it may do nothing.
    pub(crate) fn enter(self: &Arc<Self>, peer: &Peer) -> Entered {
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        self.live().insert(number, peer.clone());
        if let Some(why) = self.why(peer.identity(), peer.serial()) {
            peer.cut(why);
        }
        Entered {
            suspensions: Arc::clone(self),
            number,
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u64, Peer>> {
        // Nothing that holds the lock leaves the map half changed.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn say_cut(peer: &Peer, why: &str) {
    tracing::warn!(
        peer = %peer.address(), identity = %peer.identity(), why,
        "a connection is cut"
    );
}

/// A peer that is connected.
#[derive(Debug)]
pub(crate) struct Entered {
    suspensions: Arc<Suspensions>,
    number: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.suspensions.live().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspended(subject: &str) -> Banned {
        let mut banned = Banned::default();
        banned
            .subjects
            .insert(subject.parse().unwrap(), "lost".to_owned());
        banned
    }

    fn agent(host: &str, serial: &str) -> Peer {
        let identity = Identity::Agent(host.parse().unwrap());
        Peer::of(identity, serial.parse().unwrap())
    }

    #[test]
    fn whoever_is_connected_is_cut_and_nobody_else() {
        let suspensions = Arc::new(Suspensions::default());
        let (one, other) = (agent("app-1", "a1"), agent("app-2", "a2"));
        let gone = agent("app-1", "a3");
        let _entered = [suspensions.enter(&one), suspensions.enter(&other)];
        drop(suspensions.enter(&gone));
        suspensions.set(suspended("host:app-1"));
        assert!(one.is_cut() && !other.is_cut() && !gone.is_cut());
        suspensions.set(suspended("serial:a2"));
        assert!(other.is_cut());
        // One that comes afterwards.
        let late = agent("app-9", "a2");
        let _entered = suspensions.enter(&late);
        assert!(late.is_cut());
        suspensions.set(Banned::default());
        assert_eq!(suspensions.why(late.identity(), late.serial()), None);
    }

    #[test]
    fn a_host_that_has_joined_has_no_certificates_but_those_that_were_granted() {
        let suspensions = Arc::new(Suspensions::default());
        let made_by_hand = agent("app-1", "a1");
        let other = agent("app-2", "a1");
        let _entered = [suspensions.enter(&made_by_hand), suspensions.enter(&other)];
        let host = "app-1".parse().unwrap();
        suspensions.set_granted(&host, Some(BTreeSet::from(["b1".parse().unwrap()])));
        assert!(made_by_hand.is_cut() && !other.is_cut());
        let (granted, late) = (agent("app-1", "b1"), agent("app-1", "a2"));
        let _entered = [suspensions.enter(&granted), suspensions.enter(&late)];
        assert!(!granted.is_cut() && late.is_cut());
    }

    #[test]
    fn a_revocation_list_that_has_ended_trusts_no_operator() {
        let suspensions = Suspensions::default();
        let olga = Identity::Operator {
            name: "olga".into(),
            groups: vec![],
            roles: None,
        };
        let serial: Serial = "a1".parse().unwrap();
        assert_eq!(suspensions.why(&olga, &serial), None);
        let list = |ends: SystemTime, serials: &[&Serial]| OperatorList {
            serials: serials.iter().map(|serial| (*serial).clone()).collect(),
            ends: Some(ends),
        };
        let hour = std::time::Duration::from_hours(1);
        suspensions.set_operators(list(SystemTime::now() + hour, &[]));
        assert_eq!(suspensions.why(&olga, &serial), None);
        suspensions.set_operators(list(SystemTime::now() + hour, &[&serial]));
        assert!(suspensions.why(&olga, &serial).unwrap().contains("revoked"));
        suspensions.set_operators(list(SystemTime::now() - hour, &[]));
        assert!(
            suspensions
                .why(&olga, &serial)
                .unwrap()
                .contains("has ended")
        );
        // Agents have a list of their own.
        let agent = Identity::Agent("app-1".parse().unwrap());
        assert_eq!(suspensions.why(&agent, &serial), None);
    }
}
