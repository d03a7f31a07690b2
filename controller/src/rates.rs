//! How much one who is known may ask for: so much that only a stolen key, or a broken agent, ever
//! meets an end of it, and so little that it harms nobody else.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

use lockstep_proto::values::Timestamp;

/// So much at once, and so much more with each second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// What may come at once.
    pub(crate) burst: u64,
    /// What comes back in each second.
    pub(crate) per_second: u64,
}

/// What each has used of a rate.
#[derive(Debug)]
pub(crate) struct Used<K> {
    rate: Rate,
    by: HashMap<K, Level>,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    /// In thousandths.
    used: u64,
    at: Timestamp,
}

impl<K: Eq + Hash> Used<K> {
    /// Nobody has used anything.
    pub(crate) fn new(rate: Rate) -> Self {
        let by = HashMap::new();
        Self { rate, by }
    }

    /// Whether there is something left for somebody.
    pub(crate) fn is_left<Q>(&self, now: Timestamp, who: &Q) -> bool
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let used = |level: &Level| level.used(now, self.rate);
        self.rate.is_above(self.by.get(who).map_or(0, used))
    }

    /// Uses so much if anything is left, also more than that; whether anything was.
    pub(crate) fn take(&mut self, now: Timestamp, who: K, cost: u64) -> bool {
        let level = self.by.entry(who).or_insert(Level { used: 0, at: now });
        let used = level.used(now, self.rate);
        let is_left = self.rate.is_above(used);
        let more = if is_left {
            cost.saturating_mul(1000)
        } else {
            0
        };
        *level = Level {
            used: used.saturating_add(more),
            at: now,
        };
        is_left
    }
}

impl Rate {
    /// Whether somebody who has used so much, in thousandths, has something left.
    fn is_above(self, used: u64) -> bool {
        used < self.burst.saturating_mul(1000)
    }
}

impl Level {
    /// What is used of it by now.
    fn used(self, now: Timestamp, rate: Rate) -> u64 {
        let back = now.since(self.at).0.saturating_mul(rate.per_second);
        self.used.saturating_sub(back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_comes_back_with_time_and_to_each_his_own() {
        let rate = Rate {
            burst: 3,
            per_second: 2,
        };
        let mut used = Used::new(rate);
        let at = |ms| Timestamp(1_000_000 + ms);
        for _ in 0..3 {
            assert!(used.take(at(0), "a", 1));
        }
        assert!(!used.is_left(at(0), "a") && used.is_left(at(0), "b"));
        assert!(!used.is_left(at(0), "a"));
        assert!(used.is_left(at(500), "a"));
        assert!(used.take(at(500), "a", 1) && !used.is_left(at(500), "a"));
        // One large cost may go beyond, and is paid back.
        assert!(used.take(at(60_000), "a", 10));
        // Who is refused pays nothing, and waits no longer for it.
        assert!(!used.take(at(62_000), "a", 1));
        assert!(!used.is_left(at(63_500), "a") && used.is_left(at(63_501), "a"));
        assert!(used.take(at(u64::MAX - 1_000_000), "a", u64::MAX));
        assert!(!used.is_left(at(u64::MAX - 1_000_000), "a"));
    }
}
