//! One run of a step on a lab's host, from consent to release, with the test as the controller:
//! it orders again what is not answered, gives another attempt where the report says that one is
//! safe, and takes every report once, in the order of its number.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use lockstep_proto::ids::{Direction, Epoch, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::report::{Cause, Report, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::wire::agent_v1::down;
use lockstep_tests::played::Session;
use tokio::time::{Instant, timeout, timeout_at};

use super::lab::{HOST, Lab};

/// A run that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(90);

/// How many attempts a controller gives: one is killed, the next must do.
const ATTEMPTS: u16 = 3;

/// A release that an agent has heard is done by then.
const RELEASED_WITHIN: Duration = Duration::from_secs(20);

/// The agent comes to the points after that by then, and is killed there if it has to be.
const LAST_POINTS: Duration = Duration::from_secs(2);

/// Between two looks at the host.
const LOOK: Duration = Duration::from_millis(5);

const EPOCH: Epoch = Epoch { counter: 1, id: 77 };

/// How a step ended in one direction, over all of its attempts.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) outcome: StepOutcome,
    pub(super) facts: Vec<Fact>,
    pub(super) attempts: u16,
}

/// What a run has seen beside its outcomes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// How often the agent ended and was started again.
    pub(super) restarts: u32,
    /// Results that were lost, or that came twice or out of order.
    pub(super) lost: Vec<String>,
}

/// A run.
pub(super) struct Play<'a> {
    pub(super) lab: &'a mut Lab,
    plan: &'a SealedPlan,
    bindings: Vec<Binding>,
    acknowledged: u64,
    session: Option<Session>,
    pending: Pending,
    pub(super) seen: Seen,
    until: Instant,
}

/// What the controller waits for, and says again to an agent that comes back.
#[derive(Debug, Clone)]
enum Pending {
    Consent,
    Order(StepKey),
    Release,
}

impl<'a> Play<'a> {
    /// Starts the agent of a host that has none.
    pub(super) fn begin(
        lab: &'a mut Lab,
        plan: &'a SealedPlan,
        bindings: Vec<Binding>,
    ) -> Result<Self> {
        lab.controller.keep(plan);
        lab.controller.forget_waiting();
        lab.start_agent()?;
        Ok(Self {
            lab,
            plan,
            bindings,
            acknowledged: 0,
            session: None,
            pending: Pending::Consent,
            seen: Seen::default(),
            until: Instant::now() + PATIENCE,
        })
    }

    pub(super) fn key(&self, step: u16, direction: Direction, attempt: u16) -> StepKey {
        StepKey {
            rollout: self.lab.rollout(),
            host: HOST.parse().expect("a host's name"),
            at: StepRef { phase: 0, step },
            direction,
            attempt,
        }
    }

    /// Offers the plan and waits for the consent.
    pub(super) async fn consent(&mut self) -> Result<()> {
        self.expect(Pending::Consent).await?;
        match self.report().await? {
            ReportBody::Consented { .. } => Ok(()),
            ReportBody::Declined { refusals, .. } => bail!("no consent: {refusals:?}"),
            other => bail!("{other:?} is no consent"),
        }
    }

    /// Has a step done, or undone, with as many attempts as that takes; `between` is called before
    /// each attempt after the first.
    pub(super) async fn step(
        &mut self,
        step: u16,
        direction: Direction,
        mut between: impl FnMut(&Lab) -> Result<()>,
    ) -> Result<Ended> {
        let mut attempt = 1;
        loop {
            let key = self.key(step, direction, attempt);
            self.expect(Pending::Order(key.clone())).await?;
            let (outcome, facts) = self.finished(&key).await?;
            let again = matches!(&outcome, StepOutcome::Failed(failure)
                if failure.cause == Cause::Interrupted);
            if again && attempt < ATTEMPTS {
                between(self.lab)?;
                attempt += 1;
                continue;
            }
            for fact in &facts {
                self.bindings.push(Binding {
                    origin: key.clone(),
                    fact: fact.clone(),
                    signature: None,
                });
            }
            return Ok(Ended {
                outcome,
                facts,
                attempts: attempt,
            });
        }
    }

    /// The bindings that later steps get.
    pub(super) fn bindings(&self) -> Vec<Binding> {
        self.bindings.clone()
    }

    async fn finished(&mut self, key: &StepKey) -> Result<(StepOutcome, Vec<Fact>)> {
        let mut started = 0;
        loop {
            match self.report().await? {
                ReportBody::Finished {
                    key: of,
                    outcome,
                    facts,
                    ..
                } if of == *key => return Ok((outcome, facts)),
                ReportBody::Started { key: of } if of == *key => started += 1,
                other => bail!("{other:?} instead of the outcome of {key}"),
            }
            if started > 1 {
                self.seen.lost.push(format!("{key} was started twice"));
            }
        }
    }

    /// Ends the rollout; returns when the agent has forgotten it.
    pub(super) async fn release(&mut self) -> Result<()> {
        self.expect(Pending::Release).await?;
        let steps = self.lab.path("state/steps");
        let plans = self.lab.path("state/plans");
        let (began, mut heard) = (Instant::now(), None);
        let last_points = |lab: &Lab| lab.awaits_kill("agent") && began.elapsed() < LAST_POINTS;
        while has_entries(&steps, "") || has_entries(&plans, ".steps.json") || last_points(self.lab)
        {
            if let Ok(event) = timeout(LOOK, self.lab.next_event()).await {
                if matches!(event, Event::Ended(_)) {
                    heard = None;
                }
                self.handle(event).await?;
            }
            if self.session.is_some() {
                let heard = heard.get_or_insert_with(Instant::now);
                if heard.elapsed() > RELEASED_WITHIN {
                    // What is left is a matter of the comparison.
                    return Ok(());
                }
            }
            if Instant::now() > self.until {
                bail!("stuck: the rollout is not released");
            }
        }
        Ok(())
    }

    /// From now on this is what the controller wants.
    async fn expect(&mut self, pending: Pending) -> Result<()> {
        self.pending = pending;
        self.say().await;
        Ok(())
    }

    /// Says what is pending. An agent that is gone is told again when it is back.
    async fn say(&mut self) {
        let Some(session) = &self.session else {
            return;
        };
        let rollout = self.lab.rollout();
        match &self.pending {
            Pending::Consent => session.offer(&rollout, self.plan, false).await,
            Pending::Order(key) => {
                let bindings = self.bindings.clone();
                session.order_with(self.plan, key, bindings).await;
            }
            Pending::Release => session.release(&rollout).await,
        }
    }

    async fn welcome(&mut self, mut session: Session) -> Result<()> {
        if session.hello.last_report < self.acknowledged {
            let last = session.hello.last_report;
            let acknowledged = self.acknowledged;
            self.seen.lost.push(format!(
                "the agent knows {last} reports, and {acknowledged} were acknowledged"
            ));
            bail!("the agent has lost reports");
        }
        session.welcome(EPOCH, self.acknowledged, 0).await;
        self.session = Some(session);
        self.say().await;
        Ok(())
    }

    /// The agent has ended: it is started again.
    fn again(&mut self, ended: &str) -> Result<()> {
        self.seen.restarts += 1;
        if !ended.contains("SIGKILL") {
            bail!("the agent ended by itself: {ended}");
        }
        if self.seen.restarts > 5 {
            bail!("stuck: the agent is killed again and again");
        }
        self.session = None;
        self.lab.controller.forget_waiting();
        self.lab.start_agent()
    }

    /// The host is restarted, agent and all.
    pub(super) async fn reboot(&mut self) -> Result<()> {
        self.lab.reboot().await?;
        self.session = None;
        self.lab.controller.forget_waiting();
        self.lab.start_agent()
    }

    /// The agent is killed from outside, and started again.
    pub(super) async fn restart(&mut self) -> Result<()> {
        self.lab.kill_agent().await?;
        self.session = None;
        self.lab.controller.forget_waiting();
        self.lab.start_agent()
    }

    /// Orders a step and returns once a file is there that a process of it has written.
    pub(super) async fn order_until(
        &mut self,
        key: &StepKey,
        there: impl Fn(&Lab) -> bool,
    ) -> Result<()> {
        self.expect(Pending::Order(key.clone())).await?;
        self.wait_until(there).await
    }

    /// Goes on, without taking reports, until something is so.
    pub(super) async fn wait_until(&mut self, there: impl Fn(&Lab) -> bool) -> Result<()> {
        while !there(self.lab) {
            if let Ok(event) = timeout(LOOK, self.lab.next_event()).await {
                self.handle(event).await?;
            }
            if Instant::now() > self.until {
                bail!("stuck: the step process does not come to its point");
            }
        }
        Ok(())
    }

    async fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Ended(how) => self.again(&how),
            Event::Dialled(session) => self.welcome(*session).await,
            Event::Report(_) => Ok(()),
        }
    }

    /// The next report, acknowledged; the agent is started again meanwhile as often as it ends.
    async fn report(&mut self) -> Result<ReportBody> {
        loop {
            let Some(report) = self.next().await? else {
                continue;
            };
            if report.number != self.acknowledged + 1 {
                let number = report.number;
                let after = self.acknowledged;
                self.seen
                    .lost
                    .push(format!("report {number} came after report {after}"));
                if number <= after {
                    continue;
                }
            }
            self.acknowledged = report.number;
            if let Some(session) = &self.session {
                let acknowledged = down::Message::Acknowledged(report.number);
                session.send(acknowledged).await;
            }
            return Ok(report.body);
        }
    }

    async fn next(&mut self) -> Result<Option<Report>> {
        let lab = &mut *self.lab;
        let session = &mut self.session;
        let report = async {
            match session {
                Some(session) => session.coming().await,
                None => std::future::pending().await,
            }
        };
        // Borrows of the lab's halves.
        let event = async {
            tokio::select! {
                biased;
                report = report => Event::Report(report.map(Box::new)),
                event = lab.next_event() => event,
            }
        };
        match timeout_at(self.until, event).await {
            Err(_) => bail!("stuck: waiting for {:?}", self.pending),
            Ok(Event::Report(Some(report))) => Ok(Some(*report)),
            // The agent has gone, or dials again.
            Ok(Event::Report(None)) => {
                self.session = None;
                Ok(None)
            }
            Ok(event) => self.handle(event).await.map(|()| None),
        }
    }
}

/// Whether a directory has entries whose names end so.
fn has_entries(dir: &Path, ending: &str) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().ends_with(ending))
}

/// What can happen while a report is awaited.
pub(super) enum Event {
    Report(Option<Box<Report>>),
    Ended(String),
    Dialled(Box<Session>),
}
