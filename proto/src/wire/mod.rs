//! Generated code, and the conversions between it and the domain types. Wire types stop here.

mod agent;
mod control;

pub use agent::{Hello, InvalidMessage, PROTOCOL_VERSIONS, VersionRange, Welcome};

/// Generated from `lockstep/agent/v1/agent.proto`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    unreachable_pub,
    unused_qualifications
)]
pub mod agent_v1 {
    tonic::include_proto!("lockstep.agent.v1");
}

/// Generated from `lockstep/control/v1/control.proto`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    unreachable_pub,
    unused_qualifications
)]
pub mod control_v1 {
    tonic::include_proto!("lockstep.control.v1");
}

/// Generated from `lockstep/enroll/v1/enroll.proto`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    unreachable_pub,
    unused_qualifications
)]
pub mod enroll_v1 {
    tonic::include_proto!("lockstep.enroll.v1");
}

/// Generated from `lockstep/host/v1/host.proto`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::all,
    unreachable_pub,
    unused_qualifications
)]
pub mod host_v1 {
    tonic::include_proto!("lockstep.host.v1");
}

/// Every call of every service, as `/package.Service/Call`, read from the contract.
pub const CALLS: &[&str] = include!(concat!(env!("OUT_DIR"), "/calls.rs"));

/// The largest message of an agent, in bytes: an order with its bindings.
pub const MAX_AGENT_MESSAGE: usize = 256 << 10;

/// The largest message of a host that wants a certificate, in bytes: a request has about 300.
pub const MAX_ENROLL_MESSAGE: usize = 16 << 10;

/// The largest message of an operator, in bytes: a compiled plan with its source.
pub const MAX_CONTROL_MESSAGE: usize = 4 << 20;

/// The largest piece of a blob or a log, in bytes.
pub const CHUNK: usize = 64 << 10;

/// Armoured signatures as texts, if they are within their bounds.
pub fn signatures(
    signatures: Vec<impl Into<Vec<u8>> + AsRef<[u8]>>,
) -> Result<Vec<String>, InvalidMessage> {
    let invalid = || InvalidMessage::Field("signatures");
    crate::seal::check_size(&signatures).map_err(|_| invalid())?;
    let text = |signature: _| String::from_utf8(Into::into(signature)).map_err(|_| invalid());
    signatures.into_iter().map(text).collect()
}
