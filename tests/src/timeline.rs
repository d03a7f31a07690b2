//! A rollout's timeline for people, planned against actual, from its document.

use serde_json::Value;

use crate::operator::{list, text};

/// One line for each phase that was opened, and how the rollout ended.
pub fn timeline(document: &Value) -> Vec<String> {
    let begun = document["submitted"].as_u64().unwrap_or_default();
    let since = |value: &Value| value.as_u64().map(|at| at.saturating_sub(begun));
    let mut lines = vec![format!(
        "{:<16} {:>15} {:>19}",
        "phase", "planned", "actual"
    )];
    for phase in list(&document["phases"]) {
        let Some(opened) = since(&phase["opened"]) else {
            continue;
        };
        let planned = match &phase["planned"] {
            Value::Null => "-".to_owned(),
            planned => format!("+{} for {}", text(&planned["at"]), text(&planned["takes"])),
        };
        let actual = match since(&phase["closed"]) {
            Some(closed) => format!("+{} for {}", seconds(opened), seconds(closed - opened)),
            None => format!("+{}, not closed", seconds(opened)),
        };
        lines.push(format!(
            "{:<16} {planned:>15} {actual:>19}",
            text(&phase["name"])
        ));
    }
    if let Some(started) = since(&document["rollback"]["started"]) {
        let reason = text(&document["rollback"]["reason"]);
        lines.push(format!(
            "rollback began   {:>35}  {reason}",
            format!("+{}", seconds(started))
        ));
    }
    let downtime = &document["downtime"];
    if let Some(down) = downtime["ms"].as_u64() {
        let planned = text(&document["slo"]["downtime"]);
        lines.push(format!(
            "downtime         {planned:>15} {:>19}",
            seconds(down)
        ));
    }
    if let Some(ended) = since(&document["ended"]) {
        let state = text(&document["state"]);
        lines.push(format!(
            "{state:<16} {:>35}",
            format!("+{}", seconds(ended))
        ));
    }
    lines
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{}s", milliseconds / 1000, milliseconds % 1000 / 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_timeline_shows_what_was_opened_only() {
        let document = json!({
            "submitted": 1000, "ended": 8500, "state": "rolled_back",
            "slo": {"downtime": "20m"}, "downtime": {"ms": 2345},
            "rollback": {"started": 4000, "reason": "why"},
            "phases": [
                {"name": "stop", "opened": 2000, "closed": 3500,
                 "planned": {"at": "19m", "takes": "2m"}},
                {"name": "start", "opened": 3500, "closed": null, "planned": null},
                {"name": "smoke", "opened": null, "closed": null, "planned": null},
            ],
        });
        let text = timeline(&document).join("\n");
        assert!(
            text.contains("+19m for 2m") && text.contains("+1.0s for 1.5s"),
            "{text}"
        );
        assert!(
            text.contains("+2.5s, not closed") && !text.contains("smoke"),
            "{text}"
        );
        assert!(
            text.contains("2.3s") && text.contains("+7.5s") && text.contains("why"),
            "{text}"
        );
    }
}
