//! Offers: fetch the plan, review it, gather the host's state, consent or decline.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, Epoch, PlanDigest, RolloutId, StepKey};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Failure, HOLDS_NOT, Refusal, ReportBody};
use lockstep_proto::seal::SealedPlan;
use serde_json::Value;

use super::approvals::Gates;
use super::attend::{Host, wall_clock};
use super::consent;
use super::look::Turn;
use super::plans::{self, HeldPlan, HeldSeal};
use super::{Event, Exec, ExecError, Gathered, Offer, Outbound, Surveying};
use crate::journal::{AppendError, Held, Need, Record};
use crate::step::{Job, LogMark};

/// Offers that wait for their plan, and as many that the host is looked at for. A controller offers
/// few rollouts to one host at a time.
const AWAITING: usize = 16;

impl Exec {
    pub(super) fn handle_offer(&mut self, offer: Offer) -> Result<(), ExecError> {
        if !self.admit(offer.epoch)? {
            return Ok(());
        }
        // What was looked at for an earlier round is not what is there now.
        let is_older = |other: &Offer| other.rollout == offer.rollout && other.round < offer.round;
        self.considering.retain(|other| !is_older(other));
        let mut considered = self.considering.iter_mut();
        if let Some(considered) = considered.find(|other| other.rollout == offer.rollout) {
            // Said again, perhaps by a successor: then the answer is for that one.
            if (considered.plan, considered.dry_run) == (offer.plan, offer.dry_run)
                && considered.signatures == offer.signatures
            {
                considered.epoch = offer.epoch;
            }
            return Ok(());
        }
        if self.awaiting_plan.contains(&offer) {
            return Ok(());
        }
        if !offer.dry_run {
            self.let_go_of_earlier_round(&offer)?;
            if let Some(hold) = &self.memory.hold {
                if hold.rollout != offer.rollout {
                    let why = self.holds_for(&hold.rollout);
                    return self.decline(offer.rollout, vec![whole(why)]);
                }
                if hold.plan == offer.plan
                    && let Some(consent) = hold.consent
                {
                    return self.send_again(consent);
                }
                let why = format!("{} has another plan on this host", offer.rollout);
                return self.decline(offer.rollout, vec![whole(why)]);
            }
            if self.memory.has_ended(&offer.rollout) {
                let why = format!("{} has ended on this host", offer.rollout);
                return self.decline(offer.rollout, vec![whole(why)]);
            }
        }
        if let Some(plan) = plans::load(&self.host.config.state_dir, offer.plan) {
            return self.consider(offer, &plan);
        }
        if self.awaiting_plan.len() == AWAITING {
            return self.decline(offer.rollout, vec![too_many()]);
        }
        if let Some(session) = &mut self.session {
            if !self
                .awaiting_plan
                .iter()
                .any(|other| other.plan == offer.plan)
            {
                session.first.push_back(Outbound::Fetch(offer.plan));
            }
            self.awaiting_plan.push(offer);
        }
        Ok(())
    }

    /// The host was free meanwhile as far as the controller knows, and has not heard of it.
    fn let_go_of_earlier_round(&mut self, offer: &Offer) -> Result<(), ExecError> {
        let steps = self.held.as_ref().map_or(&[][..], |held| &held.steps);
        let earlier = self.memory.hold_for(&offer.rollout).is_some_and(|hold| {
            hold.plan == offer.plan && hold.round < offer.round && !hold.has_changed(steps)
        });
        if earlier && !self.is_busy() {
            return self.let_go(&offer.rollout, true);
        }
        Ok(())
    }

    pub(super) fn handle_plan(
        &mut self,
        digest: PlanDigest,
        content: Result<Vec<u8>, String>,
    ) -> Result<(), ExecError> {
        let waiting = self
            .awaiting_plan
            .extract_if(.., |offer| offer.plan == digest);
        let offers: Vec<Offer> = waiting.collect();
        let stored = content.and_then(|bytes| {
            let held = self.memory.hold.as_ref().map(|hold| hold.plan);
            plans::store(&self.host.config.state_dir, digest, &bytes, held)
                .map_err(|error| crate::errors::chain(&error))
        });
        for offer in offers {
            match &stored {
                Ok(plan) => self.consider(offer, plan)?,
                Err(why) => {
                    let why = format!("the plan {} cannot be had: {why}", digest.short());
                    self.decline(offer.rollout, vec![whole(why)])?;
                }
            }
        }
        Ok(())
    }

    /// Holds a plan against the host's configuration and policy.
    pub(super) fn review(
        &self,
        offer: &Offer,
        plan: &SealedPlan,
    ) -> Result<HeldPlan, Vec<Refusal>> {
        let policy = self.policy().map_err(|why| {
            vec![whole(format!(
                "{why}; until it is repaired nothing is allowed"
            ))]
        })?;
        let config = &self.host.config;
        let compiled = plan.plan();
        let held = HeldPlan {
            expires: compiled.expires,
            steps: vec![],
            seal: (!offer.signatures.is_empty()).then(|| HeldSeal {
                of: plans::serial_of(compiled),
                signatures: offer.signatures.clone(),
                labels: config.labels.clone(),
                vars: config.vars.clone(),
            }),
            gates: Some(Gates::of(compiled)),
        };
        let mut refusals = vec![];
        if let Some(seal) = policy.trust().seal() {
            let of = plans::serial_of(compiled);
            let sealed = seal.check(&of.fleet, plan.digest(), &offer.signatures);
            let licensed = || self.memory.licences.check(&of, &offer.rollout);
            refusals.extend(sealed.and_then(|_| licensed()).err().map(whole));
        }
        match consent::review(compiled, config, &policy, wall_clock()) {
            Ok(steps) if refusals.is_empty() => Ok(HeldPlan { steps, ..held }),
            Ok(_) => Err(refusals),
            Err(others) => {
                refusals.extend(others);
                Err(refusals)
            }
        }
    }

    fn consider(&mut self, offer: Offer, plan: &SealedPlan) -> Result<(), ExecError> {
        if self.gathering >= AWAITING {
            return self.decline(offer.rollout, vec![too_many()]);
        }
        let held = match self.review(&offer, plan) {
            Ok(held) => held,
            Err(refusals) => return self.decline(offer.rollout, refusals),
        };
        if offer.dry_run {
            self.looked_at.retain(|(digest, _)| *digest != offer.plan);
            self.looked_at.truncate(AWAITING - 1);
            self.looked_at.insert(0, (offer.plan, held.clone()));
        }
        self.considering.push(offer.clone());
        self.gathering += 1;
        let rollout = offer.rollout.clone();
        let turn = if offer.dry_run {
            Turn::Waits
        } else {
            Turn::AtOnce
        };
        let purpose = Gathered::Consent(Box::new((offer, held.clone())));
        self.gather(purpose, rollout, held, turn);
        Ok(())
    }

    fn gather(&self, purpose: Gathered, rollout: RolloutId, held: HeldPlan, turn: Turn) {
        let (host, answers) = (self.host.clone(), self.answers.clone());
        tokio::task::spawn_local(async move {
            let state = gather(&host, &rollout, &held, turn).await;
            let _ = answers.send(Event::Gathered(purpose, state)).await;
        });
    }

    pub(super) fn handle_gathered(
        &mut self,
        purpose: Gathered,
        state: Result<Vec<Fact>, Failure>,
    ) -> Result<(), ExecError> {
        match purpose {
            Gathered::Consent(of) => {
                self.gathering = self.gathering.saturating_sub(1);
                let (offer, held) = *of;
                self.conclude(offer, &held, state)
            }
            Gathered::Survey(rollout) => {
                let done = self.surveying.extract_if(.., |it| it.rollout == rollout);
                let again = done.last().is_some_and(|done| done.again);
                if let Some(held) = self.held_for(&rollout).filter(|_| again) {
                    self.survey(rollout, held);
                    return Ok(());
                }
                let state = state.unwrap_or_else(|failure| vec![not_surveyed(&failure.message)]);
                self.answer(ReportBody::Surveyed { rollout, state })
            }
        }
    }

    /// Consents: the hold and its report are one record, so that neither is without the other.
    fn conclude(
        &mut self,
        offer: Offer,
        held: &HeldPlan,
        state: Result<Vec<Fact>, Failure>,
    ) -> Result<(), ExecError> {
        let Offer {
            rollout,
            plan,
            // The newest that it was made in is kept with those that are considered.
            epoch: _,
            dry_run,
            signatures: _,
            round,
        } = offer;
        // The offer that the host was looked at for, not another one of the rollout.
        let is_it = |other: &Offer| {
            (&other.rollout, other.plan) == (&rollout, plan)
                && (other.round, other.dry_run) == (round, dry_run)
        };
        let Some(index) = self.considering.iter().position(is_it) else {
            tracing::info!(%rollout, "released before this host consented");
            return Ok(());
        };
        let Offer { epoch, .. } = self.considering.swap_remove(index);
        // INV-4: a successor that wants this rollout offers it anew; one that does not know it
        // would have a host that holds for nobody.
        if let Err(why) = self.memory.check_epoch(epoch) {
            tracing::info!(%rollout, why, "no consent");
            return Ok(());
        }
        let state = match state {
            Ok(state) => state,
            Err(failure) => {
                let hint = failure
                    .hint
                    .map(|hint| format!("; {hint}"))
                    .unwrap_or_default();
                let why = format!("the host's state cannot be read: {}{hint}", failure.message);
                return self.decline(rollout, vec![whole(why)]);
            }
        };
        let consented = ReportBody::Consented {
            rollout: rollout.clone(),
            plan,
            state,
            round,
        };
        if dry_run {
            return self.answer(consented);
        }
        // Another rollout may have been faster.
        if let Some(hold) = &self.memory.hold {
            let why = self.holds_for(&hold.rollout);
            return self.decline(rollout, vec![whole(why)]);
        }
        let full = |error: &dyn std::error::Error| {
            vec![whole(format!(
                "the consent cannot be recorded: {}; make room in the agent's state directory",
                crate::errors::chain(error)
            ))]
        };
        let steps = match held.write(&self.host.config.state_dir, &rollout) {
            Ok(steps) => steps,
            Err(error) => return self.decline(rollout, full(&error)),
        };
        let licence = match self.licence(held, &rollout) {
            Ok(licence) => licence,
            Err(why) => return self.decline(rollout, vec![whole(why)]),
        };
        let hold = Record::Held(Held {
            rollout: rollout.clone(),
            plan,
            steps,
            log_offsets: log_offsets(held),
            round,
        });
        let report = self.numbered(consented);
        let records = licence.into_iter().chain([hold, report]).collect();
        match self.commit(records, Need::Opens) {
            Ok(()) => {
                tracing::info!(%rollout, plan = %plan.short(), "consented");
                self.held = Some(held.clone());
                Ok(())
            }
            Err(error @ (AppendError::Full(_) | AppendError::TooLarge(_))) => {
                self.decline(rollout, full(&error))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The record that a serial licenses this rollout, where the host asks for sealed plans. The
    /// policy, or what was licensed, may have changed since the plan was reviewed.
    fn licence(&self, held: &HeldPlan, rollout: &RolloutId) -> Result<Option<Record>, String> {
        let (true, Some(seal)) = (self.is_sealed()?, &held.seal) else {
            return Ok(None);
        };
        self.memory.licences.check(&seal.of, rollout)?;
        Ok(Some(Record::Licensed {
            of: seal.of.clone(),
            rollout: rollout.clone(),
        }))
    }

    fn decline(&mut self, rollout: RolloutId, refusals: Vec<Refusal>) -> Result<(), ExecError> {
        for refusal in &refusals {
            let at = refusal.at.map(tracing::field::display);
            tracing::warn!(%rollout, at, reason = refusal.reason, "declined");
        }
        self.answer(ReportBody::Declined { rollout, refusals })
    }

    /// Why another rollout has to wait.
    fn holds_for(&self, holder: &RolloutId) -> String {
        let ended = self.release_later.as_ref();
        if ended.is_some_and(|(ended, _)| ended == holder) {
            return format!(
                "this host holds for {holder}, which has ended, as long as a step of it runs here; \
                 apply the plan again when that is over"
            );
        }
        format!("this host holds for {holder}; end that rollout first")
    }

    pub(super) fn handle_survey(
        &mut self,
        rollout: RolloutId,
        epoch: Epoch,
    ) -> Result<(), ExecError> {
        if !self.admit(epoch)? {
            return Ok(());
        }
        let Some(held) = self.held_for(&rollout) else {
            return self.answer(ReportBody::Surveyed {
                state: vec![not_surveyed(HOLDS_NOT)],
                rollout,
            });
        };
        let newest = self.memory.last_report;
        let mut under_way = self.surveying.iter_mut();
        match under_way.find(|it| it.rollout == rollout) {
            // What it sees answers this one too, unless something has happened meanwhile.
            Some(it) => it.again |= it.since != newest,
            None => self.survey(rollout, held),
        }
        Ok(())
    }

    fn survey(&mut self, rollout: RolloutId, held: HeldPlan) {
        self.surveying.push(Surveying {
            rollout: rollout.clone(),
            since: self.memory.last_report,
            again: false,
        });
        self.gather(
            Gathered::Survey(rollout.clone()),
            rollout,
            held,
            Turn::Waits,
        );
    }

    /// The steps of this rollout, if the host holds for it.
    fn held_for(&self, rollout: &RolloutId) -> Option<HeldPlan> {
        let held = self.held.as_ref();
        held.filter(|_| self.memory.hold_for(rollout).is_some())
            .cloned()
    }
}

fn too_many() -> Refusal {
    whole("too many plans are offered to this host at once".to_owned())
}

fn whole(reason: String) -> Refusal {
    Refusal { at: None, reason }
}

fn not_surveyed(why: &str) -> Fact {
    Fact::Note {
        name: "not surveyed".into(),
        value: why.to_owned(),
    }
}

/// The parts of the host's state that the plan's steps touch here, each once.
async fn gather(
    host: &Host,
    rollout: &RolloutId,
    held: &HeldPlan,
    turn: Turn,
) -> Result<Vec<Fact>, Failure> {
    let changing = held.steps.iter().filter(|step| step.action.changes());
    let jobs = changing.map(|step| Job {
        key: StepKey {
            rollout: rollout.clone(),
            host: host.config.host.clone(),
            at: step.at,
            direction: Direction::Do,
            attempt: 1,
        },
        action: step.action.clone(),
        before: Value::Null,
        bindings: vec![],
        timeout: step.timeout,
        log_offsets: BTreeMap::new(),
    });
    host.state(jobs.collect(), turn).await
}

/// Where the log files that the plan reads end now: what they hold already is older than the
/// rollout.
fn log_offsets(held: &HeldPlan) -> BTreeMap<PathBuf, LogMark> {
    let logs = held.steps.iter().filter_map(|step| match &step.action {
        Action::CheckLog(log) => Some(PathBuf::from(&log.path)),
        _ => None,
    });
    logs.map(|path| {
        let end = LogMark::end_of(&path);
        (path, end)
    })
    .collect()
}

#[cfg(test)]
mod tests;
