//! Names and numbers that identify things, each a type of its own.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::{Deserializer, Visitor};
use serde::ser::{SerializeStruct as _, Serializer};
use serde::{Deserialize, Serialize};

/// A text that is not the id it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}: {rule}")]
pub struct InvalidId {
    /// The kind of id that was expected.
    pub what: &'static str,
    /// The text that was given.
    pub text: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// Reads an id from a text without a copy of the text.
struct Text<T>(PhantomData<T>);

impl<T: FromStr<Err = InvalidId>> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let check: fn(&str) -> bool = $check;
                if check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(InvalidId { what: $what, text: text.to_owned(), rule: $rule })
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Text(PhantomData))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

fn is_host_name(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    (1..=63).contains(&text.len())
        && text.bytes().all(ok)
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && !text.ends_with(['-', '.'])
        && !text.contains("..")
}

fn is_hex_id(text: &str, prefix: &str, digits: usize) -> bool {
    text.strip_prefix(prefix).is_some_and(|rest| {
        rest.len() == digits
            && rest
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

text_id!(
    /// The name of a host: that of its certificate (`spiffe://<domain>/agent/<host>`).
    HostId,
    "host name",
    "1 to 63 of a-z, 0-9, `-` and `.`, beginning with a letter or digit",
    is_host_name
);
text_id!(
    /// One execution of a plan. Made by the controller: `ro_` and 12 hexadecimal digits.
    RolloutId,
    "rollout id",
    "`ro_` and 12 hexadecimal digits",
    |text| is_hex_id(text, "ro_", 12)
);
text_id!(
    /// One installation of an agent: made at its first start and kept in its state directory.
    /// A second agent under the same host name has another one, and is refused.
    InstanceId,
    "instance id",
    "`in_` and 16 hexadecimal digits",
    |text| is_hex_id(text, "in_", 16)
);
text_id!(
    /// What an undo would lose, exactly as it was shown: a row more, and it is another one. People
    /// accept it by this id.
    LossId,
    "id of a loss",
    "`lo_` and 16 hexadecimal digits, as the refusal shows it",
    |text| is_hex_id(text, "lo_", 16)
);
text_id!(
    /// One boot of a host: the kernel's boot id and a random file in /run together,
    /// because containers share the kernel's.
    BootId,
    "boot id",
    "`bt_` and 16 hexadecimal digits",
    |text| is_hex_id(text, "bt_", 16)
);

impl RolloutId {
    /// Makes an id from six random bytes; the caller owns the randomness.
    pub fn from_random(bytes: [u8; 6]) -> Self {
        Self(format!("ro_{}", hex::encode(bytes)).into())
    }
}

impl InstanceId {
    /// Makes an id from eight random bytes.
    pub fn from_random(bytes: [u8; 8]) -> Self {
        Self(format!("in_{}", hex::encode(bytes)).into())
    }
}

impl BootId {
    /// Makes an id from eight bytes derived from the boot's identity.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(format!("bt_{}", hex::encode(bytes)).into())
    }
}

/// The name of an operator, as in `spiffe://<domain>/operator/<name>`.
pub type OperatorName = String;

/// A SHA-256. Its text form is `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// The digest of a compiled plan's canonical bytes: what people approve and sign.
pub type PlanDigest = Digest;

impl Digest {
    /// Hashes bytes.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// The 64 hexadecimal digits without the prefix, as `sha256sum` prints them.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0; 64];
        hex::encode_to_slice(self.0, &mut digits).map_err(|_| fmt::Error)?;
        let digits = str::from_utf8(&digits).map_err(|_| fmt::Error)?;
        write!(f, "sha256:{digits}")
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            what: "digest",
            text: text.to_owned(),
            rule: "`sha256:` and 64 hexadecimal digits",
        };
        let digits = text.strip_prefix("sha256:").ok_or_else(invalid)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| invalid())?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Text(PhantomData))
    }
}

/// The number of a controller's term, and the random id of that term (INV-4). Agents refuse a
/// lower counter, and the same counter with another id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// Grows by one whenever a controller takes over.
    pub counter: u64,
    /// Random, made when the term begins.
    pub id: u64,
}

impl Epoch {
    /// Before any controller: what a fresh agent has seen.
    pub const NONE: Self = Self { counter: 0, id: 0 };

    /// Whether something sent under `self` may be obeyed by one who has seen `highest`.
    pub fn is_current(self, highest: Self) -> bool {
        self.counter > highest.counter || self == highest
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.counter, self.id)
    }
}

/// Which way a step is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Apply the action.
    Do,
    /// Return to the recorded before-state.
    Undo,
    /// Only ask the host whether the effect is there; a dry run's direction.
    Probe,
}

impl Direction {
    /// The word used in keys and on screens.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Do => "do",
            Self::Undo => "undo",
            Self::Probe => "probe",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The position of a step in a compiled plan: phase and step, both from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StepRef {
    /// The phase's index in the plan.
    pub phase: u16,
    /// The step's index in the phase.
    pub step: u16,
}

impl fmt::Display for StepRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.phase, self.step)
    }
}

/// What must not have more than one effect (INV-1): one attempt at one step on one host. Its JSON
/// has phase and step beside the others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(from = "FlatStepKey")]
pub struct StepKey {
    /// The rollout that the attempt belongs to.
    pub rollout: RolloutId,
    /// The host that acts.
    pub host: HostId,
    /// The step.
    pub at: StepRef,
    /// Which way.
    pub direction: Direction,
    /// From 1.
    pub attempt: u16,
}

/// A step key as JSON has it. Not `serde(flatten)`, which reads into a tree first: every report has
/// a key.
#[derive(Deserialize)]
struct FlatStepKey {
    rollout: RolloutId,
    host: HostId,
    phase: u16,
    step: u16,
    direction: Direction,
    attempt: u16,
}

impl From<FlatStepKey> for StepKey {
    fn from(key: FlatStepKey) -> Self {
        let FlatStepKey {
            rollout,
            host,
            phase,
            step,
            direction,
            attempt,
        } = key;
        Self {
            rollout,
            host,
            at: StepRef { phase, step },
            direction,
            attempt,
        }
    }
}

impl Serialize for StepKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut key = serializer.serialize_struct("StepKey", 6)?;
        key.serialize_field("rollout", &self.rollout)?;
        key.serialize_field("host", &self.host)?;
        key.serialize_field("phase", &self.at.phase)?;
        key.serialize_field("step", &self.at.step)?;
        key.serialize_field("direction", &self.direction)?;
        key.serialize_field("attempt", &self.attempt)?;
        key.end()
    }
}

impl fmt::Display for StepKey {
    /// Also a valid file and systemd unit name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rollout,
            host,
            at,
            direction,
            attempt,
        } = self;
        write!(f, "{rollout}.{at}.{direction}.{attempt}@{host}")
    }
}

impl FromStr for StepKey {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let parse = || -> Option<Self> {
            let (left, host) = text.split_once('@')?;
            let mut parts = left.split('.');
            let key = Self {
                rollout: parts.next()?.parse().ok()?,
                at: StepRef {
                    phase: parts.next()?.parse().ok()?,
                    step: parts.next()?.parse().ok()?,
                },
                direction: match parts.next()? {
                    "do" => Direction::Do,
                    "undo" => Direction::Undo,
                    "probe" => Direction::Probe,
                    _ => return None,
                },
                attempt: parts.next()?.parse().ok()?,
                host: host.parse().ok()?,
            };
            parts.next().is_none().then_some(key)
        };
        // Numbers could also be written `+1` and `01`: a key has one text, as it has one file.
        let parsed = parse().filter(|key| key.to_string() == text);
        parsed.ok_or_else(|| InvalidId {
            what: "step key",
            text: text.to_owned(),
            rule: "<rollout>.<phase>.<step>.<direction>.<attempt>@<host>",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_key_survives_its_text_form() {
        let key = StepKey {
            rollout: RolloutId::from_random([1, 2, 3, 4, 5, 6]),
            host: "db-1.prod".parse().unwrap(),
            at: StepRef { phase: 3, step: 14 },
            direction: Direction::Undo,
            attempt: 2,
        };
        assert_eq!(key.to_string(), "ro_010203040506.3.14.undo.2@db-1.prod");
        assert_eq!(key.to_string().parse::<StepKey>().unwrap(), key);
        for other in [
            "03.14.undo.2",
            "3.+14.undo.2",
            "3.14.undo.02",
            "3.14.undo.2.1",
        ] {
            let other = format!("ro_010203040506.{other}@db-1.prod");
            assert!(other.parse::<StepKey>().is_err(), "{other}");
        }
    }

    #[test]
    fn host_names_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "a/b", "A", "-a", "a..b", "a.", "a b", "a\n"] {
            assert!(bad.parse::<HostId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_epoch_with_the_same_counter_and_another_id_is_refused() {
        let seen = Epoch { counter: 4, id: 7 };
        assert!(seen.is_current(seen));
        assert!(Epoch { counter: 5, id: 1 }.is_current(seen));
        assert!(!Epoch { counter: 4, id: 8 }.is_current(seen));
        assert!(!Epoch { counter: 3, id: 7 }.is_current(seen));
    }
}
