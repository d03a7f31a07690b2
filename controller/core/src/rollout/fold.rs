//! The fold: the only place where a record changes a [`Rollout`].

use lockstep_proto::action::{Action, Class};
use lockstep_proto::ids::{Direction, HostId, StepRef};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure, HOLDS_NOT, ReportBody, StepOutcome};
use lockstep_proto::values::Timestamp;

use super::retry::Retry;
use super::state::{
    Accepted, Attempt, AttemptResult, Backward, Cursor, Decision, Ending, Gate, Glass, Mode,
    NoticeState, Outcome, Resolved, SignOff, States, Survey,
};
use super::{IllegalTransition, Rollout};
use crate::record::Record;

impl Rollout {
    /// Folds one record. The running path and recovery both go through here. Returns whether it
    /// changes anything: a host's report that answers nothing that was asked of it does not, and
    /// nobody is told of it.
    pub(crate) fn apply(
        &mut self,
        at: Timestamp,
        record: &Record,
    ) -> Result<bool, IllegalTransition> {
        let retry = match record {
            Record::Resumed { failed: true, .. } => Some(self.retry()),
            _ => None,
        };
        if !self.fold(at, record)? {
            return Ok(false);
        }
        if let Some(retry) = &retry {
            self.fold_retry(retry);
        }
        let detail = retry.map(|retry| retry.lines()).unwrap_or_default();
        self.narrate(at, record, detail);
        Ok(true)
    }

    fn fold(&mut self, now: Timestamp, record: &Record) -> Result<bool, IllegalTransition> {
        let state = self.state();
        let illegal = |record| Err(IllegalTransition { record, state });
        if !self.has_what_is_named_by(record) {
            return illegal("what a record names");
        }
        match record {
            Record::TermBegan { .. }
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
            | Record::Matched { .. } => return illegal("a record of the coordinator"),
            Record::Signed { signature, .. } => {
                let known = self.signatures.iter().cloned();
                self.signatures = known.chain([signature.clone()]).collect();
            }
            Record::Reported { host, body, .. } => {
                return Ok(self.fold_report(now, host, body));
            }
            Record::Consented { .. } => match self.mode {
                Mode::Consenting => self.mode = Mode::Forward(Cursor::default()),
                _ => return illegal("consented"),
            },
            Record::PhaseOpened { phase, .. } => {
                self.phases.entry(*phase).or_default().opened = Some(now);
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("phase opened");
                };
                *cursor = Cursor {
                    phase: *phase,
                    opened: Some(now),
                    ..Cursor::default()
                };
            }
            Record::Elected { groups, host, .. } => {
                self.elected.insert(groups.clone(), host.clone());
            }
            Record::WaveOpened {
                phase, stage, wave, ..
            } => {
                let waves = self.waves_of(*phase, *stage);
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("wave opened");
                };
                if cursor.waves.is_empty() {
                    cursor.waves = waves;
                }
                // As it was when the stage began: hosts that have failed since are still in it.
                if cursor.waves.len() <= *wave as usize {
                    return illegal("wave opened");
                }
                cursor.wave = Some(*wave as usize);
            }
            Record::WaveClosed { .. } => {
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("wave closed");
                };
                let Some(wave) = cursor.wave.take() else {
                    return illegal("wave closed");
                };
                cursor.closed = Some((wave, now));
            }
            Record::StageClosed { .. } => {
                let Some(cursor) = self.cursor_mut() else {
                    return illegal("stage closed");
                };
                let Cursor {
                    phase,
                    opened,
                    stage,
                    ..
                } = *cursor;
                *cursor = Cursor {
                    phase,
                    opened,
                    stage: stage + 1,
                    ..Cursor::default()
                };
            }
            Record::PhaseClosed { phase, .. } => {
                self.phases.entry(*phase).or_default().closed = Some(now);
                match &mut self.mode {
                    Mode::Forward(cursor) => {
                        *cursor = Cursor {
                            phase: phase + 1,
                            ..Cursor::default()
                        }
                    }
                    Mode::Backward(backward) => backward.checks_closed = Some(now),
                    Mode::Consenting => return illegal("phase closed"),
                }
            }
            Record::Dispatched {
                at,
                direction,
                attempt,
                hosts,
                not_after,
                ..
            } => {
                for host in hosts {
                    let undo = self.last_attempt(*at, Direction::Undo, host);
                    let after_undo = undo.map_or(0, |undo| undo.number);
                    let by_host = self.attempts.entry((*at, *direction)).or_default();
                    let attempts = by_host.entry(host.clone()).or_default();
                    if attempts.is_empty() {
                        // Hardly ever are there more, and of many hosts and steps each byte counts.
                        attempts.reserve_exact(1);
                    }
                    match attempts.last_mut() {
                        // Said again, with a later end.
                        Some(last) if last.number == *attempt => {
                            last.not_after = *not_after;
                            if last.is_lost() {
                                last.result = None;
                                last.given_up = false;
                                last.forgiven = false;
                                last.asked_again = Some(now);
                            }
                        }
                        _ => attempts.push(Attempt {
                            number: *attempt,
                            ordered: now,
                            not_after: *not_after,
                            started: None,
                            result: None,
                            given_up: false,
                            forgiven: false,
                            undo_first: false,
                            asked_again: None,
                            after_undo,
                            resolved: None,
                            accepted: None,
                            stale: false,
                        }),
                    }
                    let is_open = attempts.last().is_some_and(|last| last.result.is_none());
                    self.set_open(*at, *direction, host, is_open);
                }
            }
            Record::GivenUp {
                at,
                direction,
                attempt,
                host,
                why,
                ..
            } => {
                let Some(attempt) = self.attempt_mut(*at, *direction, host, *attempt) else {
                    return illegal("given up");
                };
                attempt.given_up = true;
                let since = attempt.started.unwrap_or(attempt.ordered);
                attempt.result = Some(AttemptResult {
                    at: now,
                    took: now.since(since),
                    outcome: Outcome::Lost(*why),
                    facts: vec![],
                    signatures: vec![],
                });
                self.note_open(*at, *direction, host);
            }
            Record::Resolved {
                at,
                direction,
                attempt,
                host,
                done,
                operator,
                reason,
                signature,
                ..
            } => {
                let attempt = self.attempt_mut(*at, *direction, host, *attempt);
                let Some(attempt) = attempt.filter(|attempt| attempt.is_unsettled()) else {
                    return illegal("resolved");
                };
                let result = attempt.result.as_mut().expect("it is unsettled");
                let says = format!("{operator} says that it was");
                if *done {
                    attempt.given_up = false;
                    result.outcome = Outcome::Ok {
                        changed: true,
                        summary: format!("{says} done: {reason}"),
                    };
                } else {
                    attempt.forgiven = true;
                    result.outcome = Outcome::Failed(Failure {
                        cause: Cause::Interrupted,
                        message: format!("{says} not done: {reason}"),
                        hint: None,
                        last_lines: vec![],
                        changed: false,
                    });
                }
                attempt.resolved = Some(Box::new(Resolved {
                    done: *done,
                    by: operator.clone(),
                    signature: signature.clone(),
                    answered: false,
                }));
                if let Some(member) = self.members.get_mut(host) {
                    member.spoken_for = true;
                }
            }
            Record::LossAccepted {
                at,
                attempt,
                host,
                loss,
                operator,
                reason,
                signature,
                ..
            } => {
                let attempt = self.attempt_mut(*at, Direction::Undo, host, *attempt);
                let Some(attempt) = attempt.filter(|undo| undo.would_lose().as_ref() == Some(loss))
                else {
                    return illegal("accepted");
                };
                attempt.accepted = Some(Box::new(Accepted {
                    at: now,
                    loss: loss.clone(),
                    by: operator.clone(),
                    reason: reason.clone(),
                    signature: signature.clone(),
                }));
            }
            Record::Quarantined { host, why, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return illegal("quarantined");
                };
                member.quarantined = Some(why.clone());
            }
            Record::GateOpened {
                at,
                evidence,
                until,
                ..
            } => {
                let gate = Gate {
                    opened: now,
                    until: *until,
                    evidence: *evidence,
                    released: None,
                    glass: vec![],
                    decisions: vec![],
                    closed: None,
                };
                self.gates.insert(*at, gate);
            }
            Record::GlassBroken {
                at,
                operator,
                reason,
                until,
                signed,
                ..
            } => {
                let Some(gate) = self.gates.get_mut(at) else {
                    return illegal("glass broken");
                };
                gate.glass.push(Glass {
                    at: now,
                    operator: operator.clone(),
                    reason: reason.clone(),
                    until: *until,
                    signed: signed.clone(),
                });
            }
            Record::LockReleased { at, .. } => {
                if !self.fold_released(*at) {
                    return illegal("lock released");
                }
            }
            Record::LockTaken { at, round, .. } => {
                if !self.fold_taken(now, *at, *round) {
                    return illegal("lock taken");
                }
            }
            Record::GateReopened {
                at,
                evidence,
                until,
                ..
            } => {
                if !self.fold_reopened(now, *at, *evidence, *until) {
                    return illegal("gate reopened");
                }
            }
            Record::GateDecided {
                at,
                operator,
                groups,
                approve,
                items,
                comment,
                signed,
                ..
            } => {
                let Some(gate) = self.gates.get_mut(at) else {
                    return illegal("gate decided");
                };
                gate.decisions.push(Decision {
                    at: now,
                    operator: operator.clone(),
                    groups: groups.clone(),
                    approve: *approve,
                    items: items.clone(),
                    comment: comment.clone(),
                    signed: signed.clone(),
                });
            }
            Record::GateClosed { at, met, why, .. } => {
                let Some(gate) = self.gates.get_mut(at) else {
                    return illegal("gate closed");
                };
                gate.closed = Some((now, *met, why.clone()));
                // All was as people had seen it. The gates before it were closed already.
                if *met {
                    self.lock.shown = None;
                }
            }
            Record::NoticeOrdered { which, .. } => {
                self.notices.insert(
                    *which,
                    NoticeState {
                        ordered: now,
                        sent: None,
                    },
                );
            }
            Record::NoticeSent { which, error, .. } => {
                let Some(notice) = self.notices.get_mut(which) else {
                    return illegal("notice sent");
                };
                notice.sent = Some(error.clone().map_or(Ok(()), Err));
            }
            Record::Paused { operator, .. } => {
                self.paused = true;
                self.paused_by.clone_from(operator);
            }
            Record::Unpaused { .. } => self.paused = false,
            Record::Resumed { failed, .. } => {
                self.deadline_from = now;
                self.fold_resumed(now, !*failed);
            }
            Record::RollbackStarted {
                reason, operator, ..
            } => {
                self.paused = false;
                self.ended = None;
                if operator.is_some() {
                    self.deadline_from = now;
                }
                match &mut self.mode {
                    Mode::Backward(_) => self.fold_resumed(now, true),
                    mode => {
                        *mode = Mode::Backward(Backward {
                            started: now,
                            reason: reason.clone(),
                            operator: operator.clone(),
                            undone: None,
                            checks: Cursor {
                                phase: self.plan.plan().after_rollback_index(),
                                ..Cursor::default()
                            },
                            checks_closed: None,
                        });
                    }
                }
            }
            Record::Undone { .. } => match &mut self.mode {
                Mode::Backward(backward) => backward.undone = Some(now),
                _ => return illegal("undone"),
            },
            Record::Ended { end, reason, .. } => {
                self.paused = false;
                self.ended = Some(Ending {
                    at: now,
                    end: *end,
                    reason: reason.clone(),
                });
            }
            Record::Closed {
                operator, reason, ..
            } => {
                self.closed = Some((now, operator.clone(), reason.clone()));
            }
            Record::SignedOff {
                role,
                operator,
                comment,
                ..
            } => self.signoffs.push(SignOff {
                at: now,
                role: role.clone(),
                operator: operator.clone(),
                comment: comment.clone(),
            }),
        }
        Ok(true)
    }

    /// Folds what a host says, and returns whether it answers something: an offer, an order, a
    /// survey. An agent may say whatever it likes, any number of times; of hosts that are no
    /// members, of steps that are not in the plan, of attempts that nobody ordered. All of it is
    /// durable and acknowledged (INV-2), and only answers change anything.
    fn fold_report(&mut self, now: Timestamp, host: &HostId, body: &ReportBody) -> bool {
        let ended = self.ended.is_some();
        match body {
            ReportBody::Consented { state, round, .. } => {
                let current = *round == self.lock.round;
                let Some(member) = self.members.get_mut(host) else {
                    return false;
                };
                // One for an earlier round was under way when the lock was freed.
                let is_first = member.consent.is_none() && current;
                if is_first {
                    member.consent = Some(Ok(()));
                    keep_states(&mut member.before, state);
                    self.silent.remove(host);
                }
                is_first
            }
            ReportBody::Declined { refusals, .. } => {
                let Some(member) = self.members.get_mut(host) else {
                    return false;
                };
                let is_first = member.declined.is_none();
                member.consent.get_or_insert_with(|| Err(refusals.clone()));
                member.declined.get_or_insert(now);
                self.silent.remove(host);
                is_first
            }
            ReportBody::Started { key } => {
                let attempt = self.attempt_mut(key.at, key.direction, host, key.attempt);
                let Some(attempt) = attempt.filter(|attempt| attempt.started.is_none()) else {
                    return false;
                };
                attempt.started = Some(now);
                true
            }
            ReportBody::Finished {
                key,
                outcome,
                facts,
                took,
                signatures,
            } => {
                let Some(attempt) = self.attempt_mut(key.at, key.direction, host, key.attempt)
                else {
                    return false;
                };
                let known = attempt.result.as_ref().map(|result| &result.outcome);
                // A host that was given up may still say what happened; it knows better.
                if !matches!(known, None | Some(Outcome::Lost(_))) {
                    // People hear once that a host says otherwise than one of them did.
                    let word = attempt.resolved.as_mut();
                    return word.is_some_and(|word| !std::mem::replace(&mut word.answered, true));
                }
                // Somebody wanted to hear of it again, and this is its word (INV-1).
                if attempt.forgiven {
                    attempt.forgiven = false;
                    attempt.given_up = false;
                }
                attempt.result = Some(AttemptResult {
                    at: now,
                    took: *took,
                    outcome: match outcome.clone() {
                        StepOutcome::Ok { changed, summary } => Outcome::Ok { changed, summary },
                        StepOutcome::Failed(failure) => Outcome::Failed(failure),
                        StepOutcome::Unknown { why } => Outcome::Unknown { why },
                    },
                    facts: facts.clone(),
                    signatures: signatures.clone(),
                });
                self.note_open(key.at, key.direction, host);
                // Hardly any report says one.
                let says_state = facts.iter().any(|fact| matches!(fact, Fact::State { .. }));
                if let Some(member) = says_state.then(|| self.members.get_mut(host)).flatten() {
                    match key.direction {
                        Direction::Do => keep_states(&mut member.before, facts),
                        Direction::Undo => keep_states(&mut member.undone, facts),
                        Direction::Probe => {}
                    }
                }
                true
            }
            ReportBody::Surveyed { state, .. } => {
                let lets_go = state.iter().any(says_it_let_go);
                let asked = self.counts_survey(host, lets_go);
                let Some(member) = self.members.get_mut(host).filter(|_| asked) else {
                    return false;
                };
                let mut survey = Survey::default();
                keep_states(&mut survey.states, state);
                survey.note = state.iter().find_map(|fact| match fact {
                    Fact::Note { value, .. } => Some(value.clone()),
                    _ => None,
                });
                member.surveyed = Some(survey);
                member.answered |= ended && lets_go;
                true
            }
        }
    }

    /// The rollout goes on. A gate that was not met, or whose time has passed, opens anew, and so
    /// does the time of the phase. In a rollback, whatever is not undone is `again` tried.
    fn fold_resumed(&mut self, now: Timestamp, again: bool) {
        self.paused = false;
        self.ended = None;
        let backward = matches!(self.mode, Mode::Backward(_));
        let checks = self.compiled().after_rollback_index();
        let plan = self.plan.clone();
        for ((at, direction), hosts) in &mut self.attempts {
            let class = plan.plan().step(*at).map(|it| it.step.action.info().class);
            // An undo looks first at what there is to undo; looking does nothing.
            let is_proven = *direction == Direction::Undo || class == Some(Class::Observing);
            let mine = match direction {
                Direction::Do => !backward || at.phase == checks,
                Direction::Undo => true,
                Direction::Probe => false,
            };
            for last in hosts
                .values_mut()
                .filter_map(|attempts| attempts.last_mut())
            {
                let Some(result) = last.result.as_ref().filter(|_| mine) else {
                    continue;
                };
                match result.outcome {
                    // A host that was given up may have said meanwhile that it is done (INV-1).
                    Outcome::Ok { .. } => last.given_up = false,
                    // Nobody knows what it did: it is not done again (INV-1).
                    Outcome::Unknown { .. } if !is_proven => {}
                    _ => last.forgiven |= backward && again,
                }
            }
        }
        if let Mode::Backward(state) = &mut self.mode {
            state.undone = None;
            let phase = state.checks.phase;
            state.checks = Cursor {
                phase,
                ..Cursor::default()
            };
            state.checks_closed = None;
            for member in self.members.values_mut() {
                member.surveyed = None;
            }
        } else {
            let deadline = self.deadline();
            self.gates.retain(|_, gate| match gate.closed {
                Some((_, met, _)) => met,
                None => gate.until > now,
            });
            for (at, gate) in &mut self.gates {
                let placed = plan.plan().step(*at);
                if placed.is_some_and(|it| matches!(it.step.action, Action::GateWindow(_))) {
                    gate.until = deadline;
                }
            }
        }
        if let Mode::Forward(cursor) = &mut self.mode {
            cursor.opened = cursor.opened.map(|_| now);
        }
    }

    /// The hosts that failed get another attempt.
    fn fold_retry(&mut self, retry: &Retry) {
        // A host whose undo is tried again has failed all the same.
        let forward = matches!(self.mode, Mode::Forward(_));
        for again in &retry.again {
            if let Some(member) = self.members.get_mut(&again.host).filter(|_| forward) {
                member.quarantined = None;
            }
            let key = (again.at, again.direction);
            let attempts = self.attempts.get_mut(&key);
            if let Some(last) = attempts
                .and_then(|hosts| hosts.get_mut(&again.host))
                .and_then(|attempts| attempts.last_mut())
                .filter(|last| !last.is_ok())
            {
                last.forgiven = true;
                last.undo_first |= again.undo_first;
            }
        }
        // Between two waves: the last one opens again for them.
        if let Mode::Forward(cursor) = &mut self.mode
            && cursor.wave.is_none()
            && !retry.again.is_empty()
        {
            cursor.wave = cursor.closed.map(|(wave, _)| wave);
        }
    }

    fn attempt_mut(
        &mut self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
        number: u16,
    ) -> Option<&mut Attempt> {
        let attempts = self.attempts.get_mut(&(at, direction))?.get_mut(host)?;
        attempts.iter_mut().find(|attempt| attempt.number == number)
    }

    fn cursor_mut(&mut self) -> Option<&mut Cursor> {
        match &mut self.mode {
            Mode::Consenting => None,
            Mode::Forward(cursor) => Some(cursor),
            Mode::Backward(backward) => Some(&mut backward.checks),
        }
    }
}

/// Whether a host says that it holds for the rollout no more.
fn says_it_let_go(fact: &Fact) -> bool {
    matches!(fact, Fact::Note { value, .. } if value == HOLDS_NOT)
}

fn keep_states(states: &mut States, facts: &[Fact]) {
    for fact in facts {
        if let Fact::State { name, digest, text } = fact {
            states.insert(name.clone(), (*digest, text.clone()));
        }
    }
}
