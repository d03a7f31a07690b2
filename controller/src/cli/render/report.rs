//! The report of a rollout: what happened, against what was planned, with names and times. It is
//! built once, as blocks; Markdown and HTML only write them down.

use lockstep_core::rollout::LOUD;
use lockstep_proto::values::Period;

use super::evidence::evidence;
use super::status::{failures, held, host_names, inputs, left, said, state};
use super::words;
use crate::cli::clean;
use crate::cli::document::{Attempt, Document, Phase, Planned, Step};

/// A part of a report. Texts are plain: whoever writes them down escapes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Block {
    /// A heading; the title of the report has level 1.
    Heading(u8, String),
    /// Names and values.
    Fields(Vec<(String, String)>),
    /// Rows under a head.
    Table {
        /// The head.
        head: Vec<&'static str>,
        /// Rows; each has as many cells as the head.
        rows: Vec<Vec<String>>,
    },
    /// Lines as they are.
    Lines(String),
}

/// Builds the report.
pub(crate) fn report(document: &Document) -> Vec<Block> {
    let mut blocks = vec![
        Block::Heading(1, format!("Deployment report: {}", document.plan)),
        Block::Fields(header(document)),
    ];
    section(&mut blocks, "Deployment timeline", timeline(document));
    section(&mut blocks, "Downtime", downtime(document));
    section(&mut blocks, "Failures", failed(document));
    section(&mut blocks, "Rollback", rollback(document));
    section(&mut blocks, "Hosts", hosts(document));
    section(&mut blocks, "Steps", steps(document));
    section(&mut blocks, "Approvals and checklists", decisions(document));
    section(&mut blocks, "Evidence", evidence(document));
    section(&mut blocks, "Notices", notices(document));
    section(&mut blocks, "Sign-off", signoff(document));
    blocks
}

fn section(blocks: &mut Vec<Block>, title: &str, body: Vec<Block>) {
    if !body.is_empty() {
        blocks.push(Block::Heading(2, title.to_owned()));
        blocks.extend(body);
    }
}

fn header(document: &Document) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    let mut field = |name: &str, value: String| fields.push((name.to_owned(), value));
    field("Result", state(document).to_uppercase());
    if !document.reason.is_empty() {
        field("Reason", clean::line(&document.reason));
    }
    for word in &document.break_glass {
        let (at, until) = (words::moment(word.at), words::moment(word.until));
        let said = format!("{}, {at} until {until}", clean::line(&word.say()));
        field(LOUD, said);
    }
    field("Deployment status", checked_status(&document.state));
    field("Rollout", document.rollout.clone());
    field("Plan", format!("{}, {}", document.plan, document.digest));
    if !document.inputs.is_empty() {
        field("Inputs", inputs(document));
    }
    field("Requested by", document.requester.clone());
    field("Started", words::moment(document.submitted));
    field(
        "Ended",
        document
            .ended
            .map_or_else(|| "not yet".to_owned(), words::moment),
    );
    if let Some(total) = document.total_ms() {
        field("Total time", held(total, document.slo.total.as_deref()));
    }
    let hosts = words::count(document.hosts.len(), "host");
    field("Hosts", format!("{hosts}: {}", host_names(document, 20)));
    if let Some(closed) = &document.closed {
        let at = words::moment(closed.at);
        field(
            "Closed",
            format!(
                "by {} at {at}: {}",
                closed.operator,
                clean::line(&closed.reason)
            ),
        );
    }
    fields
}

/// The boxes of the runbook's last page.
fn checked_status(state: &str) -> String {
    let boxes = [
        ("succeeded", "Success"),
        ("partial", "Partial"),
        ("rolled_back", "Rolled back"),
        ("halted", "Halted"),
        ("cancelled", "Cancelled"),
    ];
    let one = |(name, words): &(&str, &str)| {
        format!("[{}] {words}", if *name == state { "x" } else { " " })
    };
    boxes.iter().map(one).collect::<Vec<_>>().join("  ")
}

fn timeline(document: &Document) -> Vec<Block> {
    let rows: Vec<Vec<String>> = document
        .phases
        .iter()
        .map(|phase| timeline_row(document, phase))
        .collect();
    if rows.is_empty() {
        return vec![];
    }
    let head = vec![
        "Planned at",
        "Activity",
        "Planned",
        "Started",
        "Took",
        "Compared",
        "Responsible",
    ];
    vec![Block::Table { head, rows }]
}

fn timeline_row(document: &Document, phase: &Phase) -> Vec<String> {
    let planned = phase.planned.as_ref();
    let started = phase
        .opened
        .map(|at| words::offset(at.saturating_sub(document.submitted)));
    let took = match (phase.opened, phase.closed) {
        (Some(opened), Some(closed)) => Some(closed.saturating_sub(opened)),
        _ => None,
    };
    let limit = planned.and_then(|planned| planned.takes.parse::<Period>().ok());
    let compared = match (phase.opened, took, limit) {
        (None, ..) => "not reached".to_owned(),
        (Some(_), None, _) => "not closed".to_owned(),
        (_, Some(_), None) => String::new(),
        (_, Some(took), Some(limit)) if took <= limit.0 => "in time".to_owned(),
        (_, Some(took), Some(limit)) => format!("{} longer", words::took(took - limit.0)),
    };
    let dash = || "-".to_owned();
    vec![
        planned.map_or_else(dash, planned_at),
        phase.name.clone(),
        planned.map_or_else(dash, |planned| planned.takes.clone()),
        started.unwrap_or_else(dash),
        took.map_or_else(dash, words::took),
        compared,
        planned
            .and_then(|planned| planned.owner.clone())
            .unwrap_or_else(dash),
    ]
}

/// `T+2m`; the plan's own words, but for the beginning, which has a unit there.
fn planned_at(planned: &Planned) -> String {
    match planned.at.parse::<Period>() {
        Ok(Period(0)) => "T+0".to_owned(),
        _ => format!("T+{}", planned.at),
    }
}

fn downtime(document: &Document) -> Vec<Block> {
    let Some(downtime) = &document.downtime else {
        let Some(most) = &document.slo.downtime else {
            return vec![];
        };
        let why = format!("not measured (at most {most}): no step proved that an address refuses");
        return vec![Block::Fields(vec![("Downtime".to_owned(), why)])];
    };
    let from = format!(
        "{} (proven: {} refuses)",
        words::moment(downtime.from),
        downtime.address
    );
    let mut fields = vec![("From".to_owned(), from)];
    match (downtime.to, downtime.ms) {
        (Some(to), Some(ms)) => {
            let url = downtime.url.as_deref().unwrap_or("a check");
            fields.push((
                "To".to_owned(),
                format!("{} (proven: {url} is healthy)", words::moment(to)),
            ));
            fields.push((
                "Downtime".to_owned(),
                held(ms, document.slo.downtime.as_deref()),
            ));
        }
        _ => fields.push(("To".to_owned(), "no healthy check since then".to_owned())),
    }
    vec![Block::Fields(fields)]
}

fn failed(document: &Document) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (phase, step) in document.steps() {
        for attempt in failures(&step.attempts) {
            let title = format!("{} {} on {}", step.at, step.action, attempt.place());
            blocks.push(Block::Heading(3, title));
            let mut fields = vec![
                ("Phase".to_owned(), phase.name.clone()),
                ("Outcome".to_owned(), said(attempt)),
            ];
            if let Some(at) = attempt.finished {
                fields.push(("At".to_owned(), words::moment(at)));
            }
            if let Some(hint) = &attempt.hint {
                fields.push(("Hint".to_owned(), clean::line(hint)));
            }
            if let Some(word) = &attempt.accepted_loss {
                fields.push((
                    "Loss accepted".to_owned(),
                    format!(
                        "{} by {}, {}: {}",
                        clean::line(&word.loss),
                        clean::line(&word.by),
                        words::moment(word.at),
                        clean::line(&word.reason)
                    ),
                ));
            }
            blocks.push(Block::Fields(fields));
            if !attempt.last_lines.is_empty() {
                blocks.push(Block::Lines(attempt.last_lines.join("\n")));
            }
        }
    }
    blocks
}

fn rollback(document: &Document) -> Vec<Block> {
    let Some(rollback) = &document.rollback else {
        return vec![];
    };
    let by = rollback
        .operator
        .as_deref()
        .unwrap_or("no person: it was automatic");
    let mut fields = vec![
        ("Reason".to_owned(), clean::line(&rollback.reason)),
        ("Asked for by".to_owned(), by.to_owned()),
        ("Started".to_owned(), words::moment(rollback.started)),
    ];
    match rollback.ended {
        Some(ended) => {
            fields.push(("Ended".to_owned(), words::moment(ended)));
            let took = ended.saturating_sub(rollback.started);
            fields.push((
                "Took".to_owned(),
                held(took, document.slo.rollback.as_deref()),
            ));
        }
        None => fields.push(("Ended".to_owned(), "not yet".to_owned())),
    }
    let mut blocks = vec![Block::Fields(fields)];
    if !document.state_compared.is_empty() {
        blocks.push(Block::Heading(
            3,
            "State of the hosts, before and after".to_owned(),
        ));
        let rows = document.state_compared.iter().map(|part| {
            let verdict = if part.equal { "equal" } else { "DIFFERENT" };
            let words = |text: &str, digest: Option<&str>| match (text, digest) {
                ("", None) => "not known".to_owned(),
                ("", Some(digest)) => short(digest),
                (text, _) => clean::line(text),
            };
            vec![
                part.host.clone(),
                part.name.clone(),
                words(&part.before_text, Some(&part.before)),
                words(&part.after_text, part.after.as_deref()),
                verdict.to_owned(),
            ]
        });
        let head = vec!["Host", "What", "Before", "After", "Compared"];
        blocks.push(Block::Table {
            head,
            rows: rows.collect(),
        });
    }
    blocks
}

fn hosts(document: &Document) -> Vec<Block> {
    let rows: Vec<Vec<String>> = document
        .hosts
        .iter()
        .map(|host| {
            let quarantined = if host.quarantined { "yes" } else { "no" };
            vec![
                host.host.clone(),
                host.state.clone(),
                quarantined.to_owned(),
                clean::line(&host.why),
            ]
        })
        .collect();
    if rows.is_empty() {
        return vec![];
    }
    let mut blocks = vec![Block::Table {
        head: vec!["Host", "Outcome", "Quarantined", "Why"],
        rows,
    }];
    let left: Vec<String> = left(document)
        .into_iter()
        .map(|line| line.text)
        .filter(|text| !text.is_empty())
        .collect();
    if !left.is_empty() {
        blocks.push(Block::Lines(left.join("\n")));
    }
    blocks
}

fn steps(document: &Document) -> Vec<Block> {
    let mut blocks = Vec::new();
    for phase in &document.phases {
        let rows: Vec<Vec<String>> = phase
            .steps
            .iter()
            .flat_map(|step| {
                step.attempts
                    .iter()
                    .map(move |attempt| step_row(step, attempt))
            })
            .collect();
        if !rows.is_empty() {
            blocks.push(Block::Heading(3, phase.name.clone()));
            let head = vec![
                "Step",
                "Action",
                "Host",
                "Started",
                "Took",
                "Outcome",
                "What happened",
            ];
            blocks.push(Block::Table { head, rows });
        }
    }
    blocks
}

fn step_row(step: &Step, attempt: &Attempt) -> Vec<String> {
    let action = if step.title() == step.action {
        step.action.clone()
    } else {
        format!("{}: {}", step.action, clean::line(step.title()))
    };
    let outcome = match (attempt.outcome.as_str(), attempt.changed) {
        ("ok", false) => "ok, unchanged".to_owned(),
        (outcome, _) => outcome.to_owned(),
    };
    let dash = || "-".to_owned();
    vec![
        step.at.clone(),
        action,
        attempt.place(),
        attempt
            .started
            .or(attempt.ordered)
            .map_or_else(dash, words::clock),
        attempt.took_ms.map_or_else(dash, words::took),
        outcome,
        clean::line(&attempt.message),
    ]
}

fn decisions(document: &Document) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (phase, step) in document.steps() {
        let Some(gate) = &step.gate else { continue };
        if !step.waits_for_people() {
            continue;
        }
        blocks.push(Block::Heading(
            3,
            format!("{} {} in {}", step.at, step.title(), phase.name),
        ));
        let mut fields = vec![("Opened".to_owned(), words::moment(gate.opened))];
        if let Some(title) = step.args["title"].as_str() {
            fields.push(("What".to_owned(), clean::line(title)));
        }
        if let Some(closed) = gate.closed {
            let waited = words::took(closed.saturating_sub(gate.opened));
            let met = if gate.met == Some(true) {
                "met"
            } else {
                "NOT met"
            };
            let why = clean::line(&gate.why);
            fields.push((
                "Closed".to_owned(),
                format!("{} after {waited}, {met}: {why}", words::moment(closed)),
            ));
        } else {
            fields.push(("Waiting for".to_owned(), clean::line(&gate.missing)));
        }
        if !gate.from.is_empty() {
            let from: Vec<String> = gate
                .from
                .iter()
                .map(|(group, number)| format!("{number} of {group}"))
                .collect();
            fields.push(("Needed".to_owned(), from.join(", ")));
        }
        fields.push(("Shown".to_owned(), gate.evidence.clone()));
        blocks.push(Block::Fields(fields));
        if !gate.items.is_empty() {
            let rows = gate.items.iter().enumerate().map(|(index, item)| {
                let confirmed = gate.confirmed(index);
                let mark = if confirmed.is_some() { "[x]" } else { "[ ]" };
                vec![
                    (index + 1).to_string(),
                    format!("{mark} {}", clean::line(item)),
                    confirmed.map_or_else(|| "-".to_owned(), |decision| decision.operator.clone()),
                    confirmed.map_or_else(|| "-".to_owned(), |decision| words::moment(decision.at)),
                ]
            });
            let head = vec!["No.", "Item", "Confirmed by", "At"];
            blocks.push(Block::Table {
                head,
                rows: rows.collect(),
            });
        }
        if !gate.decisions.is_empty() {
            let rows = gate.decisions.iter().map(|decision| {
                let word = if decision.approve {
                    "approved"
                } else {
                    "REJECTED"
                };
                vec![
                    decision.operator.clone(),
                    decision.groups.join(", "),
                    word.to_owned(),
                    words::moment(decision.at),
                    clean::line(&decision.comment),
                ]
            });
            let head = vec!["Who", "Groups", "Decision", "At", "Comment"];
            blocks.push(Block::Table {
                head,
                rows: rows.collect(),
            });
        }
    }
    blocks
}

fn notices(document: &Document) -> Vec<Block> {
    if document.notices.is_empty() {
        return vec![];
    }
    let rows = document.notices.iter().map(|notice| {
        let outcome = notice.error.as_ref().map_or_else(
            || "sent".to_owned(),
            |error| format!("NOT sent: {}", clean::line(error)),
        );
        vec![
            notice.when.replace('_', " "),
            notice.action.clone(),
            words::moment(notice.at),
            outcome,
        ]
    });
    vec![Block::Table {
        head: vec!["When", "Action", "At", "Outcome"],
        rows: rows.collect(),
    }]
}

fn signoff(document: &Document) -> Vec<Block> {
    if document.signoff.is_empty() {
        return vec![];
    }
    let blank = || "_________________".to_owned();
    let rows = document.signoff.iter().map(|signoff| {
        let mark = if signoff.operator.is_some() {
            "[x]"
        } else {
            "[ ]"
        };
        vec![
            format!("{mark} {}", signoff.role),
            signoff.operator.clone().unwrap_or_else(blank),
            signoff.at.map_or_else(blank, words::moment),
            clean::line(&signoff.comment),
        ]
    });
    vec![Block::Table {
        head: vec!["Role", "Name", "At", "Comment"],
        rows: rows.collect(),
    }]
}

fn short(digest: &str) -> String {
    digest
        .strip_prefix("sha256:")
        .unwrap_or(digest)
        .chars()
        .take(12)
        .collect()
}
