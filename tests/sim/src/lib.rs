//! The whole of Lockstep in one thread, under faults: the real core, driver, sessions, link, exec,
//! journals, claims and outcomes, over simulated processes, network, clock and effects.
//!
//! ```text
//! seed -> plans, hosts, delays, faults      one runtime, time that only waits when nothing can run
//!      -> event log (the same each time)
//!      -> checker over all journals and the ledger of effects -> violations
//! ```
//!
//! A seed whose run violates something is run again with fewer faults, until none can be left out:
//! what remains is its shortest event log.

mod check;
mod dice;
mod faults;
mod net;
mod operator;
mod plans;
mod process;
mod world;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use lockstep::simulation as controller;
use lockstep_agent::simulation::{self as agent, Agent};
use lockstep_proto::ids::HostId;
use lockstep_tests::planted::{self, Fault as Planted};
use lockstep_tests::points;
use lockstep_tests::power::Disk;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio::time::{Duration, sleep};

use dice::Dice;
use faults::{Fault, Kind, schedule};
use net::Direction;
use operator::Operator;
use world::{Control, Host, Shared, World};

/// Faults of one run that are tried at least.
const FAULTS: usize = 24;

/// Faults of one run that take effect at least, or as many as can be tried.
pub const EFFECTIVE: usize = 20;

/// Faults of one run that are tried at most.
const MOST_FAULTS: usize = 120;

/// A run that takes longer than this, in simulated time, is stuck.
const LONGEST: Duration = Duration::from_hours(6);

/// Where nothing happens, the next fault comes after this, in milliseconds.
const LULL: u64 = 20_000;

/// After the last fault, for what was held up to come to its end.
const QUIET: Duration = Duration::from_secs(90);

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// It decides everything else.
    pub seed: u64,
    /// Faults that are left out, by their number.
    pub without: BTreeSet<usize>,
    /// A fault that is planted in the product.
    pub planted: Option<Planted>,
}

/// What came of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Promises that were broken.
    pub violations: Vec<String>,
    /// Faults that took effect: a kill of what is dead is none.
    pub faults: usize,
    /// Faults that were tried.
    pub tried: usize,
    /// How rollouts ended.
    pub ends: BTreeMap<String, u64>,
    /// Every event, in order.
    pub log: Vec<String>,
    /// Actions whose outcome was unknown, by name.
    pub unknown: BTreeMap<String, u64>,
}

/// Runs a seed.
pub fn run(options: &Options) -> Outcome {
    planted::plant(options.planted);
    let dir = scratch();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime can be built");
    let local = LocalSet::new();
    let shared: Rc<RefCell<Option<Rc<World>>>> = Rc::default();
    let running = AssertUnwindSafe(|| {
        local.block_on(&runtime, async {
            let run = Run::new(options, dir.path(), &shared);
            let finished = tokio::time::timeout(LONGEST, run.go()).await;
            finished.unwrap_or_else(|_| Outcome {
                violations: vec!["INV-8: the world does not come to an end".into()],
                ..Outcome::default()
            })
        })
    });
    let result = std::panic::catch_unwind(running);
    let world = shared.take();
    let mut outcome = result.unwrap_or_else(|panic| Outcome {
        violations: vec![format!("panic: {}", words(&*panic))],
        ..Outcome::default()
    });
    if let Some(world) = world {
        outcome.log = world.take_log();
        (outcome.faults, outcome.tried) = (world.happened.get(), world.tried.get());
        outcome.violations.extend(world.ledger.violations.take());
    }
    drop(local);
    drop(runtime);
    points::watch(None);
    agent::enter(None);
    controller::enter(None);
    planted::plant(None);
    outcome
}

/// The faults that a violation needs: the others are left out one by one. Answers with what is
/// left out, and the shortest run.
pub fn shrink(options: &Options, first: Outcome) -> (Options, Outcome) {
    let (mut least, mut shortest) = (options.clone(), first);
    for index in (0..shortest.tried).rev() {
        let mut fewer = least.clone();
        fewer.without.insert(index);
        let outcome = run(&fewer);
        if !outcome.violations.is_empty() {
            (least, shortest) = (fewer, outcome);
        }
    }
    (least, shortest)
}

/// Where agents' files are: in memory, where there is such a place.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    dir.expect("there is room for a temporary directory")
}

fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("killed outside of a process").to_owned()
}

/// One run.
struct Run {
    world: Rc<World>,
    dir: PathBuf,
    disks: Vec<controller::Disk>,
    faults: Vec<(usize, Fault)>,
    left_out: usize,
    power: StdRng,
    operator: Operator,
    starts: u32,
    /// What happens later, by its time in milliseconds.
    later: BTreeMap<(u64, u64), Later>,
    numbers: u64,
    asleep: Option<Rc<Control>>,
    /// When somebody ends it, if it does not give way.
    put_down_at: u64,
    /// How long the controller stays away once it is killed, in milliseconds.
    down: u64,
}

/// Something that comes back.
#[derive(Debug, Clone)]
enum Later {
    StartAgent(usize),
    StartController,
    /// Some agents dial a controller that has woken up beside its successor.
    Detour(usize),
}

impl Run {
    fn new(options: &Options, dir: &Path, shared: &RefCell<Option<Rc<World>>>) -> Self {
        let seed = options.seed;
        let dice = Dice::new(seed, 3);
        let count = usize::try_from(dice.between(3, 6)).expect("few hosts");
        let hosts: Vec<Host> = (0..count).map(|index| host(dir, index, seed)).collect();
        let (tasks, mut received) = mpsc::unbounded_channel();
        let world = Rc::new(World::new(hosts, seed, tasks));
        *shared.borrow_mut() = Some(world.clone());
        tokio::task::spawn_local(async move {
            while let Some(task) = received.recv().await {
                tokio::task::spawn_local(task);
            }
        });
        agent::enter(Some(Rc::new(Shared(world.clone()))));
        controller::enter(Some(Rc::new(Shared(world.clone()))));
        let watched = Rc::downgrade(&world);
        points::watch(Some(Box::new(move |point| {
            if let Some(world) = watched.upgrade() {
                world.reached(point);
            }
        })));
        let faults = schedule(seed, count, MOST_FAULTS);
        let faults = faults.into_iter().enumerate();
        let mut faults: Vec<(usize, Fault)> = faults.collect();
        faults.reverse();
        let mut run = Self {
            world,
            dir: dir.to_owned(),
            disks: vec![controller::Disk::default()],
            faults,
            left_out: 0,
            power: StdRng::seed_from_u64(seed),
            operator: Operator::new(seed),
            starts: 0,
            later: BTreeMap::new(),
            numbers: 0,
            asleep: None,
            put_down_at: 0,
            down: 1_000,
        };
        for (index, fault) in &mut run.faults {
            if options.without.contains(index) {
                // Its time passes all the same.
                fault.kind = Kind::Reset { host: usize::MAX };
            }
        }
        run
    }

    async fn go(mut self) -> Outcome {
        self.start_controller(0, false).await;
        for index in 0..self.world.hosts.len() {
            self.world.start_daemon(index);
        }
        sleep(Duration::from_secs(3)).await;
        let mut calm = false;
        let (mut events, mut due) = (self.world.events(), self.world.millis());
        loop {
            let now = self.world.millis();
            self.come_back(now).await;
            if let Some((_, fault)) = self.faults.last()
                && (self.world.events() >= events + fault.after || now >= due + LULL)
            {
                let (number, fault) = self.faults.pop().expect("looked at just now");
                self.apply(number, fault.kind).await;
                let tried = number + 1;
                self.world.tried.set(tried);
                if tried >= FAULTS && self.world.happened.get() + self.left_out >= EFFECTIVE {
                    self.faults.clear();
                }
                (events, due) = (self.world.events(), now);
            }
            let more = !self.faults.is_empty();
            self.operator.act(&self.world, &mut self.disks, more).await;
            if !more && self.operator.is_idle() {
                if calm {
                    break;
                }
                // One more, with nothing in its way: nobody but the clock drives it.
                calm = true;
                self.heal();
                self.operator.once_more();
            }
            sleep(Duration::from_millis(100)).await;
        }
        self.finish().await
    }

    fn at(&mut self, after: u64, what: Later) {
        self.numbers += 1;
        let when = self.world.millis() + after;
        self.later.insert((when, self.numbers), what);
    }

    async fn come_back(&mut self, now: u64) {
        while let Some(entry) = self.later.first_entry()
            && entry.key().0 <= now
        {
            match entry.remove() {
                Later::StartAgent(host) => self.world.start_daemon(host),
                Later::StartController => self.start_controller(self.disks.len() - 1, false).await,
                Later::Detour(host) => self.detour(host),
            }
        }
        // Whoever keeps services running starts them again.
        for index in 0..self.world.hosts.len() {
            let host = &self.world.hosts[index];
            let dead = host
                .daemon
                .borrow()
                .as_ref()
                .is_some_and(|it| !it.is_alive());
            let planned = |later: &Later| matches!(later, Later::StartAgent(it) if *it == index);
            if dead && !self.later.values().any(planned) {
                let why = host.daemon.borrow().as_ref().and_then(|it| it.ended.take());
                self.world
                    .say(&format!("{} agent is gone: {why:?}", host.name));
                self.at(1_000, Later::StartAgent(index));
            }
        }
        let control = self.world.control.borrow().clone();
        let dead = control.as_ref().is_none_or(|it| !it.process.is_alive());
        let planned = |later: &Later| matches!(later, Later::StartController);
        if dead && !self.later.values().any(planned) {
            let why = control.and_then(|it| it.process.ended.take());
            self.world.say(&format!("the controller is gone: {why:?}"));
            // Whoever is killed has no last words, and nobody is beside the newest one.
            if let Some(why) = why {
                let what = format!("INV-2: the newest controller ends: {why}");
                self.world.violated(what);
                self.faults.clear();
                self.operator.give_up();
            }
            self.at(self.down, Later::StartController);
        }
    }

    async fn start_controller(&mut self, disk: usize, take_over: bool) {
        self.starts += 1;
        let what = format!("controller {}", self.starts);
        self.world.say(&format!("{what} starts"));
        let process = self.world.processes.make(None, what);
        self.world.disks.borrow_mut().insert(process.pid, disk);
        let (connections, accepted) = mpsc::channel(64);
        let (ready, started) = oneshot::channel();
        let local = LocalSet::new();
        let (own, kept, dir) = (
            process.clone(),
            self.disks[disk].clone(),
            self.dir.join("controller"),
        );
        local.spawn_local(async move {
            let why = match controller::start(&kept, &dir, take_over, accepted) {
                Ok((handle, ended)) => {
                    let _ = ready.send(handle);
                    ended.await
                }
                Err(why) => Err(format!("cannot start: {why}")),
            };
            *own.ended.borrow_mut() = Some(format!("{why:?}"));
            own.kill();
        });
        self.world.start(&process, local);
        if let Ok(handle) = started.await {
            *self.world.control.borrow_mut() = Some(Rc::new(Control {
                process,
                connections,
                handle,
            }));
            return;
        }
        let why = process.ended.take().unwrap_or_default();
        let what = format!("INV-2: the controller does not start: {why}");
        self.world.violated(what);
        // Nothing goes on from here.
        self.faults.clear();
        self.operator.give_up();
    }

    async fn apply(&mut self, number: usize, kind: Kind) {
        if kind == (Kind::Reset { host: usize::MAX }) {
            self.left_out += 1;
            return;
        }
        let world = self.world.clone();
        world.say(&format!("FAULT {number} {kind:?}"));
        let control = world.control.borrow().clone();
        let control = control.filter(|control| control.process.is_alive());
        match kind {
            Kind::KillAgent { host, writes } => {
                if let Some(daemon) = &*world.hosts[host].daemon.borrow() {
                    daemon.kill_in(writes);
                }
            }
            Kind::KillStep { host, writes } => {
                let host = world.busy(host);
                match world.steps(host).into_iter().next() {
                    // Half of them between two writes, in the middle of what they do.
                    Some(step) if writes % 2 == 0 => {
                        world.say(&format!("{} killed", step.what));
                        world.happens();
                        step.kill();
                    }
                    Some(step) => step.kill_in(writes / 2),
                    None => world.hosts[host].next_step_dies.set(Some(writes)),
                }
            }
            Kind::KillController { writes, down } => {
                if let Some(control) = control {
                    control.process.kill_in(writes);
                    self.down = down;
                }
            }
            Kind::PowerLoss { host, down } => self.power_loss(world.busy(host), down),
            Kind::Reset { host } => {
                if world.hosts[host].way.cut() {
                    world.happens();
                }
            }
            Kind::Partition {
                host,
                up,
                down,
                time,
            } => {
                let time = Duration::from_millis(time);
                let way = &world.hosts[host].way;
                if world.is_up(host) {
                    world.happens();
                }
                if up || !down {
                    way.stall(Direction::Up, time);
                }
                if down {
                    way.stall(Direction::Down, time);
                }
            }
            Kind::Isolated { time } => {
                if control.is_some() {
                    world.happens();
                }
                for host in &world.hosts {
                    host.way.stall(Direction::Up, Duration::from_millis(time));
                    host.way.stall(Direction::Down, Duration::from_millis(time));
                }
            }
            Kind::SlowAgent { host, time } => {
                if world.is_up(host)
                    && let Some(daemon) = &*world.hosts[host].daemon.borrow()
                {
                    world.happens();
                    daemon.freeze(Duration::from_millis(time));
                }
            }
            Kind::SlowController { time } => {
                if let Some(control) = control {
                    world.happens();
                    control.process.freeze(Duration::from_millis(time));
                }
            }
            Kind::Clock { host, by } => {
                world.happens();
                world.hosts[host].clock.set(by);
            }
            Kind::Disorder { host, messages } => {
                world.hosts[host].disorder.set(messages);
                world.hosts[host].in_order.set(true);
            }
            Kind::TooLate { host } => world.hosts[host].too_late.set(true),
            Kind::Successor { sleeps, stubborn } => {
                if let Some(control) = control.filter(|_| self.asleep.is_none()) {
                    world.stubborn.set(stubborn.then_some(control.process.pid));
                    world.happens();
                    self.successor(control, sleeps).await;
                }
            }
        }
    }

    fn power_loss(&mut self, index: usize, down: u64) {
        let host = &self.world.hosts[index];
        let alive = self.world.processes.alive_on(index);
        if !alive.is_empty() {
            self.world.happens();
        }
        for process in alive {
            process.kill();
        }
        let services = self.world.net.roll(4);
        let services = i32::try_from(services).expect("few");
        self.world.processes.booted(index, services);
        // Nobody hears of it: the other side finds out.
        let time = Duration::from_millis(down + 500);
        host.way.stall(Direction::Up, time);
        host.way.stall(Direction::Down, time);
        host.disk.borrow_mut().lose_power(&mut self.power);
        let _ = std::fs::remove_dir_all(host.dir.join("run"));
        self.at(down, Later::StartAgent(index));
    }

    /// The controller stops for a time, and somebody starts another one on a copy of its disk.
    async fn successor(&mut self, old: Rc<Control>, sleeps: u64) {
        old.process.freeze(Duration::from_millis(sleeps));
        let disk = self.world.disks.borrow()[&old.process.pid];
        let (copy, index) = (
            self.disks[disk].copy(),
            self.world.indexes.borrow()[disk].clone(),
        );
        self.disks.push(copy);
        self.world.indexes.borrow_mut().push(index);
        self.asleep = Some(old);
        self.put_down_at = self.world.millis() + sleeps + 40_000;
        self.start_controller(self.disks.len() - 1, true).await;
        for index in 0..self.world.hosts.len() {
            self.world.hosts[index].way.cut();
            self.at(sleeps + 2_000 * (index as u64 + 1), Later::Detour(index));
        }
    }

    /// An agent that has heard of the successor dials the old one.
    fn detour(&mut self, index: usize) {
        let Some(old) = self.asleep.clone() else {
            return;
        };
        let stubborn = self.world.stubborn.get() == Some(old.process.pid);
        if stubborn && self.world.millis() > self.put_down_at {
            old.process.kill();
        }
        if !old.process.is_alive() {
            self.world.say("the controller that woke up has ended");
            self.asleep = None;
            return;
        }
        let host = &self.world.hosts[index];
        if self.world.ledger.has_left(&host.name, old.process.pid) {
            self.world
                .say(&format!("{} dials the controller that woke up", host.name));
            *host.detour.borrow_mut() = Some(old);
            host.way.cut();
            // Some start anew, and know what they have written down.
            if self.world.net.percent(50)
                && let Some(daemon) = &*host.daemon.borrow()
            {
                daemon.kill();
            }
        }
        // Until it has ended, or a rollout would wait for it for ever. It ends at the word of two.
        if index < 2 {
            self.at(5_000, Later::Detour(index));
        }
    }

    /// Everything is well again.
    fn heal(&mut self) {
        self.later
            .retain(|_, later| !matches!(later, Later::Detour(_)));
        if let Some(old) = self.asleep.take() {
            old.process.kill();
        }
        for host in &self.world.hosts {
            host.way.heal();
            host.disorder.set(0);
            host.too_late.set(false);
            host.clock.set(0);
            host.detour.take();
            host.next_step_dies.set(None);
        }
    }

    /// Now nothing may be left over.
    async fn finish(mut self) -> Outcome {
        let end = self.world.millis() + u64::try_from(QUIET.as_millis()).expect("short");
        while self.world.millis() < end {
            let now = self.world.millis();
            self.come_back(now).await;
            sleep(Duration::from_millis(500)).await;
        }
        let world = self.world;
        let disk = self.disks.len() - 1;
        for (index, host) in world.hosts.iter().enumerate() {
            for process in world.processes.alive_on(index) {
                let daemon = host.daemon.borrow().as_ref().map(|daemon| daemon.pid);
                if Some(process.pid) != daemon {
                    world.violated(format!("INV-8: {} still runs", process.what));
                }
                process.kill();
            }
            match host.agent.reports() {
                Ok(account) => {
                    let broken = world.indexes.borrow()[disk].check_reports(&host.name, &account);
                    for what in broken {
                        world.violated(what);
                    }
                    if let Some(held) = account.hold {
                        world.violated(format!("INV-8: {} still holds for {held}", host.name));
                    }
                }
                Err(why) => world.violated(format!("INV-2: {} has lost records: {why}", host.name)),
            }
        }
        let index = world.indexes.borrow()[disk].clone();
        for what in world.ledger.check_outcomes(&index) {
            world.violated(what);
        }
        for what in world.ledger.check_blind(&index) {
            world.violated(what);
        }
        for what in index.check_skipped(&world.indexes.borrow()[..disk]) {
            world.violated(what);
        }
        let mut unknown = BTreeMap::new();
        for (key, action, class) in index.unknown() {
            *unknown.entry(action.to_owned()).or_default() += 1;
            if class != lockstep_proto::action::Class::Blind {
                world.violated(format!(
                    "INV-1: {key} is unknown, and `{action}` is not blind"
                ));
            }
        }
        Outcome {
            violations: vec![],
            ends: self.operator.ends,
            unknown,
            ..Outcome::default()
        }
    }
}

fn host(dir: &Path, index: usize, seed: u64) -> Host {
    let name: HostId = format!("h-{index}").parse().expect("a name");
    let role = if index == 0 { "db" } else { "app" };
    let labels = BTreeMap::from([("role".to_owned(), role.to_owned())]);
    let dir = dir.join(name.as_str());
    let agent = Agent::install(&dir, &name, &labels).expect("an agent can be installed");
    let disk = Disk::new(&dir.join("state"));
    Host::new(name, role, agent, dir, disk, seed)
}
