//! The ladder of proofs of a backup.

use serde::{Deserialize, Serialize};

/// How far a backup is proven. Each level proves what those below it prove, and more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Level {
    /// 0: the archive has the size and the digest that it had when it was made.
    Digest,
    /// 1: its table of contents can be read, and lists the data of as many tables as were counted.
    Listed,
    /// 2: all of it can be read.
    Read,
    /// 3: it restores into an empty database without an error, and each table has as many rows as
    /// were counted.
    Restored,
    /// 4: the restored database has the schema, the rows of each table and the values of the
    /// snapshot that was dumped.
    #[default]
    Equal,
    /// 5: pg_amcheck finds nothing wrong in the restored database: each index holds each row.
    Checked,
}

impl Level {
    const ALL: [Self; 6] = [
        Self::Digest,
        Self::Listed,
        Self::Read,
        Self::Restored,
        Self::Equal,
        Self::Checked,
    ];
}

impl TryFrom<u8> for Level {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        let level = Self::ALL.get(usize::from(number)).copied();
        level.ok_or_else(|| format!("{number} is no level: 0 to 5"))
    }
}

impl From<Level> for u8 {
    fn from(level: Level) -> Self {
        level as Self
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "level {}", u8::from(*self))
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Level {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Level".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "integer",
            "minimum": 0,
            "maximum": 5,
            "description": "How far a backup is proven: 0 its digest, 1 its table of contents, 2 all of it \
                            is read, 3 it restores to as many rows, 4 what it restores to equals its source, 5 pg_amcheck \
                            finds nothing in that.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_numbers_from_0_to_5_in_their_order() {
        for (number, level) in (0..).zip(Level::ALL) {
            assert_eq!(serde_json::to_string(&level).unwrap(), number.to_string());
            assert_eq!(Level::try_from(number), Ok(level));
        }
        assert!(Level::ALL.is_sorted());
        let refused = serde_json::from_str::<Level>("6").unwrap_err();
        assert!(refused.to_string().contains("6 is no level"), "{refused}");
    }
}
