//! A thief of the controller: holds all its keys, and none of the people's.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use lockstep_proto::ids::{Digest, Direction, Epoch, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Order};
use lockstep_proto::plan::CompiledPlan;
use lockstep_proto::report::{Cause, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::wire::agent_v1::{self as wire, down};
use serde_json::{Value, json};

use super::place::{FLEET, HOST, Place, key};
use super::tally::Tally;
use crate::played::{Controller, Session, compiled};

/// What the agent answered.
#[derive(Debug)]
pub(super) enum Answer {
    Consented,
    /// The plan or the order is refused, in the report with this number.
    Refused(String, u64),
    Done,
    /// It failed, or nobody knows.
    Otherwise(#[expect(dead_code, reason = "for whoever reads what went wrong")] String),
    /// The agent has ended the session.
    Ended,
    /// Nothing that belongs to it.
    Nothing,
}

/// What a hostile order must come to. None may have an effect.
#[derive(Debug, Clone, Copy)]
pub(super) enum Must {
    /// Refused, with these words.
    BeRefused(&'static str),
    /// The session ends, and the records have these words.
    EndTheSession(&'static str),
    /// Any answer.
    ChangeNothing,
}

/// Bytes that are offered as a plan, and signatures.
#[derive(Debug, Clone)]
pub(super) struct Offered {
    pub(super) digest: Digest,
    pub(super) signatures: Vec<String>,
}

/// The thief at work.
pub(super) struct Thief {
    pub(super) place: Place,
    pub(super) session: Session,
    pub(super) tally: Tally,
    pub(super) epoch: Epoch,
    controller: Controller,
    serial: u64,
    rollouts: u32,
}

impl Thief {
    pub(super) async fn begin(place: Place) -> Result<Self> {
        let address = place.cluster.address().parse()?;
        let mut controller = Controller::start(&place.stolen()?, address).await;
        // The journal of a controller says which term it is in, and so do its agents.
        let epoch = controller.met().await.epoch;
        let session = controller.accept_all(epoch).await;
        Ok(Self {
            place,
            session,
            tally: Tally::default(),
            epoch,
            controller,
            serial: 100,
            rollouts: 0,
        })
    }

    /// A rollout that nobody has heard of.
    pub(super) fn rollout(&mut self) -> RolloutId {
        self.rollouts += 1;
        let [a, b, c, d] = self.rollouts.to_be_bytes();
        RolloutId::from_random([0xbd, 0, a, b, c, d])
    }

    /// A plan of the fleet, with the next serial.
    pub(super) fn plan(&mut self, actions: &[(&str, Value)]) -> SealedPlan {
        self.plan_with(actions, |_| {})
    }

    pub(super) fn plan_with(
        &mut self,
        actions: &[(&str, Value)],
        change: impl FnOnce(&mut CompiledPlan),
    ) -> SealedPlan {
        self.serial += 1;
        let mut plan = compiled(actions);
        plan.fleet_name = FLEET.into();
        plan.serial = self.serial;
        change(&mut plan);
        seal::seal(plan).expect("a plan of some steps is not too large")
    }

    /// A command that writes a line.
    pub(super) fn note(&self, line: &str) -> (&'static str, Value) {
        let at = |name: &str| self.place.path(name).display().to_string();
        let argv = json!(["/usr/bin/python3", at("note"), at("effects"), line]);
        ("exec.run", json!({"name": "note", "argv": argv}))
    }

    /// A file that is written.
    pub(super) fn render(&self, path: &str, value: &str) -> (&'static str, Value) {
        let path = self.place.path(path).display().to_string();
        ("env.render", json!({"path": path, "set": {"A": value}}))
    }

    pub(super) fn keep(&self, plan: &SealedPlan, signers: &[u8]) -> Offered {
        self.controller.keep(plan);
        Offered {
            digest: plan.digest(),
            signatures: sign(plan.digest(), signers),
        }
    }

    /// Keeps any bytes, signed by as many people as it takes: what they sign is not good by that.
    pub(super) fn keep_bytes(&self, bytes: &[u8]) -> Offered {
        let digest = Digest::of(bytes);
        self.keep_as(digest, bytes)
    }

    /// Keeps bytes under a digest that may not be theirs, with signatures of the digest.
    pub(super) fn keep_as(&self, digest: Digest, bytes: &[u8]) -> Offered {
        self.controller.keep_as(digest, bytes);
        Offered {
            digest,
            signatures: sign(digest, &[1, 2]),
        }
    }

    /// Offers a plan; how the agent answers.
    pub(super) async fn offer(&mut self, rollout: &RolloutId, offered: &Offered) -> Answer {
        let Offered { digest, signatures } = offered.clone();
        self.session
            .offer_signed(rollout, digest, signatures, false)
            .await;
        self.answer(|body| match body {
            ReportBody::Consented { rollout: of, .. }
            | ReportBody::Declined { rollout: of, .. } => of == rollout,
            _ => false,
        })
        .await
    }

    pub(super) fn at(rollout: &RolloutId, (phase, step): (u16, u16), attempt: u16) -> StepKey {
        StepKey {
            rollout: rollout.clone(),
            host: HOST.parse().expect("a host's name"),
            at: StepRef { phase, step },
            direction: Direction::Do,
            attempt,
        }
    }

    /// Orders a step; how it ends.
    pub(super) async fn order(
        &mut self,
        plan: Digest,
        key: &StepKey,
        bindings: Vec<Binding>,
    ) -> Answer {
        let order = Order {
            key: key.clone(),
            plan,
            epoch: self.epoch,
            not_after: lockstep_proto::values::Timestamp(crate::played::CLOCK + 3_600_000),
            bindings,
        };
        self.order_as_it_is(order.into(), key).await
    }

    pub(super) async fn order_as_it_is(&mut self, order: wire::Order, key: &StepKey) -> Answer {
        self.session.send(down::Message::Order(order)).await;
        self.answer(|body| matches!(body, ReportBody::Finished { key: of, .. } if of == key))
            .await
    }

    /// Sends anything, and waits until the agent has heard it.
    pub(super) async fn say(&mut self, down: wire::Down) -> Answer {
        self.session.send_raw(down).await;
        let asked = self.rollout();
        let survey = wire::Survey {
            rollout: asked.to_string(),
            epoch: Some(self.epoch.into()),
        };
        self.session.send(down::Message::Survey(survey)).await;
        let mut last = Answer::Nothing;
        loop {
            let Some(report) = self.session.heard().await else {
                return Answer::Ended;
            };
            match &report.body {
                ReportBody::Surveyed { rollout, .. } if *rollout == asked => return last,
                _ => last = read(report),
            }
        }
    }

    async fn answer(&mut self, is_it: impl Fn(&ReportBody) -> bool) -> Answer {
        loop {
            match self.session.heard().await {
                None => return Answer::Ended,
                Some(report) if is_it(&report.body) => return read(report),
                Some(_) => {}
            }
        }
    }

    /// Plays a hostile offer, and, should the agent consent, every step of the plan.
    pub(super) async fn hostile_offer(
        &mut self,
        kind: &str,
        name: &str,
        offered: &Offered,
        words: &'static str,
    ) -> Result<()> {
        let rollout = self.rollout();
        self.hostile_offer_of(kind, name, &rollout, offered, words)
            .await
    }

    pub(super) async fn hostile_offer_of(
        &mut self,
        kind: &str,
        name: &str,
        rollout: &RolloutId,
        offered: &Offered,
        words: &'static str,
    ) -> Result<()> {
        self.tally.play(kind, name);
        let answer = self.offer(rollout, offered).await;
        let consented = matches!(answer, Answer::Consented);
        self.check(kind, name, answer, Must::BeRefused(words))
            .await?;
        if consented {
            // What is taken shows by what it does.
            for step in 0..4 {
                let key = Self::at(rollout, (0, step), 1);
                self.order(offered.digest, &key, vec![]).await;
            }
            self.session.release(rollout).await;
            self.unlicensed(kind, name);
        }
        Ok(())
    }

    /// Holds an answer against what it must be, and looks what has changed.
    pub(super) async fn check(
        &mut self,
        kind: &str,
        name: &str,
        answer: Answer,
        must: Must,
    ) -> Result<()> {
        let whole = format!("{kind}: {name}");
        self.unlicensed(kind, name);
        let wrong = format!("{whole}: {answer:?} instead of {must:?}");
        match (must, answer) {
            (Must::BeRefused(words), Answer::Refused(why, number)) => {
                if !why.contains(words) {
                    self.tally
                        .wrong
                        .push(format!("{whole}: `{words}` is not why: {why}"));
                }
                self.tally.refused.insert(whole, number);
            }
            (Must::ChangeNothing, Answer::Refused(_, number)) => {
                self.tally.refused.insert(whole, number);
            }
            (Must::EndTheSession(words), Answer::Ended) => {
                self.tally.ended.insert(whole, words.to_owned());
                self.connect_again().await?;
            }
            (Must::ChangeNothing, Answer::Ended) => {
                bail!("{whole}: the session has ended, and nothing says why it should");
            }
            (Must::ChangeNothing, _) => self.tally.answered(kind, name),
            (_, Answer::Ended) => {
                self.tally.wrong.push(wrong);
                self.connect_again().await?;
            }
            _ => self.tally.wrong.push(wrong),
        }
        Ok(())
    }

    /// Counts what has changed as effects that nobody licensed.
    pub(super) fn unlicensed(&mut self, kind: &str, name: &str) {
        for path in self.place.watch.changes() {
            let path = path.display();
            self.tally
                .effects
                .push(format!("{kind}: {name}: {path} has changed"));
        }
    }

    /// A session after one that was ended.
    pub(super) async fn connect_again(&mut self) -> Result<()> {
        self.connect_in(self.epoch).await
    }

    /// Kills exec, and starts it again.
    pub(super) async fn restart_exec(&mut self) -> Result<()> {
        let host = self.place.cluster.host_mut(HOST);
        host.kill_link();
        host.kill_agent();
        host.start_agent()?;
        host.kill_link();
        self.connect_again().await
    }

    /// The next session, welcomed in some term. The link is started anew: it would dial later and
    /// later.
    pub(super) async fn connect_in(&mut self, epoch: Epoch) -> Result<()> {
        let host = self.place.cluster.host_mut(HOST);
        host.kill_link();
        self.controller.forget_waiting();
        host.start_link()?;
        self.session = self.controller.accept_all(epoch).await;
        Ok(())
    }

    /// A rollout that people have sealed, begun.
    pub(super) async fn hold(&mut self, plan: &SealedPlan) -> Result<RolloutId> {
        let rollout = self.rollout();
        let offered = self.keep(plan, &[1, 2]);
        match self.offer(&rollout, &offered).await {
            Answer::Consented => Ok(rollout),
            other => bail!("a sealed plan is answered with {other:?}"),
        }
    }

    pub(super) async fn release(&mut self, rollout: &RolloutId) -> Result<()> {
        let release = wire::Release {
            rollout: rollout.to_string(),
            epoch: Some(self.epoch.into()),
            comes_back: false,
        };
        let said = wire::Down {
            message: Some(down::Message::Release(release)),
            head: None,
        };
        match self.say(said).await {
            Answer::Nothing => Ok(()),
            other => bail!("a release is answered with {other:?}"),
        }
    }

    /// An order that people have licensed: it must have this effect, once, and nothing else.
    pub(super) async fn licensed(
        &mut self,
        plan: &SealedPlan,
        key: &StepKey,
        bindings: Vec<Binding>,
        changed: &[PathBuf],
    ) -> Result<()> {
        let answer = self.order(plan.digest(), key, bindings).await;
        ensure!(
            matches!(answer, Answer::Done),
            "the licensed order {key} is answered with {answer:?}"
        );
        let seen = self.place.watch.changes();
        ensure!(
            seen == changed,
            "the licensed order {key} has changed {seen:?}"
        );
        self.tally.licensed += 1;
        Ok(())
    }

    /// A licensed command: one line more in the ledger, as it was given.
    pub(super) async fn licensed_note(
        &mut self,
        plan: &SealedPlan,
        key: &StepKey,
        bindings: Vec<Binding>,
        line: &str,
    ) -> Result<()> {
        let mut expected = self.place.ledger();
        expected.push(format!("['{line}']"));
        let changed = [self.place.path("effects")];
        self.licensed(plan, key, bindings, &changed).await?;
        let ledger = self.place.ledger();
        ensure!(ledger == expected, "the ledger has {ledger:?}");
        Ok(())
    }

    /// Reads the agent's own records for everything that it has refused.
    pub(super) fn audit(&mut self) -> Result<()> {
        let records = self.place.audit()?;
        let mut reports = std::collections::BTreeSet::new();
        let mut reasons = vec![];
        for line in &records {
            let record = &line["record"];
            if let Some(number) = record["report"]["number"].as_u64() {
                reports.insert(number);
            }
            if let Some(why) = record["refused"]["why"].as_str() {
                reasons.push(why.to_owned());
            }
        }
        let tally = &mut self.tally;
        for (name, number) in &tally.refused {
            if !reports.contains(number) {
                let missing = format!("{name}: its refusal {number} is not on record");
                tally.wrong.push(missing);
            }
        }
        let on_record = tally.refused.values().filter(|it| reports.contains(it));
        tally.audit_lines = on_record.count() as u64;
        // Each reason counts once: two that end their sessions alike leave one line.
        for (name, words) in &tally.ended {
            match reasons.iter().position(|why| why.contains(words.as_str())) {
                Some(found) => {
                    reasons.remove(found);
                    tally.audit_lines += 1;
                }
                None => {
                    let missing = format!("{name}: `{words}` is not on record: {reasons:#?}");
                    tally.wrong.push(missing);
                }
            }
        }
        Ok(())
    }
}

/// Signatures of people under a plan.
pub(super) fn sign(plan: Digest, signers: &[u8]) -> Vec<String> {
    let message = seal::message(plan);
    let sign = |seed: &u8| key(*seed).sign(seal::NAMESPACE, message.as_bytes());
    signers.iter().map(sign).collect()
}

fn read(report: Report) -> Answer {
    match report.body {
        ReportBody::Consented { .. } => Answer::Consented,
        ReportBody::Declined { refusals, .. } => {
            let reasons: Vec<String> = refusals.into_iter().map(|it| it.reason).collect();
            Answer::Refused(reasons.join("; "), report.number)
        }
        ReportBody::Finished { outcome, .. } => match outcome {
            StepOutcome::Ok { .. } => Answer::Done,
            StepOutcome::Failed(failure) if failure.cause == Cause::Refused => {
                Answer::Refused(failure.message, report.number)
            }
            StepOutcome::Failed(failure) => Answer::Otherwise(failure.message),
            StepOutcome::Unknown { why } => Answer::Otherwise(why),
        },
        ReportBody::Started { .. } | ReportBody::Surveyed { .. } => Answer::Nothing,
    }
}
