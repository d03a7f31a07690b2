//! What a controller refused to a peer, as its journal has it (INV-11). Every word is of this
//! controller's own: names come from certificates that it has verified, calls from its table.

use lockstep_proto::ids::{HostId, OperatorName};
use lockstep_proto::refusals::Counted;
use lockstep_proto::values::Timestamp;
use serde::{Deserialize, Serialize};

/// Who was refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caller {
    /// The agent of a host.
    Agent(HostId),
    /// A person.
    Operator(OperatorName),
    /// Whoever has shown no certificate.
    Nobody,
    /// Whoever has shown a certificate that is not good here. Whose it claims to be counts for
    /// nothing.
    Unverified,
    /// More different peers than are told apart.
    Others,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The certificate is not of an issuer for its role, or not valid; or there is none, where the
    /// call takes one.
    Certificate,
    /// The certificate has ended.
    Ended,
    /// The peer is suspended, its certificate is void, or the list that would say so has ended.
    Suspended,
    /// The certificate's roles do not allow the call, or it is for peers of another kind.
    Role,
    /// There is no such call.
    NoSuchCall,
    /// This person, or host, may not decide, or say, or have that.
    NotAllowed,
    /// What was asked for is wrong by itself, or breaks the contract.
    Invalid,
    /// Not in this state: of the rollout, of the peer's journal, of its release.
    NotNow,
    /// It is there already: another session of the host, another rollout with the serial.
    Taken,
    /// Too often, or too many at a time.
    Rate,
}

/// One kind of refusal: what is told apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// Who was refused.
    pub who: Caller,
    /// The call, by its name without the service; `handshake`, and `other` for
    /// whatever is in no table.
    pub call: &'static str,
    /// Why.
    pub why: Why,
}

/// Refusals of one kind, since the last record of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallsRefused {
    /// Who was refused. At a handshake that is whoever showed the certificate; that its key is
    /// theirs is proven only later.
    pub who: Caller,
    /// What was refused.
    pub call: String,
    /// Why.
    pub why: Why,
    /// How often.
    pub count: u64,
    /// When the first of them was.
    pub since: Timestamp,
}

impl From<Counted<Kind>> for CallsRefused {
    fn from(counted: Counted<Kind>) -> Self {
        let Counted { kind, count, since } = counted;
        let Kind { who, call, why } = kind;
        Self {
            who,
            call: call.to_owned(),
            why,
            count,
            since,
        }
    }
}
