//! The world: hosts with their effects, processes, network and clock, as both sides see it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;

use lockstep::simulation as controller;
use lockstep_agent::simulation::{self as agent, Agent, Arrived, Local, Seen, StepEnd, Stream};
use lockstep_core::{Entry, Record};
use lockstep_proto::action::Action;
use lockstep_proto::ids::{Digest, HostId, RolloutId, StepKey};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_tests::power::Disk;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::{Duration, Instant, sleep};

use crate::check::{Index, Ledger};
use crate::dice::Dice;
use crate::net::{self, Way};
use crate::process::{Process, Processes, Running};

/// The wall clock at the beginning, in milliseconds since 1970.
const BEGAN: u64 = 1_790_000_000_000;

/// A host and what is on it.
pub(crate) struct Host {
    pub(crate) name: HostId,
    pub(crate) role: &'static str,
    pub(crate) agent: Agent,
    pub(crate) dir: PathBuf,
    pub(crate) disk: RefCell<Disk>,
    pub(crate) daemon: RefCell<Option<Rc<Process>>>,
    pub(crate) way: Rc<Way>,
    /// What its effects have made: services, links, marks.
    pub(crate) state: RefCell<BTreeMap<String, String>>,
    /// The state when the host was first asked for it by a rollout, and by which; until then when
    /// the current one was submitted. Up to then steps of one that was cancelled may run.
    pub(crate) before: RefCell<(Option<RolloutId>, BTreeMap<String, String>)>,
    /// Restarts that were made, by attempt.
    receipts: RefCell<BTreeSet<StepKey>>,
    /// How far its wall clock is off, in milliseconds.
    pub(crate) clock: Cell<i64>,
    /// Messages that are handed on late or again.
    pub(crate) disorder: Cell<u32>,
    /// Whether the first of them is still to come.
    pub(crate) in_order: Cell<bool>,
    /// The next order is handed on after it is worth anything.
    pub(crate) too_late: Cell<bool>,
    /// A controller that it dials once, wherever the address leads.
    pub(crate) detour: RefCell<Option<Rc<Control>>>,
    /// The next step process is killed after so many writes.
    pub(crate) next_step_dies: Cell<Option<u64>>,
    /// Delays on its way, and what its processes draw: by host, so that what happens at one instant
    /// on several of them may come in any order.
    pub(crate) net: Rc<Dice>,
    /// How long its effects take, and which fail.
    effects: Dice,
}

impl Host {
    pub(crate) fn new(
        name: HostId,
        role: &'static str,
        agent: Agent,
        dir: PathBuf,
        disk: Disk,
        seed: u64,
    ) -> Self {
        let own = seed
            ^ name
                .as_str()
                .bytes()
                .fold(0, |all, byte| all * 31 + u64::from(byte));
        Self {
            net: Rc::new(Dice::new(own, 5)),
            effects: Dice::new(own, 6),
            name,
            role,
            agent,
            dir,
            disk: RefCell::new(disk),
            daemon: RefCell::default(),
            way: Rc::default(),
            state: RefCell::default(),
            before: RefCell::default(),
            receipts: RefCell::default(),
            clock: Cell::default(),
            disorder: Cell::default(),
            in_order: Cell::default(),
            too_late: Cell::default(),
            detour: RefCell::default(),
            next_step_dies: Cell::default(),
        }
    }
}

/// Whoever has the controller's address.
pub(crate) struct Control {
    pub(crate) process: Rc<Process>,
    pub(crate) connections: mpsc::Sender<controller::Dialled>,
    pub(crate) handle: controller::Controller,
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Everything.
pub(crate) struct World {
    pub(crate) hosts: Vec<Host>,
    pub(crate) processes: Rc<Processes>,
    pub(crate) control: RefCell<Option<Rc<Control>>>,
    /// What is durable at each controller's disk.
    pub(crate) indexes: RefCell<Vec<Index>>,
    /// The disk of each controller process.
    pub(crate) disks: RefCell<BTreeMap<i32, usize>>,
    pub(crate) ledger: Ledger,
    /// A controller that does not give way.
    pub(crate) stubborn: Cell<Option<i32>>,
    /// Faults that took effect.
    pub(crate) happened: Cell<usize>,
    /// Faults that were tried.
    pub(crate) tried: Cell<usize>,
    pub(crate) net: Rc<Dice>,
    began: Instant,
    tasks: mpsc::UnboundedSender<Task>,
    log: RefCell<Vec<String>>,
}

impl World {
    pub(crate) fn new(hosts: Vec<Host>, seed: u64, tasks: mpsc::UnboundedSender<Task>) -> Self {
        Self {
            hosts,
            processes: Rc::default(),
            control: RefCell::default(),
            indexes: RefCell::new(vec![Index::default()]),
            disks: RefCell::default(),
            ledger: Ledger::default(),
            stubborn: Cell::default(),
            happened: Cell::default(),
            tried: Cell::default(),
            net: Rc::new(Dice::new(seed, 1)),
            began: Instant::now(),
            tasks,
            log: RefCell::default(),
        }
    }

    /// Milliseconds since the beginning.
    pub(crate) fn millis(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).expect("a short time")
    }

    /// Writes the event log.
    pub(crate) fn say(&self, what: &str) {
        let at = self.millis();
        self.log
            .borrow_mut()
            .push(format!("{:>5}.{:03} {what}", at / 1000, at % 1000));
    }

    /// How many events there have been.
    pub(crate) fn events(&self) -> usize {
        self.log.borrow().len()
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        self.log.take()
    }

    /// A fault takes effect.
    pub(crate) fn happens(&self) {
        self.happened.update(|count| count + 1);
    }

    /// A promise is broken.
    pub(crate) fn violated(&self, what: String) {
        self.say(&format!("VIOLATED {what}"));
        self.ledger.violations.borrow_mut().push(what);
    }

    /// Runs something outside of all processes.
    pub(crate) fn spawn_task(&self, task: impl Future<Output = ()> + 'static) {
        let sent = self.tasks.send(Box::pin(task));
        sent.unwrap_or_else(|_| unreachable!("the world's own tasks run as long as it is there"));
    }

    /// Starts a process.
    pub(crate) fn start(&self, process: &Rc<Process>, local: LocalSet) {
        self.spawn_task(Running {
            processes: self.processes.clone(),
            process: process.clone(),
            local,
            timer: None,
        });
    }

    /// Starts the agent of a host.
    pub(crate) fn start_daemon(&self, index: usize) {
        let host = &self.hosts[index];
        if self.is_up(index) {
            return;
        }
        let process = self
            .processes
            .make(Some(index), format!("{} agent", host.name));
        *host.daemon.borrow_mut() = Some(process.clone());
        let local = LocalSet::new();
        let (agent, own) = (host.agent.clone(), process.clone());
        local.spawn_local(async move {
            let ended = agent.run().await;
            *own.ended.borrow_mut() = Some(format!("{ended:?}"));
            own.kill();
        });
        self.say(&format!("{} agent starts", host.name));
        self.start(&process, local);
    }

    pub(crate) fn host(&self, name: &HostId) -> (usize, &Host) {
        let mut hosts = self.hosts.iter().enumerate();
        hosts
            .find(|(_, host)| host.name == *name)
            .expect("a host of the world")
    }

    fn here(&self) -> (&Host, Rc<Process>) {
        let process = self.processes.current().expect("somebody asks");
        let host = process.host.expect("a process of a host");
        (&self.hosts[host], process)
    }

    /// Whether a host's agent runs.
    pub(crate) fn is_up(&self, host: usize) -> bool {
        let daemon = self.hosts[host].daemon.borrow();
        daemon.as_ref().is_some_and(|daemon| daemon.is_alive())
    }

    /// The steps that run on a host.
    pub(crate) fn steps(&self, host: usize) -> Vec<Rc<Process>> {
        let daemon = self.hosts[host].daemon.borrow().clone();
        let mut there = self.processes.alive_on(host);
        there.retain(|it| daemon.as_ref().is_none_or(|daemon| daemon.pid != it.pid));
        there
    }

    /// The first host from this one on where a step runs; itself if there is none.
    pub(crate) fn busy(&self, host: usize) -> usize {
        let count = self.hosts.len();
        let mut hosts = (host..host + count).map(|it| it % count);
        hosts.find(|it| !self.steps(*it).is_empty()).unwrap_or(host)
    }

    /// A point in the code of a process.
    pub(crate) fn reached(&self, point: &str) {
        if let Some(process) = self.processes.current() {
            process.reached(|| {
                self.happens();
                self.say(&format!("{} killed at `{point}`", process.what));
            });
        }
    }

    /// Makes a change on a host, at this instant.
    fn change(&self, host: &Host, key: &StepKey, name: String, value: Option<String>) {
        let shown = value.as_deref().unwrap_or("nothing");
        self.say(&format!("{key} makes {name} {shown}"));
        let mut state = host.state.borrow_mut();
        match value {
            Some(value) => _ = state.insert(name, value),
            None => _ = state.remove(&name),
        }
        drop(state);
        self.check_effect(key);
    }

    fn labels(&self) -> Vec<(HostId, &'static str)> {
        let hosts = self.hosts.iter();
        hosts.map(|host| (host.name.clone(), host.role)).collect()
    }

    fn check_effect(&self, key: &StepKey) {
        let indexes = self.indexes.borrow();
        let labels = self.labels();
        let mut broken = self.ledger.effect(key, &indexes, &labels);
        drop(indexes);
        if !self.host(&key.host).1.agent.intends(key) {
            broken.push(format!(
                "INV-2: {key} acts, and its host has not written the intent"
            ));
        }
        for what in broken {
            self.violated(what);
        }
    }

    /// What an action makes, and what it makes of it.
    fn target(action: &Action) -> Option<(String, String)> {
        let args = action.args();
        let text = |name: &str| args[name].as_str().unwrap_or_default().to_owned();
        match action {
            Action::ServiceStop(_) => {
                Some((format!("service {}", text("service")), "stopped".into()))
            }
            Action::ServiceStart(_) => {
                Some((format!("service {}", text("service")), "active".into()))
            }
            Action::ReleaseActivate(_) => Some((format!("link {}", text("app")), text("release"))),
            _ => None,
        }
    }

    async fn work(&self, host: usize, most: u64) {
        let time = self.hosts[host].effects.between(1, most);
        sleep(Duration::from_millis(time)).await;
    }
}

fn failure(cause: Cause, message: &str, changed: bool) -> Failure {
    Failure {
        cause,
        message: message.into(),
        hint: None,
        last_lines: vec![],
        changed,
    }
}

/// The handle that is given to both sides.
pub(crate) struct Shared(pub Rc<World>);

impl agent::World for Shared {
    fn wall_clock(&self) -> u64 {
        let host = self.0.processes.current().and_then(|process| process.host);
        let off = host.map_or(0, |host| self.0.hosts[host].clock.get());
        (BEGAN + self.0.millis()).saturating_add_signed(off)
    }

    fn random(&self, below: u64) -> u64 {
        self.0.here().0.net.roll(below)
    }

    fn process(&self) -> i32 {
        self.0.here().1.pid
    }

    fn started(&self, pid: i32) -> Option<u64> {
        let process = self.0.processes.find(pid);
        let process = process.filter(|process| process.is_alive());
        process.map(|process| process.started)
    }

    fn kill(&self, pid: i32, at_once: bool) {
        let Some(process) = self.0.processes.find(pid) else {
            return;
        };
        if at_once {
            process.kill();
        } else {
            process.terminated.notify_one();
        }
    }

    fn spawn(&self, key: &StepKey) -> io::Result<()> {
        let (host, daemon) = self.0.here();
        let process = self.0.processes.make(daemon.host, format!("{key}"));
        if let Some(writes) = host.next_step_dies.take() {
            process.kill_in(writes);
        }
        let local = LocalSet::new();
        let (agent, own, key) = (host.agent.clone(), process.clone(), key.clone());
        // Hosts are slow now and then, and once in a while slower than anybody waits.
        let delay = match host.effects.roll(100) {
            0..=1 => host.effects.between(25_000, 40_000),
            2..=19 => host.effects.between(100, 5_000),
            _ => 0,
        };
        let world = self.0.clone();
        local.spawn_local(async move {
            sleep(Duration::from_millis(delay)).await;
            let ended = agent.step(&key).await;
            if matches!(ended, Ok(StepEnd::Done)) {
                world.ledger.completed(&key);
            }
            *own.ended.borrow_mut() = Some(format!("{ended:?}"));
            own.kill();
        });
        self.0.start(&process, local);
        Ok(())
    }

    fn terminated(&self) -> Local<()> {
        let notify = self.0.here().1.terminated.clone();
        Box::pin(async move { notify.notified().await })
    }

    fn dial(&self, host: &HostId) -> Local<io::Result<Stream>> {
        let (world, name) = (self.0.clone(), host.clone());
        Box::pin(async move {
            let (index, host) = world.host(&name);
            sleep(Duration::from_millis(host.net.between(1, 40))).await;
            while host.way.is_stalled(net::Direction::Up)
                || host.way.is_stalled(net::Direction::Down)
            {
                sleep(Duration::from_millis(100)).await;
            }
            let control = host
                .detour
                .take()
                .or_else(|| world.control.borrow().clone());
            let control = control.filter(|control| control.process.is_alive());
            let control = control.ok_or(io::ErrorKind::ConnectionRefused)?;
            let stands: Rc<dyn Fn() -> bool> = {
                let (world, control) = (world.clone(), control.process.clone());
                Rc::new(move || {
                    let daemon = world.hosts[index].daemon.borrow().clone();
                    control.is_frozen() || daemon.is_some_and(|daemon| daemon.is_frozen())
                })
            };
            let (ours, theirs, carrying) = net::join(&host.way, &host.net, &stands);
            world.spawn_task(carrying);
            let dialled = controller::Dialled {
                host: name.clone(),
                stream: Box::new(theirs),
            };
            let accepted = control.connections.send(dialled).await;
            accepted.map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Ok(Box::new(ours) as Stream)
        })
    }

    fn deliver(&self, host: &HostId, message: &Arrived<'_>) -> Vec<Duration> {
        let host = self.0.host(host).1;
        let now = Duration::ZERO;
        if let Arrived::Order(order) = message
            && host.too_late.replace(false)
        {
            // Orders are worth two minutes, and the controller waits twenty seconds more.
            self.0.happens();
            self.0
                .say(&format!("{} is under way for too long", order.key));
            return vec![Duration::from_secs(host.net.between(156, 162))];
        }
        let Some(left) = host.disorder.get().checked_sub(1) else {
            return vec![now];
        };
        host.disorder.set(left);
        if host.in_order.take() {
            self.0.happens();
        }
        let later = Duration::from_millis(host.net.between(1, 15_000));
        match host.net.roll(3) {
            0 => vec![now, later],
            1 => vec![later],
            _ => vec![now, now, later],
        }
    }

    fn handing(&self, _host: &HostId, message: &Arrived<'_>) {
        if let Arrived::Order(order) = message
            && let Some(what) = self.0.ledger.order(order, self.0.millis())
        {
            self.0.say(&what);
        }
    }

    fn before(&self, _key: &StepKey, action: &Action) -> Result<Value, Failure> {
        let (host, _) = self.0.here();
        Ok(match World::target(action) {
            Some((name, _)) => json!(host.state.borrow().get(&name)),
            None => Value::Null,
        })
    }

    fn probe(&self, key: &StepKey, action: &Action) -> Result<Seen, Failure> {
        let (host, _) = self.0.here();
        let is_there = match action {
            Action::ServiceRestart(_) => host.receipts.borrow().contains(key),
            Action::ExecRun(_) => return Ok(Seen::NoProof),
            _ => match World::target(action) {
                Some((name, value)) => host.state.borrow().get(&name) == Some(&value),
                None => true,
            },
        };
        Ok(if is_there {
            Seen::Present
        } else {
            Seen::Absent
        })
    }

    fn apply(&self, key: &StepKey, action: &Action) -> Local<Result<bool, Failure>> {
        let (world, key, action) = (self.0.clone(), key.clone(), action.clone());
        let index = world.here().1.host.expect("a step of a host");
        Box::pin(async move {
            let host = &world.hosts[index];
            world.work(index, 2_500).await;
            let roll = host.effects.roll(100);
            if roll < 2 {
                let cause = if action.changes() {
                    Cause::Step
                } else {
                    Cause::CheckUnmet
                };
                return Err(failure(cause, "it does not work", false));
            }
            let changed = match (&action, World::target(&action)) {
                (_, Some((name, value))) => {
                    let there = host.state.borrow().get(&name) == Some(&value);
                    if !there {
                        world.change(host, &key, name, Some(value));
                    }
                    !there
                }
                (Action::ServiceRestart(_), None) => {
                    host.receipts.borrow_mut().insert(key.clone());
                    world.say(&format!("{key} restarts"));
                    world.check_effect(&key);
                    true
                }
                (Action::ExecRun(_), None) => {
                    world.say(&format!("{key} marks"));
                    world.check_effect(&key);
                    true
                }
                _ => false,
            };
            world.work(index, 1_000).await;
            if roll == 2 {
                return Err(failure(Cause::Step, "it stopped half-way", changed));
            }
            Ok(changed)
        })
    }

    fn undo(&self, key: &StepKey, action: &Action, before: &Value) -> Local<Result<bool, Failure>> {
        let (world, key) = (self.0.clone(), key.clone());
        let (action, before) = (action.clone(), before.clone());
        let index = world.here().1.host.expect("a step of a host");
        Box::pin(async move {
            let host = &world.hosts[index];
            world.work(index, 2_000).await;
            let changed = match World::target(&action) {
                Some((name, _)) => {
                    let before = before.as_str().map(ToOwned::to_owned);
                    let is_back = host.state.borrow().get(&name).cloned() == before;
                    if !is_back {
                        world.change(host, &key, name, before);
                    }
                    !is_back
                }
                None => false,
            };
            world.work(index, 500).await;
            Ok(changed)
        })
    }

    fn state(&self, key: &StepKey, action: &Action) -> Vec<Fact> {
        let host = self.0.host(&key.host).1;
        let Some((name, _)) = World::target(action) else {
            return vec![];
        };
        let mut before = host.before.borrow_mut();
        if before.0.as_ref() != Some(&key.rollout) {
            *before = (Some(key.rollout.clone()), host.state.borrow().clone());
        }
        let value = host.state.borrow().get(&name).cloned().unwrap_or_default();
        vec![Fact::State {
            name,
            digest: Digest::of(value.as_bytes()),
            text: value,
        }]
    }
}

/// A record in one line.
fn line(record: &Record) -> String {
    let mut line = serde_json::to_string(record).expect("a record is plain data");
    if line.len() > 160 {
        let end = line.floor_char_boundary(160);
        line.truncate(end);
        line.push_str("..");
    }
    line
}

impl controller::World for Shared {
    fn wall_clock(&self) -> u64 {
        BEGAN + self.0.millis()
    }

    fn heeds_terms(&self) -> bool {
        let process = self.0.processes.current().expect("a controller asks");
        self.0.stubborn.get() != Some(process.pid)
    }

    fn random(&self) -> u64 {
        self.0.net.roll(u64::MAX)
    }

    fn appending(&self, entries: &[Entry], durable: bool) {
        let process = self.0.processes.current().expect("a controller appends");
        if !durable {
            self.0.reached("journal: to be appended");
            return;
        }
        let disk = self.0.disks.borrow()[&process.pid];
        let labels = self.0.labels();
        let mut broken = vec![];
        for entry in entries {
            match &entry.record {
                Record::TermBegan { epoch } => self.0.ledger.term_began(process.pid, *epoch),
                // Whoever reports to a term has written it down.
                Record::Reported { host, .. } => self.0.ledger.reports_to(host, process.pid),
                _ => {}
            }
            self.0
                .say(&format!("{} {}", process.what, line(&entry.record)));
            let now = self.0.millis();
            broken.extend(self.0.indexes.borrow_mut()[disk].add(entry, now, &labels));
        }
        for what in broken {
            self.0.violated(what);
        }
        self.0.reached("journal: appended");
    }
}
