//! Bounds on handshakes, and on connections of those who have no certificate.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::Identity;

/// Handshakes at a time. Two cores do about 3,000 a second, so these are 0.1 s of work.
const HANDSHAKES: usize = 256;

/// Of those, handshakes with one address at a time: a slow or hostile one leaves room for others,
/// and a fleet behind one address still gets through at full speed.
const HANDSHAKES_PER_ADDRESS: usize = 64;

/// Connections that wait for their handshake; beyond them the kernel's backlog waits.
const WAITING: usize = 2048;

/// Connections without a certificate. Each may ask for one certificate, and lives for seconds; what
/// comes beyond is closed, and tries again.
const STRANGERS: usize = 128;

/// Connections of one agent. It needs one, and for a moment another while the older one ends.
const OF_AN_AGENT: usize = 8;

/// Connections of one person: each command is one, and each may watch for hours.
const OF_A_PERSON: usize = 64;

/// Bounds handshakes, overall and for each address, and connections of each peer.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) waiting: Arc<Semaphore>,
    all: Arc<Semaphore>,
    addresses: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
    strangers: Arc<Semaphore>,
    /// How many connections each peer has, by its name.
    peers: Mutex<HashMap<String, usize>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
            all: Arc::new(Semaphore::new(HANDSHAKES)),
            addresses: Mutex::default(),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            peers: Mutex::default(),
        }
    }
}

/// The right to shake hands, given back when dropped.
pub(super) struct Permits {
    gate: Arc<Gate>,
    address: IpAddr,
    own: Option<OwnedSemaphorePermit>,
    _all: OwnedSemaphorePermit,
}

impl Gate {
    pub(super) async fn enter(self: &Arc<Self>, address: IpAddr) -> Permits {
        let semaphore = {
            let mut addresses = self.addresses();
            let new = || Arc::new(Semaphore::new(HANDSHAKES_PER_ADDRESS));
            Arc::clone(addresses.entry(address).or_insert_with(new))
        };
        let own = semaphore.acquire_owned().await;
        let all = Arc::clone(&self.all).acquire_owned().await;
        Permits {
            gate: Arc::clone(self),
            address,
            own: Some(own.expect("the semaphore is never closed")),
            _all: all.expect("the semaphore is never closed"),
        }
    }

    /// The right of one without a certificate to be connected; none if there are too many.
    pub(super) fn admit_stranger(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.strangers).try_acquire_owned().ok()
    }

    /// The right of a peer to one more connection; none if it has enough.
    pub(super) fn admit_peer(self: &Arc<Self>, identity: &Identity) -> Option<OfPeer> {
        let most = match identity {
            Identity::Agent(_) => OF_AN_AGENT,
            _ => OF_A_PERSON,
        };
        let name = identity.to_string();
        let mut peers = self.peers();
        let count = peers.entry(name.clone()).or_default();
        if *count == most {
            return None;
        }
        *count += 1;
        Some(OfPeer {
            gate: Arc::clone(self),
            name,
        })
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Nothing that holds the lock leaves the map half changed.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addresses(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<Semaphore>>> {
        // Nothing that holds the lock leaves the map half changed.
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right of a peer to one connection, given back when dropped.
pub(super) struct OfPeer {
    gate: Arc<Gate>,
    name: String,
}

impl Drop for OfPeer {
    fn drop(&mut self) {
        let mut peers = self.gate.peers();
        if let Some(count) = peers.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.name);
            }
        }
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.own = None;
        let mut addresses = self.gate.addresses();
        // Nobody else has it or waits for it: forget the address.
        let last = addresses.get(&self.address);
        if last.is_some_and(|semaphore| Arc::strong_count(semaphore) == 1) {
            addresses.remove(&self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_so_many_connections_and_gives_them_back() {
        let gate = Arc::new(Gate::default());
        let agent = |name: &str| Identity::Agent(name.parse().unwrap());
        let admit = || gate.admit_peer(&agent("a"));
        let mut held: Vec<_> = std::iter::from_fn(admit).take(100).collect();
        assert_eq!(held.len(), OF_AN_AGENT);
        assert!(gate.admit_peer(&agent("b")).is_some());
        held.pop();
        assert!(admit().is_some());
        drop(held);
        assert!(gate.peers().is_empty());
    }
}
