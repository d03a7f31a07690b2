//! Rollouts and hosts, at a glance and in detail.

use lockstep_core::rollout::LOUD;
use lockstep_proto::values::Period;
use lockstep_proto::wire::control_v1 as wire;

use super::progress::some_of;
use super::{Line, Tone, table, words};
use crate::cli::clean;
use crate::cli::document::{Attempt, Document, Phase};
use crate::cli::exit::is_end;

/// Rollouts as a table.
pub(crate) fn rollouts(list: &[wire::Rollout], now_ms: u64) -> Vec<Line> {
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|rollout| {
            let end = if rollout.ended_ms == 0 {
                now_ms
            } else {
                rollout.ended_ms
            };
            let mut state = clean::line(&rollout.state);
            if rollout.dry_run {
                state.push_str(" (dry run)");
            }
            let reason = if rollout.waits_for.is_empty() {
                clean::line(&rollout.reason)
            } else {
                format!("waits for {}", clean::line(&rollout.waits_for))
            };
            vec![
                clean::line(&rollout.rollout),
                clean::line(&rollout.plan),
                state,
                words::moment(rollout.submitted_ms),
                words::since(end.saturating_sub(rollout.submitted_ms)),
                clean::line(&rollout.requester),
                reason,
            ]
        })
        .collect();
    table(
        &[
            "ROLLOUT",
            "PLAN",
            "STATE",
            "SUBMITTED",
            "TOOK",
            "BY",
            "REASON",
        ],
        &rows,
    )
}

/// Hosts as a table.
pub(crate) fn hosts(list: &[wire::Host], now_ms: u64) -> Vec<Line> {
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|host| {
            let mut labels: Vec<String> = host
                .labels
                .iter()
                .map(|(name, value)| format!("{}={}", clean::line(name), clean::line(value)))
                .collect();
            labels.sort();
            let ago = |at: u64| words::since(now_ms.saturating_sub(at));
            let seen = match (host.connected, host.last_seen_ms) {
                (true, _) => "connected".to_owned(),
                (false, 0) => "never seen".to_owned(),
                // The controller was away itself: it cannot tell when the host went.
                (false, _) if host.awaited_since_ms > 0 => format!(
                    "not back since the controller's start {} ago",
                    ago(host.awaited_since_ms)
                ),
                (false, at) => format!("gone for {}", ago(at)),
            };
            let lock = if host.locked_by.is_empty() {
                "-"
            } else {
                &host.locked_by
            };
            vec![
                clean::line(&host.host),
                seen,
                clean::line(lock),
                clean::line(&host.agent_version),
                labels.join(" "),
            ]
        })
        .collect();
    table(&["HOST", "AGENT", "LOCKED BY", "VERSION", "LABELS"], &rows)
}

/// One rollout in detail.
pub(crate) fn detail(document: &Document, now_ms: u64) -> Vec<Line> {
    let mut lines = vec![
        field("rollout", &document.rollout),
        field("plan", &format!("{} ({})", document.plan, document.digest)),
    ];
    if !document.inputs.is_empty() {
        lines.push(field("inputs", &inputs(document)));
    }
    lines.push(Line::new(
        state_tone(&document.state),
        field("state", &state(document)).text,
    ));
    lines.extend(document.break_glass.iter().map(|word| {
        let said = format!(
            "{}, {} until {}",
            word.say(),
            words::moment(word.at),
            words::moment(word.until)
        );
        Line::new(Tone::Bad, field(LOUD, &said).text)
    }));
    if !document.reason.is_empty() {
        lines.push(field("reason", &document.reason));
    }
    let submitted = words::moment(document.submitted);
    lines.push(field(
        "submitted",
        &format!("{submitted} by {}", document.requester),
    ));
    if let Some(total) = document.total_ms() {
        lines.push(field("took", &held(total, document.slo.total.as_deref())));
    }
    if let Some(downtime) = &document.downtime {
        lines.push(field(
            "downtime",
            &match downtime.ms {
                Some(ms) => held(ms, document.slo.downtime.as_deref()),
                None => format!("since {}", words::moment(downtime.from)),
            },
        ));
    }
    if let Some(paused) = &document.paused {
        let at = words::moment(paused.at);
        lines.push(field("paused", &format!("{} at {at}", paused.message)));
    }
    if let Some(closed) = &document.closed {
        lines.push(field(
            "closed",
            &format!("by {}: {}", closed.operator, closed.reason),
        ));
    }
    lines.push(Line::plain(""));
    lines.extend(phases(document, now_ms));
    lines.push(Line::plain(""));
    lines.extend(hosts_of(document));
    lines.extend(left(document));
    lines.extend(open_gates(document, now_ms));
    lines.extend(troubles(document));
    let next = next(document);
    if !next.is_empty() {
        lines.push(Line::plain(""));
        lines.extend(next);
    }
    lines
}

/// What a person may do now, as commands.
fn next(document: &Document) -> Vec<Line> {
    let id = &document.rollout;
    let commands = match document.state.as_str() {
        "paused" if document.has_failures() => vec![
            format!("lockstep resume {id} --failed  (those that failed try again)"),
            format!("lockstep resume {id}  (what failed counts as failed)"),
            format!("lockstep rollback {id} --reason TEXT"),
        ],
        "paused" => vec![format!("lockstep resume {id}")],
        "halted" if document.closed.is_none() => {
            let failed = format!("lockstep resume {id} --failed  (those that failed try again)");
            let failed = document.has_failures().then_some(failed);
            let others = [
                format!("lockstep resume {id}"),
                format!("lockstep rollback {id} --reason TEXT"),
                format!("lockstep close {id} --accept --reason TEXT"),
            ];
            failed.into_iter().chain(others).collect()
        }
        state if is_end(state) && !document.dry_run => vec![format!("lockstep report {id}")],
        _ => vec![],
    };
    let names = std::iter::once("next").chain(std::iter::repeat(""));
    let lines = names
        .zip(&commands)
        .map(|(name, command)| field(name, command));
    lines.collect()
}

/// What is said when a rollout has ended and somebody watched.
pub(crate) fn ending(document: &Document) -> Vec<Line> {
    let took = document
        .total_ms()
        .map(|ms| format!(" after {}", words::took(ms)))
        .unwrap_or_default();
    let mut lines = vec![Line::new(
        state_tone(&document.state),
        format!(
            "{}: {} ({}){took}",
            state(document),
            document.plan,
            document.rollout
        ),
    )];
    if !document.reason.is_empty() {
        lines.push(field("reason", &document.reason));
    }
    if let Some(downtime) = &document.downtime {
        lines.push(field(
            "downtime",
            &match downtime.ms {
                Some(ms) => held(ms, document.slo.downtime.as_deref()),
                None => format!(
                    "since {}, not proven to be over",
                    words::moment(downtime.from)
                ),
            },
        ));
    }
    for host in document.hosts.iter().filter(|host| host.quarantined) {
        lines.push(field("left out", &format!("{}: {}", host.host, host.why)));
    }
    let id = &document.rollout;
    lines.push(field(
        "report",
        &format!("lockstep report {id} --format html -o {id}.html"),
    ));
    if document.state == "halted" {
        lines.extend(next(document));
    }
    lines
}

/// `4m 02s (at most 20m: kept)`.
pub(crate) fn held(ms: u64, limit: Option<&str>) -> String {
    let took = words::took(ms);
    let Some(limit) = limit else { return took };
    match limit.parse::<Period>() {
        Ok(period) if ms <= period.0 => format!("{took} (at most {limit}: kept)"),
        Ok(period) => format!(
            "{took} (at most {limit}: MISSED by {})",
            words::took(ms - period.0)
        ),
        Err(_) => took,
    }
}

/// The state in words that need no explanation.
pub(crate) fn state(document: &Document) -> String {
    let state = document.state.replace('_', " ");
    if document.dry_run {
        format!("{state} (dry run)")
    } else {
        state
    }
}

/// `release=v1.1.0 region=eu`.
pub(crate) fn inputs(document: &Document) -> String {
    let one = |(name, value): (&String, &String)| format!("{name}={}", clean::line(value));
    document
        .inputs
        .iter()
        .map(one)
        .collect::<Vec<_>>()
        .join(" ")
}

fn state_tone(state: &str) -> Tone {
    match state {
        "succeeded" => Tone::Good,
        "paused" | "rolling_back" => Tone::Waiting,
        state if is_end(state) => Tone::Bad,
        _ => Tone::Plain,
    }
}

fn field(name: &str, value: &str) -> Line {
    Line::plain(format!("{name:10} {}", clean::line(value)))
}

fn phases(document: &Document, now_ms: u64) -> Vec<Line> {
    let rows: Vec<Vec<String>> = document
        .phases
        .iter()
        .map(|phase| {
            let (state, took) = match (phase.opened, phase.closed) {
                (None, _) => ("not reached".to_owned(), String::new()),
                (Some(opened), None) if document.ended.is_none() => (
                    "open".to_owned(),
                    words::since(now_ms.saturating_sub(opened)),
                ),
                (Some(_), None) => ("not closed".to_owned(), String::new()),
                (Some(opened), Some(closed)) => (
                    "closed".to_owned(),
                    words::took(closed.saturating_sub(opened)),
                ),
            };
            vec![phase.name.clone(), state, took, standing(phase)]
        })
        .collect();
    table(&["PHASE", "STATE", "TOOK", "STEPS"], &rows)
}

/// `3 ok, 1 running`.
fn standing(phase: &Phase) -> String {
    let mut said = Vec::new();
    for outcome in ["ok", "running", "failed", "unknown", "unreachable"] {
        let attempts = phase.steps.iter().flat_map(|step| &step.attempts);
        let number = attempts
            .filter(|attempt| attempt.outcome == outcome)
            .count();
        if number > 0 {
            said.push(format!("{number} {outcome}"));
        }
    }
    said.join(", ")
}

fn hosts_of(document: &Document) -> Vec<Line> {
    let rows: Vec<Vec<String>> = document
        .hosts
        .iter()
        .map(|host| {
            let quarantined = if host.quarantined {
                " (quarantined)"
            } else {
                ""
            };
            let absent = if document.absent.contains(&host.host) {
                " (not connected)"
            } else {
                ""
            };
            vec![
                host.host.clone(),
                format!("{}{quarantined}{absent}", host.state),
                clean::line(&host.why),
            ]
        })
        .collect();
    table(&["HOST", "OUTCOME", "WHY"], &rows)
}

/// What a rollout that has ended left running, or may have: nothing, where every host has said that
/// it stopped; for one that was cancelled, that is said too.
pub(crate) fn left(document: &Document) -> Vec<Line> {
    let open: Vec<_> = document
        .left
        .iter()
        .filter(|left| left.state != "stopped")
        .collect();
    let stopped = document.left.len() - open.len();
    let mut lines = Vec::new();
    if open.is_empty() && (document.state != "cancelled" || stopped == 0) {
        return lines;
    }
    lines.push(Line::plain(""));
    lines.push(Line::plain(format!(
        "stopped on {} of {}",
        stopped,
        words::count(document.left.len(), "host")
    )));
    lines.extend(open.iter().map(|left| {
        let text = format!("  {}: {}", left.host, clean::line(&left.message));
        Line::new(Tone::Waiting, text)
    }));
    lines
}

fn open_gates(document: &Document, now_ms: u64) -> Vec<Line> {
    let mut lines = Vec::new();
    let many = document.open_gates().count() > 1;
    for (step, gate) in document.open_gates() {
        let verb = if step.action == "gate.approval" {
            "approve"
        } else {
            "confirm"
        };
        let which = if many {
            format!(" --gate {}", step.at)
        } else {
            String::new()
        };
        lines.push(Line::plain(""));
        lines.push(Line::new(
            Tone::Waiting,
            format!(
                "waiting for {}, for {}, at most until {}",
                gate.missing,
                words::since(now_ms.saturating_sub(gate.opened)),
                words::moment(gate.until)
            ),
        ));
        lines.push(Line::plain(format!(
            "  lockstep {verb} {}{which}",
            document.rollout
        )));
    }
    lines
}

/// Attempts that did not end well, the newest attempt of each only.
fn troubles(document: &Document) -> Vec<Line> {
    let mut lines = Vec::new();
    for (phase, step) in document.steps() {
        for attempt in failures(&step.attempts) {
            lines.push(Line::plain(""));
            lines.push(Line::new(
                Tone::Bad,
                format!(
                    "{} {} on {}: {}",
                    step.at,
                    step.action,
                    attempt.place(),
                    said(attempt)
                ),
            ));
            lines.push(Line::plain(format!("  phase {}", phase.name)));
            let last = attempt.last_lines.iter().rev().take(5).rev();
            lines.extend(
                last.map(|line| Line::new(Tone::Quiet, format!("  | {}", clean::line(line)))),
            );
            if let Some(hint) = &attempt.hint {
                lines.push(Line::plain(format!("  hint: {}", clean::line(hint))));
            }
        }
    }
    lines
}

/// Attempts that ended otherwise than well.
pub(crate) fn failures(attempts: &[Attempt]) -> impl Iterator<Item = &Attempt> {
    attempts.iter().filter(|attempt| {
        matches!(
            attempt.outcome.as_str(),
            "failed" | "unknown" | "unreachable"
        )
    })
}

/// `failed (check unmet): expected 200, got 503`.
pub(crate) fn said(attempt: &Attempt) -> String {
    let cause = match attempt.cause.as_str() {
        "" | "unknown" => String::new(),
        cause => format!(" ({cause})"),
    };
    let message = clean::line(&attempt.message);
    format!(
        "{}{cause}{}{message}",
        attempt.outcome,
        if message.is_empty() { "" } else { ": " }
    )
}

/// Host names, the first of them.
pub(crate) fn host_names(document: &Document, most: usize) -> String {
    let names: Vec<String> = document
        .hosts
        .iter()
        .map(|host| host.host.clone())
        .collect();
    some_of(&names, most)
}
