//! Bounds on connections before their handshake is over, and on those without a certificate.
//!
//! Nobody is let wait for the room that one address has taken. What an address may have is never
//! more than what is still free: one alone gets half of everything, two get a third each, and
//! whoever comes next still finds room. What goes beyond is closed at once, so that the accept loop
//! never stands still.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::Identity;

/// Handshakes at a time. Two cores do about 3,000 a second, so these are 0.1 s of work.
const HANDSHAKES: usize = 256;

/// Of those, handshakes with one address at a time: a slow or hostile one leaves room for others,
/// and a fleet behind one address still gets through at full speed.
const HANDSHAKES_PER_ADDRESS: usize = 64;

/// Connections that wait for their handshake, a descriptor each: 10,000 agents behind one address
/// may come in one moment, and the unit's 65,536 descriptors have room for as many that are up.
const WAITING: usize = 24_576;

/// Connections without a certificate. Each may ask for one certificate, and lives for seconds; what
/// comes beyond is closed, and tries again.
const STRANGERS: usize = 256;

/// A connection waits so long for its turn: 10,000 handshakes take less on one core.
pub(super) const TURN_WITHIN: Duration = Duration::from_secs(20);

/// Connections of one agent. It needs one, and for a moment another while the older one ends.
const OF_AN_AGENT: usize = 8;

/// Connections of one person: each command is one, and each may watch for hours.
const OF_A_PERSON: usize = 64;

/// Bounds handshakes, overall and for each address, and connections of each peer.
#[derive(Debug)]
pub(super) struct Gate {
    waiting: Arc<Room>,
    strangers: Arc<Room>,
    /// Connections that found no place.
    closed: AtomicU64,
    all: Arc<Semaphore>,
    addresses: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
    /// How many connections each peer has, by its name.
    peers: Mutex<HashMap<String, usize>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            waiting: Arc::new(Room::of(WAITING)),
            strangers: Arc::new(Room::of(STRANGERS)),
            closed: AtomicU64::new(0),
            all: Arc::new(Semaphore::new(HANDSHAKES)),
            addresses: Mutex::default(),
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
    /// A place among those that wait, or how many times there was none: this address has enough.
    pub(super) fn wait(&self, address: IpAddr) -> Result<Place, u64> {
        let place = self.waiting.take(address);
        place.ok_or_else(|| self.closed.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The right of one without a certificate to be connected; none if there are too many.
    pub(super) fn admit_stranger(&self, address: IpAddr) -> Option<Place> {
        self.strangers.take(address)
    }

    /// The right to shake hands; none if it is not one's turn in time.
    pub(super) async fn enter(
        self: &Arc<Self>,
        address: IpAddr,
        within: Duration,
    ) -> Option<Permits> {
        let address = network(address);
        let semaphore = {
            let mut addresses = self.addresses();
            let new = || Arc::new(Semaphore::new(HANDSHAKES_PER_ADDRESS));
            Arc::clone(addresses.entry(address).or_insert_with(new))
        };
        let all = Arc::clone(&self.all);
        let turn = async {
            let own = semaphore.acquire_owned().await;
            (own, all.acquire_owned().await)
        };
        let turn = tokio::time::timeout(within, turn).await;
        let Ok((own, all)) = turn else {
            self.forget(address);
            return None;
        };
        Some(Permits {
            gate: Arc::clone(self),
            address,
            own: Some(own.expect("the semaphore is never closed")),
            _all: all.expect("the semaphore is never closed"),
        })
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

    /// Forgets an address unless somebody has its semaphore or waits for it.
    fn forget(&self, address: IpAddr) {
        let mut addresses = self.addresses();
        let last = addresses.get(&address);
        if last.is_some_and(|semaphore| Arc::strong_count(semaphore) == 1) {
            addresses.remove(&address);
        }
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
        self.gate.forget(self.address);
    }
}

/// Places, of which one address has at most as many as are still free.
#[derive(Debug)]
struct Room {
    size: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by: HashMap<IpAddr, usize>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    address: IpAddr,
}

impl Room {
    fn of(size: usize) -> Self {
        Self {
            size,
            taken: Mutex::default(),
        }
    }

    fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = network(address);
        let mut taken = self.taken();
        let mine = taken.by.get(&address).copied().unwrap_or(0);
        if mine >= self.size - taken.all {
            return None;
        }
        taken.all += 1;
        taken.by.insert(address, mine + 1);
        Some(Place {
            room: Arc::clone(self),
            address,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Nothing that holds the lock leaves the counts half changed.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.room.taken();
        taken.all -= 1;
        if let Some(mine) = taken.by.get_mut(&self.address) {
            *mine -= 1;
            if *mine == 0 {
                taken.by.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: with IPv6, everybody has a network of 2^64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let prefix = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(prefix))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_of(room: &Arc<Room>, address: &str) -> Vec<Place> {
        let address = address.parse().unwrap();
        std::iter::from_fn(|| room.take(address)).collect()
    }

    #[test]
    fn whoever_comes_next_finds_room() {
        let room = Arc::new(Room::of(24));
        let first = all_of(&room, "10.0.0.1");
        assert_eq!(first.len(), 12);
        assert!(room.take("10.0.0.1".parse().unwrap()).is_none());
        let second = all_of(&room, "10.0.0.2");
        assert_eq!(second.len(), 6);
        assert!(room.take("10.0.0.3".parse().unwrap()).is_some());
        drop((first, second));
        let taken = room.taken();
        assert!(taken.all == 0 && taken.by.is_empty());
    }

    #[test]
    fn one_network_is_one_address() {
        let room = Arc::new(Room::of(24));
        let held = all_of(&room, "2001:db8::1");
        for same in ["2001:db8::2", "2001:db8::ffff:0:0:1"] {
            assert!(room.take(same.parse().unwrap()).is_none(), "{same}");
        }
        assert!(room.take("2001:db8:0:1::1".parse().unwrap()).is_some());
        drop(held);
        let held = all_of(&room, "10.0.0.1");
        assert!(room.take("::ffff:10.0.0.1".parse().unwrap()).is_none());
        drop(held);
    }

    #[tokio::test]
    async fn who_does_not_get_a_turn_goes() {
        let gate = Arc::new(Gate::default());
        let enter = |address: &str| {
            let (gate, address) = (Arc::clone(&gate), address.parse().unwrap());
            async move { gate.enter(address, Duration::from_millis(50)).await }
        };
        let mut held = Vec::new();
        for _ in 0..HANDSHAKES_PER_ADDRESS {
            held.push(enter("10.0.0.1").await.unwrap());
        }
        assert!(enter("10.0.0.1").await.is_none());
        assert!(enter("10.0.0.2").await.is_some());
        drop(held);
        assert!(enter("10.0.0.1").await.is_some());
        assert!(gate.addresses().is_empty());
    }

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
