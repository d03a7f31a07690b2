//! Plans before they run: what is submitted, and what a dry run found.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::plan::{Batch, Phase, Stage, Strategy, Target};
use lockstep_proto::seal::SealedPlan;

use super::status::{failures, said};
use super::{Line, Tone, table, words};
use crate::cli::clean;
use crate::cli::document::{Document, Step};

/// A compiled plan in short: what somebody is about to submit.
pub(crate) fn summary(sealed: &SealedPlan) -> Vec<Line> {
    let plan = sealed.plan();
    let mut lines = vec![
        Line::new(Tone::Heading, format!("plan {}", plan.plan)),
        Line::plain(format!("digest    {}", sealed.digest())),
    ];
    if !plan.inputs.is_empty() {
        let one = |(name, value): (&String, &String)| format!("{name}={value}");
        let inputs: Vec<String> = plan.inputs.iter().map(one).collect();
        lines.push(Line::plain(format!("inputs    {}", inputs.join(" "))));
    }
    lines.push(Line::plain(format!("deadline  {}", plan.deadline)));
    if !plan.fleet_name.is_empty() {
        // What people seal.
        let until = words::moment(plan.expires.0);
        lines.push(Line::plain(format!(
            "fleet     {}, serial {}, valid until {until}",
            plan.fleet_name, plan.serial
        )));
    }
    lines.push(Line::plain(""));
    let rows: Vec<Vec<String>> = plan.phases.iter().map(phase_row).collect();
    lines.extend(table(&["PHASE", "ON", "STEPS", "WAITS FOR"], &rows));
    // Whoever compiled it may have chosen names that look like lines of ours.
    let plain = |line: Line| Line::new(line.tone, clean::line(&line.text));
    lines.into_iter().map(plain).collect()
}

fn phase_row(phase: &Phase) -> Vec<String> {
    let mut on: Vec<String> = Vec::new();
    let mut waits = Vec::new();
    for stage in &phase.stages {
        let place = place(stage);
        if !place.is_empty() && !on.contains(&place) {
            on.push(place);
        }
        waits.extend(
            stage
                .steps
                .iter()
                .filter_map(|step| waits_for(&step.action)),
        );
    }
    let steps = phase.stages.iter().map(|stage| stage.steps.len()).sum();
    vec![
        phase.name.clone(),
        on.join("; "),
        words::count(steps, "step"),
        waits.join("; "),
    ]
}

fn place(stage: &Stage) -> String {
    let target = match &stage.target {
        Target::Controller => return String::new(),
        Target::Groups(groups) => groups.join(", "),
        Target::OneOf(groups) => format!("one of {}", groups.join(", ")),
    };
    match &stage.strategy {
        Strategy::All => target,
        Strategy::Rolling {
            batch,
            max_failures: 0,
            ..
        } => format!("{target} ({} at a time)", size(*batch)),
        Strategy::Rolling {
            batch,
            max_failures,
            ..
        } => {
            format!(
                "{target} ({} at a time, {max_failures} may fail)",
                size(*batch)
            )
        }
        Strategy::Canary { first, soak } => {
            format!("{target} ({} first, for {soak})", size(*first))
        }
    }
}

fn size(batch: Batch) -> String {
    match batch {
        Batch::Hosts(hosts) => hosts.to_string(),
        Batch::Percent(percent) => format!("{percent}%"),
    }
}

fn waits_for(action: &Action) -> Option<String> {
    let free = if action.releases_lock() {
        "; the hosts are free meanwhile"
    } else {
        ""
    };
    asks_for(action).map(|what| what + free)
}

fn asks_for(action: &Action) -> Option<String> {
    match action {
        Action::GateApproval(gate) => {
            let from = gate
                .from
                .iter()
                .map(|(group, number)| format!("{number} of {group}"));
            let from: Vec<String> = from.collect();
            Some(format!(
                "approval by {}, at most {}",
                from.join(", "),
                gate.timeout
            ))
        }
        Action::GateChecklist(gate) => {
            let items = words::count(gate.items.len(), "item");
            Some(format!("checklist of {items}, at most {}", gate.timeout))
        }
        Action::GateWindow(gate) => Some(format!("the window {} UTC", gate.utc)),
        Action::GateWait(gate) => Some(gate.r#for.to_string()),
        _ => None,
    }
}

/// What a dry run found, host by host.
pub(crate) fn dry_run(document: &Document) -> Vec<Line> {
    let mut lines = vec![
        Line::new(Tone::Heading, format!("dry run of {}", document.plan)),
        Line::plain(format!("digest  {}", document.digest)),
    ];
    if !document.reason.is_empty() {
        lines.push(Line::new(
            Tone::Bad,
            format!("{}: {}", document.state, clean::line(&document.reason)),
        ));
    }
    for host in &document.hosts {
        lines.push(Line::plain(""));
        lines.push(Line::new(Tone::Heading, host.host.clone()));
        let mut any = false;
        for (_, step) in document.steps() {
            for attempt in step
                .attempts
                .iter()
                .filter(|attempt| attempt.host == host.host)
            {
                any = true;
                lines.extend(answer(step, attempt));
            }
        }
        if !any {
            let why = if host.why.is_empty() {
                "nothing to ask on this host"
            } else {
                &host.why
            };
            lines.push(Line::plain(format!("  {}", clean::line(why))));
        }
    }
    let people: Vec<&Step> = document
        .steps()
        .map(|(_, step)| step)
        .filter(|step| is_on_controller(step))
        .collect();
    if !people.is_empty() {
        lines.push(Line::plain(""));
        lines.push(Line::new(Tone::Heading, "on the controller, not asked"));
        for step in people {
            lines.push(Line::plain(format!(
                "  {:4} {:24} {}",
                step.at,
                step.action,
                step.describe()
            )));
        }
    }
    lines.push(Line::plain(""));
    lines.push(Line::plain(format!(
        "{}; nothing was changed",
        tally(document)
    )));
    lines
}

fn answer(step: &Step, attempt: &crate::cli::document::Attempt) -> Vec<Line> {
    let place = format!("  {:4} {:24}", step.at, step.action);
    let failed = failures(std::slice::from_ref(attempt)).next().is_some();
    let mut lines = vec![if failed {
        Line::new(Tone::Bad, format!("{place} {}", said(attempt)))
    } else {
        let tone = if attempt.message.starts_with("depends on") {
            Tone::Quiet
        } else {
            Tone::Plain
        };
        Line::new(tone, format!("{place} {}", clean::line(&attempt.message)))
    }];
    for fact in attempt.facts() {
        if let lockstep_proto::order::Fact::Note { name, value } = fact {
            lines.push(Line::new(
                Tone::Quiet,
                format!("{:32}| {name}: {}", "", clean::line(&value)),
            ));
        }
    }
    if let Some(hint) = &attempt.hint {
        lines.push(Line::plain(format!("{:32}hint: {}", "", clean::line(hint))));
    }
    lines
}

fn is_on_controller(step: &Step) -> bool {
    step.action.starts_with("gate.") || step.action.starts_with("notify.")
}

/// `4 would act, 2 nothing to do, 1 depends on an earlier step`.
fn tally(document: &Document) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (_, step) in document.steps() {
        for attempt in &step.attempts {
            let word = match attempt.outcome.as_str() {
                "ok" => attempt
                    .message
                    .split(':')
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
                other => other.to_owned(),
            };
            *counts.entry(word).or_default() += 1;
        }
    }
    if counts.is_empty() {
        return "no host was asked".to_owned();
    }
    let said: Vec<String> = counts
        .iter()
        .map(|(word, number)| format!("{number} {word}"))
        .collect();
    said.join(", ")
}
