//! The figures of both halves, in one file: `target/reports/chaos.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One half's figures.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Half {
    /// Points at which something was killed.
    pub points: u64,
    /// Those after which everything went on as it should.
    pub ok: u64,
    /// Effects that happened twice.
    pub double_effects: u64,
    /// Reports and outcomes that were lost.
    pub lost_results: u64,
    /// Outcomes that are not known.
    pub unknown: u64,
    /// What did not come to its end.
    pub stuck: u64,
    /// Other promises that were broken.
    pub other_violations: u64,
    /// Anything else worth reading.
    #[serde(default)]
    pub more: BTreeMap<String, Value>,
}

impl Half {
    /// Whether a promise was broken. `unknown` is judged by the half itself.
    pub fn is_sound(&self) -> bool {
        self.ok == self.points
            && self.double_effects + self.lost_results + self.stuck + self.other_violations == 0
    }
}

/// Both halves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Points of the controller.
    pub controller_points: u64,
    /// Those from which a copy was resumed to its end.
    pub controller_resumed: u64,
    /// Points of the agent and of step processes.
    pub agent_points: u64,
    /// Those after which the attempt was settled as it should be.
    pub agent_ok: u64,
    /// Effects that happened twice, in both halves.
    pub double_effects: u64,
    /// Reports and outcomes that were lost.
    pub lost_results: u64,
    /// Outcomes that are not known.
    pub unknown: u64,
    /// What did not come to its end.
    pub stuck: u64,
    /// From the start of a controller's process to the first session, in milliseconds: 99 of 100
    /// are at most this.
    pub resume_p99_ms: u64,
    /// The controller's half.
    pub controller: Half,
    /// The agent's half.
    pub agent: Half,
}

/// Where the figures are.
pub fn path() -> PathBuf {
    lockstep_tests::target().join("reports/chaos.json")
}

/// Puts figures into the file; what it says of the other half stays.
pub fn save(change: impl FnOnce(&mut Report)) -> Result<Report> {
    let path = path();
    // A file of another time may have other keys: then it is made anew.
    let text = fs::read_to_string(&path).unwrap_or_default();
    let mut report: Report = serde_json::from_str(&text).unwrap_or_default();
    change(&mut report);
    let Report {
        controller, agent, ..
    } = &report;
    let sum = |of: fn(&Half) -> u64| of(controller) + of(agent);
    let (double, lost) = (
        sum(|half| half.double_effects),
        sum(|half| half.lost_results),
    );
    let (unknown, stuck) = (sum(|half| half.unknown), sum(|half| half.stuck));
    let (points, resumed) = (controller.points, controller.ok);
    let (agent_points, agent_ok) = (agent.points, agent.ok);
    report.controller_points = points;
    report.controller_resumed = resumed;
    report.agent_points = agent_points;
    report.agent_ok = agent_ok;
    report.double_effects = double;
    report.lost_results = lost;
    report.unknown = unknown;
    report.stuck = stuck;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    Ok(report)
}
