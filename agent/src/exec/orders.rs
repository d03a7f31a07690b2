//! Orders, from the decision to the report; cancelling; the end of a rollout.

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, Epoch, PlanDigest, RolloutId, StepKey};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::report::{Cause, Failure, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};
use serde_json::Value;

use super::ahead::{self, Earlier};
use super::approvals::{self, Asked, People};
use super::attend::{Met, failed, wall_clock};
use super::consent::HeldStep;
use super::evidence;
use super::machine::{Begin, Decision, Now, check_freshness, refused};
use super::plans::{self, HeldPlan};
use super::policy::Policy;
use super::runner::Runner;
use super::{Event, Exec, ExecError, Offer, Preparing, Refusal};
use crate::actions;
use crate::faults::{planted, reached};
use crate::journal::{AppendError, Intent, Need, Record};
use crate::step::{Ended, Job, Keep, StepDir, failure};

impl Exec {
    pub(super) fn handle_order(&mut self, order: Order) -> Result<(), ExecError> {
        if !self.admit(order.epoch)? {
            return Ok(());
        }
        let Some(session) = &self.session else {
            return Ok(());
        };
        if self.memory.is_crowded(&order.key) {
            let why = "it has ordered more steps than a plan can have, and this host has refused \
                       them";
            self.end_session(Refusal::Unanswered, why.to_owned());
            return Ok(());
        }
        let decision = self.memory.decide(
            &order,
            Now {
                controller: session.now(),
                busy: self.preparing.as_ref().map(|preparing| &preparing.key),
                steps: self.held.as_ref().map_or(&[][..], |held| &held.steps),
            },
        );
        tracing::debug!(step = %order.key, ?decision, "ordered");
        match decision {
            Decision::Stale(why) => {
                let counter = order.epoch.counter;
                self.refuse_session(Refusal::Term { counter }, why);
                Ok(())
            }
            Decision::Repeat(recorded) => self.send_again(recorded),
            // Its reports are on their way.
            Decision::Running => Ok(()),
            Decision::Refuse(failure) => self.finish_unbegun(order.key, failed(failure)),
            Decision::Nothing(summary) => self.finish_unbegun(order.key, unchanged(summary)),
            Decision::Look => self.look(order),
            Decision::Begin(begin) => self.begin(order, begin),
        }
    }

    fn begin(&mut self, order: Order, begin: Begin) -> Result<(), ExecError> {
        // Read once: a file that is being replaced must not be two policies for one order.
        let policy = self.policy().map_err(|why| refused(why, "repair it first"));
        let admitted = policy.and_then(|policy| {
            let step = self.step_for(&policy, &order)?.clone();
            let counted = self.admit_step(&policy, &order.key, &step)?;
            Ok((step, counted))
        });
        let (step, counted) = match admitted {
            Ok(admitted) => admitted,
            Err(failure) => return self.finish_unbegun(order.key, failed(failure)),
        };
        let hold = self.memory.hold.as_ref().expect("begun under the hold");
        let job = Job {
            key: order.key.clone(),
            action: step.action,
            before: Value::Null,
            bindings: order.bindings.clone(),
            timeout: step.timeout,
            log_offsets: hold.log_offsets.clone(),
        };
        let dir = self.host.dir(&order.key);
        if planted!(ReuseStepKey) {
            let _ = std::fs::remove_dir_all(dir.path());
        }
        if let Err(error) = dir.make(Keep::of(&job.action)) {
            return self.finish_unbegun(order.key, failed(no_room(&error)));
        }
        let session = self.session.as_ref().expect("orders come in a session");
        self.preparing = Some(Preparing {
            key: order.key.clone(),
            cancelled: false,
            counted,
            clock: session.clock,
        });
        if let Some(position) = begin.before {
            let before = match self.journal.read(position)? {
                Record::Intent(intent) => intent.before,
                other => unreachable!("{other:?} stands where an intent was written"),
            };
            return self.handle_prepared(order, job, Ok(before));
        }
        let (host, answers) = (self.host.clone(), self.answers.clone());
        tokio::task::spawn_local(async move {
            let before = host.before(&job).await;
            let event = Event::Prepared(Box::new(order), Box::new(job), before);
            let _ = answers.send(event).await;
        });
        Ok(())
    }

    /// The step that is ordered; refused if the host's policy has changed, or the plan expired,
    /// since it consented. What was done may always be undone.
    fn step_for(&self, policy: &Policy, order: &Order) -> Result<&HeldStep, Failure> {
        let held = self.held.as_ref().ok_or_else(|| {
            refused(
                "the steps that this host consented to cannot be read",
                "the agent's log says why",
            )
        })?;
        let step = held
            .steps
            .iter()
            .find(|step| step.at == order.key.at)
            .expect("decided to begin a step of this host");
        if order.key.direction != Direction::Undo {
            self.check_allowed(policy, held, order.plan, &step.action)?;
            self.check_approved(policy, held, order, &step.action)?;
        }
        self.check_bindings(policy, order)?;
        Ok(step)
    }

    /// Refuses what was allowed when the plan was offered, and is not any more.
    fn check_allowed(
        &self,
        policy: &Policy,
        held: &HeldPlan,
        plan: PlanDigest,
        action: &Action,
    ) -> Result<(), Failure> {
        check_expiry(held.expires, self.session.as_ref().map(super::Session::now))?;
        let changed = "the policy was changed after this host had consented";
        held.check_seal(policy, plan)
            .and_then(|()| policy.check(action))
            .map_err(|why| refused(why, changed))
    }

    /// Refuses what people have not approved, where the host asks for their signatures.
    fn check_approved(
        &self,
        policy: &Policy,
        held: &HeldPlan,
        order: &Order,
        action: &Action,
    ) -> Result<(), Failure> {
        let Some(approvers) = policy.trust().approvers() else {
            return Ok(());
        };
        let hold = self.memory.hold.as_ref();
        let asked = Asked {
            host: &self.host.config.host,
            order,
            action,
            now: wall_clock(),
            begun_after: &|gate| hold.is_some_and(|hold| hold.has_begun_after(gate)),
        };
        let people = People {
            approvers,
            breakers: policy.trust().breakers(),
        };
        approvals::check(held.gates.as_ref(), people, &asked)
            .map_err(|why| refused(why, "whose signatures count stands in the host's policy"))
    }

    /// Refuses facts that nobody has signed, where the host asks for that; also of an undo, which
    /// may bring back what a fact names.
    fn check_bindings(&self, policy: &Policy, order: &Order) -> Result<(), Failure> {
        let own = (&self.host.config.host, &self.key.public());
        evidence::check(policy, own, order).map_err(|why| {
            refused(
                why,
                "`bindings` in the host's policy says whose facts it takes",
            )
        })
    }

    pub(super) fn policy(&self) -> Result<Policy, String> {
        Policy::load(self.host.config.policy_path()).map_err(|error| crate::errors::chain(&error))
    }

    /// The intent, then the step process: from here on something may have happened.
    pub(super) fn handle_prepared(
        &mut self,
        order: Order,
        mut job: Job,
        before: Result<Value, Failure>,
    ) -> Result<(), ExecError> {
        let preparing = self.preparing.take().expect("it was being prepared");
        let may_begin = self.check_still_wanted(&order, &preparing);
        let key = order.key;
        if let Err(why) = may_begin {
            return self.ended_without_intent(key, why);
        }
        job.before = match before {
            Ok(before) => before,
            Err(failure) => return self.ended_without_intent(key, failure),
        };
        if let Err(error) = self.host.dir(&key).write_job(&job) {
            return self.ended_without_intent(key, no_room(&error));
        }
        #[cfg(feature = "faults")]
        if planted!(IntentAfterStart) {
            self.host.runner.start_early(&key);
        }
        let intent = Record::Intent(Intent {
            key: key.clone(),
            before: job.before,
            boot: self.host.boot.clone(),
            at: wall_clock(),
            counted: preparing.counted,
        });
        let started = self.numbered(ReportBody::Started { key: key.clone() });
        match self.commit(vec![intent, started], Need::Opens) {
            Ok(()) => {}
            Err(error @ (AppendError::Full(_) | AppendError::TooLarge(_))) => {
                return self.ended_without_intent(key, no_room(&error));
            }
            Err(error) => return Err(error.into()),
        }
        let hold = self.memory.hold.as_ref().expect("begun under the hold");
        let unproven = hold.unknown(key.at);
        let unproven = unproven.map(|attempt| self.key_of(hold, key.at, attempt));
        let unproven = unproven.collect();
        self.spawn_attend(key, Met::New { unproven });
        Ok(())
    }

    /// Looking at the host takes its time: what was allowed before may not be any more.
    fn check_still_wanted(&self, order: &Order, preparing: &Preparing) -> Result<(), Failure> {
        if preparing.cancelled {
            let why = "stopped before it began, as people asked for";
            return Err(failure(Cause::Cancelled, why));
        }
        let ends = self.release_later.as_ref();
        if ends.is_some_and(|(rollout, _)| *rollout == order.key.rollout) {
            let why = "not begun: the rollout has ended meanwhile";
            return Err(failure(Cause::Cancelled, why));
        }
        // A successor that knows of the order gives it again by itself after such an end; one that
        // does not has nothing done behind its back (INV-4).
        if let Err(why) = self.memory.check_epoch(order.epoch) {
            let why = format!("not begun: {why}");
            return Err(failure(Cause::Interrupted, why));
        }
        check_freshness(order, preparing.clock.now())
    }

    /// Nothing has happened, whatever the failure says.
    fn ended_without_intent(&mut self, key: StepKey, why: Failure) -> Result<(), ExecError> {
        let _ = std::fs::remove_dir_all(self.host.dir(&key).path());
        self.finish_unbegun(
            key,
            failed(Failure {
                changed: false,
                ..why
            }),
        )?;
        self.release_now_if_due()
    }

    pub(super) fn handle_ended(&mut self, key: StepKey, mut ended: Ended) -> Result<(), ExecError> {
        let changed_before = self
            .memory
            .hold
            .as_ref()
            .is_some_and(|hold| hold.changed_by_others(&key));
        if let StepOutcome::Ok { changed, .. } = &mut ended.outcome {
            // An earlier attempt made what this one found: a rollback has it to undo.
            *changed |= changed_before;
        }
        self.finish(key, ended)?;
        self.release_now_if_due()
    }

    pub(super) fn handle_cancel(
        &mut self,
        rollout: &RolloutId,
        epoch: Epoch,
    ) -> Result<(), ExecError> {
        if !self.admit(epoch)? {
            return Ok(());
        }
        if let Some(preparing) = &mut self.preparing
            && preparing.key.rollout == *rollout
        {
            preparing.cancelled = true;
        }
        let Some(hold) = self.memory.hold_for(rollout) else {
            return Ok(());
        };
        let running: Vec<(StepKey, bool)> = hold
            .running()
            .map(|(at, attempt)| (self.key_of(hold, at, attempt), attempt.cancelled))
            .collect();
        for (key, recorded) in running {
            tracing::info!(step = %key, "to be stopped");
            if !recorded {
                self.commit(vec![Record::Cancelled { key: key.clone() }], Need::Closes)?;
            }
            Runner::cancel(&self.host.dir(&key), &self.host.boot);
        }
        Ok(())
    }

    pub(super) fn handle_release(
        &mut self,
        rollout: RolloutId,
        epoch: Epoch,
    ) -> Result<(), ExecError> {
        if !self.admit(epoch)? {
            return Ok(());
        }
        // A consent that is on its way is not given any more.
        self.considering.retain(|offer| offer.rollout != rollout);
        self.awaiting_plan.retain(|offer| offer.rollout != rollout);
        if self.memory.hold_for(&rollout).is_some() {
            self.release_later = Some((rollout, false));
        } else if self.memory.waits(&rollout) {
            return self.let_go(&rollout, false);
        }
        self.release_now_if_due()
    }

    /// A rollout waits, and frees this host until it is offered again. A controller that says so
    /// after something was changed has lost its way, and the hold stays.
    pub(super) fn handle_freed(
        &mut self,
        rollout: RolloutId,
        epoch: Epoch,
    ) -> Result<(), ExecError> {
        if !self.admit(epoch)? {
            return Ok(());
        }
        let Some(hold) = self.memory.hold_for(&rollout) else {
            return Ok(());
        };
        let steps = self.held.as_ref().map_or(&[][..], |held| &held.steps);
        if hold.has_changed(steps) {
            tracing::error!(%rollout, "the controller frees this host, and something was changed \
                here: the host holds on");
            return Ok(());
        }
        self.release_later = Some((rollout, true));
        self.release_now_if_due()
    }

    /// Whether an attempt is under way.
    pub(super) fn is_busy(&self) -> bool {
        let hold = self.memory.hold.as_ref();
        self.preparing.is_some() || hold.is_some_and(|hold| hold.running().next().is_some())
    }

    /// Ends the hold, once nothing of the rollout runs any more.
    fn release_now_if_due(&mut self) -> Result<(), ExecError> {
        if self.is_busy() {
            return Ok(());
        }
        match self.release_later.take() {
            Some((rollout, comes_back)) => self.let_go(&rollout, comes_back),
            None => Ok(()),
        }
    }

    /// Ends the hold, if there is one, and whatever was kept for it.
    pub(super) fn let_go(
        &mut self,
        rollout: &RolloutId,
        comes_back: bool,
    ) -> Result<(), ExecError> {
        let record = Record::Released {
            rollout: rollout.clone(),
            comes_back,
        };
        self.commit(vec![record], Need::Closes)?;
        if self.memory.hold.is_none() {
            self.held = None;
        }
        tracing::info!(%rollout, comes_back, "released");
        let state_dir = &self.host.config.state_dir;
        HeldPlan::forget(state_dir, rollout);
        remove_steps(state_dir, |of| of == rollout);
        Ok(())
    }

    /// A dry run: only asks.
    fn look(&mut self, order: Order) -> Result<(), ExecError> {
        let policy = self.policy().map_err(|why| refused(why, "repair it first"));
        let found = policy.and_then(|policy| {
            let (step, earlier) = self.step_to_look_at(&policy, &order)?;
            let limited = policy.limits_asking(&step.action);
            Ok((step, earlier, limited))
        });
        let (step, earlier, limited) = match found {
            Ok(found) => found,
            Err(failure) => return self.finish_unbegun(order.key, failed(failure)),
        };
        let job = Job {
            key: order.key,
            action: step.action,
            before: Value::Null,
            bindings: order.bindings,
            timeout: step.timeout,
            log_offsets: std::collections::BTreeMap::new(),
        };
        let (host, answers) = (self.host.clone(), self.answers.clone());
        tokio::task::spawn_local(async move {
            let begun = tokio::time::Instant::now();
            let seen = host.dry_run(&job, earlier, limited).await;
            let mut ended = match seen {
                Ok(summary) => Ended {
                    outcome: StepOutcome::Ok {
                        changed: false,
                        summary,
                    },
                    facts: vec![Fact::Note {
                        name: "step".into(),
                        value: actions::describe(&job.action),
                    }],
                    took: Period(0),
                },
                Err(failure) => failed(failure),
            };
            ended.took = Period(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
            let _ = answers.send(Event::Looked(job.key, Box::new(ended))).await;
        });
        Ok(())
    }

    fn review_again(&self, order: &Order, plan: &SealedPlan) -> Result<HeldPlan, Failure> {
        let offer = Offer {
            rollout: order.key.rollout.clone(),
            plan: order.plan,
            epoch: order.epoch,
            dry_run: true,
            signatures: vec![],
            round: 0,
        };
        self.review(&offer, plan).map_err(|refusals| {
            let reasons: Vec<String> = refusals.into_iter().map(|r| r.reason).collect();
            refused(
                reasons.join("; "),
                "offer the plan again for the whole list",
            )
        })
    }

    /// The step that a dry run asks about, and what the plan does before it.
    fn step_to_look_at(
        &self,
        policy: &Policy,
        order: &Order,
    ) -> Result<(HeldStep, Vec<Earlier>), Failure> {
        let plan = plans::load(&self.host.config.state_dir, order.plan).ok_or_else(|| {
            refused(
                "this host does not have the plan",
                "offer it first, as a dry run",
            )
        })?;
        let known = |(digest, _): &&(PlanDigest, HeldPlan)| *digest == order.plan;
        let held = match self.looked_at.iter().find(known) {
            Some((_, held)) => held.clone(),
            // Offered before the agent was restarted. Signatures came with the offer: a host that
            // asks for them wants it again.
            None => self.review_again(order, &plan)?,
        };
        let step = held
            .steps
            .iter()
            .find(|step| step.at == order.key.at)
            .ok_or_else(|| {
                refused(
                    format!(
                        "step {} of the plan is not meant for this host",
                        order.key.at
                    ),
                    "the labels that decide it are in the host's own agent.toml",
                )
            })?;
        self.check_allowed(policy, &held, order.plan, &step.action)?;
        let earlier = ahead::earlier(plan.plan(), &held.steps, step.at);
        Ok((step.clone(), earlier))
    }
}

/// Both clocks must allow it: a controller that lies about the time revives no expired plan.
fn check_expiry(expires: Timestamp, controller: Option<Timestamp>) -> Result<(), Failure> {
    let expired = |now: Timestamp| now > expires.plus(super::consent::CLOCK_TOLERANCE);
    if expired(wall_clock()) || controller.is_some_and(expired) {
        return Err(refused(
            "the plan has expired",
            "what was done can still be undone; compile the plan again for a new rollout",
        ));
    }
    Ok(())
}

fn unchanged(summary: String) -> Ended {
    Ended {
        outcome: StepOutcome::Ok {
            changed: false,
            summary,
        },
        facts: vec![],
        took: Period(0),
    }
}

fn no_room(error: &dyn std::error::Error) -> Failure {
    Failure {
        hint: Some("nothing was done; make room in the agent's state directory".into()),
        ..failure(
            Cause::Host,
            format!(
                "the attempt cannot be recorded: {}",
                crate::errors::chain(error)
            ),
        )
    }
}

/// Removes the directories of the attempts of some rollouts.
pub(super) fn remove_steps(state_dir: &std::path::Path, which: impl Fn(&RolloutId) -> bool) {
    let Ok(entries) = std::fs::read_dir(StepDir::parent(state_dir)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let key = name.parse::<StepKey>();
        if !key.is_ok_and(|key| which(&key.rollout)) {
            continue;
        }
        reached("step directory: to be removed");
        if let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(%error, path = %entry.path().display(), "cannot be removed");
        }
        reached("step directory: removed");
    }
}

#[cfg(test)]
mod tests;
