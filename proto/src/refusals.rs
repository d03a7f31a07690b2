//! Which refusals are written into a journal, and when (INV-11). Pure.
//!
//! Whoever is refused decides how often, and must neither fill a disk nor slow a journal. So what
//! is refused to the same peer for the same reason is counted: the first is written at once, what
//! follows as a count, at first a minute later and then ever more rarely.

use std::collections::{BTreeMap, VecDeque};

use crate::values::{Period, Timestamp};

/// Between the first record of a kind and the next; it doubles while refusals go on.
const FIRST_PAUSE: Period = Period::seconds(60);

/// The longest pause: a peer that goes on for ever costs 24 records a day.
const LONGEST_PAUSE: Period = Period::seconds(60 * 60);

/// The time over which all records together are bounded.
const WINDOW: Period = Period::seconds(60);

/// How much a ledger may hold and write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Kinds that are told apart at a time; beyond, they are counted as one.
    pub kinds: usize,
    /// Records in a minute, of all kinds together.
    pub a_minute: usize,
}

/// Refusals of one kind, since the last record of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted<K> {
    /// Who was refused what, and why.
    pub kind: K,
    /// How often.
    pub count: u64,
    /// When the first of them was.
    pub since: Timestamp,
}

/// What was refused, as far as it is not written yet. `K` says who was refused what, and why, in
/// words of this side only.
#[derive(Debug)]
pub struct Ledger<K> {
    bounds: Bounds,
    /// Stands for every kind for which there is no room.
    others: K,
    kinds: BTreeMap<K, Kind>,
    /// When the last records were written, the oldest first; as many as the bound.
    written: VecDeque<Timestamp>,
}

#[derive(Debug)]
struct Kind {
    /// Not written yet.
    count: u64,
    since: Timestamp,
    /// The next record is not written before.
    next: Timestamp,
    /// From that one to the one after it.
    pause: Period,
}

impl<K: Ord + Clone> Ledger<K> {
    /// An empty one. `others` stands for kinds for which there is no room.
    pub fn new(bounds: Bounds, others: K) -> Self {
        Self {
            bounds,
            others,
            kinds: BTreeMap::new(),
            written: VecDeque::new(),
        }
    }

    /// Somebody was refused something.
    pub fn note(&mut self, now: Timestamp, kind: K) {
        let kind = self.room_for(now, kind);
        let noted = self.kinds.entry(kind).or_insert(Kind {
            count: 0,
            since: now,
            next: now,
            pause: FIRST_PAUSE,
        });
        if noted.count == 0 {
            noted.since = now;
            if noted.is_quiet(now) {
                (noted.next, noted.pause) = (now, FIRST_PAUSE);
            }
        }
        noted.count = noted.count.saturating_add(1);
    }

    /// The kind that a refusal is counted as.
    fn room_for(&mut self, now: Timestamp, kind: K) -> K {
        if self.kinds.contains_key(&kind) || self.kinds.len() < self.bounds.kinds {
            return kind;
        }
        self.kinds.retain(|_, it| it.count > 0 || !it.is_quiet(now));
        if self.kinds.len() < self.bounds.kinds {
            kind
        } else {
            self.others.clone()
        }
    }

    /// What is to be written now; it counts as written.
    pub fn take_due(&mut self, now: Timestamp) -> Vec<Counted<K>> {
        self.look_at(now);
        let room = self.bounds.a_minute.saturating_sub(self.written.len());
        let mut due: Vec<Counted<K>> = self.waiting(|kind| kind.next <= now);
        // Whoever has waited longest comes first: a flood of kinds keeps none out for ever.
        due.sort_by_key(|counted| counted.since);
        due.truncate(room);
        for counted in &due {
            let kind = self.kinds.get_mut(&counted.kind).expect("it is waiting");
            kind.count = 0;
            kind.next = now.plus(kind.pause);
            kind.pause = Period(kind.pause.0.saturating_mul(2)).min(LONGEST_PAUSE);
            self.written.push_back(now);
        }
        due
    }

    /// When [`Self::take_due`] has something; none if nothing waits.
    pub fn next(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.look_at(now);
        let waiting = self.kinds.values().filter(|kind| kind.count > 0);
        let next = waiting.map(|kind| kind.next).min()?;
        let full = self.written.len() >= self.bounds.a_minute;
        let room = self.written.front().filter(|_| full);
        Some(room.map_or(next, |oldest| next.max(oldest.plus(WINDOW))))
    }

    /// Everything that waits, for a last record of each before the end.
    pub fn take_all(&mut self) -> Vec<Counted<K>> {
        let all = self.waiting(|_| true);
        for kind in self.kinds.values_mut() {
            kind.count = 0;
        }
        all
    }

    fn waiting(&self, wanted: impl Fn(&Kind) -> bool) -> Vec<Counted<K>> {
        let waiting = self.kinds.iter();
        let waiting = waiting.filter(|(_, kind)| kind.count > 0 && wanted(kind));
        waiting
            .map(|(kind, noted)| Counted {
                kind: kind.clone(),
                count: noted.count,
                since: noted.since,
            })
            .collect()
    }

    /// Forgets what is over; a clock that was put back keeps nothing waiting longer than a pause.
    fn look_at(&mut self, now: Timestamp) {
        let is_recent = |at: &Timestamp| *at <= now && now.since(*at) < WINDOW;
        self.written.retain(is_recent);
        for kind in self.kinds.values_mut() {
            kind.next = kind.next.min(now.plus(LONGEST_PAUSE));
        }
    }
}

impl Kind {
    /// Nothing of it was refused for as long as its last pause: what comes is a first one again.
    fn is_quiet(&self, now: Timestamp) -> bool {
        now >= self.next.plus(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        kinds: 8,
        a_minute: 4,
    };
    const HOUR: u64 = 3_600_000;

    fn ledger() -> Ledger<u32> {
        Ledger::new(BOUNDS, u32::MAX)
    }

    /// Refuses `kind` every second and writes whatever is due, when it is due.
    fn run(
        ledger: &mut Ledger<u32>,
        seconds: std::ops::Range<u64>,
        kind: impl Fn(u64) -> u32,
    ) -> Vec<(u64, Counted<u32>)> {
        let mut written = vec![];
        for second in seconds {
            let now = Timestamp(second * 1000);
            ledger.note(now, kind(second));
            if ledger.next(now).is_some_and(|at| at <= now) {
                written.extend(ledger.take_due(now).into_iter().map(|it| (second, it)));
            }
        }
        written
    }

    #[test]
    fn the_first_is_written_at_once_and_what_follows_is_counted() {
        let mut ledger = ledger();
        let written = run(&mut ledger, 0..200, |_| 1);
        let times: Vec<(u64, u64)> = written.iter().map(|(at, it)| (*at, it.count)).collect();
        assert_eq!(times, [(0, 1), (60, 60), (180, 120)]);
        assert_eq!(ledger.take_all()[0].count, 19);
        let later = Timestamp(200_000);
        assert_eq!((ledger.next(later), ledger.take_all()), (None, vec![]));
    }

    #[test]
    fn what_is_quiet_for_long_is_a_first_one_again() {
        let mut ledger = ledger();
        run(&mut ledger, 0..4000, |_| 1);
        ledger.take_all();
        let later = Timestamp(4 * HOUR);
        ledger.note(later, 1);
        assert_eq!(ledger.next(later), Some(later));
        assert_eq!(ledger.take_due(later)[0].since, later);
    }

    #[test]
    fn a_day_of_one_kind_is_some_thirty_records_and_a_flood_of_kinds_is_bounded() {
        let mut one = ledger();
        let written = run(&mut one, 0..24 * 3600, |_| 1);
        assert!(written.len() <= 30, "{}", written.len());
        let mut many = ledger();
        let written = run(&mut many, 0..3600, |second| u32::try_from(second).unwrap());
        let most = 60 * BOUNDS.a_minute;
        assert!(written.len() <= most, "{}", written.len());
        assert!(many.kinds.len() <= BOUNDS.kinds + 1);
        let all: u64 = written.iter().map(|(_, it)| it.count).sum();
        let left: u64 = many.take_all().iter().map(|it| it.count).sum();
        assert_eq!(all + left, 3600, "none is lost");
        assert!(written.iter().any(|(_, it)| it.kind == u32::MAX));
    }

    #[test]
    fn a_flood_keeps_no_other_kind_out_for_ever() {
        let mut ledger = Ledger::new(
            Bounds {
                kinds: 100,
                a_minute: 2,
            },
            u32::MAX,
        );
        let written = run(&mut ledger, 0..3600, |second| {
            let quiet = second == 30;
            if quiet {
                99
            } else {
                u32::try_from(second % 50).unwrap()
            }
        });
        assert!(written.iter().any(|(_, it)| it.kind == 99));
    }

    #[test]
    fn a_clock_that_is_put_back_keeps_nothing_waiting_for_longer_than_a_pause() {
        // One kind, and as many as a minute has records.
        for kinds in [1, BOUNDS.a_minute as u64] {
            let mut ledger = ledger();
            let kind = |second| u32::try_from(second % kinds).unwrap();
            run(&mut ledger, 100_000..100_100, kind);
            let back = Timestamp(1000);
            ledger.note(back, 1);
            let next = ledger.next(back).expect("it waits");
            assert!(next <= back.plus(LONGEST_PAUSE), "{next:?}");
            // Whoever asks again and again waits no longer by that.
            let later = back.plus(FIRST_PAUSE);
            assert_eq!(ledger.next(later), Some(next));
            assert!(!ledger.take_due(next).is_empty());
        }
    }

    proptest! {
        #[test]
        fn no_minute_has_more_records_than_its_bound_and_none_is_lost(
            steps in prop::collection::vec((0_u64..40_000, 0_u32..20), 1..400),
        ) {
            let mut ledger = ledger();
            let (mut now, mut noted, mut counted) = (Timestamp(0), 0, 0);
            let mut times: Vec<Timestamp> = vec![];
            for (pause, kind) in steps {
                now = now.plus(Period(pause));
                ledger.note(now, kind);
                noted += 1;
                for due in ledger.take_due(now) {
                    prop_assert!(due.count > 0 && due.since <= now);
                    counted += due.count;
                    times.push(now);
                }
            }
            for (index, at) in times.iter().enumerate() {
                let within = times[index..].iter().filter(|it| it.since(*at) < WINDOW);
                prop_assert!(within.count() <= BOUNDS.a_minute);
            }
            counted += ledger.take_all().iter().map(|it| it.count).sum::<u64>();
            prop_assert_eq!(counted, noted);
        }
    }
}
