//! Gates: stages on the controller, where a rollout waits for people or for time.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::action::Action;
use lockstep_proto::action::gate::{Approval, Checklist, Day, OnTimeout, Window};
use lockstep_proto::approval::{self, unfilled};
use lockstep_proto::ids::{Digest, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::plan::{Phase, Stage};
use lockstep_proto::values::{Period, Timestamp};

use super::state::Decision;
use super::{Cursor, Gate, Rollout, glass};
use crate::record::{End, NoticeRef, Record};

/// What is missing at a gate where nobody is missed.
const AWAITS_LOCK: &str = "the hosts, which another rollout has locked";

const MINUTE: u64 = 60_000;
const DAY: u64 = 24 * 60 * MINUTE;

impl Gate {
    /// Whether anybody has decided here, or said that its glass is to be broken.
    pub(super) fn is_decided(&self) -> bool {
        !self.decisions.is_empty() || !self.glass.is_empty()
    }

    /// The times that somebody approved here.
    pub(crate) fn approvals_of(&self, operator: &str) -> impl Iterator<Item = &Decision> {
        self.decisions
            .iter()
            .filter(move |decision| decision.approve && decision.operator == operator)
    }

    /// Who confirmed an item of a checklist first.
    pub(crate) fn confirmed_by(&self, item: u32) -> Option<&str> {
        self.decisions
            .iter()
            .find(|decision| {
                decision.approve && (decision.items.is_empty() || decision.items.contains(&item))
            })
            .map(|decision| decision.operator.as_str())
    }
}

/// What is still to be seen at a gate.
enum Verdict {
    Met(String),
    Unmet(String),
    Waiting(String),
}

impl Rollout {
    pub(super) fn advance_controller_stage(
        &self,
        cursor: &Cursor,
        phase: &Phase,
        stage: &Stage,
        now: Timestamp,
    ) -> Vec<Record> {
        let rollout = self.id.clone();
        let first = Self::first_step(phase, cursor.stage);
        for (step, number) in stage.steps.iter().zip(first..) {
            let at = StepRef {
                phase: cursor.phase,
                step: number,
            };
            if self.dry_run {
                continue;
            }
            let Some(until) = self.gate_until(&step.action, now) else {
                let which = NoticeRef::Step(at);
                if self.notices.contains_key(&which) {
                    continue;
                }
                return vec![Record::NoticeOrdered { rollout, which }];
            };
            let Some(gate) = self.gates.get(&at) else {
                let evidence = self.evidence();
                return vec![Record::GateOpened {
                    rollout,
                    at,
                    evidence,
                    until,
                }];
            };
            match &gate.closed {
                Some((_, true, _)) => {}
                Some((_, false, why)) => {
                    let reason = format!(
                        "{} ({at}) in phase `{}`: {why}",
                        step.action.name(),
                        phase.name
                    );
                    let timed_out = now >= gate.until && gate.decisions.iter().all(|d| d.approve);
                    return match on_timeout(&step.action) {
                        OnTimeout::Halt if timed_out => vec![self.end(End::Halted, reason)],
                        OnTimeout::Halt | OnTimeout::Abort => vec![self.failed(reason)],
                    };
                }
                None => {
                    let verdict = self.verdict(&step.action, gate, now);
                    let met = matches!(verdict, Verdict::Met(_));
                    if let Some(due) = self.advance_lock(at, &step.action, met, now) {
                        // People who decided no, or too late, end it in any case.
                        let over =
                            matches!(verdict, Verdict::Unmet(_)) || !met && now >= gate.until;
                        if !over {
                            return due;
                        }
                    }
                    return match verdict {
                        Verdict::Met(why) => {
                            vec![Record::GateClosed {
                                rollout,
                                at,
                                met: true,
                                why,
                            }]
                        }
                        Verdict::Unmet(why) => {
                            vec![Record::GateClosed {
                                rollout,
                                at,
                                met: false,
                                why,
                            }]
                        }
                        Verdict::Waiting(missing) if now >= gate.until => {
                            let why =
                                format!("timed out: nobody decided in time; missing: {missing}");
                            vec![Record::GateClosed {
                                rollout,
                                at,
                                met: false,
                                why,
                            }]
                        }
                        Verdict::Waiting(_) => vec![],
                    };
                }
            }
        }
        vec![Record::StageClosed { rollout }]
    }

    /// Until when a gate waits; none if the action is a notice.
    pub(super) fn gate_until(&self, action: &Action, now: Timestamp) -> Option<Timestamp> {
        match action {
            Action::GateApproval(approval) => Some(now.plus(approval.timeout)),
            Action::GateChecklist(list) => Some(now.plus(list.timeout)),
            Action::GateWindow(_) => Some(self.deadline()),
            Action::GateWait(wait) => Some(now.plus(wait.r#for)),
            _ => None,
        }
    }

    /// What a gate waits for, or what two people let pass instead. A no stays a no.
    fn verdict(&self, action: &Action, gate: &Gate, now: Timestamp) -> Verdict {
        match (self.asked_for(action, gate, now), gate.broken(now)) {
            (Verdict::Waiting(missing), Some(words)) => Verdict::Met(glass::say(words, &missing)),
            (verdict, _) => verdict,
        }
    }

    fn asked_for(&self, action: &Action, gate: &Gate, now: Timestamp) -> Verdict {
        match action {
            Action::GateApproval(approval) => self.approval(approval, gate),
            Action::GateChecklist(list) => checklist(list, gate),
            Action::GateWindow(window) if is_open(window, now) => {
                Verdict::Met("the window is open".into())
            }
            Action::GateWindow(window) => Verdict::Waiting(format!("the window {}", window.utc)),
            Action::GateWait(wait) if now >= gate.opened.plus(wait.r#for) => {
                Verdict::Met(format!("{} have passed", wait.r#for))
            }
            _ => Verdict::Waiting("time".into()),
        }
    }

    /// Whether an open gate has what it waits for.
    pub(super) fn is_met(&self, at: StepRef, now: Timestamp) -> bool {
        let verdict = |gate| self.verdict(&self.placed(at).step.action, gate, now);
        let gate = self.gates.get(&at);
        gate.is_some_and(|gate| matches!(verdict(gate), Verdict::Met(_)))
    }

    /// What is missing at a gate, in words; empty if it is closed. Words that broke its glass count
    /// as they stood when the rollout was last heard of, so that its document is its records'.
    pub(crate) fn missing(&self, at: StepRef) -> String {
        let heard = self.events.last().map_or(self.submitted, |last| last.at);
        self.missing_now(at, heard)
    }

    /// The same with the words that hold now.
    pub(crate) fn missing_now(&self, at: StepRef, now: Timestamp) -> String {
        let Some(gate) = self.gates.get(&at).filter(|gate| gate.closed.is_none()) else {
            return String::new();
        };
        // Only what people can bring is missing; time passes by itself.
        let asked_for = self.asked_for(&self.placed(at).step.action, gate, gate.opened);
        match asked_for {
            Verdict::Waiting(missing) if gate.broken(now).is_none() => missing,
            Verdict::Waiting(_) | Verdict::Met(_) if self.lock.released => AWAITS_LOCK.to_owned(),
            Verdict::Waiting(_) | Verdict::Met(_) | Verdict::Unmet(_) => String::new(),
        }
    }

    fn approval(&self, approval: &Approval, gate: &Gate) -> Verdict {
        if let Some(no) = gate.decisions.iter().find(|decision| !decision.approve) {
            let comment = if no.comment.is_empty() {
                String::new()
            } else {
                format!(": {}", no.comment)
            };
            return Verdict::Unmet(format!("rejected by {}{comment}", no.operator));
        }
        let mut people: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for decision in gate
            .decisions
            .iter()
            .filter(|decision| decision.operator != self.requester)
        {
            let groups = decision.groups.iter().map(String::as_str);
            people.entry(&decision.operator).or_default().extend(groups);
        }
        let missing = unfilled(&approval.from, &people);
        if missing.is_empty() {
            let names: Vec<&str> = people.keys().copied().collect();
            return Verdict::Met(format!("approved by {}", names.join(", ")));
        }
        let words: Vec<String> = missing
            .iter()
            .map(|(group, count)| format!("{count} of {group}"))
            .collect();
        Verdict::Waiting(words.join(", "))
    }

    /// What people decide upon: the plan, the matched hosts, and the SQL that was shown (INV-12).
    pub(crate) fn evidence(&self) -> Digest {
        approval::evidence(
            self.plan.digest(),
            self.members.keys(),
            &self.sql_shown(None),
        )
    }

    /// The digests of the SQL that was shown; of what was shown before a gate, if one is named.
    pub(super) fn sql_shown(&self, before: Option<StepRef>) -> Vec<Digest> {
        let shown = self.facts().filter_map(|(origin, fact)| match fact {
            Fact::SqlPlan { digest, .. } if before.is_none_or(|gate| origin.at < gate) => {
                Some(*digest)
            }
            _ => None,
        });
        shown.collect()
    }

    /// When a gate of the cursor's stage may close without a decision.
    pub(super) fn gate_deadline(&self, cursor: &Cursor, now: Timestamp) -> Option<Timestamp> {
        let open = self
            .gates
            .iter()
            .find(|(at, gate)| at.phase == cursor.phase && gate.closed.is_none());
        let (at, gate) = open?;
        let due = match &self.placed(*at).step.action {
            Action::GateWindow(window) => opens(window, now),
            _ => gate.until,
        };
        let due = gate.glass_ends(now).map_or(due, |ends| ends.min(due));
        // A gate whose time has come, and that is still open, waits for its lock.
        Some(due).filter(|due| *due > now)
    }
}

fn on_timeout(action: &Action) -> OnTimeout {
    match action {
        Action::GateApproval(approval) => approval.on_timeout,
        Action::GateChecklist(list) => list.on_timeout,
        _ => OnTimeout::Abort,
    }
}

fn checklist(list: &Checklist, gate: &Gate) -> Verdict {
    if let Some(no) = gate.decisions.iter().find(|decision| !decision.approve) {
        return Verdict::Unmet(format!("rejected by {}: {}", no.operator, no.comment));
    }
    let mut confirmed: BTreeSet<usize> = BTreeSet::new();
    for decision in &gate.decisions {
        if decision.items.is_empty() {
            confirmed.extend(0..list.items.len());
        }
        confirmed.extend(decision.items.iter().map(|item| *item as usize));
    }
    let missing: Vec<&str> = list
        .items
        .iter()
        .enumerate()
        .filter(|(index, _)| !confirmed.contains(index))
        .map(|(_, item)| item.as_str())
        .collect();
    if missing.is_empty() {
        Verdict::Met(format!("{} items confirmed", list.items.len()))
    } else {
        Verdict::Waiting(missing.join("; "))
    }
}

/// Minutes of the day, from and until; a window that was not validated is never open.
fn minutes(window: &Window) -> Option<(u64, u64)> {
    let minute = |text: &str| {
        let (hour, minute) = text.trim().split_once(':')?;
        let (hour, minute): (u64, u64) = (hour.parse().ok()?, minute.parse().ok()?);
        (hour <= 24 && minute < 60).then_some(hour * 60 + minute)
    };
    let (from, until) = window.utc.split_once('-')?;
    Some((minute(from)?, minute(until)?))
}

fn weekday(now: Timestamp) -> Day {
    // 1970-01-01 was a Thursday.
    const DAYS: [Day; 7] = [
        Day::Thu,
        Day::Fri,
        Day::Sat,
        Day::Sun,
        Day::Mon,
        Day::Tue,
        Day::Wed,
    ];
    DAYS[usize::try_from(now.0 / DAY % 7).expect("below 7")]
}

fn is_open(window: &Window, now: Timestamp) -> bool {
    let minute = now.0 % DAY / MINUTE;
    minutes(window).is_some_and(|(from, until)| {
        window.days.contains(&weekday(now)) && (from..until).contains(&minute)
    })
}

/// When the window opens next, looked for from `from` on.
fn opens(window: &Window, from: Timestamp) -> Timestamp {
    let Some((first, _)) = minutes(window) else {
        return Timestamp(u64::MAX);
    };
    (0..8)
        .map(|day| Timestamp((from.0 / DAY + day) * DAY).plus(Period(first * MINUTE)))
        .find(|start| *start >= from && window.days.contains(&weekday(*start)))
        .unwrap_or(Timestamp(u64::MAX))
}

#[cfg(test)]
mod tests {
    use lockstep_proto::action::gate::Lock;

    use super::*;

    #[test]
    fn a_window_opens_on_its_days_only() {
        let window = Window {
            days: vec![Day::Tue],
            utc: "14:00-18:00".into(),
            lock: Lock::Hold,
        };
        // 2026-11-24 is a Tuesday.
        let tuesday = Timestamp(1_795_478_400_000);
        let at = |hours: u64| Timestamp(tuesday.0 + hours * 60 * MINUTE);
        assert_eq!(weekday(tuesday), Day::Tue);
        assert!(!is_open(&window, at(13)) && is_open(&window, at(14)) && !is_open(&window, at(18)));
        assert!(!is_open(&window, at(14 + 24)));
        assert_eq!(opens(&window, at(1)), at(14));
        assert_eq!(opens(&window, at(15)), at(14 + 7 * 24));
    }
}
