//! Bounds on the one call that needs no certificate.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Tries of one address in a window. A host needs one; whoever guesses tokens has 160 bits before
/// him at five a minute.
const TRIES: u32 = 5;
const WINDOW: Duration = Duration::from_mins(1);

/// Addresses that are remembered. When there is no room for another, it waits: a flood from
/// everywhere stops enrolment for a minute, and nothing else.
const ADDRESSES: usize = 16_384;

/// Counts tries by address.
#[derive(Debug, Default)]
pub(super) struct Limits {
    addresses: Mutex<HashMap<IpAddr, (Instant, u32)>>,
}

impl Limits {
    /// Whether an address may try now.
    pub(super) fn may_try(&self, address: IpAddr, now: Instant) -> bool {
        let mut addresses = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_over = |begun: &Instant| now.duration_since(*begun) >= WINDOW;
        if addresses.len() >= ADDRESSES {
            addresses.retain(|_, (begun, _)| !is_over(begun));
            if addresses.len() >= ADDRESSES && !addresses.contains_key(&address) {
                return false;
            }
        }
        let (begun, tries) = addresses.entry(address).or_insert((now, 0));
        if is_over(begun) {
            (*begun, *tries) = (now, 0);
        }
        *tries += 1;
        *tries <= TRIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_five_tries_a_minute() {
        let limits = Limits::default();
        let (one, other) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let begun = Instant::now();
        let tries = |address, at| (0..7).filter(|_| limits.may_try(address, at)).count();
        assert_eq!(tries(one, begun), 5);
        assert_eq!(tries(one, begun + Duration::from_secs(59)), 0);
        assert_eq!(tries(other, begun), 5);
        assert_eq!(tries(one, begun + WINDOW), 5);
    }

    #[test]
    fn addresses_without_end_take_no_memory_without_end() {
        let limits = Limits::default();
        let begun = Instant::now();
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        let let_in = (0..20_000).filter(|number| limits.may_try(address(*number), begun));
        assert_eq!(let_in.count(), ADDRESSES);
        assert!(
            limits.may_try(address(1), begun),
            "one that is known has its tries"
        );
        assert!(limits.may_try(address(30_000), begun + WINDOW));
    }
}
