//! `postgres.rehearse`: a migration on a restored backup.

use serde::{Deserialize, Serialize};

use super::Tool;
use crate::action::postgres::Rows;
use crate::values::Period;

/// Whether a migration must have a way down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum WayDown {
    /// One that does not lead back fails the step.
    #[default]
    Required,
    /// One that does not lead back is said.
    IfPossible,
}

/// Arguments of `postgres.rehearse`: on the host that has the rollout's newest backup and the
/// release.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Rehearse {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "crate::action::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic.
    #[serde(default = "super::program")]
    pub program: String,
    /// The target revision. Default: head.
    #[serde(default = "super::head")]
    pub to: String,
    /// How the rows of the tables that were there may differ after the migration; where they must be
    /// unchanged, so must the values in the columns that were there. Default: unchanged.
    #[serde(default, skip_serializing_if = "crate::action::is_default")]
    pub rows: Rows,
    /// Whether the way down must lead back. Default: required.
    #[serde(default, skip_serializing_if = "crate::action::is_default")]
    pub downgrade: WayDown,
    /// How long a statement may wait for a lock. Default: 5s.
    #[serde(default = "super::lock_timeout")]
    pub lock_timeout: Period,
    /// How long a statement may take. Default: 15m.
    #[serde(default = "super::statement_timeout")]
    pub statement_timeout: Period,
}
