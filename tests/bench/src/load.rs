//! The load: thousands of simulated agents in one process, over real sessions.
//!
//! Real is what the controller sees: a certificate and a key of its own for each, TLS 1.3, HTTP/2
//! with the agent's own settings, numbered reports that are repeated until they are acknowledged,
//! the agent's pauses between dials. Simulated is what lies behind: no step runs, nothing is written
//! to a disk, and what is reported is made up.
//!
//! The process takes a word a line on its standard input and answers with JSON on its output:
//!
//! ```text
//! connect   every agent dials, and goes on dialling when it loses its session, until ..
//! drop      .. every session is gone
//! think A B every step takes an agent A to B milliseconds from now on; at first none at all
//! ```
//!
//! A round is one order to every agent; when the last result is durable, a line tells of it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use lockstep_proto::ids::{Digest, HostId, InstanceId, StepKey};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::values::Period;
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::witness::Head;
use lockstep_tests::played::{Agent, hello};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::Channel;

use crate::clock;
use crate::dial::{Dial, Place};
use crate::manner::{self, Manner};

/// Dials at a time at the beginning. After a loss nothing but the agents' own pauses spreads them.
const RAMP: usize = 64;

/// The agent's own pauses between dials: full jitter below a bound that grows.
const FIRST_PAUSE: f64 = 0.5;
const PAUSE_FACTOR: f64 = 1.6;
const LONGEST_PAUSE: f64 = 30.0;

/// What the load is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Load {
    /// The controller, and who may issue what.
    pub(crate) place: Place,
    /// How many agents; the first one's number.
    pub(crate) agents: usize,
    pub(crate) first: usize,
    /// Where their random numbers begin.
    pub(crate) seed: u64,
    /// Whether the controller is the bare one: an order is answered by its result, and no more.
    pub(crate) bare: bool,
    /// How they behave.
    #[serde(default)]
    pub(crate) manner: Manner,
}

impl Load {
    /// A whole fleet.
    pub(crate) fn of(place: &Place, agents: usize, bare: bool) -> Self {
        Self {
            place: place.clone(),
            agents,
            first: 0,
            seed: 7,
            bare,
            manner: Manner::Prompt,
        }
    }
}

/// What a load says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// Every agent has its session. Times in nanoseconds of [`clock::now`].
    Connected {
        /// When each was welcomed, sorted.
        at: Vec<u64>,
        /// Dials that failed before that, and those of them in which TLS or HTTP/2 did.
        failed: u64,
        refused: Vec<u64>,
    },
    /// Every session is gone.
    Dropped,
    /// Every agent's result of a step is durable.
    Round {
        /// The step's key without the host.
        step: String,
        /// When its first and last order came.
        orders: [u64; 2],
        /// When its first and last result were durable.
        durable: [u64; 2],
        /// How many agents were ordered it more than once.
        twice: u64,
        /// Orders so far to do a step again.
        repeated: u64,
    },
}

fn say(said: &Said) {
    println!("{}", serde_json::to_string(said).expect("it is JSON"));
}

/// One round as it comes in.
#[derive(Debug, Default)]
struct Round {
    orders: Option<[u64; 2]>,
    durable: Option<[u64; 2]>,
    done: usize,
    twice: u64,
}

/// What all agents share.
struct Shared {
    load: Load,
    up: watch::Sender<bool>,
    /// Between how many milliseconds a step takes.
    think: Mutex<[u64; 2]>,
    rounds: Mutex<HashMap<String, Round>>,
    welcomed: Mutex<HashMap<HostId, u64>>,
    failed: AtomicU64,
    refused: Mutex<Vec<u64>>,
    gone: AtomicU64,
    ramp: Semaphore,
    first_time: AtomicBool,
    repeated: AtomicU64,
}

/// Plays the load until standard input ends.
pub(crate) fn run(load: Load) -> Result<()> {
    if load.manner == Manner::Loud {
        rustix::process::nice(10)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(play(load))
}

async fn play(load: Load) -> Result<()> {
    let (up, _) = watch::channel(false);
    let shared = Arc::new(Shared {
        up,
        think: Mutex::default(),
        rounds: Mutex::default(),
        welcomed: Mutex::default(),
        failed: AtomicU64::new(0),
        refused: Mutex::default(),
        gone: AtomicU64::new(0),
        ramp: Semaphore::new(RAMP),
        first_time: AtomicBool::new(true),
        repeated: AtomicU64::new(0),
        load,
    });
    let mut agents = JoinSet::new();
    let issuer = shared.load.place.issuer()?;
    for number in 0..shared.load.agents {
        let number = shared.load.first + number;
        let host = format!("sim-{number:05}");
        let dial = Dial::new(&shared.load.place, &issuer, &host, number)?;
        let agent = Simulated::new(&shared, &host, dial, number)?;
        agents.spawn(agent.live());
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match line.as_str() {
            "connect" => {
                shared.up.send_replace(true);
            }
            "drop" => {
                shared.gone.store(0, Ordering::SeqCst);
                shared.first_time.store(true, Ordering::SeqCst);
                shared.up.send_replace(false);
            }
            other => match thinks(other) {
                Some(bounds) => *lock(&shared.think) = bounds,
                None => anyhow::bail!("`{other}` is no word for a load"),
            },
        }
    }
    Ok(())
}

/// What `think A B` says.
fn thinks(word: &str) -> Option<[u64; 2]> {
    let (least, most) = word.strip_prefix("think ")?.split_once(' ')?;
    let bounds = [least.parse().ok()?, most.parse().ok()?];
    (bounds[0] <= bounds[1]).then_some(bounds)
}

/// What happens next in a session.
enum Next {
    Message(Result<down::Message, Status>),
    /// A step has taken its time.
    Worked(StepKey),
}

/// One agent.
struct Simulated {
    shared: Arc<Shared>,
    host: HostId,
    instance: InstanceId,
    dial: Dial,
    random: StdRng,
    up: watch::Receiver<bool>,
    /// Reports that are not acknowledged, the oldest first; the number of the newest of all.
    reports: Vec<Report>,
    last: u64,
    /// Steps whose result is among them, with the number of that report.
    open: Vec<(String, u64)>,
    /// The connection of the session.
    channel: Option<Channel>,
    /// Steps that were ordered.
    done: HashSet<String>,
    /// The step that it is at, and when that ends.
    at_work: Option<(Instant, StepKey)>,
}

impl Simulated {
    fn new(shared: &Arc<Shared>, host: &str, dial: Dial, number: usize) -> Result<Self> {
        let mut random = StdRng::seed_from_u64(shared.load.seed + number as u64);
        Ok(Self {
            host: host.parse()?,
            instance: InstanceId::from_random(random.random()),
            dial,
            random,
            up: shared.up.subscribe(),
            reports: vec![],
            last: 0,
            open: vec![],
            channel: None,
            done: HashSet::new(),
            at_work: None,
            shared: Arc::clone(shared),
        })
    }

    async fn live(mut self) {
        loop {
            if self.up.wait_for(|up| *up).await.is_err() {
                return;
            }
            let mut failures = 0;
            while *self.up.borrow() {
                if self.session().await {
                    failures = 0;
                } else {
                    self.shared.failed.fetch_add(1, Ordering::Relaxed);
                }
                if !*self.up.borrow() {
                    break;
                }
                let bound = (FIRST_PAUSE * PAUSE_FACTOR.powi(failures)).min(LONGEST_PAUSE);
                let pause = Duration::from_secs_f64(self.random.random_range(0.0..=bound));
                failures += 1;
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = self.up.wait_for(|up| !*up) => {}
                }
            }
            let gone = self.shared.gone.fetch_add(1, Ordering::SeqCst) + 1;
            if gone == self.shared.load.agents as u64 {
                say(&Said::Dropped);
            }
        }
    }

    /// One session, to its end. Whether there was one.
    async fn session(&mut self) -> bool {
        let first_time = self.shared.first_time.load(Ordering::SeqCst);
        let shared = Arc::clone(&self.shared);
        let turn = if first_time {
            shared.ramp.acquire().await.ok()
        } else {
            None
        };
        let Ok(mut hello) = hello(self.host.as_str(), 1) else {
            return false;
        };
        hello.instance = self.instance.clone();
        hello.last_report = self.last;
        hello.labels = [("role".to_owned(), self.shared.load.manner.role().to_owned())].into();
        let channel = match self.dial.channel().await {
            Ok(channel) => channel,
            Err(error) => {
                if !format!("{error:?}").contains("ConnectionRefused") {
                    lock(&self.shared.refused).push(clock::now());
                }
                return false;
            }
        };
        self.channel = Some(channel.clone());
        let Ok(mut agent) = Agent::begin(channel, hello.into()).await else {
            lock(&self.shared.refused).push(clock::now());
            return false;
        };
        drop(turn);
        self.welcomed(agent.welcome.acknowledged);
        for report in &self.reports {
            agent
                .send(Some(up::Message::Report(report.clone().into())))
                .await;
        }
        let mut up = self.up.clone();
        loop {
            let next = tokio::select! {
                message = agent.coming() => Next::Message(message),
                key = worked(&mut self.at_work) => Next::Worked(key),
                _ = up.wait_for(|up| !*up) => return true,
            };
            match next {
                Next::Worked(key) => self.finish(&agent, key).await,
                Next::Message(Ok(message)) => {
                    if self.hear(&agent, message).await.is_none() {
                        return true;
                    }
                }
                Next::Message(Err(_)) => return true,
            }
        }
    }

    fn welcomed(&mut self, acknowledged: u64) {
        self.acknowledged(acknowledged);
        let mut welcomed = lock(&self.shared.welcomed);
        welcomed.entry(self.host.clone()).or_insert_with(clock::now);
        if welcomed.len() == self.shared.load.agents {
            let mut at: Vec<u64> = std::mem::take(&mut *welcomed).into_values().collect();
            at.sort_unstable();
            self.shared.first_time.store(false, Ordering::SeqCst);
            say(&Said::Connected {
                at,
                failed: self.shared.failed.swap(0, Ordering::Relaxed),
                refused: std::mem::take(&mut lock(&self.shared.refused)),
            });
        }
    }

    async fn hear(&mut self, agent: &Agent, message: down::Message) -> Option<()> {
        if self.shared.load.manner == Manner::Late {
            tokio::time::sleep(manner::LATE).await;
        }
        match message {
            down::Message::Acknowledged(upto) => self.acknowledged(upto),
            down::Message::Offer(offer) => {
                let (rollout, plan, ..) = offer.into_parts().ok()?;
                let consented = ReportBody::Consented {
                    rollout,
                    plan,
                    state: vec![],
                    round: 0,
                };
                self.report(agent, consented).await;
            }
            down::Message::Order(order) => self.obey(agent, order).await?,
            _ => {}
        }
        Some(())
    }

    async fn obey(&mut self, agent: &Agent, order: wire::Order) -> Option<()> {
        let key = order.into_order(self.host.clone()).ok()?.key;
        if self.shared.load.bare {
            self.report(agent, finished(key)).await;
            self.reports.clear();
            return Some(());
        }
        if self.shared.load.manner == Manner::Stuck {
            return Some(());
        }
        if key.attempt > 1 {
            self.shared.repeated.fetch_add(1, Ordering::Relaxed);
        }
        let step = step(&key);
        let now = clock::now();
        let again = !self.done.insert(step.clone());
        {
            let mut rounds = lock(&self.shared.rounds);
            let round = rounds.entry(step).or_default();
            let [first, _] = round.orders.unwrap_or([now, now]);
            round.orders = Some([first, now]);
            // A controller that comes back says again what it has not heard the beginning of.
            round.twice += u64::from(again);
        }
        if again {
            return Some(());
        }
        self.report(agent, ReportBody::Started { key: key.clone() })
            .await;
        if self.shared.load.manner == Manner::Loud {
            let channel = self.channel.clone()?;
            tokio::spawn(manner::print(channel, key));
            return Some(());
        }
        let [least, most] = *lock(&self.shared.think);
        if most == 0 {
            self.finish(agent, key).await;
        } else {
            let work = Duration::from_millis(self.random.random_range(least..=most));
            self.at_work = Some((Instant::now() + work, key));
        }
        Some(())
    }

    async fn finish(&mut self, agent: &Agent, key: StepKey) {
        let step = step(&key);
        self.report(agent, finished(key)).await;
        self.open.push((step, self.last));
    }

    async fn report(&mut self, agent: &Agent, body: ReportBody) {
        self.last += 1;
        let report = Report {
            number: self.last,
            body,
            head: Some(Head {
                journal: self.instance.to_string(),
                number: 2 * self.last,
                hash: Digest(self.random.random()),
            }),
        };
        self.reports.push(report.clone());
        agent.send(Some(up::Message::Report(report.into()))).await;
    }

    fn acknowledged(&mut self, upto: u64) {
        self.reports.retain(|report| report.number > upto);
        let now = clock::now();
        let shared = Arc::clone(&self.shared);
        self.open.retain(|(step, number)| {
            if *number > upto {
                return true;
            }
            let mut rounds = lock(&shared.rounds);
            let round = rounds.entry(step.clone()).or_default();
            let [first, _] = round.durable.unwrap_or([now, now]);
            round.durable = Some([first, now]);
            round.done += 1;
            if round.done == shared.load.agents {
                let ended = rounds.remove(step).expect("it was there");
                say(&Said::Round {
                    step: step.clone(),
                    orders: ended.orders.unwrap_or_default(),
                    durable: ended.durable.unwrap_or_default(),
                    twice: ended.twice,
                    repeated: shared.repeated.load(Ordering::Relaxed),
                });
            }
            false
        });
    }
}

/// The step that an agent is at, once it has taken its time; nothing if it is at none.
async fn worked(at_work: &mut Option<(Instant, StepKey)>) -> StepKey {
    if let Some((until, _)) = at_work {
        tokio::time::sleep_until(*until).await;
    }
    match at_work.take() {
        Some((_, key)) => key,
        None => std::future::pending().await,
    }
}

/// What a result says: watchers of the rollout read it, and know how old it is.
const SENT_AT: &str = "sent at ";

/// When a result was sent, in nanoseconds of [`clock::now`], from what it says.
pub(crate) fn sent_at(summary: &str) -> Option<u64> {
    summary.strip_prefix(SENT_AT)?.parse().ok()
}

fn finished(key: StepKey) -> ReportBody {
    ReportBody::Finished {
        key,
        outcome: StepOutcome::Ok {
            changed: false,
            summary: format!("{SENT_AT}{}", clock::now()),
        },
        facts: vec![],
        took: Period(3),
        signatures: vec![],
    }
}

/// A step's key without the host.
fn step(key: &StepKey) -> String {
    let key = key.to_string();
    key.split('@').next().unwrap_or_default().to_owned()
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
