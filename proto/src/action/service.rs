//! Services: stop, start, restart, ask.

use serde::{Deserialize, Serialize};

use super::Address;
use crate::values::Period;

/// Who runs a service on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// systemd, over D-Bus.
    #[default]
    Systemd,
    /// The agent starts the process in a session of its own, as the host's configuration says.
    Process,
    /// Commands in the host's configuration start, stop and ask.
    Command,
}

/// The state that a service should be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Expected {
    /// It runs.
    #[default]
    Running,
    /// It does not run.
    Stopped,
    /// Either: the state is only reported.
    Any,
}

/// Arguments of `service.stop`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// The service's name: a systemd unit without its suffix, or a name in the host's configuration.
    pub service: String,
    /// How this host runs services.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub driver: Driver,
    /// Addresses that must refuse connections afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refuses: Vec<Address>,
    /// How long stopping may take. Default: 30s.
    #[serde(default = "stop_within")]
    pub within: Period,
}

/// Arguments of `service.start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The service's name: a systemd unit without its suffix, or a name in the host's configuration.
    pub service: String,
    /// How this host runs services.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub driver: Driver,
    /// Addresses that must accept connections afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listens: Vec<Address>,
    /// How long starting may take. Default: 60s.
    #[serde(default = "start_within")]
    pub within: Period,
}

/// Arguments of `service.restart`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Restart {
    /// The service's name: a systemd unit without its suffix, or a name in the host's configuration.
    pub service: String,
    /// How this host runs services.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub driver: Driver,
    /// Addresses that must accept connections afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listens: Vec<Address>,
    /// How long it may take. Default: 60s.
    #[serde(default = "start_within")]
    pub within: Period,
}

/// Arguments of `service.status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The service's name: a systemd unit without its suffix, or a name in the host's configuration.
    pub service: String,
    /// How this host runs services.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub driver: Driver,
    /// The state that it should be in. Default: running.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub expect: Expected,
}

fn stop_within() -> Period {
    Period::seconds(30)
}

fn start_within() -> Period {
    Period::seconds(60)
}
