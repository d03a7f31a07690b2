//! Typed values of plans: periods, sizes and instants. In text they carry their unit, and each
//! has exactly one canonical text, so that a compiled plan has exactly one encoding.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A text that is not the value it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what} ({example})")]
pub struct InvalidValue {
    what: &'static str,
    text: String,
    example: &'static str,
}

/// A length of time with millisecond resolution: `250ms`, `90s`, `2m`, `1h`, `30d`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Period(pub u64);

const PERIOD_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

impl Period {
    /// A period of whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(seconds * 1000)
    }

    /// The same as the standard library's type.
    pub const fn to_std(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

/// A size in bytes: `512B`, `64KiB`, `100MiB`, `10GiB`, `2TiB`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

const SIZE_UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// A share in percent: `5%`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Percent(pub u64);

const PERCENT_UNITS: [(&str, u64); 1] = [("%", 1)];

/// Reads `<integer><unit>`; the units are given from large to small.
fn parse_with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Writes with the largest unit that divides the value: the one canonical text.
fn format_with_unit(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    let smallest = units[units.len() - 1];
    let (unit, factor) = match value {
        0 => smallest,
        _ => *units
            .iter()
            .find(|(_, factor)| value.is_multiple_of(*factor))
            .unwrap_or(&smallest),
    };
    write!(f, "{}{unit}", value / factor)
}

macro_rules! unit_text {
    ($name:ident, $units:ident, $what:literal, $example:literal) => {
        impl FromStr for $name {
            type Err = InvalidValue;
            fn from_str(text: &str) -> Result<Self, InvalidValue> {
                parse_with_unit(text, &$units).map(Self).ok_or_else(|| InvalidValue {
                    what: $what,
                    text: text.to_owned(),
                    example: $example,
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format_with_unit(f, self.0, &$units)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidValue;
            fn try_from(text: String) -> Result<Self, InvalidValue> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }

        #[cfg(feature = "schema")]
        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                let units: Vec<&str> = $units.iter().map(|(unit, _)| *unit).collect();
                schemars::json_schema!({
                    "type": "string",
                    "pattern": format!("^[0-9]+({})$", units.join("|")),
                    "description": concat!("A ", $what, ", ", $example, "."),
                })
            }
        }
    };
}

unit_text!(
    Period,
    PERIOD_UNITS,
    "duration",
    "such as `250ms`, `90s`, `2m`, `1h` or `30d`"
);
unit_text!(
    ByteSize,
    SIZE_UNITS,
    "size",
    "such as `512B`, `64KiB`, `100MiB` or `10GiB`"
);

unit_text!(Percent, PERCENT_UNITS, "share", "such as `5%`");

/// An instant: milliseconds since 1970-01-01T00:00:00Z, on the controller's clock unless said
/// otherwise.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// This instant and a period.
    #[must_use]
    pub const fn plus(self, period: Period) -> Self {
        Self(self.0.saturating_add(period.0))
    }

    /// The time from `earlier` to this instant; zero if it is later.
    pub const fn since(self, earlier: Self) -> Period {
        Period(self.0.saturating_sub(earlier.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_period_and_size_has_one_text(value in 0_u64..1 << 50) {
            prop_assert_eq!(Period(value).to_string().parse::<Period>().unwrap(), Period(value));
            prop_assert_eq!(ByteSize(value).to_string().parse::<ByteSize>().unwrap(), ByteSize(value));
        }
    }

    #[test]
    fn units_are_required_and_exact() {
        assert_eq!("90s".parse(), Ok(Period(90_000)));
        assert_eq!("100MiB".parse(), Ok(ByteSize(100 << 20)));
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "1.5h",
            "1 h",
            "1H",
            "1MB",
            "99999999999999999999d",
        ] {
            assert!(
                bad.parse::<Period>().is_err() && bad.parse::<ByteSize>().is_err(),
                "{bad}"
            );
        }
        assert_eq!(Period(0).to_string(), "0ms");
        assert_eq!(Period(120_000).to_string(), "2m");
    }
}
