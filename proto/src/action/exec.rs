//! Commands of the user's own, off unless the host's policy lists them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Arguments of `exec.run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// What it is, for people and policies.
    pub name: String,
    /// Program and arguments. There is no shell.
    pub argv: Vec<String>,
    /// The directory to run in. Default: `/`. If it or the program lies within an
    /// application's root on the host, the command runs as that application's user and with
    /// its variables, else as the agent's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Variables to set; they win over the application's. A value may be `secret://NAME` if
    /// the host's policy lists it in `env`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The exit code expected. Default: 0.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub exit: i32,
    /// A regular expression that standard output must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
}
