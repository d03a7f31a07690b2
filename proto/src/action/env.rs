//! Environment files of services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Arguments of `env.diff`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Diff {
    /// The file, absolute. It lies outside the release, so that releases stay immutable.
    pub path: String,
    /// The variables. A value may be `secret://NAME`.
    pub set: BTreeMap<String, String>,
}

/// Arguments of `env.render`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Render {
    /// The file, absolute. It lies outside the release, so that releases stay immutable.
    pub path: String,
    /// The variables. A value may be `secret://NAME`.
    pub set: BTreeMap<String, String>,
    /// Octal permissions. Default: 0600.
    #[serde(default = "private")]
    pub mode: String,
    /// User that owns the file. Default: the application's user if the file lies within its
    /// root, else whoever the agent runs as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

fn private() -> String {
    "0600".to_owned()
}
