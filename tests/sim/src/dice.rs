//! Randomness that one number decides.

use std::cell::Cell;

/// A small generator: the same seed, the same numbers, whatever library is used elsewhere.
#[derive(Debug)]
pub(crate) struct Dice(Cell<u64>);

impl Dice {
    /// A stream of its own for each purpose, so that one more roll here changes nothing there.
    pub(crate) fn new(seed: u64, purpose: u64) -> Self {
        let dice = Self(Cell::new(
            seed ^ purpose.wrapping_mul(0xD6E8_FEB8_6659_FD93),
        ));
        dice.next();
        dice
    }

    fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `sides`.
    pub(crate) fn roll(&self, sides: u64) -> u64 {
        self.next() % sides.max(1)
    }

    /// A number between two, both included.
    pub(crate) fn between(&self, from: u64, to: u64) -> u64 {
        from + self.roll(to - from + 1)
    }

    /// Whether something of that probability happens.
    pub(crate) fn percent(&self, percent: u64) -> bool {
        self.roll(100) < percent
    }
}
