//! Notices: sent by the controller at most once; their outcome never changes a rollout's.

use serde::{Deserialize, Serialize};

/// Arguments of `notify.webhook`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// Where to post; may be `secret://NAME`, resolved on the controller.
    pub url: String,
    /// Text. `${rollout.id}`, `.plan`, `.state`, `.reason`, `.elapsed` and `.phase` are put in.
    pub text: String,
}

/// Arguments of `notify.slack`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Slack {
    /// Slack's incoming webhook; may be `secret://NAME`, resolved on the controller.
    pub webhook: String,
    /// Text. `${rollout.id}`, `.plan`, `.state`, `.reason`, `.elapsed` and `.phase` are put in.
    pub text: String,
}

/// Arguments of `notify.email`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Email {
    /// Addresses.
    pub to: Vec<String>,
    /// Text. `${rollout.id}`, `.plan`, `.state`, `.reason`, `.elapsed` and `.phase` are put in.
    pub subject: String,
    /// Text. `${rollout.id}`, `.plan`, `.state`, `.reason`, `.elapsed` and `.phase` are put in.
    pub text: String,
}
