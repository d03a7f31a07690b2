//! The backup that a migration asks for.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::action::postgres::Level;
use crate::values::Period;

/// What must be proven before a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RequiredBackup {
    /// A backup of this rollout that was restored: level 3 or more (INV-7).
    #[default]
    Verified,
    /// Nothing: for databases whose data can be lost.
    None,
    /// A backup of this rollout that has reached a level, and is not too old.
    Proven(ProvenBackup),
}

/// What a backup must have reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ProvenBackup {
    /// How far it must be proven.
    pub level: Level,
    /// How old its snapshot may be when the migration begins, by the database server's clock. Default: any age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age: Option<Period>,
}

impl ProvenBackup {
    /// One that was restored, of any age.
    pub const RESTORED: Self = Self {
        level: Level::Restored,
        age: None,
    };
}

const VERIFIED: &str = "verified";
const NONE: &str = "none";

impl RequiredBackup {
    /// What is asked of the backup; `None` if there need be none.
    pub fn asks(self) -> Option<ProvenBackup> {
        match self {
            Self::Verified => Some(ProvenBackup::RESTORED),
            Self::None => None,
            Self::Proven(asked) => Some(asked),
        }
    }
}

impl Serialize for RequiredBackup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Verified => serializer.serialize_str(VERIFIED),
            Self::None => serializer.serialize_str(NONE),
            Self::Proven(asked) => asked.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RequiredBackup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RequiredBackup;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`verified`, `none`, or `{level: 4, age: 15m}`")
            }
            fn visit_str<E: de::Error>(self, word: &str) -> Result<RequiredBackup, E> {
                match word {
                    VERIFIED => Ok(RequiredBackup::Verified),
                    NONE => Ok(RequiredBackup::None),
                    _ => Err(E::unknown_variant(word, &[VERIFIED, NONE])),
                }
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<RequiredBackup, A::Error> {
                let asked = ProvenBackup::deserialize(MapAccessDeserializer::new(map))?;
                Ok(RequiredBackup::Proven(asked))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for RequiredBackup {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RequiredBackup".into()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "What must be proven before a migration: `verified` (a backup of this rollout that was \
                            restored, level 3 or more), `none` (for databases whose data can be lost), or the \
                            level that it must have reached, and its age.",
            "anyOf": [
                {"type": "string", "enum": [VERIFIED, NONE]},
                generator.subschema_for::<ProvenBackup>(),
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_a_word_or_a_level() {
        let asked = ProvenBackup {
            level: Level::Equal,
            age: Some(Period::seconds(900)),
        };
        for (text, meant) in [
            (r#""verified""#, RequiredBackup::Verified),
            (r#""none""#, RequiredBackup::None),
            (r#"{"level":4,"age":"15m"}"#, RequiredBackup::Proven(asked)),
        ] {
            let read: RequiredBackup = serde_json::from_str(text).unwrap();
            assert_eq!(read, meant);
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
        for text in [
            r#""maybe""#,
            r#"{"level":6}"#,
            "{}",
            r#"{"level":1,"ago":"1m"}"#,
            "4",
        ] {
            serde_json::from_str::<RequiredBackup>(text).expect_err(text);
        }
    }
}
