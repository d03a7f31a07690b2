//! The arguments that actions have, by their names: a rule about one that no action has would say
//! nothing, and a denial would deny nothing.

use lockstep_proto::action::{Action, CATALOGUE, Site};
use serde::de::value::Error as Stop;
use serde::de::{Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

/// How alike a word must be to be the one that was meant.
const ALIKE: f64 = 0.7;

/// The names of an action's arguments.
pub(super) fn of(action: &str) -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // It is asked which fields it looks for, and told nothing.
    let _ = Action::deserialize_args(action, Fields(&mut names));
    names
}

/// `; did you mean ...?`, or what there is if nothing is like it.
pub(super) fn suggestion<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let mut known: Vec<&str> = known.collect();
    known.sort_unstable();
    known.dedup();
    let nearest = known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), *name))
        .min();
    #[expect(clippy::cast_precision_loss, reason = "words are short")]
    match nearest {
        Some((distance, name))
            if distance as f64 <= (1.0 - ALIKE) * word.len().max(name.len()) as f64 =>
        {
            format!("; did you mean `{name}`?")
        }
        _ => format!("; there are {}", known.join(", ")),
    }
}

/// The actions that hosts carry out.
pub(super) fn actions_of_hosts() -> impl Iterator<Item = &'static str> {
    let on_hosts = CATALOGUE.iter().filter(|row| row.site == Site::Host);
    on_hosts.map(|row| row.name)
}

/// Notes which fields a structure has.
struct Fields<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Fields<'_> {
    type Error = Stop;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Stop> {
        *self.0 = fields;
        Err(Stop::custom("only its fields were wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Stop> {
        Err(Stop::custom("not a structure"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_of_hosts_has_arguments() {
        for action in actions_of_hosts() {
            assert!(!of(action).is_empty(), "{action}");
        }
        assert!(of("exec.run").contains(&"argv"));
        assert!(of("check.http").contains(&"url"));
    }
}
