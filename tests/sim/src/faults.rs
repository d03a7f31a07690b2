//! What goes wrong, and when: drawn from the seed, each fault by itself, so that leaving one out
//! changes nothing of the others.

use crate::dice::Dice;

/// One thing that goes wrong. Hosts by number; times in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The agent's daemon is killed after so many more writes.
    KillAgent { host: usize, writes: u64 },
    /// A step process, if one runs, is killed after so many more writes.
    KillStep { host: usize, writes: u64 },
    /// The controller is killed after so many more writes.
    KillController { writes: u64, down: u64 },
    /// The host loses its power: what was not synced may be lost.
    PowerLoss { host: usize, down: u64 },
    /// Connections are reset.
    Reset { host: usize },
    /// Nothing passes in one or both directions.
    Partition {
        host: usize,
        up: bool,
        down: bool,
        time: u64,
    },
    /// Nobody reaches the controller.
    Isolated { time: u64 },
    /// The daemon stands still, as with a slow disk.
    SlowAgent { host: usize, time: u64 },
    /// The controller stands still.
    SlowController { time: u64 },
    /// The host's clock jumps.
    Clock { host: usize, by: i64 },
    /// The next messages are handed on again, late and in another order.
    Disorder { host: usize, messages: u32 },
    /// The next order is under way for longer than it is worth.
    TooLate { host: usize },
    /// The controller is stopped, and a successor starts on a copy of its disk; then it wakes up,
    /// and may not give way.
    Successor { sleeps: u64, stubborn: bool },
}

/// A fault and when it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    /// So many events after the one before: faults come while something happens.
    pub(crate) after: usize,
    pub(crate) kind: Kind,
}

/// The faults of a seed.
pub(crate) fn schedule(seed: u64, hosts: usize, count: usize) -> Vec<Fault> {
    (0..count)
        .map(|index| {
            let dice = Dice::new(seed, 1000 + index as u64);
            Fault {
                after: usize::try_from(dice.between(1, 12)).expect("small"),
                kind: kind(&dice, hosts),
            }
        })
        .collect()
}

fn kind(dice: &Dice, hosts: usize) -> Kind {
    let host = usize::try_from(dice.roll(hosts as u64)).expect("few hosts");
    match dice.roll(20) {
        0..=2 => Kind::KillAgent {
            host,
            writes: dice.roll(30),
        },
        3..=5 => Kind::KillStep {
            host,
            writes: dice.roll(16),
        },
        6..=8 => Kind::KillController {
            writes: dice.roll(12),
            down: dice.between(100, 8_000),
        },
        9 | 10 => Kind::PowerLoss {
            host,
            down: dice.between(1_000, 30_000),
        },
        11 => Kind::Reset { host },
        12 => Kind::Partition {
            host,
            up: dice.percent(70),
            down: dice.percent(70),
            time: dice.between(500, 40_000),
        },
        13 => Kind::Isolated {
            time: dice.between(500, 20_000),
        },
        14 => Kind::SlowAgent {
            host,
            time: dice.between(100, 12_000),
        },
        15 => Kind::SlowController {
            time: dice.between(100, 12_000),
        },
        16 => Kind::Clock {
            host,
            by: i64::try_from(dice.roll(7_200_000)).expect("small") - 3_600_000,
        },
        17 => Kind::Disorder {
            host,
            messages: 1 + u32::try_from(dice.roll(8)).expect("small"),
        },
        18 => Kind::TooLate { host },
        _ => Kind::Successor {
            sleeps: dice.between(1_000, 40_000),
            stubborn: dice.percent(50),
        },
    }
}
