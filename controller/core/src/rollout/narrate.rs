//! Records as events for people: the one place where their words are chosen.

use std::sync::Arc;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::plan::NoticeWhen;
use lockstep_proto::report::{ReportBody, StepOutcome};
use lockstep_proto::values::Timestamp;

use super::document::when_word;
use super::{Outcome, Rollout};
use crate::event::{EventKind, RolloutEvent};
use crate::record::{End, NoticeRef, Record};

impl Rollout {
    /// Adds the events of a record that was just folded.
    /// `detail` is what else is known of it.
    pub(super) fn narrate(&mut self, at: Timestamp, record: &Record, detail: Vec<String>) {
        let mut events = self.events_of(record);
        if let Some(first) = events.first_mut() {
            first.detail.extend(detail);
        }
        for event in events {
            let number = self.events.last().map_or(1, |last| last.number + 1);
            self.events.push(Arc::new(RolloutEvent {
                number,
                at,
                state: self.state(),
                ..event
            }));
        }
    }

    /// The first event, once the matched hosts are known.
    pub(crate) fn narrate_submitted(&mut self, at: Timestamp) {
        let what = if self.dry_run { "dry run of " } else { "" };
        let event = RolloutEvent {
            number: 1,
            at,
            kind: EventKind::Submitted,
            state: self.state(),
            message: format!(
                "{what}plan `{}` submitted by {}",
                self.compiled().plan,
                self.requester
            ),
            detail: self.members.keys().map(ToString::to_string).collect(),
            ..RolloutEvent::default()
        };
        self.events.push(Arc::new(event));
    }

    fn events_of(&self, record: &Record) -> Vec<RolloutEvent> {
        let plain = |kind, message: String| RolloutEvent {
            kind,
            message,
            ..RolloutEvent::default()
        };
        let event = match record {
            Record::Reported { host, body, .. } => return self.events_of_report(host, body),
            Record::PhaseOpened { phase, .. } => RolloutEvent {
                phase: self.name_of(*phase),
                ..plain(
                    EventKind::PhaseOpened,
                    format!("phase `{}`", self.name_of(*phase)),
                )
            },
            Record::PhaseClosed { phase, .. } => RolloutEvent {
                phase: self.name_of(*phase),
                ..plain(
                    EventKind::PhaseClosed,
                    format!("phase `{}` is closed", self.name_of(*phase)),
                )
            },
            Record::Elected { groups, host, .. } => RolloutEvent {
                host: Some(host.clone()),
                ..plain(
                    EventKind::Note,
                    format!("{host} was elected for {}", groups.join(", ")),
                )
            },
            Record::WaveOpened { phase, wave, .. } if *wave > 0 => RolloutEvent {
                phase: self.name_of(*phase),
                ..plain(EventKind::Note, format!("wave {}", wave + 1))
            },
            Record::Dispatched {
                at,
                direction,
                attempt,
                hosts,
                ..
            } => {
                return hosts
                    .iter()
                    .map(|host| {
                        let event =
                            self.step_event(EventKind::StepOrdered, *at, *direction, *attempt);
                        RolloutEvent {
                            host: Some(host.clone()),
                            ..event
                        }
                    })
                    .collect();
            }
            Record::GivenUp {
                at,
                direction,
                attempt,
                host,
                ..
            }
            | Record::Resolved {
                at,
                direction,
                attempt,
                host,
                ..
            } => {
                return vec![self.result_event(*at, *direction, *attempt, host)];
            }
            Record::LossAccepted {
                at,
                attempt,
                host,
                loss,
                operator,
                reason,
                ..
            } => RolloutEvent {
                host: Some(host.clone()),
                message: format!("{operator} accepts what would be lost ({loss}): {reason}"),
                ..self.step_event(EventKind::Note, *at, Direction::Undo, *attempt)
            },
            Record::Quarantined { host, why, .. } => RolloutEvent {
                host: Some(host.clone()),
                ..plain(
                    EventKind::Quarantined,
                    format!("{host} stays behind: {why}"),
                )
            },
            Record::GateOpened { at, evidence, .. } => self.gate_opened(*at, &evidence.to_string()),
            Record::GateDecided {
                at,
                operator,
                approve,
                comment,
                ..
            } => RolloutEvent {
                message: self.say_decision(*at, operator, *approve, comment),
                ..self.step_event(EventKind::GateDecided, *at, Direction::Do, 0)
            },
            Record::GlassBroken {
                at,
                operator,
                group,
                reason,
                ..
            } => RolloutEvent {
                message: self.say_glass(*at, operator, group, reason),
                ..self.step_event(EventKind::GlassBroken, *at, Direction::Do, 0)
            },
            Record::LockReleased { at, .. } => RolloutEvent {
                message: "the hosts are free for other rollouts while this gate waits".to_owned(),
                ..self.step_event(EventKind::Note, *at, Direction::Do, 0)
            },
            Record::LockTaken { at, .. } => RolloutEvent {
                message: "the hosts are locked again: they are asked for consent anew, and what \
                          was seen before the gate is looked at again"
                    .to_owned(),
                ..self.step_event(EventKind::Note, *at, Direction::Do, 0)
            },
            Record::GateReopened {
                at, evidence, why, ..
            } => {
                let event = self.gate_opened(*at, &evidence.to_string());
                RolloutEvent {
                    message: format!("{why}; {}", event.message),
                    ..event
                }
            }
            Record::GateClosed { at, why, .. } => RolloutEvent {
                message: why.clone(),
                ..self.step_event(EventKind::GateClosed, *at, Direction::Do, 0)
            },
            Record::NoticeSent { which, error, .. } => {
                let what = self.say_notice(*which);
                let message = match error {
                    None => format!("{what} was sent"),
                    Some(error) => format!("{what} could not be sent: {error}"),
                };
                plain(EventKind::Note, message)
            }
            Record::Paused { operator, .. } => {
                plain(EventKind::Paused, format!("paused by {operator}"))
            }
            Record::Resumed {
                operator, failed, ..
            } => {
                let again = if *failed {
                    "; the hosts that failed try again"
                } else {
                    ""
                };
                plain(EventKind::Resumed, format!("resumed by {operator}{again}"))
            }
            Record::Unpaused { why, .. } => {
                plain(EventKind::Resumed, format!("goes on by itself: {why}"))
            }
            Record::RollbackStarted {
                reason, operator, ..
            } => {
                let by = operator
                    .as_ref()
                    .map(|name| format!(" by {name}"))
                    .unwrap_or_default();
                plain(
                    EventKind::RollbackStarted,
                    format!("rolling back{by}: {reason}"),
                )
            }
            Record::Undone { .. } => plain(EventKind::Note, "every undo has ended".into()),
            Record::Ended { end, reason, .. } => self.ended_event(*end, reason),
            Record::Closed {
                operator, reason, ..
            } => plain(EventKind::Note, format!("closed by {operator}: {reason}")),
            Record::SignedOff { role, operator, .. } => {
                plain(EventKind::Note, format!("signed by {operator} as {role}"))
            }
            Record::WaveOpened { .. }
            | Record::WaveClosed { .. }
            | Record::StageClosed { .. }
            | Record::Consented { .. }
            | Record::NoticeOrdered { .. }
            | Record::TermBegan { .. }
            | Record::TookOver { .. }
            | Record::ReportsLost { .. }
            | Record::Compacted { .. }
            | Record::Archived(_)
            | Record::ReportsArchived { .. }
            | Record::HostSeen { .. }
            | Record::HostForgotten { .. }
            | Record::Trust(_)
            | Record::CallsRefused(_)
            | Record::Submitted { .. }
            | Record::Signed { .. }
            | Record::Matched { .. } => return vec![],
        };
        vec![event]
    }

    fn events_of_report(&self, host: &HostId, body: &ReportBody) -> Vec<RolloutEvent> {
        let consent = |message| RolloutEvent {
            kind: EventKind::Consent,
            host: Some(host.clone()),
            message,
            ..RolloutEvent::default()
        };
        match body {
            ReportBody::Consented { .. } => vec![consent(format!("{host} consents"))],
            ReportBody::Declined { refusals, .. } => {
                vec![consent(format!(
                    "{host} refuses: {}",
                    self.say_refusals(refusals)
                ))]
            }
            ReportBody::Started { key } => vec![RolloutEvent {
                host: Some(host.clone()),
                ..self.step_event(EventKind::StepStarted, key.at, key.direction, key.attempt)
            }],
            ReportBody::Finished { key, outcome, .. } => {
                let attempts = self.attempts.get(&(key.at, key.direction));
                let attempt = attempts
                    .and_then(|hosts| hosts.get(host)?.iter().find(|it| it.number == key.attempt));
                let word = attempt.and_then(|attempt| attempt.resolved.as_ref());
                let event = self.result_event(key.at, key.direction, key.attempt, host);
                vec![match word {
                    None => event,
                    Some(word) => RolloutEvent {
                        kind: EventKind::Note,
                        message: say_contradiction(outcome, word.done, &word.by),
                        detail: vec![],
                        ..event
                    },
                }]
            }
            ReportBody::Surveyed { .. } => vec![],
        }
    }

    fn result_event(
        &self,
        at: StepRef,
        direction: Direction,
        attempt: u16,
        host: &HostId,
    ) -> RolloutEvent {
        let found = self.attempts.get(&(at, direction)).and_then(|hosts| {
            hosts
                .get(host)?
                .iter()
                .find(|known| known.number == attempt)
        });
        let event = RolloutEvent {
            host: Some(host.clone()),
            ..self.step_event(EventKind::StepFailed, at, direction, attempt)
        };
        let Some(result) = found.and_then(|attempt| attempt.result.as_ref()) else {
            return event;
        };
        let event = RolloutEvent {
            took_ms: result.took.0,
            ..event
        };
        match &result.outcome {
            Outcome::Ok { summary, .. } => {
                let detail = match direction {
                    Direction::Probe => notes(&result.facts),
                    Direction::Do | Direction::Undo => vec![],
                };
                RolloutEvent {
                    kind: EventKind::StepOk,
                    message: summary.clone(),
                    detail,
                    ..event
                }
            }
            Outcome::Failed(failure) => {
                let hint = failure.hint.iter().map(|hint| format!("hint: {hint}"));
                let detail = failure.last_lines.iter().cloned().chain(hint).collect();
                RolloutEvent {
                    message: self.say_failure(at, result),
                    detail,
                    ..event
                }
            }
            Outcome::Unknown { .. } | Outcome::Lost(_) => RolloutEvent {
                message: self.say_failure(at, result),
                ..event
            },
        }
    }

    /// `notify.slack (step 3.1)`, `notify.slack (when started)`.
    fn say_notice(&self, which: NoticeRef) -> String {
        match which {
            NoticeRef::Step(at) => format!("{} (step {at})", self.placed(at).step.action.name()),
            NoticeRef::Plan { index, .. } => {
                let notice = self.compiled().notices.get(usize::from(index));
                notice.map_or_else(
                    || "a notice".to_owned(),
                    |notice| match notice.when {
                        NoticeWhen::Every(_) => {
                            format!("{} ({})", notice.action.name(), when_word(notice.when))
                        }
                        when => {
                            let when = when_word(when).replace('_', " ");
                            format!("{} (when {when})", notice.action.name())
                        }
                    },
                )
            }
        }
    }

    fn say_decision(&self, at: StepRef, operator: &str, approve: bool, comment: &str) -> String {
        let does = match &self.placed(at).step.action {
            _ if !approve => "rejects",
            Action::GateChecklist(_) => "confirms",
            _ => "approves",
        };
        if comment.is_empty() {
            format!("{operator} {does}")
        } else {
            format!("{operator} {does}: {comment}")
        }
    }

    fn gate_opened(&self, at: StepRef, evidence: &str) -> RolloutEvent {
        let action = &self.placed(at).step.action;
        let mut detail = Vec::new();
        let message = match action {
            Action::GateApproval(approval) => {
                detail.push(format!("plan {}", self.plan.digest()));
                let hosts: Vec<&str> = self.members.keys().map(HostId::as_str).collect();
                detail.push(format!("hosts {}", hosts.join(", ")));
                for (_, fact) in self.facts() {
                    if let Fact::SqlPlan {
                        database,
                        from,
                        to,
                        digest,
                        sql,
                        opaque,
                        hazards,
                        ..
                    } = fact
                    {
                        detail.push(format!("SQL for {database}, {from} -> {to}, {digest}:"));
                        detail.extend(opaque.iter().map(|what| format!("  opaque: {what}")));
                        detail.extend(hazards.iter().map(|what| format!("  hazard: {what}")));
                        detail.extend(sql.lines().map(|line| format!("  {line}")));
                    }
                }
                detail.push(format!("evidence {evidence}"));
                let title = approval.title.as_deref().unwrap_or("approval");
                format!("{title}: waiting for {}", self.missing(at))
            }
            Action::GateChecklist(list) => {
                detail.extend(
                    list.items
                        .iter()
                        .zip(1..)
                        .map(|(item, number)| format!("{number}. {item}")),
                );
                detail.push(format!("evidence {evidence}"));
                format!(
                    "checklist of {} items: waiting for {}",
                    list.items.len(),
                    list.from.as_deref().unwrap_or("any operator")
                )
            }
            Action::GateWindow(window) => format!("waiting for the window {}", window.utc),
            Action::GateWait(wait) => format!("waiting for {}", wait.r#for),
            _ => String::new(),
        };
        RolloutEvent {
            message,
            detail,
            ..self.step_event(EventKind::GateOpened, at, Direction::Do, 0)
        }
    }

    fn ended_event(&self, end: End, reason: &str) -> RolloutEvent {
        let next = match end {
            End::Halted => vec![format!(
                "hint: look at `lockstep report {id}`, then `lockstep resume {id}` (`--failed` for \
                 the hosts that failed), `lockstep rollback {id} --reason TEXT` or \
                 `lockstep close {id} --accept --reason TEXT`",
                id = self.id
            )],
            _ => vec![],
        };
        let message = if reason.is_empty() {
            end.as_str().to_owned()
        } else {
            format!("{}: {reason}", end.as_str())
        };
        RolloutEvent {
            kind: EventKind::Ended,
            message,
            detail: next,
            ..RolloutEvent::default()
        }
    }

    fn step_event(
        &self,
        kind: EventKind,
        at: StepRef,
        direction: Direction,
        attempt: u16,
    ) -> RolloutEvent {
        let placed = self.compiled().step(at);
        RolloutEvent {
            kind,
            phase: self.name_of(at.phase),
            step: Some(at),
            action: placed.map_or("", |placed| placed.step.action.name()),
            direction: direction.as_str(),
            attempt,
            ..RolloutEvent::default()
        }
    }

    fn name_of(&self, phase: u16) -> String {
        self.compiled()
            .phase(phase)
            .map(|phase| phase.name.clone())
            .unwrap_or_default()
    }
}

/// What a host says after a person has said it instead.
fn say_contradiction(outcome: &StepOutcome, done: bool, operator: &str) -> String {
    let says = match outcome {
        StepOutcome::Ok { summary, .. } => format!("it is done: {summary}"),
        StepOutcome::Failed(failure) => format!("it failed: {}", failure.message),
        StepOutcome::Unknown { why } => format!("nobody can say what it did: {why}"),
    };
    let word = if done { "done" } else { "not done" };
    format!("the host says now that {says}; what counts is the word of {operator}, {word}")
}

fn notes(facts: &[Fact]) -> Vec<String> {
    let note = |fact: &Fact| match fact {
        Fact::Note { name, value } => Some(format!("{name}: {value}")),
        _ => None,
    };
    facts.iter().filter_map(note).collect()
}
