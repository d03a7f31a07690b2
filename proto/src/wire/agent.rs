//! Conversions of `lockstep.agent.v1`. Each destructures every field, so that a new one asks the
//! compiler for attention.

use std::collections::BTreeMap;

use super::agent_v1 as wire;
use crate::ids::{
    BootId, Digest, Direction, Epoch, HostId, InstanceId, InvalidId, RolloutId, StepKey, StepRef,
};
use crate::json;
use crate::order::{Binding, Fact, MAX_FACT_BYTES, Order};
use crate::report::{MAX_REPORT_BYTES, Report, ReportBody};
use crate::seal::MAX_SIGNATURE_BYTES;
use crate::values::Timestamp;
use crate::witness::Head;

/// The protocol versions that this release speaks.
pub const PROTOCOL_VERSIONS: VersionRange = VersionRange { min: 1, max: 1 };

/// A range of protocol versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    /// The lowest.
    pub min: u32,
    /// The highest.
    pub max: u32,
}

impl VersionRange {
    /// The highest version that both ranges hold.
    pub fn common(self, other: Self) -> Option<u32> {
        let highest = self.max.min(other.max);
        (highest >= self.min.max(other.min)).then_some(highest)
    }
}

/// A message that breaks the contract.
#[derive(Debug, thiserror::Error)]
pub enum InvalidMessage {
    /// A field that must be there is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field that does not hold what it should.
    #[error("{0} is not valid")]
    Field(&'static str),
    /// An id that is none.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// JSON that is not what it should be.
    #[error("{0} cannot be read")]
    Json(&'static str, #[source] serde_json::Error),
}

/// The agent's introduction; see the `.proto` file for each field.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the .proto file documents the fields")]
pub struct Hello {
    pub versions: VersionRange,
    pub host: HostId,
    pub instance: InstanceId,
    pub boot: BootId,
    pub highest_epoch: Epoch,
    pub last_report: u64,
    pub labels: BTreeMap<String, String>,
    pub agent_version: String,
    pub held_rollout: Option<RolloutId>,
    pub acknowledged: u64,
}

/// The controller's answer; see the `.proto` file for each field.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the .proto file documents the fields")]
pub struct Welcome {
    pub version: u32,
    pub epoch: Epoch,
    pub clock: Timestamp,
    pub acknowledged: u64,
    pub earlier: u64,
}

impl From<Epoch> for wire::Epoch {
    fn from(Epoch { counter, id }: Epoch) -> Self {
        Self { counter, id }
    }
}

impl From<wire::Epoch> for Epoch {
    fn from(wire::Epoch { counter, id }: wire::Epoch) -> Self {
        Self { counter, id }
    }
}

fn epoch(epoch: Option<wire::Epoch>) -> Result<Epoch, InvalidMessage> {
    epoch
        .map(Into::into)
        .ok_or(InvalidMessage::Missing("epoch"))
}

fn digest(bytes: &[u8]) -> Result<Digest, InvalidMessage> {
    bytes
        .try_into()
        .map(Digest)
        .map_err(|_| InvalidMessage::Field("digest"))
}

impl From<Hello> for wire::Hello {
    fn from(hello: Hello) -> Self {
        let Hello {
            versions,
            host,
            instance,
            boot,
            highest_epoch,
            last_report,
            labels,
            agent_version,
            held_rollout,
            acknowledged,
        } = hello;
        Self {
            min_version: versions.min,
            max_version: versions.max,
            host: host.into(),
            instance: instance.into(),
            boot: boot.into(),
            highest_epoch: Some(highest_epoch.into()),
            last_report,
            labels: labels.into_iter().collect(),
            agent_version,
            held_rollout: held_rollout.map(Into::into).unwrap_or_default(),
            acknowledged,
        }
    }
}

impl TryFrom<wire::Hello> for Hello {
    type Error = InvalidMessage;
    fn try_from(hello: wire::Hello) -> Result<Self, InvalidMessage> {
        let wire::Hello {
            min_version,
            max_version,
            host,
            instance,
            boot,
            highest_epoch,
            last_report,
            labels,
            agent_version,
            held_rollout,
            acknowledged,
        } = hello;
        // Both are journalled, in one record of at most 32 KiB.
        let label_bytes: usize = labels
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if labels.len() > 64 || label_bytes > 4 << 10 {
            return Err(InvalidMessage::Field("labels"));
        }
        if agent_version.len() > 128 {
            return Err(InvalidMessage::Field("agent_version"));
        }
        Ok(Self {
            versions: VersionRange {
                min: min_version,
                max: max_version,
            },
            host: host.parse()?,
            instance: instance.parse()?,
            boot: boot.parse()?,
            highest_epoch: epoch(highest_epoch)?,
            last_report,
            labels: labels.into_iter().collect(),
            agent_version,
            held_rollout: match held_rollout.as_str() {
                "" => None,
                id => Some(id.parse()?),
            },
            acknowledged,
        })
    }
}

impl From<Welcome> for wire::Welcome {
    fn from(
        Welcome {
            version,
            epoch,
            clock,
            acknowledged,
            earlier,
        }: Welcome,
    ) -> Self {
        Self {
            version,
            epoch: Some(epoch.into()),
            clock_ms: clock.0,
            acknowledged,
            earlier,
        }
    }
}

impl TryFrom<wire::Welcome> for Welcome {
    type Error = InvalidMessage;
    fn try_from(welcome: wire::Welcome) -> Result<Self, InvalidMessage> {
        let wire::Welcome {
            version,
            epoch: term,
            clock_ms,
            acknowledged,
            earlier,
        } = welcome;
        Ok(Self {
            version,
            epoch: epoch(term)?,
            clock: Timestamp(clock_ms),
            acknowledged,
            earlier,
        })
    }
}

impl From<Direction> for wire::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Do => Self::Do,
            Direction::Undo => Self::Undo,
            Direction::Probe => Self::Probe,
        }
    }
}

impl TryFrom<wire::Direction> for Direction {
    type Error = InvalidMessage;
    fn try_from(direction: wire::Direction) -> Result<Self, InvalidMessage> {
        match direction {
            wire::Direction::Unspecified => Err(InvalidMessage::Missing("direction")),
            wire::Direction::Do => Ok(Self::Do),
            wire::Direction::Undo => Ok(Self::Undo),
            wire::Direction::Probe => Ok(Self::Probe),
        }
    }
}

impl From<Order> for wire::Order {
    fn from(order: Order) -> Self {
        let Order {
            key,
            plan,
            epoch,
            not_after,
            bindings,
        } = order;
        let StepKey {
            rollout,
            host: _,
            at,
            direction,
            attempt,
        } = key;
        Self {
            rollout: rollout.into(),
            plan_digest: plan.0.to_vec().into(),
            phase: at.phase.into(),
            step: at.step.into(),
            direction: wire::Direction::from(direction).into(),
            attempt: attempt.into(),
            epoch: Some(epoch.into()),
            not_after_ms: not_after.0,
            bindings: bindings.into_iter().map(Into::into).collect(),
        }
    }
}

impl wire::Order {
    /// Reads an order that `host` received. The host is not in the message: an agent takes every
    /// order as meant for itself, and the controller's certificate says who sent it.
    pub fn into_order(self, host: HostId) -> Result<Order, InvalidMessage> {
        let direction = Direction::try_from(self.direction())?;
        let Self {
            rollout,
            plan_digest,
            phase,
            step,
            direction: _,
            attempt,
            epoch: term,
            not_after_ms,
            bindings,
        } = self;
        let small =
            |value: u32, field| u16::try_from(value).map_err(|_| InvalidMessage::Field(field));
        Ok(Order {
            key: StepKey {
                rollout: rollout.parse()?,
                host,
                at: StepRef {
                    phase: small(phase, "phase")?,
                    step: small(step, "step")?,
                },
                direction,
                attempt: small(attempt, "attempt")?,
            },
            plan: digest(&plan_digest)?,
            epoch: epoch(term)?,
            not_after: Timestamp(not_after_ms),
            bindings: bindings
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl From<Binding> for wire::Binding {
    fn from(
        Binding {
            origin,
            fact,
            signature,
        }: Binding,
    ) -> Self {
        let json = serde_json::to_vec(&fact).expect("a fact has no map with other keys than text");
        Self {
            origin: origin.to_string(),
            fact_json: json.into(),
            signature: signature.unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::Binding> for Binding {
    type Error = InvalidMessage;
    fn try_from(binding: wire::Binding) -> Result<Self, InvalidMessage> {
        let wire::Binding {
            origin,
            fact_json,
            signature,
        } = binding;
        if fact_json.len() > MAX_FACT_BYTES {
            return Err(InvalidMessage::Field("fact"));
        }
        if signature.len() > MAX_SIGNATURE_BYTES {
            return Err(InvalidMessage::Field("signature"));
        }
        let fact: Fact =
            json::read(&fact_json).map_err(|error| InvalidMessage::Json("fact", error))?;
        Ok(Self {
            origin: origin.parse()?,
            fact,
            signature: Some(signature).filter(|signature| !signature.is_empty()),
        })
    }
}

impl From<Head> for wire::Head {
    fn from(head: Head) -> Self {
        let Head {
            journal,
            number,
            hash,
        } = head;
        Self {
            journal,
            number,
            hash: hash.0.to_vec().into(),
        }
    }
}

impl TryFrom<wire::Head> for Head {
    type Error = InvalidMessage;
    fn try_from(head: wire::Head) -> Result<Self, InvalidMessage> {
        let wire::Head {
            journal,
            number,
            hash,
        } = head;
        let head = Self {
            journal,
            number,
            hash: digest(&hash)?,
        };
        if head.is_named() {
            Ok(head)
        } else {
            Err(InvalidMessage::Field("head"))
        }
    }
}

impl From<Report> for wire::Report {
    fn from(report: Report) -> Self {
        let Report { number, body, head } = report;
        let json =
            serde_json::to_vec(&body).expect("a report has no map with other keys than text");
        Self {
            number,
            body_json: json.into(),
            head: head.map(Into::into),
        }
    }
}

impl TryFrom<wire::Report> for Report {
    type Error = InvalidMessage;
    fn try_from(report: wire::Report) -> Result<Self, InvalidMessage> {
        let wire::Report {
            number,
            body_json,
            head,
        } = report;
        if body_json.len() > MAX_REPORT_BYTES {
            return Err(InvalidMessage::Field("report"));
        }
        let body: ReportBody =
            json::read(&body_json).map_err(|error| InvalidMessage::Json("report", error))?;
        let head = head.map(TryInto::try_into).transpose()?;
        Ok(Self { number, body, head })
    }
}

impl wire::FetchBlobRequest {
    /// The digest that is asked for.
    pub fn digest(&self) -> Result<Digest, InvalidMessage> {
        digest(&self.digest)
    }
}

impl wire::Offer {
    /// Rollout, plan, term, whether it is a dry run, and the plan's signatures.
    pub fn into_parts(
        self,
    ) -> Result<(RolloutId, Digest, Epoch, bool, Vec<String>), InvalidMessage> {
        let Self {
            rollout,
            plan_digest,
            epoch: term,
            dry_run,
            signatures,
            round: _,
        } = self;
        Ok((
            rollout.parse()?,
            digest(&plan_digest)?,
            epoch(term)?,
            dry_run,
            super::signatures(signatures)?,
        ))
    }
}

macro_rules! rollout_and_epoch {
    ($($message:ident)*) => {$(
        impl wire::$message {
            /// Rollout and term.
            pub fn into_parts(self) -> Result<(RolloutId, Epoch), InvalidMessage> {
                let Self { rollout, epoch: term } = self;
                Ok((rollout.parse()?, epoch(term)?))
            }
        }
    )*};
}
rollout_and_epoch!(Cancel Survey);

impl wire::Release {
    /// Rollout, term, and whether the rollout comes back.
    pub fn into_parts(self) -> Result<(RolloutId, Epoch, bool), InvalidMessage> {
        let Self {
            rollout,
            epoch: term,
            comes_back,
        } = self;
        Ok((rollout.parse()?, epoch(term)?, comes_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn an_order_survives_the_wire() {
        let host: HostId = "app-1".parse().unwrap();
        let key = StepKey {
            rollout: RolloutId::from_random([7; 6]),
            host: host.clone(),
            at: StepRef { phase: 2, step: 5 },
            direction: Direction::Undo,
            attempt: 3,
        };
        let order = Order {
            key: key.clone(),
            plan: Digest::of(b"plan"),
            epoch: Epoch { counter: 2, id: 99 },
            not_after: Timestamp(123),
            bindings: vec![Binding {
                origin: key,
                fact: Fact::Note {
                    name: "a".into(),
                    value: "b".into(),
                },
                signature: Some("ab".into()),
            }],
        };
        let bytes = wire::Order::from(order.clone()).encode_to_vec();
        let read = wire::Order::decode(bytes.as_slice())
            .unwrap()
            .into_order(host)
            .unwrap();
        assert_eq!(read, order);
    }

    #[test]
    fn versions_meet_at_the_highest_common_one() {
        let range = |min, max| VersionRange { min, max };
        assert_eq!(range(1, 3).common(range(2, 5)), Some(3));
        assert_eq!(range(1, 1).common(range(2, 2)), None);
    }
}
