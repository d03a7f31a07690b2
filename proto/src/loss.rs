//! What an undo would lose, and people accept: by an id that stands for exactly what was shown.

use crate::ids::{Digest, LossId, StepKey};

impl LossId {
    /// That of what an undo of a step would lose, whatever attempt it is.
    pub fn of(undo: &StepKey, lines: &[String]) -> Self {
        let all = ("lockstep loss 1", &undo.rollout, &undo.host, undo.at, lines);
        let all = serde_json::to_vec(&all).expect("texts are JSON");
        let id = format!("lo_{}", &Digest::of(&all).hex()[..16]);
        id.parse().expect("it is made as it is read")
    }

    /// How a refusal's message shows it.
    pub fn shown(&self) -> String {
        format!("({self})")
    }

    /// The first id that a refusal's message shows.
    pub fn in_message(message: &str) -> Option<Self> {
        let mut ends = message.split('(').skip(1);
        ends.find_map(|rest| rest.split_once(')')?.0.parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stands_for_a_step_and_all_that_was_shown() {
        let key = |text: &str| -> StepKey { text.parse().unwrap() };
        let of = |undo: &str, lines: &[&str]| {
            let lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
            LossId::of(&key(undo), &lines)
        };
        let first = of("ro_010101010101.1.2.undo.1@db-1", &["staff: 3 rows"]);
        assert_eq!(
            first,
            of("ro_010101010101.1.2.undo.7@db-1", &["staff: 3 rows"])
        );
        for other in [
            of("ro_010101010101.1.2.undo.1@db-1", &["staff: 4 rows"]),
            of("ro_010101010101.1.2.undo.1@db-1", &["staff: 3", " rows"]),
            of("ro_010101010101.1.2.undo.1@db-2", &["staff: 3 rows"]),
            of("ro_010101010101.1.3.undo.1@db-1", &["staff: 3 rows"]),
            of("ro_020202020202.1.2.undo.1@db-1", &["staff: 3 rows"]),
        ] {
            assert_ne!(first, other);
        }
        let message = format!("(x) it would be lost {}: a (b)", first.shown());
        assert_eq!(LossId::in_message(&message), Some(first));
        for none in [
            "",
            "(lo_12)",
            "(lo_0123456789ABCDEF)",
            "(lo_0123456789abcdef",
            ")(",
        ] {
            assert_eq!(LossId::in_message(none), None, "{none}");
        }
    }
}
