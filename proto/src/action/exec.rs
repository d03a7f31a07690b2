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
    /// The directory to run in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Variables to set. A value may be `secret://NAME`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The exit code expected. Default: 0.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub exit: i32,
    /// A regular expression that standard output must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
}
