//! People at the command line: they submit, watch, and decide where a person must.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use lockstep::simulation::{Controller, Disk};
use lockstep_core::{Call, Summary};
use lockstep_proto::ids::RolloutId;
use lockstep_proto::seal::{SealedPlan, seal};
use tokio::time::{Duration, timeout};

use crate::check::HostState;
use crate::dice::Dice;
use crate::plans;
use crate::world::World;

/// A promise's ten seconds, and what it takes to see it.
const AFTER_DEADLINE: u64 = 12_000;

/// What a halted rollout names as its cause.
const CAUSES: &[&str] = &[
    "agent lost",
    "timed out",
    "step failed",
    "check unmet",
    "refuse",
    "unknown",
    "deadline",
];

/// Why a host refuses a rollout for the sake of another one.
const HELD: &str = "this host holds for";

/// Hosts let go of a cancelled rollout by then: steps have 30 s, and their processes some more.
const MOST_REFUSED: u32 = 20;

/// Who does not hear from the controller asks again.
const PATIENCE: Duration = Duration::from_secs(2);

/// A rollout that somebody watches.
struct Watched {
    id: RolloutId,
    plan: Arc<SealedPlan>,
    /// The beginning of the time that it has.
    since: u64,
    /// When a person acts next, once something waits for a person.
    acts_at: Option<u64>,
    /// What people have tried since it halted.
    tries: u32,
    /// Whether a person has asked for its end.
    cancelled: bool,
    /// When that was answered.
    cancelled_at: Option<u64>,
}

/// People at the command line.
pub(crate) struct Operator {
    dice: Dice,
    watched: Option<Watched>,
    serial: u64,
    next_look: u64,
    /// Since when the controller answers.
    answers_since: Option<u64>,
    given_up: bool,
    /// Whether one more rollout is to be submitted.
    pending: bool,
    /// Whether people leave rollouts alone.
    calm: bool,
    /// How often it was refused then.
    refused: u32,
    /// How rollouts ended.
    pub(crate) ends: BTreeMap<String, u64>,
}

impl Operator {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            dice: Dice::new(seed, 4),
            watched: None,
            serial: 0,
            next_look: 0,
            answers_since: None,
            given_up: false,
            pending: false,
            calm: false,
            refused: 0,
            ends: BTreeMap::new(),
        }
    }

    /// Whether nothing is waited for.
    pub(crate) fn is_idle(&self) -> bool {
        self.given_up || (self.watched.is_none() && self.serial > 0 && !self.pending)
    }

    /// One more rollout, in which nobody intervenes.
    pub(crate) fn once_more(&mut self) {
        (self.pending, self.calm) = (true, true);
    }

    pub(crate) fn give_up(&mut self) {
        self.given_up = true;
    }

    /// What people do now; `more`: whether they begin another rollout.
    pub(crate) async fn act(&mut self, world: &Rc<World>, disks: &mut [Disk], more: bool) {
        let now = world.millis();
        if now < self.next_look || self.given_up {
            return;
        }
        self.next_look = now + 500;
        let control = world.control.borrow().clone();
        let Some(control) = control.filter(|it| it.process.is_alive() && !it.process.is_frozen())
        else {
            self.answers_since = None;
            return;
        };
        let controller = control.handle.clone();
        match self.watched.take() {
            Some(watched) => self.watched = self.watch(world, &controller, watched).await,
            None if more || self.serial == 0 || self.pending => {
                // With a host away nothing begins: once in a while that is seen too.
                let up = controller.read(|c| c.hosts().filter(|(_, info)| info.connected).count());
                let up = timeout(PATIENCE, up).await.ok().flatten();
                if up != Some(world.hosts.len()) && !self.dice.percent(3) {
                    return;
                }
                let disk = disks.last_mut().expect("there is a disk");
                self.watched = self.submit(world, &controller, disk).await;
            }
            None => {}
        }
    }

    async fn submit(
        &mut self,
        world: &Rc<World>,
        controller: &Controller,
        disk: &mut Disk,
    ) -> Option<Watched> {
        self.serial += 1;
        let dice = Dice::new(self.dice.roll(u64::MAX), self.serial);
        let plan = seal(plans::plan(&dice, self.serial)).expect("a small plan");
        let plan = Arc::new(plan);
        let bytes = self.serial.to_be_bytes();
        let id = RolloutId::from_random(bytes[2..].try_into().expect("6 bytes"));
        for index in world.indexes.borrow_mut().iter_mut() {
            index.plan(&id, Arc::clone(&plan));
        }
        disk.store(Arc::clone(&plan));
        for host in &world.hosts {
            let state = host.state.borrow().clone();
            *host.before.borrow_mut() = (None, state);
        }
        let answer = timeout(PATIENCE, controller.submit(&plan, &id)).await;
        match &answer {
            Ok(Some(Err(refused))) => {
                world.say(&format!("{id} is refused: {refused}"));
                return None;
            }
            Ok(Some(Ok(_))) => world.say(&format!("{id} is submitted")),
            // It may have been taken all the same.
            Ok(None) | Err(_) => world.say(&format!("{id} was submitted, without an answer")),
        }
        self.pending = false;
        Some(Watched {
            id,
            plan,
            since: world.millis(),
            acts_at: None,
            tries: 0,
            cancelled: false,
            cancelled_at: None,
        })
    }

    async fn watch(
        &mut self,
        world: &Rc<World>,
        controller: &Controller,
        mut watched: Watched,
    ) -> Option<Watched> {
        let id = watched.id.clone();
        let asked = id.clone();
        let summary = timeout(PATIENCE, controller.read(move |c| c.summary(&asked))).await;
        let now = world.millis();
        let Ok(Some(summary)) = summary else {
            self.answers_since = None;
            return Some(watched);
        };
        let answers_since = *self.answers_since.get_or_insert(now);
        let Some(summary) = summary else {
            world.say(&format!("{id} was never taken"));
            return None;
        };
        if summary.state == "halted" {
            check_halted(world, &summary);
        }
        if summary.ended && !summary.open {
            self.ended(world, &watched, &summary);
            return None;
        }
        // Cancelling waits for no host.
        if let Some(at) = watched.cancelled_at
            && !summary.ended
            && now > at.max(answers_since) + AFTER_DEADLINE
        {
            let ms = now - at;
            world.violated(format!(
                "INV-8: {id} was cancelled {ms} ms ago, and goes on"
            ));
            self.give_up();
        }
        let until = watched.since + watched.plan.plan().deadline.0 + AFTER_DEADLINE;
        if !summary.ended && now > until && now > answers_since + AFTER_DEADLINE {
            world.violated(format!(
                "INV-8: {id} is {} {} s after its deadline",
                summary.state,
                (now - until) / 1000
            ));
            self.give_up();
        }
        self.decide(world, controller, &mut watched, &summary, now)
            .await;
        Some(watched)
    }

    fn ended(&mut self, world: &Rc<World>, watched: &Watched, summary: &Summary) {
        let state = summary.state;
        world.say(&format!(
            "{} has ended: {state} {}",
            watched.id, summary.reason
        ));
        *self.ends.entry(state.to_owned()).or_default() += 1;
        // What nobody consented to ends by itself; but not where nothing is in its way.
        let mut by_itself = summary.reason.starts_with("nothing was done");
        if self.calm {
            // Hosts may still be at a step of a rollout that was cancelled, for as long as it has.
            self.pending =
                by_itself && summary.reason.contains(HELD) && self.refused < MOST_REFUSED;
            (by_itself, self.refused) = (self.pending, self.refused + 1);
            self.next_look = world.millis() + 5_000;
        }
        if state == "cancelled" && !watched.cancelled && !by_itself {
            let (id, reason) = (&watched.id, &summary.reason);
            let what = if self.refused > MOST_REFUSED {
                "a host does not let go of a rollout that has ended"
            } else {
                "it is cancelled, and nobody asked for it"
            };
            world.violated(format!("INV-8: {id}: {what}: {reason}"));
        }
        let hosts: Vec<HostState<'_>> = world
            .hosts
            .iter()
            .map(|host| HostState {
                host: &host.name,
                role: host.role,
                before: host.before.borrow().1.clone(),
                now: host.state.borrow().clone(),
            })
            .collect();
        let indexes = world.indexes.borrow();
        let index = indexes.last().expect("there is a disk");
        let broken = index.check_end(&watched.id, state, &hosts);
        drop(indexes);
        for what in broken {
            world.violated(what);
        }
    }

    /// Where a person must decide, one does, after some seconds; now and then one intervenes.
    async fn decide(
        &mut self,
        world: &Rc<World>,
        controller: &Controller,
        watched: &mut Watched,
        summary: &Summary,
        now: u64,
    ) {
        let waits = summary.ended || summary.state == "paused";
        if !waits {
            watched.acts_at = None;
            let rollout = watched.id.clone();
            let reason = "as the dice say".to_owned();
            let call = match self.dice.roll(1200) {
                _ if self.calm => return,
                0..=2 => Call::Pause { rollout },
                3 => Call::Cancel { rollout, reason },
                4 | 5 => Call::RollBack { rollout, reason },
                _ => return,
            };
            if !matches!(call, Call::Pause { .. }) {
                watched.since = now;
            }
            let cancels = matches!(call, Call::Cancel { .. });
            let done = self.call(world, controller, call).await;
            if cancels {
                watched.cancelled = true;
                watched.cancelled_at = done.then(|| world.millis());
            }
            return;
        }
        let delay = self.dice.between(1_000, 6_000);
        if *watched.acts_at.get_or_insert(now + delay) > now {
            return;
        }
        watched.acts_at = None;
        let rollout = watched.id.clone();
        if let Some(call) = resolve(world, &rollout).filter(|_| self.dice.percent(70)) {
            self.call(world, controller, call).await;
            return;
        }
        watched.tries += 1;
        let reason = "as the dice say".to_owned();
        let call = match (summary.state, watched.tries) {
            ("paused", _) | (_, 1..=2) => resume(rollout, self.dice.percent(50)),
            (_, 3) => Call::RollBack { rollout, reason },
            _ => Call::Close { rollout, reason },
        };
        watched.since = now;
        self.call(world, controller, call).await;
    }

    /// Calls; answers whether it was done, as far as was heard.
    async fn call(&self, world: &Rc<World>, controller: &Controller, call: Call) -> bool {
        let shown = format!("{call:?}");
        let name = shown.split(' ').next().unwrap_or_default();
        let answer = timeout(PATIENCE, controller.call(call)).await;
        let said = match answer {
            Ok(Some(Ok(_))) => "done".to_owned(),
            Ok(Some(Err(refused))) => format!("refused: {refused}"),
            _ => "no answer".to_owned(),
        };
        world.say(&format!("an operator calls {name}: {said}"));
        said == "done"
    }
}

/// What a person says who looks at a host where nobody knows what was done: what is so.
fn resolve(world: &World, rollout: &RolloutId) -> Option<Call> {
    let indexes = world.indexes.borrow();
    let key = indexes
        .last()
        .expect("there is a disk")
        .unsettled(rollout)?;
    let (host, _) = world.host(&key.host);
    let runs = world
        .steps(host)
        .iter()
        .any(|step| step.what == key.to_string());
    (!runs).then(|| Call::Resolve {
        rollout: key.rollout.clone(),
        host: key.host.clone(),
        at: key.at,
        done: world.ledger.has_effect(&key),
        reason: "seen".into(),
        signed: None,
    })
}

/// INV-8: who reads that a rollout is halted reads where, and why.
fn check_halted(world: &World, summary: &Summary) {
    let reason = &summary.reason;
    let host = world
        .hosts
        .iter()
        .any(|host| reason.contains(host.name.as_str()));
    let cause = CAUSES.iter().any(|cause| reason.contains(cause));
    if !host || !cause {
        let id = &summary.rollout;
        world.violated(format!(
            "INV-8: {id} is halted without host and cause: {reason}"
        ));
    }
}

fn resume(rollout: RolloutId, failed: bool) -> Call {
    if failed {
        Call::ResumeFailed { rollout }
    } else {
        Call::Resume { rollout }
    }
}
