//! The figures of both halves, in one file: `target/reports/chaos.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::agent::AgentFigures;

/// The controller's figures.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Half {
    /// Copies of the disk and the fleet: one for each point, and one more for each power cut.
    pub points: u64,
    /// Those from which the rollout came to its end as it should.
    pub resumed: u64,
    /// Effects that happened twice.
    pub double_effects: u64,
    /// Reports that were lost.
    pub lost_results: u64,
    /// Outcomes that are not known.
    pub unknown: u64,
    /// What did not come to its end.
    pub stuck: u64,
    /// Other promises that were broken.
    pub other_violations: u64,
    /// From the start of a controller's process until its rollout goes on: 99 of 100 are at most
    /// this, in milliseconds.
    pub resume_p99_ms: u64,
    /// Anything else worth reading.
    pub more: BTreeMap<String, Value>,
}

/// Both halves.
#[derive(Debug, Serialize)]
struct Report<'a> {
    controller_points: u64,
    controller_resumed: u64,
    agent_points: u64,
    agent_ok: u64,
    not_reached: u64,
    double_effects: u64,
    lost_results: u64,
    unknown: u64,
    stuck: u64,
    resume_p99_ms: u64,
    unknown_kinds: Vec<&'a String>,
    controller: &'a Half,
    agent: &'a AgentFigures,
}

/// Where the figures are.
pub fn path() -> PathBuf {
    lockstep_tests::target().join("reports/chaos.json")
}

/// Writes the figures of a whole run.
pub fn save(controller: &Half, agent: &AgentFigures) -> Result<()> {
    let report = Report {
        controller_points: controller.points,
        controller_resumed: controller.resumed,
        agent_points: agent.agent_points,
        agent_ok: agent.agent_ok,
        not_reached: agent.not_reached.values().sum(),
        double_effects: controller.double_effects + agent.double_effects,
        lost_results: controller.lost_results + agent.lost_results,
        unknown: controller.unknown + agent.unknown.values().sum::<u64>(),
        stuck: controller.stuck + agent.stuck,
        resume_p99_ms: controller.resume_p99_ms,
        unknown_kinds: agent.unknown.keys().collect(),
        controller,
        agent,
    };
    let path = path();
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    Ok(())
}
