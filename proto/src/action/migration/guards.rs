//! What a migration may do to those who use the database meanwhile.

use serde::{Deserialize, Serialize};

use crate::values::{Percent, Period};

/// What is done about transactions that have been open for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnLongTx {
    /// They are waited for, four minutes at most.
    #[default]
    Wait,
    /// The step fails with their names.
    Fail,
    /// Their sessions are ended.
    End,
}

/// What is watched while a migration runs: once a second, on the step's own session. What goes
/// beyond a guard ends the migration, which fails with the figure.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Guards {
    /// The most of the server's connections that may be in use, such as `90%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<Percent>,
    /// The longest time that a standby may be behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_lag: Option<Period>,
    /// The most sessions that may wait for a lock that the migration has, or waits for before them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked: Option<u32>,
    /// The longest time that one of them may wait. Needs PostgreSQL 14.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_wait: Option<Period>,
}
