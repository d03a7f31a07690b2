//! Gates: where a rollout waits for people or for time. They run on the controller.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Action;
use crate::values::Period;

/// What happens when nobody decided in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// The rollout is undone.
    #[default]
    Abort,
    /// The rollout halts and keeps its lock.
    Halt,
}

/// What becomes of the rollout's lock, and of its hosts' holds, while a gate waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Lock {
    /// The rollout keeps them.
    #[default]
    Hold,
    /// Other rollouts may have them. They are taken again before the rollout goes on, and what was
    /// seen before the gate is looked at again.
    Release,
}

/// A day of the week, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Day {
    /// Monday.
    #[default]
    Mon,
    /// Tuesday.
    Tue,
    /// Wednesday.
    Wed,
    /// Thursday.
    Thu,
    /// Friday.
    Fri,
    /// Saturday.
    Sat,
    /// Sunday.
    Sun,
}

/// The most people of one group that a gate may ask for.
pub const MOST_APPROVALS: u32 = 100;

/// Arguments of `gate.approval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Approval {
    /// How many people of which group must approve. Nobody counts twice, nor does who started the rollout.
    pub from: BTreeMap<String, u32>,
    /// How long to wait.
    pub timeout: Period,
    /// Default: abort.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub on_timeout: OnTimeout,
    /// What is approved, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Whether the hosts stay locked meanwhile. `release` only where nothing was changed before the
    /// gate. Default: hold.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub lock: Lock,
}

/// Arguments of `gate.checklist`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Checklist {
    /// What people confirm, each with a name and a time in the report.
    pub items: Vec<String>,
    /// The group that may confirm. Default: any operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// How long to wait. Default: 24h.
    #[serde(default = "day")]
    pub timeout: Period,
    /// Default: abort.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub on_timeout: OnTimeout,
    /// Whether the hosts stay locked meanwhile. `release` only where nothing was changed before the
    /// gate. Default: hold.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub lock: Lock,
}

/// Arguments of `gate.window`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Days of the week.
    pub days: Vec<Day>,
    /// From and until, such as `14:00-18:00`.
    pub utc: String,
    /// Whether the hosts stay locked meanwhile. `release` only where nothing was changed before the
    /// gate. Default: hold.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub lock: Lock,
}

/// Arguments of `gate.wait`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Wait {
    /// How long.
    pub r#for: Period,
    /// Whether the hosts stay locked meanwhile. `release` only where nothing was changed before the
    /// gate. Default: hold.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub lock: Lock,
}

fn day() -> Period {
    Period::seconds(86_400)
}

impl Action {
    /// Whether it is a gate that frees the lock while it waits.
    pub fn releases_lock(&self) -> bool {
        let lock = match self {
            Self::GateApproval(gate) => gate.lock,
            Self::GateChecklist(gate) => gate.lock,
            Self::GateWindow(gate) => gate.lock,
            Self::GateWait(gate) => gate.lock,
            _ => Lock::Hold,
        };
        lock == Lock::Release
    }
}
