//! Words that stories share.

use std::path::Path;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::example;
use crate::operator::{Operator, list, text};
use crate::wait;

/// Submits the runbook for a release; the rollout's id.
pub fn submit(cluster: &Cluster, release: &str) -> String {
    cluster.submit(&example::plan(), release).unwrap()
}

/// Runs the runbook for a release to its end, with people at the gates.
pub fn deploy(cluster: &Cluster, release: &str) -> Value {
    let rollout = submit(cluster, release);
    cluster
        .finish(&rollout)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.last_words()))
}

/// Runs a plan given as text to its end; the document.
pub fn run_plan(cluster: &Cluster, plan: &str) -> Value {
    let file = cluster.root().join("story.yaml");
    std::fs::write(&file, plan).unwrap();
    let rollout = cluster.requester().submit(&file, &[]).unwrap();
    cluster
        .finish(&rollout)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.last_words()))
}

/// Waits until an attempt at an action is under way on a host, or on any if none is named; where.
pub fn under_way(watcher: &Operator, rollout: &str, action: &str, host: Option<&str>) -> String {
    wait::until(&format!("{action} to be under way"), wait::ROLLOUT, || {
        let document = watcher
            .rollout(rollout)
            .map_err(|error| format!("{error:#}"))?;
        let running = crate::operator::attempts(&document, action)
            .into_iter()
            .find(|attempt| {
                attempt["outcome"] == "running" && host.is_none_or(|host| attempt["host"] == host)
            });
        match running {
            Some(attempt) => Ok(text(&attempt["host"]).to_owned()),
            None => Err(text(&document["state"]).to_owned()),
        }
    })
    .unwrap()
}

/// A step, as a line of a plan, that writes its name into the host's file of effects and then takes
/// so many seconds.
pub fn effect(name: &str, takes: u32) -> String {
    const WORK: &str = "import sys, time; open(sys.argv[1], 'a').write(sys.argv[2] + '\\\\n'); \
                        time.sleep(float(sys.argv[3]))";
    format!(
        "      - exec.run: {{name: {name}, argv: [python3, -c, \"{WORK}\", \
         \"${{host.effects_file}}\", {name}, \"{takes}\"]}}\n"
    )
}

/// Files below a directory that hold a text, but those that `skip` names.
pub fn files_with(directory: &Path, needle: &str, skip: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let mut found = vec![];
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                left.push(path);
            } else if kind.is_file() && !skip(&path) {
                let bytes = std::fs::read(&path).unwrap_or_default();
                if bytes
                    .windows(needle.len())
                    .any(|window| window == needle.as_bytes())
                {
                    found.push(path.display().to_string());
                }
            }
        }
    }
    found
}

/// The failed attempts of a rollout: host, message, hint and last lines as one text each.
pub fn failures(document: &Value) -> Vec<String> {
    let mut found = vec![];
    for (_, step) in crate::operator::steps(document) {
        for attempt in list(&step["attempts"]).filter(|attempt| attempt["outcome"] == "failed") {
            let lines: Vec<&str> = list(&attempt["last_lines"]).map(text).collect();
            found.push(format!(
                "{} {}: {} ({}) hint: {}\n{}",
                text(&attempt["host"]),
                text(&step["action"]),
                text(&attempt["message"]),
                text(&attempt["cause"]),
                text(&attempt["hint"]),
                lines.join("\n"),
            ));
        }
    }
    found
}
