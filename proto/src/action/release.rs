//! Releases: immutable directories, and a link to the one that is active.

use serde::{Deserialize, Serialize};

/// Where a release's sources are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Git {
    /// The repository: https, ssh, or a path on the host.
    pub url: String,
    /// The tag to take.
    pub tag: String,
    /// The commit that the tag must point at; then a moved tag is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

/// A build command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// Program and arguments. There is no shell.
    pub argv: Vec<String>,
    /// The directory to run in, relative to the release. Default: the release itself.
    #[serde(rename = "in", default, skip_serializing_if = "super::is_default")]
    pub within_dir: String,
}

/// Arguments of `release.fetch`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// The application, as the host's configuration names it with its directory.
    pub app: String,
    /// The release's name, such as `v1.0.0`.
    pub release: String,
    /// Where the sources are.
    pub git: Git,
}

/// Arguments of `release.build`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// The application, as the host's configuration names it with its directory.
    pub app: String,
    /// The release's name, such as `v1.0.0`.
    pub release: String,
    /// Commands, one after the other; the first that fails ends the step.
    pub run: Vec<Command>,
}

/// Arguments of `release.activate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Activate {
    /// The application, as the host's configuration names it with its directory.
    pub app: String,
    /// The release's name, such as `v1.0.0`.
    pub release: String,
}

/// Arguments of `release.previous`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Previous {
    /// The application, as the host's configuration names it with its directory.
    pub app: String,
}
