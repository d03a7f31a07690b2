//! Floors: what people sign to let a host go on whose journal was put back to an earlier time.
//!
//! Such a host does not know any more which serials were licensed since. A floor says below which
//! serial it takes no plan. It is signed like a plan, for [`NAMESPACE`], over its canonical bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{HostId, InstanceId};
use crate::json;
use crate::values::Timestamp;

/// What signatures of floors are for, in SSH's sense.
pub const NAMESPACE: &str = "lockstep-floor";

/// The statement's name and version.
pub const STATEMENT: &str = "lockstep.floor/1";

/// The largest statement, in bytes: it is one record of the host's journal.
pub const MAX_BYTES: usize = 16 << 10;

/// In [`Floor::serials`]: every plan that is not named there.
pub const OTHERS: &str = "*";

/// The statement. Its canonical form is JSON without white space, fields in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Floor {
    /// [`STATEMENT`].
    pub statement: String,
    /// The host's fleet.
    pub fleet: String,
    /// The host.
    pub host: HostId,
    /// The installation of its agent, as its journal has it now.
    pub instance: InstanceId,
    /// For each plan the lowest serial that may come next; [`OTHERS`] stands for all others.
    pub serials: BTreeMap<String, u64>,
    /// The host does not take the statement afterwards.
    pub expires: Timestamp,
}

/// Bytes that are no floor.
#[derive(Debug, thiserror::Error)]
pub enum InvalidFloor {
    /// More than [`MAX_BYTES`].
    #[error("a floor has at most {MAX_BYTES} bytes")]
    TooLarge,
    /// Not readable.
    #[error("the floor cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// Another statement.
    #[error("the statement is `{}`, not `{STATEMENT}`", .0.escape_debug())]
    Statement(String),
    /// Readable, but not in its canonical encoding.
    #[error("the floor is not in its canonical encoding")]
    NotCanonical,
}

impl Floor {
    /// The canonical bytes: what is signed.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a floor has no map with other keys than text")
    }

    /// Reads a floor, and refuses any encoding of it but the canonical one.
    pub fn read(bytes: &[u8]) -> Result<Self, InvalidFloor> {
        if bytes.len() > MAX_BYTES {
            return Err(InvalidFloor::TooLarge);
        }
        let floor: Self = json::read(bytes).map_err(InvalidFloor::Unreadable)?;
        if floor.statement != STATEMENT {
            return Err(InvalidFloor::Statement(floor.statement));
        }
        if floor.encode() == bytes {
            Ok(floor)
        } else {
            Err(InvalidFloor::NotCanonical)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_has_one_encoding() {
        let floor = Floor {
            statement: STATEMENT.into(),
            fleet: "prod".into(),
            host: "app-1".parse().unwrap(),
            instance: InstanceId::from_random([1; 8]),
            serials: [(OTHERS.to_owned(), 7)].into(),
            expires: Timestamp(9),
        };
        let bytes = floor.encode();
        assert_eq!(Floor::read(&bytes).unwrap(), floor);
        let refused = |bytes: Vec<u8>| Floor::read(&bytes).unwrap_err();
        let spaced = [&bytes[..], b"\n"].concat();
        assert!(matches!(refused(spaced), InvalidFloor::NotCanonical));
        let other = String::from_utf8(bytes).unwrap().replace("floor/1", "x");
        let other = refused(other.into_bytes());
        assert!(matches!(other, InvalidFloor::Statement(_)));
    }
}
