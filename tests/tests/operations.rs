//! The table of operations holds: against the runbook, the inventory and the plan.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_tests::{example, repository};

/// A row of the table.
struct Row {
    runbook: String,
    place: (String, String),
    inventory: usize,
    line: usize,
}

fn table() -> Vec<Row> {
    let text = std::fs::read_to_string(repository().join("docs/operations-s0.md")).unwrap();
    let lines = text
        .lines()
        .zip(1..)
        .filter(|(line, _)| line.starts_with("| "));
    let rows = lines.skip(1).map(|(line, number)| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [runbook, _, _, place, inventory] = cells[..] else {
            panic!("line {number} of the table has {} cells", cells.len());
        };
        let place = place.trim_matches('`').split_once(" › ");
        let (phase, what) = place.unwrap_or_else(|| panic!("line {number} names no place"));
        Row {
            runbook: runbook.to_owned(),
            place: (phase.to_owned(), what.to_owned()),
            inventory: inventory.parse().unwrap(),
            line: number,
        }
    });
    rows.collect()
}

/// The plan's text in parts: each phase, the checks after a rollback, and, as `plan`, the rest.
fn parts() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(example::plan()).unwrap();
    let mut parts = BTreeMap::<String, String>::new();
    let mut now = "plan".to_owned();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("  - name: ") {
            name.clone_into(&mut now);
        } else if line.starts_with("after_rollback:") {
            "after_rollback".clone_into(&mut now);
        } else if line.starts_with(char::is_alphabetic) {
            "plan".clone_into(&mut now);
        }
        let part = parts.entry(now.clone()).or_default();
        part.push_str(line);
        part.push('\n');
    }
    parts
}

#[test]
fn every_place_that_the_table_names_is_in_the_plan() {
    let parts = parts();
    for Row {
        place: (phase, what),
        line,
        ..
    } in table()
    {
        let part = parts.get(&phase);
        let part = part.unwrap_or_else(|| panic!("line {line}: the plan has no phase `{phase}`"));
        assert!(
            part.contains(&what),
            "line {line}: `{what}` is not in the phase `{phase}`"
        );
    }
}

/// A heading by its name alone: without `## `, `1. ` or `Phase 1: `, and without `(T-24 hours)`
/// where it holds other headings.
fn bare(title: &str) -> &str {
    let title = title.trim_start_matches('#').trim();
    if let Some((phase, name)) = title.split_once(": ")
        && phase.starts_with("Phase ")
    {
        return name.split_once(" (").map_or(name, |(name, _)| name);
    }
    match title.split_once(". ") {
        Some((number, name)) if number.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => title,
    }
}

/// The sections of the runbook that hold operations, as `chapter › section`: two chapters have a
/// section of the same name.
fn sections() -> BTreeSet<String> {
    let runbook = repository().join("tests/fixtures/runbooks/S0-employee-management-system.md");
    let text = std::fs::read_to_string(runbook).unwrap();
    // Headings that only hold others, that introduce, and what is no chapter but a section.
    let holders = [
        "### Phase ",
        "### When to Rollback",
        "### Rollback Procedure",
    ];
    let flat = [
        "Emergency Contacts",
        "Deployment Timeline",
        "Deployment Sign-Off",
    ];
    let (mut chapter, mut part) = ("", "");
    let mut found = BTreeSet::new();
    for line in text.lines() {
        let title = bare(line);
        if line.starts_with("#### ") {
            assert!(found.insert(format!("{part} › {title}")), "{title}");
        } else if holders.iter().any(|holder| line.starts_with(holder)) {
            part = title;
        } else if line.starts_with("### ") {
            assert!(found.insert(format!("{chapter} › {title}")), "{title}");
        } else if line.starts_with("## ") {
            chapter = title;
            if flat.contains(&title) {
                found.insert(title.to_owned());
            }
        }
    }
    found
}

#[test]
fn every_section_of_the_runbook_has_a_row() {
    let named: BTreeSet<String> = table().into_iter().map(|row| row.runbook).collect();
    let sections = sections();
    assert_eq!(sections.len(), 35, "{sections:?}");
    for twin in ["Deployment Window", "Rollback Procedure"] {
        let twin = format!("{twin} › Step 2: Stop Application");
        assert!(sections.contains(&twin), "{sections:?}");
    }
    let without: Vec<_> = sections.difference(&named).collect();
    assert!(without.is_empty(), "no row has {without:?}");
    let invented: Vec<_> = named.difference(&sections).collect();
    assert!(invented.is_empty(), "the runbook has no {invented:?}");
}

/// When a phase is planned to begin, in minutes.
fn planned(part: &str) -> u32 {
    let at = part
        .split_once("planned: {at: ")
        .and_then(|(_, rest)| rest.split_once(','))
        .unwrap_or_else(|| panic!("no time is planned:\n{part}"));
    match at.0 {
        "0s" => 0,
        at => at.strip_suffix('m').unwrap().parse().unwrap(),
    }
}

#[test]
fn the_timeline_that_people_are_told_is_the_plan_s() {
    let parts = parts();
    let announce = &parts["announce"];
    for (phase, words) in [
        ("stop", "start of the deployment, the application stops"),
        ("migrate", "database migration"),
        ("start", "application deployment"),
        ("smoke", "smoke tests"),
        ("validate", "system available"),
    ] {
        let minutes = planned(&parts[phase]) - planned(announce);
        let line = format!("+{minutes}: {words}\n");
        assert!(announce.contains(&line), "`{line}` is not told");
    }
}

#[test]
fn every_row_of_the_inventory_that_names_s0_is_covered() {
    let inventory = repository().join("tests/fixtures/runbooks/inventory.md");
    let text = std::fs::read_to_string(inventory).unwrap();
    let covered: BTreeSet<usize> = table().into_iter().map(|row| row.inventory).collect();
    // The third part lists hazards, not operations.
    let operations = text
        .lines()
        .zip(1..)
        .take_while(|(line, _)| !line.starts_with("## 3"));
    let wanted: BTreeSet<usize> = operations
        .filter(|(line, _)| {
            let seeds = line.strip_prefix("| ").and_then(|row| row.split_once(" |"));
            seeds.is_some_and(|(seeds, _)| seeds.split(' ').any(|seed| seed == "S0"))
        })
        .map(|(_, number)| number)
        .collect();
    assert!(wanted.len() > 35, "{wanted:?}");
    assert_eq!(
        wanted.difference(&covered).collect::<Vec<_>>(),
        Vec::<&usize>::new()
    );
    assert_eq!(
        covered.difference(&wanted).collect::<Vec<_>>(),
        Vec::<&usize>::new()
    );
}

#[test]
fn every_action_and_checklist_item_of_the_plan_has_a_row() {
    let table = table();
    for (phase, part) in parts() {
        let mut items = false;
        for line in part.lines() {
            let bare = line.trim_start().trim_start_matches("- ");
            let listed = line.trim_start().starts_with("- ") && !bare.starts_with("name: ");
            items = line.trim() == "items:" || (items && listed);
            let is_action = lockstep_proto::action::CATALOGUE.iter().any(|row| {
                bare.strip_prefix(row.name)
                    .is_some_and(|rest| rest.starts_with(':'))
            });
            let what = if is_action {
                bare.split(':').next().unwrap_or_default()
            } else if items && line.trim() != "items:" {
                bare.trim_matches('"')
            } else {
                continue;
            };
            // A checklist is named by its items, a step with a name by that, a notice by its time.
            let by_another_name = matches!(what, "gate.checklist" | "exec.run" | "check.command")
                || phase == "plan"
                || (is_action && !line.trim_start().starts_with("- "));
            let named = table
                .iter()
                .any(|row| row.place.0 == phase && row.place.1 == what);
            assert!(named || by_another_name, "`{phase} › {what}` has no row");
        }
        for name in part
            .lines()
            .filter_map(|line| line.strip_prefix("      - name: "))
        {
            let is_checklist = part.contains(&format!("- name: {name}\n        gate.checklist:"));
            let named = table
                .iter()
                .any(|row| row.place.0 == phase && row.place.1 == name);
            assert!(named || is_checklist, "`{phase} › {name}` has no row");
        }
    }
}
