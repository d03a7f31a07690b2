//! Simulated agents: what a real one keeps on its disk is a value here, so a whole fleet can be
//! cloned at any instant. They keep the agents' promises (INV-1, INV-2, INV-4): reports are
//! numbered and repeated until acknowledged, a step key is done once, a host takes steps in the
//! order of the plan, terms that have ended are not obeyed.
//!
//! ```text
//! Offer -> fetch -> Consented | Order -> Started -> effect (ledger) -> Finished | Release
//! ```
//!
//! Nothing here waits: [`super::fleet`] carries messages and lets time pass.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_proto::action::Class;
use lockstep_proto::action::postgres::Level;
use lockstep_proto::ids::{
    BootId, Digest, Direction, Epoch, HostId, InstanceId, PlanDigest, RolloutId, StepKey, StepRef,
};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::report::{Cause, Failure, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::{Period, Timestamp};

/// Something that was done to a host. The ledger of effects is kept apart from agents' memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// What was done, where, which way and as which attempt.
    pub key: StepKey,
    /// The term of the order that was obeyed.
    pub epoch: Epoch,
    /// The highest term that the agent had seen when it obeyed.
    pub highest: Epoch,
}

/// A whole fleet: agents by index, and the ledger of everything that was done.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Agents.
    pub agents: Vec<Agent>,
    /// Every effect, in the order in which it happened.
    pub ledger: Vec<Effect>,
    /// What breaks a promise, seen from the agents' side.
    pub broken: BTreeSet<String>,
    /// Orders that were obeyed although their term had ended.
    pub fenced: BTreeSet<String>,
    /// Reports that were called durable, and are not.
    pub lost: BTreeSet<String>,
    /// Orders that were refused because their term has ended.
    pub stale: u64,
    /// Orders that were given again although they were done: nothing was done twice.
    pub repeated: u64,
}

/// What has to be known about a fleet's hosts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nature {
    /// The host whose step of this action fails, by its number.
    pub failing: Option<(usize, &'static str)>,
}

/// One agent with its host.
#[derive(Debug, Clone)]
pub struct Agent {
    /// Its name.
    pub host: HostId,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its installation.
    pub instance: InstanceId,
    /// Its boot.
    pub boot: BootId,
    /// The highest term obeyed.
    pub epoch: Epoch,
    /// Every report that it ever made: the first has number 1. Kept for the checks; the agent
    /// itself sends only those that are not acknowledged.
    pub reports: Vec<ReportBody>,
    /// The newest report that a controller called durable.
    pub acknowledged: u64,
    /// The rollout that it holds itself for.
    pub hold: Option<Hold>,
    /// Rollouts that have ended here.
    pub released: BTreeSet<RolloutId>,
    /// The attempt that runs; a host takes one step at a time.
    pub running: Option<Running>,
    /// Every order that came, for networks that repeat them.
    pub orders: Vec<Order>,
    /// The host's state: what rollbacks must bring back.
    pub state: BTreeMap<String, String>,
    /// Which of its actions fails.
    failing: Option<&'static str>,
}

/// A rollout that an agent holds itself for.
#[derive(Debug, Clone)]
pub struct Hold {
    /// The rollout.
    pub rollout: RolloutId,
    plan: Arc<SealedPlan>,
    consent: usize,
    attempts: Vec<Attempt>,
}

#[derive(Debug, Clone)]
struct Attempt {
    at: StepRef,
    direction: Direction,
    number: u16,
    before: BTreeMap<String, String>,
    ended: Option<usize>,
    ok: bool,
    changed: bool,
}

/// An attempt that was begun and is not reported as ended.
#[derive(Debug, Clone)]
pub struct Running {
    /// Which.
    pub key: StepKey,
    /// The term that ordered it.
    epoch: Epoch,
    highest: Epoch,
    /// Whether the effect is there.
    pub acted: bool,
    cancelled: bool,
}

/// What follows from a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing, or reports.
    Nothing,
    /// An attempt was begun.
    Work,
    /// The plan is to be fetched; then the offer is to be taken again.
    Fetch(PlanDigest),
    /// The session must end.
    End(String),
}

impl World {
    /// A fleet at rest: one database host, and the others for the application.
    pub fn new(hosts: usize, nature: Nature) -> Self {
        let agents = (0..hosts).map(|index| Agent::new(index, nature)).collect();
        Self {
            agents,
            ..Self::default()
        }
    }

    /// Whether everything that was reported is durable and nothing is held or runs.
    pub fn is_at_rest(&self) -> Result<(), String> {
        let busy = |agent: &Agent| {
            if let Some(running) = &agent.running {
                return Some(format!("{} runs", running.key));
            }
            let newest = agent.reports.len() as u64;
            if agent.acknowledged < newest {
                let (host, acknowledged) = (&agent.host, agent.acknowledged);
                return Some(format!(
                    "{host} has {newest} reports, acknowledged {acknowledged}"
                ));
            }
            let hold = agent.hold.as_ref()?;
            Some(format!("{} holds for {}", agent.host, hold.rollout))
        };
        self.agents.iter().find_map(busy).map_or(Ok(()), Err)
    }

    /// The effect of the attempt that runs on a host, if it is not there yet.
    pub fn act(&mut self, index: usize) {
        let agent = &mut self.agents[index];
        let Some(running) = agent.running.as_mut().filter(|running| !running.acted) else {
            return;
        };
        running.acted = true;
        let (key, cancelled) = (running.key.clone(), running.cancelled);
        let effect = Effect {
            key: key.clone(),
            epoch: running.epoch,
            highest: running.highest,
        };
        if !cancelled {
            agent.change(&key);
            self.ledger.push(effect);
        }
    }

    /// The attempt that runs on a host has ended, and is reported.
    pub fn finish(&mut self, index: usize) {
        self.agents[index].finish();
    }
}

impl Agent {
    fn new(index: usize, nature: Nature) -> Self {
        let role = if index == 0 { "db" } else { "app" };
        let host = format!("{role}-{index:02}").parse().expect("a host's name");
        let text = |text: &str| text.to_owned();
        let state = [("release shop", "v1"), ("service shop", "stopped")];
        let state = if role == "app" { &state[..] } else { &[] };
        let mut bytes = [0; 8];
        bytes[7] = u8::try_from(index).expect("a small fleet");
        Self {
            host,
            labels: BTreeMap::from([(text("role"), text(role))]),
            instance: InstanceId::from_random(bytes),
            boot: BootId::from_bytes(bytes),
            epoch: Epoch::NONE,
            reports: vec![],
            acknowledged: 0,
            hold: None,
            released: BTreeSet::new(),
            running: None,
            orders: vec![],
            state: state.iter().map(|(k, v)| (text(k), text(v))).collect(),
            failing: nature
                .failing
                .and_then(|(failing, action)| (failing == index).then_some(action)),
        }
    }

    /// A controller of this term may be obeyed, and is remembered; else why not (INV-4).
    pub fn admit(&mut self, epoch: Epoch) -> Result<(), String> {
        use lockstep_tests::planted::{Fault, is};
        if !epoch.is_current(self.epoch) && !is(Fault::AgentIgnoresEpoch) {
            let (host, seen) = (&self.host, self.epoch);
            return Err(format!(
                "{host} has obeyed {seen}, the controller has {epoch}"
            ));
        }
        if epoch.counter >= self.epoch.counter {
            self.epoch = epoch;
        }
        Ok(())
    }

    /// The controller says that reports up to this one are durable; else what it lost (INV-2).
    pub fn acknowledge(&mut self, number: u64) -> Result<(), String> {
        if number > self.reports.len() as u64 {
            let (host, made) = (&self.host, self.reports.len());
            return Err(format!(
                "{host} made {made} reports, {number} were acknowledged"
            ));
        }
        self.acknowledged = self.acknowledged.max(number);
        Ok(())
    }

    /// Asks for consent. `plan` is what the offer names, once it has been fetched.
    pub fn offer(
        &mut self,
        rollout: &RolloutId,
        digest: PlanDigest,
        plan: Option<&Arc<SealedPlan>>,
    ) -> Then {
        let declined = match &self.hold {
            Some(hold) if hold.rollout == *rollout && hold.plan.digest() == digest => {
                let consent = hold.consent;
                self.again(consent);
                return Then::Nothing;
            }
            Some(hold) => Some(format!("{} holds for {}", self.host, hold.rollout)),
            None if self.released.contains(rollout) => Some(format!("{rollout} has ended here")),
            None => None,
        };
        if let Some(reason) = declined {
            let refusals = vec![lockstep_proto::report::Refusal { at: None, reason }];
            let rollout = rollout.clone();
            self.reports
                .push(ReportBody::Declined { rollout, refusals });
            return Then::Nothing;
        }
        let Some(plan) = plan else {
            return Then::Fetch(digest);
        };
        self.hold = Some(Hold {
            rollout: rollout.clone(),
            plan: plan.clone(),
            consent: self.reports.len(),
            attempts: vec![],
        });
        self.reports.push(ReportBody::Consented {
            rollout: rollout.clone(),
            plan: digest,
            state: self.facts(),
            round: 0,
        });
        Then::Nothing
    }

    /// Takes an order. Its term has been admitted.
    pub fn order(&mut self, order: &Order, now: Timestamp) -> Result<Then, Failure> {
        let key = &order.key;
        let hold = self.hold.as_ref();
        let hold =
            hold.filter(|hold| hold.rollout == key.rollout && hold.plan.digest() == order.plan);
        let hold = hold.ok_or_else(|| refused("this host does not hold for it"))?;
        let same =
            |a: &&Attempt| (a.at, a.direction, a.number) == (key.at, key.direction, key.attempt);
        if let Some(attempt) = hold.attempts.iter().find(same) {
            if let Some(report) = attempt.ended {
                self.again(report);
            }
            return Ok(Then::Nothing);
        }
        if now > order.not_after {
            return Err(refused("the order came too late"));
        }
        let placed = hold.plan.plan().step(key.at);
        let placed = placed.filter(|placed| hold.plan.plan().targets(placed.target, &self.labels));
        let placed = placed.ok_or_else(|| refused("the step is not meant for this host"))?;
        if let Some(running) = &self.running {
            return Err(refused(&format!("{} still runs here", running.key)));
        }
        let undone = |at: StepRef| {
            let undo = |a: &Attempt| a.at == at && a.direction == Direction::Undo && a.ok;
            hold.attempts.iter().any(undo)
        };
        let begun = |a: &&Attempt| a.direction == Direction::Do;
        let mine = hold.attempts.iter().filter(begun);
        let before = if key.direction == Direction::Undo {
            let done = mine.clone().rfind(|a| a.at == key.at);
            match done.filter(|a| a.changed && !undone(a.at)) {
                Some(done) if placed.step.action.info().undo => done.before.clone(),
                _ => {
                    let key = key.clone();
                    self.report_end(key, ok(false, "there is nothing to undo"), vec![]);
                    return Ok(Then::Nothing);
                }
            }
        } else {
            if mine.clone().any(|a| a.at > key.at && !undone(a.at)) {
                return Err(refused("a later step was taken already"));
            }
            if mine
                .clone()
                .any(|a| a.at == key.at && a.ok && !undone(a.at))
            {
                return Err(refused("the step is done, and not undone"));
            }
            self.state.clone()
        };
        let attempt = Attempt {
            at: key.at,
            direction: key.direction,
            number: key.attempt,
            before,
            ended: None,
            ok: false,
            changed: true,
        };
        let hold = self.hold.as_mut().expect("it was just there");
        hold.attempts.push(attempt);
        self.reports.push(ReportBody::Started { key: key.clone() });
        self.running = Some(Running {
            key: key.clone(),
            epoch: order.epoch,
            highest: self.epoch,
            acted: false,
            cancelled: false,
        });
        Ok(Then::Work)
    }

    /// Whether the attempt was begun here before.
    pub fn knows(&self, key: &StepKey) -> bool {
        let same =
            |a: &Attempt| (a.at, a.direction, a.number) == (key.at, key.direction, key.attempt);
        let hold = self.hold.as_ref();
        hold.is_some_and(|hold| hold.rollout == key.rollout && hold.attempts.iter().any(same))
    }

    /// An order is not carried out, and this is why.
    pub fn refuse(&mut self, key: StepKey, failure: Failure) {
        self.report_end(key, StepOutcome::Failed(failure), vec![]);
    }

    /// People stopped the rollout: what runs ends without its effect, unless that is there.
    pub fn cancel(&mut self, rollout: &RolloutId) {
        let running = self.running.as_mut();
        let mine = |running: &&mut Running| running.key.rollout == *rollout && !running.acted;
        if let Some(running) = running.filter(mine) {
            running.cancelled = true;
        }
    }

    /// The rollout has ended.
    pub fn release(&mut self, rollout: &RolloutId) {
        self.released.insert(rollout.clone());
        // What runs comes to its end first, as on a host.
        if self.running.is_none() {
            self.hold.take_if(|hold| hold.rollout == *rollout);
        }
    }

    /// The host's state at the end of a rollback.
    pub fn survey(&mut self, rollout: &RolloutId) {
        let rollout = rollout.clone();
        let state = self.facts();
        self.reports.push(ReportBody::Surveyed { rollout, state });
    }

    /// A report that was acknowledged is made once more, for a controller that asks again.
    fn again(&mut self, index: usize) {
        if (index as u64) < self.acknowledged {
            let body = self.reports[index].clone();
            self.reports.push(body);
        }
    }

    fn change(&mut self, key: &StepKey) {
        let Some(hold) = &self.hold else {
            return;
        };
        let action = &hold
            .plan
            .plan()
            .step(key.at)
            .expect("it was ordered")
            .step
            .action;
        let name = match action.name() {
            "release.activate" => "release shop",
            "service.start" => "service shop",
            _ => return,
        };
        let value = match (key.direction, name) {
            (Direction::Do, "release shop") => "v2".to_owned(),
            (Direction::Do, _) => "running".to_owned(),
            _ => {
                let mine = |a: &&Attempt| a.at == key.at && a.direction == Direction::Undo;
                let attempt = hold.attempts.iter().rfind(mine);
                attempt.expect("it runs").before[name].clone()
            }
        };
        self.state.insert(name.to_owned(), value);
    }

    fn finish(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        let Running { key, cancelled, .. } = running;
        let plan = self.hold.as_ref().map(|hold| hold.plan.clone());
        let plan = plan.expect("a host that runs a step holds itself");
        let action = &plan
            .plan()
            .step(key.at)
            .expect("it was ordered")
            .step
            .action;
        let fails = key.direction == Direction::Do && self.failing == Some(action.name());
        let outcome = if cancelled {
            failed(Cause::Cancelled, "stopped, as people asked for")
        } else if fails {
            failed(Cause::Step, "this host always fails here")
        } else {
            ok(action.info().class != Class::Observing, "done")
        };
        let facts = match (action.name(), key.direction) {
            ("postgres.backup", Direction::Do) => vec![Fact::Backup {
                database: "shop".into(),
                id: "b1".into(),
                digest: Digest::of(b"backup"),
                size: 1 << 20,
                taken_at: Timestamp(1),
                fence: None,
            }],
            ("postgres.verify_backup", Direction::Do) => vec![Fact::BackupVerified {
                database: "shop".into(),
                id: "b1".into(),
                digest: Digest::of(b"backup"),
                fence: None,
                level: Level::Equal,
                taken_at: Some(Timestamp(1)),
            }],
            _ => vec![],
        };
        self.report_end(key.clone(), outcome, facts);
        if self.released.contains(&key.rollout) {
            self.hold = None;
        }
    }

    fn report_end(&mut self, key: StepKey, outcome: StepOutcome, facts: Vec<Fact>) {
        let index = self.reports.len();
        let (ok, changed) = match &outcome {
            StepOutcome::Ok { changed, .. } => (true, *changed),
            StepOutcome::Failed(failure) => (false, failure.changed),
            StepOutcome::Unknown { .. } => (false, true),
        };
        let hold = self
            .hold
            .as_mut()
            .filter(|hold| hold.rollout == key.rollout);
        if let Some(hold) = hold {
            let mine = |a: &&mut Attempt| {
                (a.at, a.direction, a.number) == (key.at, key.direction, key.attempt)
            };
            if let Some(attempt) = hold.attempts.iter_mut().find(mine) {
                (attempt.ended, attempt.ok, attempt.changed) = (Some(index), ok, changed);
            } else {
                hold.attempts.push(Attempt {
                    at: key.at,
                    direction: key.direction,
                    number: key.attempt,
                    before: BTreeMap::new(),
                    ended: Some(index),
                    ok,
                    changed: false,
                });
            }
        }
        self.reports.push(ReportBody::Finished {
            key,
            outcome,
            facts,
            signatures: vec![],
            took: Period(1),
        });
    }

    fn facts(&self) -> Vec<Fact> {
        let fact = |(name, text): (&String, &String)| Fact::State {
            name: name.clone(),
            digest: Digest::of(text.as_bytes()),
            text: text.clone(),
        };
        self.state.iter().map(fact).collect()
    }
}

fn ok(changed: bool, summary: &str) -> StepOutcome {
    StepOutcome::Ok {
        changed,
        summary: summary.to_owned(),
    }
}

fn failure(cause: Cause, message: &str) -> Failure {
    Failure {
        cause,
        message: message.to_owned(),
        hint: None,
        last_lines: vec![],
        changed: cause == Cause::Step,
    }
}

fn failed(cause: Cause, message: &str) -> StepOutcome {
    StepOutcome::Failed(failure(cause, message))
}

fn refused(message: &str) -> Failure {
    failure(Cause::Refused, message)
}
