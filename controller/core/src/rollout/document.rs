//! A rollout as a document: what `--output json` prints and reports are made of.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::plan::{NoticeWhen, Phase};
use lockstep_proto::values::Timestamp;
use serde_json::{Value, json};

use super::cause::Class;
use super::notices::is_for_people;
use super::{Attempt, Gate, Mode, Outcome, Rollout};
use crate::event::EventKind;
use crate::record::{Lost, NoticeRef};

/// The document's name and version.
pub(crate) const FORMAT: &str = "lockstep.rollout/1";

impl Rollout {
    /// The whole rollout. Times are milliseconds since 1970-01-01T00:00:00Z.
    pub(crate) fn document(&self) -> Value {
        let plan = self.compiled();
        let reason = self.ended.as_ref().map_or("", |ending| &ending.reason);
        let backward = match &self.mode {
            Mode::Backward(backward) => Some(backward),
            _ => None,
        };
        let mut document = json!({
            "format": FORMAT,
            "rollout": self.id,
            "plan": plan.plan,
            "digest": self.plan.digest(),
            "serial": plan.serial,
            "fleet": plan.fleet_name,
            "signatures": *self.signatures,
            "inputs": plan.inputs,
            "requester": self.requester,
            "dry_run": self.dry_run,
            "state": self.state(),
            "reason": reason,
            "paused": self.paused_document(),
            "submitted": self.submitted,
            "ended": self.ended.as_ref().map(|ending| ending.at),
            "deadline": plan.deadline,
            "hosts": self.members.keys().map(|host| self.host_document(host)).collect::<Vec<_>>(),
            "phases": plan.phases.iter().chain(&plan.after_rollback).zip(0..)
                .map(|(phase, index)| self.phase_document(phase, index)).collect::<Vec<_>>(),
            "rollback": backward.map(|backward| json!({
                "started": backward.started,
                "reason": backward.reason,
                "operator": backward.operator,
                "ended": backward.undone,
            })),
            "downtime": self.downtime(),
            "slo": {
                "total": plan.slo.total,
                "downtime": plan.slo.downtime,
                "rollback": plan.slo.rollback,
            },
            "state_compared": if backward.is_some() { self.comparison() } else { vec![] },
            "notices": self.notice_documents(),
            "closed": self.closed.as_ref().map(|(at, operator, reason)| json!({
                "at": at, "operator": operator, "reason": reason,
            })),
            "signoff": self.signoff_documents(),
            "events": self.events.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
        });
        let glass = self.glass_documents();
        if !glass.is_empty() {
            document["break_glass"] = Value::Array(glass);
        }
        document
    }

    /// The hosts that it waits for: for their consent, or for a report.
    pub(crate) fn awaited(&self) -> BTreeSet<&HostId> {
        if self.ended.is_some() {
            return BTreeSet::new();
        }
        let busy = self.outstanding().map(|(_, _, host, _)| host);
        self.silent.iter().chain(busy).collect()
    }

    /// What people have to bring before it goes on.
    pub(crate) fn waits_for(&self) -> String {
        let open = |gate: &Gate| gate.closed.is_none();
        let waits = self.ended.is_none() && !matches!(self.mode, Mode::Backward(_));
        let mut gates = self.gates.iter().filter(|(_, gate)| waits && open(gate));
        let for_people = |at: StepRef| is_for_people(&self.placed(at).step.action);
        gates
            .find(|(at, _)| for_people(**at))
            .map(|(at, _)| self.missing(*at))
            .unwrap_or_default()
    }

    /// INV-5 for a host over the whole rollout: the worst of its steps.
    fn host_outcome(&self, host: &HostId) -> &'static str {
        let outcomes: BTreeSet<&'static str> = self
            .attempts
            .values()
            .filter_map(|hosts| hosts.get(host)?.last())
            .map(|attempt| self.outcome_word(host, attempt))
            .collect();
        for word in ["unknown", "unreachable", "failed", "running", "ok"] {
            if outcomes.contains(word) {
                return word;
            }
        }
        "skipped"
    }

    fn host_document(&self, host: &HostId) -> Value {
        let member = &self.members[host];
        json!({
            "host": host,
            "state": self.host_outcome(host),
            "quarantined": member.quarantined.is_some(),
            "why": member.quarantined.clone().unwrap_or_else(|| self.host_trouble(host)),
        })
    }

    /// The last thing that went wrong on a host; empty if nothing did.
    fn host_trouble(&self, host: &HostId) -> String {
        if let Some(Err(refusals)) = &self.members[host].consent {
            return format!("it refuses: {}", self.say_refusals(refusals));
        }
        let last = self.attempts.iter().filter_map(|((at, direction), hosts)| {
            let attempt = hosts.get(host)?.last()?;
            let result = attempt.result.as_ref()?;
            let bad = !matches!(result.outcome, Outcome::Ok { .. });
            (bad && *direction != Direction::Probe).then_some((result.at, *at, result))
        });
        last.max_by_key(|(when, at, _)| (*when, *at))
            .map(|(_, at, result)| self.say_failure(at, result))
            .unwrap_or_default()
    }

    /// Who paused it, in the words of its event; null if it is not paused.
    fn paused_document(&self) -> Value {
        let last = self.events.iter().rev();
        match last
            .filter(|_| self.paused)
            .find(|event| event.kind == EventKind::Paused)
        {
            Some(event) => json!({"at": event.at, "message": event.message}),
            None => Value::Null,
        }
    }

    fn phase_document(&self, phase: &Phase, index: u16) -> Value {
        let times = self.phases.get(&index).copied().unwrap_or_default();
        let steps = phase.steps().zip(0_u16..).map(|((_, _, step), number)| {
            let at = StepRef {
                phase: index,
                step: number,
            };
            json!({
                "at": at.to_string(),
                "name": step.name,
                "action": step.action.name(),
                "args": step.action.args(),
                "line": step.line,
                "attempts": self.attempt_documents(at),
                "gate": self.gate_document(at, &step.action),
            })
        });
        json!({
            "name": phase.name,
            "index": index,
            "planned": phase.planned.as_ref().map(|planned| json!({
                "at": planned.at, "takes": planned.takes, "owner": planned.owner,
            })),
            "opened": times.opened,
            "closed": times.closed,
            "steps": steps.collect::<Vec<_>>(),
        })
    }

    fn attempt_documents(&self, at: StepRef) -> Vec<Value> {
        let mut documents = Vec::new();
        for direction in [Direction::Do, Direction::Undo, Direction::Probe] {
            for (host, attempts) in self.attempts.get(&(at, direction)).into_iter().flatten() {
                for attempt in attempts {
                    documents.push(self.attempt_document(host, direction, attempt));
                }
            }
        }
        documents
    }

    fn gate_document(&self, at: StepRef, action: &Action) -> Value {
        let Some(gate) = self.gates.get(&at) else {
            return Value::Null;
        };
        let (from, items) = match action {
            Action::GateApproval(approval) => (json!(approval.from), json!([])),
            // Everybody of the group may confirm; a list without one is everybody's.
            Action::GateChecklist(list) => {
                let group = list.from.iter().map(|group| (group.clone(), json!(1)));
                (Value::Object(group.collect()), json!(list.items))
            }
            _ => (json!({}), json!([])),
        };
        json!({
            "opened": gate.opened,
            "until": gate.until,
            "closed": gate.closed.as_ref().map(|(at, _, _)| at),
            "met": gate.closed.as_ref().map(|(_, met, _)| met),
            "why": gate.closed.as_ref().map_or("", |(_, _, why)| why),
            "missing": self.missing(at),
            "evidence": gate.evidence,
            "from": from,
            "items": items,
            "decisions": gate.decisions.iter().map(|decision| json!({
                "operator": decision.operator,
                "groups": decision.groups,
                "approve": decision.approve,
                "items": decision.items,
                "comment": decision.comment,
                "at": decision.at,
                "signed": decision.signed,
            })).collect::<Vec<_>>(),
        })
    }

    /// From the first verified refusal until every host that refused was seen healthy again. A host
    /// without a health check of its own goes by those of the others. What was healthy before a
    /// rollback does not count: it was taken back.
    fn downtime(&self) -> Value {
        let seen = |pick: fn(&Fact) -> Option<&String>| {
            self.attempts
                .values()
                .flatten()
                .flat_map(move |(host, attempts)| {
                    attempts.iter().filter_map(move |attempt| {
                        let result = attempt.result.as_ref()?;
                        Some((host, result.at, result.facts.iter().find_map(pick)?))
                    })
                })
        };
        let mut refused: BTreeMap<&HostId, (Timestamp, &String)> = BTreeMap::new();
        for (host, at, address) in seen(|fact| match fact {
            Fact::Refused { address } => Some(address),
            _ => None,
        }) {
            let first = refused.entry(host).or_insert((at, address));
            *first = (*first).min((at, address));
        }
        let Some((from, address)) = refused.values().min().copied() else {
            return Value::Null;
        };
        let counts_from = match &self.mode {
            Mode::Backward(backward) => backward.started.max(from),
            _ => from,
        };
        let healthy: Vec<(&HostId, Timestamp, &String)> = seen(|fact| match fact {
            Fact::Healthy { url } => Some(url),
            _ => None,
        })
        .filter(|(_, at, _)| *at >= counts_from)
        .collect();
        let first = |own: Option<&HostId>| {
            let of = healthy
                .iter()
                .filter(|(host, ..)| own.is_none_or(|own| *host == own));
            of.map(|(_, at, url)| (*at, *url)).min()
        };
        let ends: Option<Vec<(Timestamp, &String)>> = refused
            .keys()
            .map(|host| {
                first(Some(host)).or_else(|| first(None).filter(|_| !self.is_checked(host)))
            })
            .collect();
        let end = ends.and_then(|ends| ends.into_iter().max());
        json!({
            "from": from,
            "address": address,
            "to": end.map(|(at, _)| at),
            "ms": end.map(|(at, _)| at.since(from).0),
            "url": end.map(|(_, url)| url),
        })
    }

    /// Whether a host has a health check of its own in the plan.
    fn is_checked(&self, host: &HostId) -> bool {
        self.compiled().steps().any(|placed| {
            matches!(placed.step.action, Action::CheckHttp(_))
                && self.hosts_of(placed.target).any(|it| it == host)
        })
    }

    fn comparison(&self) -> Vec<Value> {
        let touched = self.touched();
        let members = self
            .members
            .iter()
            .filter(|(host, _)| touched.contains(host));
        members
            .flat_map(|(host, member)| {
                member.before.iter().map(move |(name, (before, words))| {
                    let after = member.after(name);
                    json!({
                        "host": host,
                        "name": name,
                        "before": before,
                        "after": after.map(|(digest, _)| digest),
                        "equal": after.is_some_and(|(digest, _)| digest == before),
                        "before_text": words,
                        "after_text": after.map_or("", |(_, words)| words),
                    })
                })
            })
            .collect()
    }

    fn notice_documents(&self) -> Vec<Value> {
        let documents = self.notices.iter().map(|(which, state)| {
            let (when, action) = match which {
                NoticeRef::Step(at) => (at.to_string(), self.placed(*at).step.action.name()),
                NoticeRef::Plan { index, .. } => {
                    match self.compiled().notices.get(usize::from(*index)) {
                        Some(notice) => (when_word(notice.when), notice.action.name()),
                        None => (String::new(), ""),
                    }
                }
            };
            let error = match &state.sent {
                None => Some("not known whether it was sent".to_owned()),
                Some(sent) => sent.clone().err(),
            };
            json!({"when": when, "action": action, "at": state.ordered, "error": error})
        });
        documents.collect()
    }

    fn signoff_documents(&self) -> Vec<Value> {
        let roles = self.compiled().signoff.iter().flat_map(|role| {
            let signed = self.signoffs.iter().filter(|signed| signed.role == *role);
            let mut documents: Vec<Value> = signed
                .map(|signed| {
                    json!({
                        "role": role,
                        "operator": signed.operator,
                        "at": signed.at,
                        "comment": signed.comment,
                    })
                })
                .collect();
            if documents.is_empty() {
                let open = json!({"role": role, "operator": null, "at": null, "comment": ""});
                documents.push(open);
            }
            documents
        });
        roles.collect()
    }
}

pub(super) fn when_word(when: NoticeWhen) -> String {
    match when {
        NoticeWhen::Every(period) => format!("every {period}"),
        other => serde_json::to_value(other)
            .ok()
            .and_then(|value| value.as_str().map(ToOwned::to_owned))
            .unwrap_or_default(),
    }
}

impl Rollout {
    /// INV-5 for one attempt. Nobody waits any more for those of a rollout that is over: what a
    /// host has not told is unknown, and what it let go of before it began was skipped.
    fn outcome_word(&self, host: &HostId, attempt: &Attempt) -> &'static str {
        let over = self.ended.is_some() && !self.is_locking();
        let member = &self.members[host];
        match attempt.result.as_ref().map(|result| &result.outcome) {
            None if over && attempt.started.is_none() && member.answered && !member.anew => {
                "skipped"
            }
            None if over => "unknown",
            None => "running",
            Some(Outcome::Ok { .. }) => "ok",
            Some(Outcome::Failed(_) | Outcome::Lost(Lost::TimedOut)) => "failed",
            Some(Outcome::Unknown { .. }) => "unknown",
            Some(Outcome::Lost(Lost::Unreachable)) => "unreachable",
        }
    }

    fn attempt_document(&self, host: &HostId, direction: Direction, attempt: &Attempt) -> Value {
        let result = attempt.result.as_ref();
        let outcome = self.outcome_word(host, attempt);
        let known = result.map(|result| &result.outcome);
        let (changed, cause, message, hint, last_lines) = match known {
            Some(Outcome::Ok { changed, summary }) => {
                (*changed, "", summary.as_str(), None, &[][..])
            }
            Some(Outcome::Failed(failure)) => (
                failure.changed,
                failure.cause.as_str(),
                failure.message.as_str(),
                failure.hint.as_deref(),
                failure.last_lines.as_slice(),
            ),
            Some(Outcome::Unknown { why }) => (true, "unknown", why.as_str(), None, &[][..]),
            Some(Outcome::Lost(Lost::Unreachable)) => {
                (true, "agent lost", "the host is unreachable", None, &[][..])
            }
            Some(Outcome::Lost(Lost::TimedOut)) => {
                (true, "timed out", "no report in time", None, &[][..])
            }
            None if outcome == "unknown" => {
                let why = "the rollout ended before its report came";
                (true, "unknown", why, None, &[][..])
            }
            None => (false, "", "", None, &[][..]),
        };
        let class = match known {
            Some(outcome) => Class::of(outcome).map_or("", Class::as_str),
            None => cause,
        };
        let mut document = json!({
            "host": host,
            "direction": direction,
            "attempt": attempt.number,
            "ordered": attempt.ordered,
            "started": attempt.started,
            "finished": result.map(|result| result.at),
            "took_ms": result.map(|result| result.took.0),
            "outcome": outcome,
            "changed": changed,
            "class": class,
            "cause": cause,
            "message": message,
            "hint": hint,
            "last_lines": last_lines,
            "facts": result.map_or(&[][..], |result| &result.facts),
        });
        if let Some(word) = &attempt.accepted {
            document["accepted_loss"] = json!({
                "loss": word.loss,
                "by": word.by,
                "at": word.at,
                "reason": word.reason,
            });
        }
        if attempt.stale {
            // The hosts were free since: what it has seen counts no more.
            document["stale"] = json!(true);
        }
        document
    }
}
