//! The agent in a simulated world: the same link, exec, journal, claims and outcomes, over a
//! network, processes, a clock and effects that a test makes up. With the feature `faults` only.
//!
//! ```text
//! controller <- World::dial - link - relay (World::deliver) - exec - journal, on real files
//!                                                              |  World::spawn
//!                                                        Agent::step - claim, outcome: real files
//!                                                              |  World::apply, undo, probe, ...
//!                                                          the world's effects
//! ```

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Epoch, HostId, RolloutId, StepKey};
use lockstep_proto::order::{Fact, Order};
use lockstep_proto::report::{Failure, ReportBody};
use serde_json::Value;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::actions::{Done, Probe};
use crate::config::{App, Config, StepRunner, Tls};
use crate::exec::{Exec, Inbound};
use crate::journal::{self, Journal, Record};
use crate::link::Link;
use crate::step::{self, StepExit};

/// A future on one thread.
pub type Local<T> = Pin<Box<dyn Future<Output = T>>>;

/// One end of a connection.
pub type Stream = Box<dyn Connection>;

/// What a connection can do.
pub trait Connection: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl Connection for DuplexStream {}

/// What a host answers when it is asked whether an effect is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It is.
    Present,
    /// It is not.
    Absent,
    /// The host cannot say.
    NoProof,
}

/// A message of the controller that has arrived.
#[derive(Debug)]
pub enum Arrived<'a> {
    /// A controller's answer to the agent's introduction.
    Welcome(Epoch),
    /// An order.
    Order(&'a Order),
    /// Anything else.
    Other,
}

/// Everything that is simulated. What asks is the process that the world has running now.
pub trait World {
    /// The host's own clock, in milliseconds since 1970.
    fn wall_clock(&self) -> u64;
    /// A number below a bound.
    fn random(&self, below: u64) -> u64;
    /// The process that asks.
    fn process(&self) -> i32;
    /// When a process that is alive began, in ticks since the boot.
    fn started(&self, pid: i32) -> Option<u64>;
    /// Asks a process to end, or ends it.
    fn kill(&self, pid: i32, at_once: bool);
    /// Starts a step process on the host that asks.
    fn spawn(&self, key: &StepKey) -> io::Result<()>;
    /// Resolves when the process that asks is asked to end.
    fn terminated(&self) -> Local<()>;
    /// Connects a host to the controller's address.
    fn dial(&self, host: &HostId) -> Local<io::Result<Stream>>;
    /// After how long a message is handed on: once for each.
    fn deliver(&self, host: &HostId, message: &Arrived<'_>) -> Vec<Duration>;
    /// A message is handed to exec now.
    fn handing(&self, host: &HostId, message: &Arrived<'_>);
    /// What an undo must know.
    fn before(&self, key: &StepKey, action: &Action) -> Result<Value, Failure>;
    /// Whether the effect is there.
    fn probe(&self, key: &StepKey, action: &Action) -> Result<Seen, Failure>;
    /// Makes the effect; says whether it was made now.
    fn apply(&self, key: &StepKey, action: &Action) -> Local<Result<bool, Failure>>;
    /// Returns to what was before; says whether anything was changed.
    fn undo(&self, key: &StepKey, action: &Action, before: &Value) -> Local<Result<bool, Failure>>;
    /// The parts of the host's state that the action touches.
    fn state(&self, key: &StepKey, action: &Action) -> Vec<Fact>;
}

thread_local! {
    static WORLD: std::cell::RefCell<Option<Rc<dyn World>>> = const { std::cell::RefCell::new(None) };
}

/// Puts this thread's agents into a world, or back into the real one.
pub fn enter(world: Option<Rc<dyn World>>) {
    WORLD.set(world);
}

/// The world of this thread; none in the real one.
pub(crate) fn world() -> Option<Rc<dyn World>> {
    WORLD.with_borrow(Clone::clone)
}

pub(crate) fn shown(seen: Seen) -> Probe {
    match seen {
        Seen::Present => Probe::Present("it is there".into()),
        Seen::Absent => Probe::Absent("it is not there".into()),
        Seen::NoProof => Probe::NoProof("nothing shows it".into()),
    }
}

pub(crate) fn done(changed: bool) -> Done {
    Done {
        changed,
        summary: "done".into(),
        facts: vec![],
    }
}

/// An agent's installation.
#[derive(Debug, Clone)]
pub struct Agent {
    config: Arc<Config>,
}

impl Agent {
    /// Installs an agent in a directory: `state` outlives reboots, `run` does not. The host has an
    /// application `app` and lets everything be done to it.
    pub fn install(
        dir: &Path,
        host: &HostId,
        labels: &BTreeMap<String, String>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(dir.join("state"))?;
        let policy = dir.join("policy.toml");
        std::fs::write(&policy, "[[allow]]\naction = \"*\"\n")?;
        let app = App {
            root: dir.join("app"),
            user: None,
            env: BTreeMap::new(),
        };
        let tls = PathBuf::from("not used");
        Ok(Self {
            config: Arc::new(Config {
                host: host.clone(),
                controller: "controller:7443".into(),
                controller_name: None,
                state_dir: dir.join("state"),
                run_dir: dir.join("run"),
                policy: Some(policy),
                link_user: None,
                secrets_dir: None,
                secrets: BTreeMap::new(),
                vault: None,
                tls: Tls {
                    controller_ca: tls.clone(),
                    cert: tls.clone(),
                    key: tls,
                },
                labels: labels.clone(),
                vars: BTreeMap::new(),
                steps: StepRunner::Session,
                apps: BTreeMap::from([("app".to_owned(), app)]),
                services: BTreeMap::new(),
                postgres: BTreeMap::new(),
            }),
        })
    }

    /// Runs the daemon until it fails; must be called within a `LocalSet`.
    pub async fn run(&self) -> Result<(), String> {
        let (logs, pieces) = mpsc::channel(32);
        let path = Path::new("agent.toml");
        let exec = Exec::open(&self.config, path, "example.com", logs);
        let exec = exec.map_err(|error| crate::errors::chain(&error))?;
        let (to_relay, relayed) = mpsc::channel(64);
        let (to_exec, inbound) = mpsc::channel(64);
        let stop = CancellationToken::new();
        let link = Link::new(self.config.clone(), to_relay, pieces);
        tokio::task::spawn_local(link.run(stop.clone()));
        tokio::task::spawn_local(relay(self.config.host.clone(), relayed, to_exec));
        let ended = exec.run(inbound, stop).await;
        ended.map_err(|error| crate::errors::chain(&error))
    }

    /// What a step process does, from its start to its end.
    pub async fn step(&self, key: &StepKey) -> io::Result<StepEnd> {
        let terminated = world().expect("a step process has a world").terminated();
        let config = Config::clone(&self.config);
        let ended = step::perform(config, key, terminated).await?;
        Ok(match ended {
            StepExit::Done => StepEnd::Done,
            StepExit::ClaimedBefore => StepEnd::ClaimedBefore,
        })
    }

    /// Whether the journal has the intent of an attempt.
    pub fn intends(&self, key: &StepKey) -> bool {
        let mut found = false;
        let looked = journal::look(&self.config.state_dir, |record| {
            found |= matches!(record, Record::Intent(intent) if intent.key == *key);
        });
        looked.is_ok() && found
    }

    /// What the journal holds; an error if it would be quarantined. No agent may be running.
    pub fn reports(&self) -> Result<Account, String> {
        let mut account = Account::default();
        let journal = Journal::open(&self.config.state_dir, |_, record| match record {
            Record::Report { number, body } => {
                account.reports.insert(number, body);
            }
            Record::Acknowledged { number, .. } => account.acknowledged = number,
            Record::Held(held) => account.hold = Some(held.rollout),
            Record::Released { rollout, .. } => {
                account.hold.take_if(|held| *held == rollout);
            }
            _ => {}
        });
        journal.map_err(|error| crate::errors::chain(&error))?;
        Ok(account)
    }
}

/// How a step process ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepEnd {
    /// Its outcome is on the disk.
    Done,
    /// Another one had the claim, and it did nothing.
    ClaimedBefore,
}

/// What an agent's journal says.
#[derive(Debug, Default)]
pub struct Account {
    /// Its reports, by number.
    pub reports: BTreeMap<u64, ReportBody>,
    /// The newest that it knows to be durable at the controller.
    pub acknowledged: u64,
    /// The rollout that it holds itself for.
    pub hold: Option<RolloutId>,
}

/// Hands messages on, some of them late, or again.
async fn relay(host: HostId, mut from: mpsc::Receiver<Inbound>, to: mpsc::Sender<Inbound>) {
    while let Some(message) = from.recv().await {
        let world = world().expect("a relay has a world");
        let Some(arrived) = copy(&message)
            .as_ref()
            .map(|message| world.deliver(&host, &name(message)))
        else {
            if hand(&host, message, &to).await.is_err() {
                return;
            }
            continue;
        };
        for delay in arrived {
            let message = copy(&message).expect("copied before");
            if delay.is_zero() {
                if hand(&host, message, &to).await.is_err() {
                    return;
                }
            } else {
                let (host, to) = (host.clone(), to.clone());
                tokio::task::spawn_local(async move {
                    tokio::time::sleep(delay).await;
                    let _ = hand(&host, message, &to).await;
                });
            }
        }
    }
}

async fn hand(host: &HostId, message: Inbound, to: &mpsc::Sender<Inbound>) -> Result<(), ()> {
    // Room first: what is handed over counts from the moment at which exec has it.
    let room = to.reserve().await.map_err(|_| ())?;
    let world = world().expect("a relay has a world");
    world.handing(host, &name(&message));
    room.send(message);
    Ok(())
}

fn name(message: &Inbound) -> Arrived<'_> {
    match message {
        Inbound::Connected { welcome, .. } => Arrived::Welcome(welcome.epoch),
        Inbound::Order(order) => Arrived::Order(order),
        _ => Arrived::Other,
    }
}

/// A second one of what may be repeated.
fn copy(message: &Inbound) -> Option<Inbound> {
    Some(match message {
        Inbound::Acknowledged(number) => Inbound::Acknowledged(*number),
        Inbound::Offer(offer) => Inbound::Offer(offer.clone()),
        Inbound::Order(order) => Inbound::Order(order.clone()),
        Inbound::Release {
            rollout,
            epoch,
            comes_back,
        } => Inbound::Release {
            rollout: rollout.clone(),
            epoch: *epoch,
            comes_back: *comes_back,
        },
        Inbound::Cancel(rollout, epoch) => Inbound::Cancel(rollout.clone(), *epoch),
        Inbound::Survey(rollout, epoch) => Inbound::Survey(rollout.clone(), *epoch),
        _ => return None,
    })
}
