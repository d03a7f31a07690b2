//! What certificates and those who have them are called.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use lockstep_proto::ids::{HostId, OperatorName};
use serde::{Deserialize, Serialize};

/// A certificate's serial number: hexadecimal digits, without zeros in front.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(String);

impl Serial {
    /// The serial number of these bytes, the most significant first.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let digits = bytes.iter().fold(String::new(), |mut digits, byte| {
            let _ = write!(digits, "{byte:02x}");
            digits
        });
        Self(digits.trim_start_matches('0').to_owned())
    }

    /// Its bytes, the most significant first.
    pub fn to_bytes(&self) -> Vec<u8> {
        let even = self.0.len().is_multiple_of(2);
        let digits = format!("{}{}", if even { "" } else { "0" }, self.0);
        let pairs = digits.as_bytes().chunks(2);
        let byte = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).expect("hexadecimal digits");
            u8::from_str_radix(text, 16).expect("hexadecimal digits")
        };
        pairs.map(byte).collect()
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that is no serial number, or names nobody who could be suspended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}")]
pub struct InvalidSubject {
    text: String,
    what: &'static str,
}

impl FromStr for Serial {
    type Err = InvalidSubject;

    /// Also with colons between bytes, as other tools print it.
    fn from_str(text: &str) -> Result<Self, InvalidSubject> {
        let digits = text.replace(':', "").to_ascii_lowercase();
        let digits = digits.trim_start_matches('0');
        let fits = (1..=40).contains(&digits.len());
        if fits && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Ok(Self(digits.to_owned()));
        }
        Err(InvalidSubject {
            text: text.to_owned(),
            what: "serial number: up to 40 hexadecimal digits, not all of them 0",
        })
    }
}

impl TryFrom<String> for Serial {
    type Error = InvalidSubject;

    fn try_from(text: String) -> Result<Self, InvalidSubject> {
        text.parse()
    }
}

impl From<Serial> for String {
    fn from(serial: Serial) -> Self {
        serial.0
    }
}

/// Who may be suspended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Subject {
    /// A host, whatever its certificate.
    Host(HostId),
    /// A person, whatever the certificate.
    Operator(OperatorName),
    /// One certificate, whoever has it.
    Serial(Serial),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => write!(f, "host:{host}"),
            Self::Operator(name) => write!(f, "operator:{name}"),
            Self::Serial(serial) => write!(f, "serial:{serial}"),
        }
    }
}

impl FromStr for Subject {
    type Err = InvalidSubject;

    fn from_str(text: &str) -> Result<Self, InvalidSubject> {
        let invalid = || InvalidSubject {
            text: text.to_owned(),
            what: "`host:NAME`, `operator:NAME` or `serial:HEX`",
        };
        let (kind, name) = text.split_once(':').ok_or_else(invalid)?;
        let ok = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        Ok(match kind {
            "host" => Self::Host(name.parse().map_err(|_| invalid())?),
            "serial" => Self::Serial(name.parse()?),
            "operator" if (1..=63).contains(&name.len()) && name.bytes().all(ok) => {
                Self::Operator(name.to_owned())
            }
            _ => return Err(invalid()),
        })
    }
}

impl TryFrom<String> for Subject {
    type Error = InvalidSubject;

    fn try_from(text: String) -> Result<Self, InvalidSubject> {
        text.parse()
    }
}

impl From<Subject> for String {
    fn from(subject: Subject) -> Self {
        subject.to_string()
    }
}
