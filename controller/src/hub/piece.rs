//! Events as they go to whoever watches: encoded once, and then only passed on.

use bytes::{BufMut as _, Bytes};
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use prost::Message as _;

/// Bytes of one piece, but for a single event that is larger: about fifty events, and half of what
/// goes into one frame of HTTP/2.
pub(crate) const PIECE: usize = 8000;

/// In front of each message of gRPC stand a flag that says that it is not compressed, and its size.
const PREFIX: usize = 5;

/// Some events of one rollout, in order, as messages of gRPC.
#[derive(Debug)]
pub(crate) struct Piece {
    bytes: Bytes,
    /// For each event its number, and where it ends.
    ends: Vec<(u64, usize)>,
    has_end: bool,
}

impl Piece {
    /// Packs events. Nothing comes after a rollout's end in the same piece.
    pub(crate) fn pack(events: impl IntoIterator<Item = RolloutEvent>) -> Vec<Self> {
        let mut packed = Vec::new();
        let mut open = Open::default();
        for event in events {
            if !open.has_room(&event) {
                packed.push(open.close(false));
            }
            open.put(&event);
            if event.kind() == EventKind::Ended {
                packed.push(open.close(true));
            }
        }
        if !open.ends.is_empty() {
            packed.push(open.close(false));
        }
        packed
    }

    /// What one who has had the events up to a number has not had yet, as bytes, and the number that
    /// it has had then. Progress has number 0, and never comes twice. None if there is nothing.
    pub(crate) fn after(&self, last: u64) -> Option<(Bytes, u64)> {
        let is_new = |&(number, _): &(u64, usize)| number == 0 || number > last;
        let first = self.ends.iter().position(is_new)?;
        let begin = match first.checked_sub(1) {
            Some(before) => self.ends[before].1,
            None => 0,
        };
        let newest = self.ends[first..].iter().map(|(number, _)| *number).max();
        Some((self.bytes.slice(begin..), last.max(newest?)))
    }

    /// Whether its last event is the end of the rollout.
    pub(crate) fn has_end(&self) -> bool {
        self.has_end
    }
}

/// A piece that is being packed.
#[derive(Default)]
struct Open {
    bytes: Vec<u8>,
    ends: Vec<(u64, usize)>,
}

impl Open {
    fn has_room(&self, event: &RolloutEvent) -> bool {
        self.ends.is_empty() || self.bytes.len() + PREFIX + event.encoded_len() <= PIECE
    }

    fn put(&mut self, event: &RolloutEvent) {
        let size = u32::try_from(event.encoded_len()).expect("an event is small");
        self.bytes.put_u8(0);
        self.bytes.put_u32(size);
        event.encode_raw(&mut self.bytes);
        self.ends.push((event.number, self.bytes.len()));
    }

    fn close(&mut self, has_end: bool) -> Piece {
        // A copy is as large as it has to be, whatever else waits to be packed.
        let piece = Piece {
            bytes: Bytes::copy_from_slice(&self.bytes),
            ends: std::mem::take(&mut self.ends),
            has_end,
        };
        self.bytes.clear();
        piece
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::hub) fn event(number: u64, kind: EventKind) -> RolloutEvent {
        RolloutEvent {
            number,
            kind: kind.into(),
            message: "x".repeat(100),
            ..RolloutEvent::default()
        }
    }

    fn many(numbers: impl IntoIterator<Item = u64>) -> Vec<Piece> {
        let events = numbers.into_iter();
        Piece::pack(events.map(|number| event(number, EventKind::StepOk)))
    }

    /// The numbers of the events in some bytes.
    fn numbers(mut bytes: &[u8]) -> Vec<u64> {
        let mut found = vec![];
        while let Some((prefix, rest)) = bytes.split_at_checked(PREFIX) {
            let size = u32::from_be_bytes(prefix[1..].try_into().unwrap()) as usize;
            found.push(RolloutEvent::decode(&rest[..size]).unwrap().number);
            bytes = &rest[size..];
        }
        assert!(bytes.is_empty());
        found
    }

    #[test]
    fn pieces_are_small_and_lack_nothing() {
        let pieces = many(1..=1000);
        assert!(pieces.len() > 10);
        let mut found = vec![];
        for piece in &pieces {
            assert!(piece.bytes.len() <= PIECE);
            let last = found.last().copied().unwrap_or_default();
            let (bytes, newest) = piece.after(last).unwrap();
            found.extend(numbers(&bytes));
            assert_eq!(found.last(), Some(&newest));
        }
        assert_eq!(found, (1..=1000).collect::<Vec<_>>());
        assert!(Piece::pack([]).is_empty());
    }

    #[test]
    fn an_event_larger_than_a_piece_is_one() {
        let large = RolloutEvent {
            number: 2,
            detail: vec!["x".repeat(1000); 20],
            ..RolloutEvent::default()
        };
        let events = [event(1, EventKind::Note), large, event(3, EventKind::Note)];
        let pieces = Piece::pack(events);
        assert_eq!(pieces.len(), 3);
    }

    #[test]
    fn what_was_had_before_does_not_come_again() {
        let pieces = many([3, 5, 9]);
        let [piece] = &pieces[..] else {
            panic!("one piece")
        };
        for (last, expected) in [(0, &[3, 5, 9][..]), (3, &[5, 9]), (4, &[5, 9]), (8, &[9])] {
            let (bytes, newest) = piece.after(last).unwrap();
            assert_eq!(numbers(&bytes), expected, "after {last}");
            assert_eq!(newest, 9);
        }
        assert!(piece.after(9).is_none());
        // Progress always comes, and is no reason to read an older event again.
        let progress = &many([0])[0];
        let (bytes, newest) = progress.after(7).unwrap();
        assert_eq!((numbers(&bytes), newest), (vec![0], 7));
    }

    #[test]
    fn nothing_comes_after_the_end_in_the_same_piece() {
        let events = [
            event(1, EventKind::StepOk),
            event(2, EventKind::Ended),
            event(3, EventKind::Resumed),
        ];
        let pieces = Piece::pack(events);
        let ends: Vec<bool> = pieces.iter().map(Piece::has_end).collect();
        assert_eq!(ends, [true, false]);
    }
}
