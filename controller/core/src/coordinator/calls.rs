//! What operators may ask for, and when it is refused. A refusal changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use lockstep_proto::ids::{Direction, HostId, LossId, OperatorName, RolloutId, StepKey, StepRef};
use lockstep_proto::plan::CLOCK_TOLERANCE;
use lockstep_proto::seal::{SealedPlan, check_size};
use lockstep_proto::values::Timestamp;

use super::Coordinator;
use crate::event::{Answer, Call, Effects, Lock, Refused};
use crate::record::{End, Entry, MAX_HOSTS_PER_RECORD, Record};
use crate::rollout::{Attempt, Mode, Rollout};

/// What is submitted, and by whom.
struct Submission {
    plan: Arc<SealedPlan>,
    requester: OperatorName,
    dry_run: bool,
    signatures: Vec<String>,
}

impl Coordinator {
    pub(super) fn handle_call(
        &mut self,
        now: Timestamp,
        operator: &OperatorName,
        groups: Vec<String>,
        call: Call,
        effects: &mut Effects,
    ) -> Result<Answer, Refused> {
        let operator = operator.clone();
        let record = match call {
            Call::Submit {
                rollout,
                plan,
                dry_run,
                signatures,
            } => {
                let submission = Submission {
                    plan,
                    requester: operator,
                    dry_run,
                    signatures,
                };
                return self.submit(now, &rollout, submission, effects);
            }
            Call::Decide {
                rollout,
                gate,
                evidence,
                approve,
                items,
                comment,
                signed,
            } => {
                let state = self.live(&rollout)?;
                let at = state.gate_for(gate)?;
                let items = state.may_decide(at, &operator, &groups, evidence, approve, &items)?;
                let signed = state.signature(at, &operator, signed, now)?;
                let missing = format!("{rollout}/{at}");
                let record = Record::GateDecided {
                    rollout,
                    at,
                    operator,
                    groups,
                    approve,
                    items,
                    evidence,
                    comment,
                    signed,
                };
                self.commit(now, record, effects);
                return Ok(Answer::Missing(missing));
            }
            Call::BreakGlass {
                rollout,
                gate,
                evidence,
                reason,
                life,
                signature,
            } => {
                let group = self.may_break_glass(&operator, &groups, life)?;
                let state = self.live(&rollout)?;
                let at = state.gate_for(gate)?;
                state.may_break(at, &operator, evidence, now)?;
                let signed = state.signature(at, &operator, signature, now)?;
                let missing = format!("{rollout}/{at}");
                let record = Record::GlassBroken {
                    rollout,
                    at,
                    operator,
                    group,
                    evidence,
                    reason,
                    until: now.plus(life),
                    signed,
                };
                self.commit(now, record, effects);
                return Ok(Answer::Missing(missing));
            }
            Call::Pause { rollout } => {
                let state = self.live(&rollout)?;
                if state.paused && !state.is_held_back() {
                    return Err(Refused::NotNow(format!("{rollout} is paused already")));
                }
                Record::Paused { rollout, operator }
            }
            Call::Resume { rollout } => {
                self.rollout(&rollout)?.may_resume()?;
                let record = Record::Resumed {
                    rollout: rollout.clone(),
                    operator,
                    failed: false,
                };
                self.ask_for_states_again(&rollout);
                self.commit(now, record, effects);
                self.say_again(now, &rollout, effects);
                return Ok(Answer::Done);
            }
            Call::ResumeFailed { rollout } => {
                let lines = self.rollout(&rollout)?.may_retry()?;
                let record = Record::Resumed {
                    rollout: rollout.clone(),
                    operator,
                    failed: true,
                };
                self.ask_for_states_again(&rollout);
                self.commit(now, record, effects);
                self.say_again(now, &rollout, effects);
                return Ok(Answer::Again(lines));
            }
            Call::Resolve {
                rollout,
                host,
                at,
                done,
                reason,
                signed,
            } => {
                let (direction, attempt) = self.rollout(&rollout)?.unsettled(&host, at)?;
                let of = StepKey {
                    rollout: rollout.clone(),
                    host: host.clone(),
                    at,
                    direction,
                    attempt,
                };
                check_word(signed.as_ref(), &of)?;
                Record::Resolved {
                    rollout,
                    at,
                    direction,
                    attempt,
                    host,
                    done,
                    operator,
                    reason,
                    signature: signed.map(|(_, signature)| signature),
                }
            }
            Call::AcceptLoss {
                rollout,
                host,
                at,
                loss,
                reason,
                signed,
            } => {
                let attempt = self.rollout(&rollout)?.refused_to_lose(&host, at, &loss)?;
                let of = StepKey {
                    rollout: rollout.clone(),
                    host: host.clone(),
                    at,
                    direction: Direction::Undo,
                    attempt,
                };
                check_word(signed.as_ref(), &of)?;
                Record::LossAccepted {
                    rollout,
                    at,
                    attempt,
                    host,
                    loss,
                    operator,
                    reason,
                    signature: signed.map(|(_, signature)| signature),
                }
            }
            Call::Cancel { rollout, reason } => {
                let state = self.live(&rollout)?;
                let up = |host: &HostId| self.is_up(host);
                let (left, shut) = (state.say_left(&up), state.left_shut());
                let reason = format!("cancelled by {operator}: {reason}{left}{shut}");
                self.ask_for_states_again(&rollout);
                Record::Ended {
                    rollout,
                    end: End::Cancelled,
                    reason,
                    operator: Some(operator),
                }
            }
            Call::RollBack { rollout, reason } => {
                let state = self.rollout(&rollout)?;
                if state.lock.released && state.ended.is_none() {
                    return Err(Refused::NotNow(format!(
                        "{rollout} has freed its hosts and changed nothing: end it with \
                         `lockstep cancel {rollout} --reason TEXT`"
                    )));
                }
                if !state.is_locking() {
                    let hint = "an ended rollout is undone by deploying the release before it";
                    return Err(Refused::NotNow(format!(
                        "{rollout} is {}: {hint}",
                        state.state()
                    )));
                }
                if matches!(state.mode, Mode::Backward(_)) && state.ended.is_none() {
                    return Err(Refused::NotNow(format!(
                        "{rollout} is rolling back already"
                    )));
                }
                let record = Record::RollbackStarted {
                    rollout: rollout.clone(),
                    reason,
                    operator: Some(operator),
                };
                self.ask_for_states_again(&rollout);
                self.commit(now, record, effects);
                self.say_again(now, &rollout, effects);
                return Ok(Answer::Done);
            }
            Call::Close { rollout, reason } => {
                let state = self.rollout(&rollout)?;
                if state.ended.is_none() || !state.is_locking() {
                    return Err(Refused::NotNow(format!(
                        "{rollout} is {}, not halted",
                        state.state()
                    )));
                }
                let up = |host: &HostId| self.is_up(host);
                let reason = format!("{reason}{}{}", state.say_left(&up), state.left_shut());
                Record::Closed {
                    rollout,
                    operator,
                    reason,
                }
            }
            Call::Trust(call) => return self.handle_trust(now, &operator, call, effects),
            Call::Forget { host } => {
                let info = self.hosts.get(&host).filter(|info| !info.forgotten);
                // One that was let in, and has never come, has a name that may be wanted again.
                if info.is_none() && !self.trust.is_enrolled(&host) {
                    return Err(Refused::Invalid(format!("there is no host {host}")));
                }
                if info.is_some_and(|info| info.connected) {
                    return Err(Refused::NotNow(format!(
                        "{host} is connected: stop its agent first"
                    )));
                }
                if let Some(holder) = self.locked_by(&host) {
                    return Err(Refused::NotNow(format!(
                        "{host} is locked by {holder}: end that first"
                    )));
                }
                Record::HostForgotten {
                    host,
                    operator,
                    void: true,
                }
            }
            Call::SignOff {
                rollout,
                role,
                comment,
            } => {
                let state = self.rollout(&rollout)?;
                if state.ended.is_none() {
                    return Err(Refused::NotNow(format!("{rollout} has not ended")));
                }
                if !state.compiled().signoff.contains(&role) {
                    let roles = state.compiled().signoff.join(", ");
                    return Err(Refused::Invalid(format!(
                        "the plan asks for {roles}, not `{role}`"
                    )));
                }
                if !groups.contains(&role) {
                    return Err(Refused::NotAllowed(format!(
                        "{operator} is not of the group `{role}`"
                    )));
                }
                let mut signed = state.signoffs.iter();
                if signed.any(|signed| signed.role == role && signed.operator == operator) {
                    return Err(Refused::NotNow(format!(
                        "{operator} has signed as {role} already; a signature stays as it is"
                    )));
                }
                Record::SignedOff {
                    rollout,
                    role,
                    operator,
                    comment,
                }
            }
        };
        self.commit(now, record, effects);
        Ok(Answer::Done)
    }

    fn submit(
        &mut self,
        now: Timestamp,
        id: &RolloutId,
        submission: Submission,
        effects: &mut Effects,
    ) -> Result<Answer, Refused> {
        let Submission {
            plan,
            requester,
            dry_run,
            signatures,
        } = submission;
        check_size(&signatures).map_err(Refused::Invalid)?;
        let compiled = plan.plan();
        if let Some(other) = self.serials.get(&compiled.serial) {
            return Err(Refused::SerialUsed(compiled.serial, other.clone()));
        }
        if now > compiled.expires.plus(CLOCK_TOLERANCE) {
            return Err(Refused::Invalid(
                "the plan has expired; compile it again".into(),
            ));
        }
        if now.plus(CLOCK_TOLERANCE) < compiled.not_before {
            return Err(Refused::Invalid(format!(
                "the plan is not valid yet: it begins {} after now by the controller's clock; \
                 compare the clock of the machine that compiled it with the controller's",
                compiled.not_before.since(now)
            )));
        }
        let mut matched = BTreeSet::new();
        let used = compiled.groups();
        for (name, selector) in compiled
            .fleet
            .iter()
            .filter(|(name, _)| used.contains(*name))
        {
            let known = self.hosts();
            let hosts: Vec<&HostId> = known
                .filter(|(_, info)| selector.matches(&info.labels))
                .map(|(host, _)| host)
                .collect();
            if hosts.is_empty() {
                let label = |(name, value)| format!("{name}={value}");
                let labels: Vec<String> = selector.labels.iter().map(label).collect();
                return Err(Refused::Invalid(format!(
                    "no host carries the labels {} of group `{name}`; see `lockstep hosts`",
                    labels.join(", ")
                )));
            }
            matched.extend(hosts.into_iter().cloned());
        }
        if !dry_run {
            for host in &matched {
                if let Some(holder) = self.locked_by(host).and_then(|id| self.rollouts.get(id)) {
                    return Err(Refused::Locked(Box::new(Lock {
                        host: host.clone(),
                        holder: holder.id.clone(),
                        plan: holder.compiled().plan.clone(),
                        state: holder.state(),
                        phase: holder.phase_name().to_owned(),
                        since_ms: holder.submitted.0,
                        until_ms: holder.ended.is_none().then(|| holder.deadline().0),
                    })));
                }
            }
        }
        let record = Record::Submitted {
            rollout: id.clone(),
            plan: plan.digest(),
            requester,
            dry_run,
        };
        let entry = Entry { at: now, record };
        self.begin(&entry, plan.clone());
        effects.persist.push(entry);
        for signature in signatures {
            let rollout = id.clone();
            self.commit(now, Record::Signed { rollout, signature }, effects);
        }
        let hosts: Vec<HostId> = matched.into_iter().collect();
        for hosts in hosts.chunks(MAX_HOSTS_PER_RECORD) {
            let record = Record::Matched {
                rollout: id.clone(),
                hosts: hosts.to_vec(),
            };
            self.commit(now, record, effects);
        }
        let rollout = &self.rollouts[id];
        let offer = rollout.offer(self.config.epoch);
        effects.send.extend(
            rollout
                .members
                .keys()
                .map(|host| (host.clone(), offer.clone())),
        );
        Ok(Answer::Done)
    }

    /// What is missing at a gate that was just decided at, given as `rollout/gate`.
    pub(super) fn missing(&self, gate: &str, now: Timestamp) -> String {
        let found = gate.split_once('/').and_then(|(rollout, at)| {
            let rollout = self.rollouts.get(&rollout.parse().ok()?)?;
            let (phase, step) = at.split_once('.')?;
            let at = StepRef {
                phase: phase.parse().ok()?,
                step: step.parse().ok()?,
            };
            Some(rollout.missing_now(at, now))
        });
        found.unwrap_or_default()
    }

    fn rollout(&self, id: &RolloutId) -> Result<&Rollout, Refused> {
        self.rollouts
            .get(id)
            .ok_or_else(|| match self.archived.get(id) {
                Some(archived) => Refused::Archived(Box::new(archived.clone())),
                None => Refused::NotFound(id.clone()),
            })
    }

    /// A rollout that has not ended.
    fn live(&self, id: &RolloutId) -> Result<&Rollout, Refused> {
        let rollout = self.rollout(id)?;
        match rollout.ended {
            None => Ok(rollout),
            Some(_) if rollout.is_locking() => Err(Refused::NotNow(format!(
                "{id} has ended: it is halted; free its hosts with `lockstep close {id} --accept \
                 --reason TEXT`, or go on with `lockstep resume {id}` or `lockstep rollback {id} \
                 --reason TEXT`"
            ))),
            Some(_) => Err(Refused::NotNow(format!(
                "{id} has ended: {}",
                rollout.state()
            ))),
        }
    }
}

/// A word that a person has signed is about the attempt that it is taken for.
fn check_word(signed: Option<&(StepKey, String)>, of: &StepKey) -> Result<(), Refused> {
    let Some((other, signature)) = signed else {
        return Ok(());
    };
    check_size(&[signature]).map_err(Refused::Invalid)?;
    if other == of {
        return Ok(());
    }
    Err(Refused::NotNow(format!(
        "what was signed is about {other}, and it is {of} that waits for a word; look again"
    )))
}

impl Rollout {
    /// Whether a person may let it go on.
    fn may_resume(&self) -> Result<(), Refused> {
        let halted = self.ended.is_some() && self.is_locking();
        if self.paused || halted {
            return Ok(());
        }
        Err(Refused::NotNow(format!(
            "{} is {}, not paused or halted",
            self.id,
            self.state()
        )))
    }

    /// Whether the hosts that failed may try again; what each of them then does.
    fn may_retry(&self) -> Result<Vec<String>, Refused> {
        self.may_resume()?;
        let id = &self.id;
        let retry = self.retry();
        if !retry.unsettled.is_empty() {
            let say = |(host, at, words): &(HostId, StepRef, String)| {
                format!(
                    "{host}: {words}: look there, then say what was done with `lockstep resolve \
                     {id} {host} {at} --done` or `--not-done`, and `--reason TEXT`"
                )
            };
            let all: Vec<String> = retry.unsettled.iter().map(say).collect();
            return Err(Refused::NotNow(format!(
                "nothing is tried again blindly: {}",
                all.join("; ")
            )));
        }
        let lines = retry.lines();
        if retry.again.is_empty() {
            let why = match lines.as_slice() {
                [] => "no host has failed".to_owned(),
                lines => lines.join("; "),
            };
            return Err(Refused::NotNow(format!(
                "nothing of {id} is to be tried again: {why}; `lockstep resume {id}` goes on"
            )));
        }
        Ok(lines)
    }

    /// The number of the undo that refused because it would lose this.
    fn refused_to_lose(&self, host: &HostId, at: StepRef, loss: &LossId) -> Result<u16, Refused> {
        if !self.is_locking() {
            return Err(Refused::NotNow(format!("{} is {}", self.id, self.state())));
        }
        let would = |undo: &Attempt| Some((undo.number, undo.would_lose()?));
        let last = self.last_attempt(at, Direction::Undo, host).and_then(would);
        let Some((number, would_lose)) = last else {
            return Err(Refused::NotNow(format!(
                "no undo of step {at} on {host} has refused to lose anything; see `lockstep status \
                 {}`",
                self.id
            )));
        };
        if would_lose != *loss {
            return Err(Refused::NotNow(format!(
                "the undo of step {at} on {host} would lose {would_lose}, not {loss}; look again: \
                 `lockstep status {}`",
                self.id
            )));
        }
        Ok(number)
    }

    /// The attempt that a person may resolve: the last one, if nothing is known of it.
    fn unsettled(&self, host: &HostId, at: StepRef) -> Result<(Direction, u16), Refused> {
        if !self.is_locking() {
            return Err(Refused::NotNow(format!("{} is {}", self.id, self.state())));
        }
        let unsettled = [Direction::Undo, Direction::Do]
            .into_iter()
            .find_map(|direction| {
                let last = self.last_attempt(at, direction, host)?;
                last.is_unsettled().then_some((direction, last.number))
            });
        unsettled.ok_or_else(|| {
            Refused::NotNow(format!(
                "no attempt at step {at} on {host} has an unknown outcome; see `lockstep status {}`",
                self.id
            ))
        })
    }
}
