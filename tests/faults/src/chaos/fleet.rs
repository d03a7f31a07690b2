//! A fleet of simulated agents on the real protocol: each dials, says Hello, carries messages to
//! and from its [`World`], and dials again. What runs on a host goes on without a session.
//!
//! ```text
//! dial -> Hello -> Welcome -> [ read -> World | World -> reports ] -> lost -> dial
//! work: Started -> (pace) -> effect -> Finished
//! ```

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::ids::{Epoch, PlanDigest, RolloutId};
use lockstep_proto::order::Order;
use lockstep_proto::report::Report;
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::wire::{MAX_AGENT_MESSAGE, PROTOCOL_VERSIONS, Welcome};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

use super::net::{Identity, connect};
use super::simulated::{Then, World};

/// Between two dials. Real agents wait up to 30 s, so that thousands do not come at once; here it
/// is the controller that is measured.
const DIAL_AGAIN: Duration = Duration::from_millis(25);

/// What a controller says to a host that was told of more than its journal has.
const LOST: &str = "are durable, and this journal has";

/// From the request to the Welcome.
const WELCOME_WITHIN: Duration = Duration::from_secs(20);

/// How the network treats messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Once, and in order.
    Plain,
    /// Reports come repeated and out of order. Orders come twice, and all earlier ones of the host
    /// again: those of earlier sessions and terms too.
    Disorderly,
    /// Streams of a controller that was left are read on: what it says late is heard.
    Lingering,
}

/// A running fleet. It ends when it is dropped.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    /// For each agent: something is to be sent.
    news: Vec<watch::Sender<()>>,
    address: watch::Receiver<Option<SocketAddr>>,
    delivery: Delivery,
    first_welcome: OnceLock<Instant>,
    goes_on: OnceLock<Instant>,
    stop: CancellationToken,
}

impl Fleet {
    /// Starts agents where `world` stands, on the runtime that this is called in. They dial
    /// `address` as soon as there is one, and whenever it changes.
    pub fn start(
        world: World,
        identities: &[Identity],
        address: watch::Receiver<Option<SocketAddr>>,
        delivery: Delivery,
    ) -> Self {
        let stop = CancellationToken::new();
        let busy: Vec<usize> = (0..world.agents.len())
            .filter(|index| world.agents[*index].running.is_some())
            .collect();
        let shared = Arc::new(Shared {
            news: world
                .agents
                .iter()
                .map(|_| watch::Sender::new(()))
                .collect(),
            world: Mutex::new(world),
            address,
            delivery,
            first_welcome: OnceLock::new(),
            goes_on: OnceLock::new(),
            stop: stop.clone(),
        });
        for (index, identity) in identities.iter().enumerate() {
            let (shared, identity) = (shared.clone(), identity.clone());
            tokio::spawn(shared.clone().until_stopped(async move {
                keep_session(&shared, index, &identity).await;
            }));
        }
        for index in busy {
            shared.work(index);
        }
        Self { shared, stop }
    }

    /// The fleet as it stands.
    pub fn world(&self) -> World {
        self.shared.world().clone()
    }

    /// Looks at the fleet without a copy of it.
    pub fn look<T>(&self, look: impl FnOnce(&World) -> T) -> T {
        look(&self.shared.world())
    }

    /// When the first session was welcomed.
    pub fn first_welcome(&self) -> Option<Instant> {
        self.shared.first_welcome.get().copied()
    }

    /// When the controller first said something of a rollout: that a report is kept, or what is to
    /// be done.
    pub fn goes_on(&self) -> Option<Instant> {
        self.shared.goes_on.get().copied()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn until_stopped(self: Arc<Self>, task: impl Future<Output = ()>) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(task).await;
    }

    /// Lets the attempt that runs on a host come to its end.
    fn work(self: &Arc<Self>, index: usize) {
        let shared = self.clone();
        tokio::spawn(self.clone().until_stopped(async move {
            tokio::time::sleep(pace(index)).await;
            shared.world().act(index);
            tokio::time::sleep(Duration::from_millis(2)).await;
            shared.world().finish(index);
            shared.news[index].send_replace(());
        }));
    }
}

/// How long a step takes: hosts differ, so that reports come one by one.
fn pace(index: usize) -> Duration {
    Duration::from_millis(3 + 6 * (index as u64 * 7 % 20))
}

async fn keep_session(shared: &Arc<Shared>, index: usize, identity: &Identity) {
    let mut address = shared.address.clone();
    loop {
        let at = match address.wait_for(Option::is_some).await {
            Ok(at) => at.expect("waited for"),
            Err(_) => return,
        };
        let session = Session {
            shared: shared.clone(),
            index,
            identity: identity.clone(),
        };
        if let Err(error) = session.run(at, address.clone()).await {
            let why = format!("{error:#}");
            tracing::debug!(index, "no session: {why}");
            // At the word of one host a controller goes on, and refuses it.
            if why.contains(LOST) {
                shared.world().lost.insert(why);
            }
        }
        tokio::time::sleep(DIAL_AGAIN).await;
    }
}

#[derive(Clone)]
struct Session {
    shared: Arc<Shared>,
    index: usize,
    identity: Identity,
}

/// The controller's time in a session.
#[derive(Debug, Clone, Copy)]
struct Clock(Timestamp, Instant);

impl Clock {
    fn now(self) -> Timestamp {
        let elapsed = u64::try_from(self.1.elapsed().as_millis()).unwrap_or(u64::MAX);
        Timestamp(self.0.0 + elapsed)
    }
}

impl Session {
    async fn run(
        self,
        at: SocketAddr,
        mut address: watch::Receiver<Option<SocketAddr>>,
    ) -> Result<()> {
        let channel = connect(at, &self.identity).await?;
        let mut client = AgentServiceClient::new(channel)
            .max_decoding_message_size(MAX_AGENT_MESSAGE)
            .max_encoding_message_size(MAX_AGENT_MESSAGE);
        let (up, messages) = mpsc::channel(16);
        let hello = up::Message::Hello(self.hello());
        up.send(wire::Up {
            message: Some(hello),
        })
        .await?;
        let begin = async {
            let down = client.session(ReceiverStream::new(messages)).await?;
            let mut down = down.into_inner();
            match down.message().await?.and_then(|down| down.message) {
                Some(down::Message::Welcome(welcome)) => Ok((down, Welcome::try_from(welcome)?)),
                other => bail!("{other:?} instead of a Welcome"),
            }
        };
        let (mut down, welcome) = tokio::time::timeout(WELCOME_WITHIN, begin).await??;
        let clock = Clock(welcome.clock, Instant::now());
        self.welcomed(&welcome)?;
        let reading = async {
            loop {
                let message = down.message().await?.context("the stream has ended")?;
                self.take(&client, message, welcome.epoch, clock).await?;
            }
        };
        let moved = address.wait_for(|new| *new != Some(at));
        let result: Result<()> = tokio::select! {
            result = reading => result,
            result = self.write(&up, welcome.acknowledged) => result,
            _ = moved => Ok(()),
        };
        if self.shared.delivery == Delivery::Lingering {
            let (shared, lingering) = (self.shared.clone(), self.clone());
            tokio::spawn(shared.until_stopped(async move {
                let _open = up;
                lingering.linger(down, clock).await;
            }));
        }
        result
    }

    fn hello(&self) -> wire::Hello {
        let world = self.shared.world();
        let agent = &world.agents[self.index];
        wire::Hello {
            min_version: PROTOCOL_VERSIONS.min,
            max_version: PROTOCOL_VERSIONS.max,
            host: agent.host.to_string(),
            instance: agent.instance.to_string(),
            boot: agent.boot.to_string(),
            highest_epoch: Some(agent.epoch.into()),
            last_report: agent.reports.len() as u64,
            acknowledged: agent.acknowledged,
            labels: agent.labels.clone().into_iter().collect(),
            agent_version: "simulated".to_owned(),
            held_rollout: agent
                .hold
                .as_ref()
                .map(|hold| hold.rollout.to_string())
                .unwrap_or_default(),
        }
    }

    fn welcomed(&self, welcome: &Welcome) -> Result<()> {
        let mut world = self.shared.world();
        let agent = &mut world.agents[self.index];
        if let Err(why) = agent.admit(welcome.epoch) {
            world.stale += 1;
            bail!(why);
        }
        let (host, durable) = (agent.host.clone(), agent.acknowledged);
        let heard = agent.acknowledge(welcome.acknowledged).err();
        let has = welcome.acknowledged;
        if has < durable {
            world.lost.insert(format!(
                "INV-2: {host} was told that its reports up to {durable} are durable, the \
                 controller has {has}"
            ));
        }
        if let Some(why) = heard {
            bail!(why);
        }
        drop(world);
        let _ = self.shared.first_welcome.set(Instant::now());
        Ok(())
    }

    /// Takes a message of the present session.
    async fn take(
        &self,
        client: &AgentServiceClient<Channel>,
        message: wire::Down,
        epoch: Epoch,
        clock: Clock,
    ) -> Result<()> {
        let message = message.message.context("an empty message")?;
        if !matches!(message, down::Message::Drain(_)) {
            let _ = self.shared.goes_on.set(Instant::now());
        }
        let then = match message {
            down::Message::Acknowledged(number) => {
                let mut world = self.shared.world();
                let heard = world.agents[self.index].acknowledge(number);
                return heard.map_err(anyhow::Error::msg);
            }
            down::Message::Offer(offer) => {
                let (rollout, digest, offered, _, _) = offer.into_parts()?;
                ensure!(offered == epoch, "an offer of another term");
                self.offered(client, rollout, digest).await?;
                Then::Nothing
            }
            down::Message::Order(order) => {
                let host = self.shared.world().agents[self.index].host.clone();
                let order = order.into_order(host)?;
                if self.shared.delivery == Delivery::Disorderly {
                    self.disorderly(&order, clock)
                } else {
                    self.ordered(&order, clock)
                }
            }
            down::Message::Drain(_) => bail!("the controller is about to stop"),
            other => self.late(&other)?,
        };
        self.shared.news[self.index].send_replace(());
        match then {
            Then::End(why) => bail!(why),
            Then::Work => self.shared.work(self.index),
            Then::Nothing | Then::Fetch(_) => {}
        }
        Ok(())
    }

    /// Messages about the end of a rollout.
    fn late(&self, message: &down::Message) -> Result<Then> {
        let (rollout, epoch) = match message {
            down::Message::Release(release) => {
                let (rollout, epoch, _) = release.clone().into_parts()?;
                (rollout, epoch)
            }
            down::Message::Cancel(cancel) => cancel.clone().into_parts()?,
            down::Message::Survey(survey) => survey.clone().into_parts()?,
            other => bail!("{other:?} was not expected"),
        };
        let mut world = self.shared.world();
        let agent = &mut world.agents[self.index];
        if let Err(why) = agent.admit(epoch) {
            world.stale += 1;
            return Ok(Then::End(why));
        }
        match message {
            down::Message::Release(_) => agent.release(&rollout),
            down::Message::Cancel(_) => agent.cancel(&rollout),
            _ => agent.survey(&rollout),
        }
        Ok(Then::Nothing)
    }

    async fn offered(
        &self,
        client: &AgentServiceClient<Channel>,
        rollout: RolloutId,
        digest: PlanDigest,
    ) -> Result<()> {
        let asked = |plan: Option<&Arc<SealedPlan>>| {
            let mut world = self.shared.world();
            world.agents[self.index].offer(&rollout, digest, plan)
        };
        if let Then::Fetch(digest) = asked(None) {
            let plan = fetch(client.clone(), digest).await?;
            asked(Some(&plan));
        }
        Ok(())
    }

    fn ordered(&self, order: &Order, clock: Clock) -> Then {
        let mut world = self.shared.world();
        let agent = &mut world.agents[self.index];
        let highest = agent.epoch;
        if let Err(why) = agent.admit(order.epoch) {
            world.stale += 1;
            return Then::End(why);
        }
        if !order.epoch.is_current(highest) {
            let (key, epoch) = (&order.key, order.epoch);
            let what = format!("{key} was obeyed under {epoch}, after {highest} had been seen");
            world.fenced.insert(what);
        }
        let agent = &mut world.agents[self.index];
        match agent.order(order, clock.now()) {
            Ok(then) => then,
            Err(failure) => {
                agent.refuse(order.key.clone(), failure);
                Then::Nothing
            }
        }
    }

    /// The order twice, and all that the host was ever given once more. What a network repeats is
    /// not what the controller says now: it does not end the session.
    fn disorderly(&self, order: &Order, clock: Clock) -> Then {
        let earlier = {
            let mut world = self.shared.world();
            let agent = &mut world.agents[self.index];
            let earlier = agent.orders.clone();
            agent.orders.push(order.clone());
            world.repeated += 1 + earlier.len() as u64;
            earlier
        };
        for order in earlier.iter().rev() {
            self.repeated(order, clock);
        }
        let then = self.ordered(order, clock);
        self.repeated(order, clock);
        for order in &earlier {
            self.repeated(order, clock);
        }
        then
    }

    fn repeated(&self, order: &Order, clock: Clock) {
        let known = self.shared.world().agents[self.index].knows(&order.key);
        let then = self.ordered(order, clock);
        if known && then == Then::Work {
            let why = format!("INV-1: {} was begun twice", order.key);
            self.shared.world().broken.insert(why);
        }
        if then == Then::Work {
            self.shared.work(self.index);
        }
    }

    /// Hears what a controller says on a stream that was left.
    async fn linger(self, mut down: Streaming<wire::Down>, clock: Clock) {
        while let Ok(Some(message)) = down.message().await {
            let then = match message.message {
                // A stream that was left acknowledges nothing.
                None | Some(down::Message::Acknowledged(_)) => continue,
                Some(down::Message::Order(order)) => {
                    let host = self.shared.world().agents[self.index].host.clone();
                    let Ok(order) = order.into_order(host) else {
                        continue;
                    };
                    self.ordered(&order, clock)
                }
                Some(other) => self.late(&other).unwrap_or(Then::Nothing),
            };
            if then == Then::Work {
                self.shared.work(self.index);
            }
        }
    }

    /// Sends reports from the acknowledged one on, as they are made.
    async fn write(&self, up: &mpsc::Sender<wire::Up>, acknowledged: u64) -> Result<()> {
        let mut news = self.shared.news[self.index].subscribe();
        let mut sent = acknowledged;
        loop {
            let reports: Vec<Report> = {
                let world = self.shared.world();
                let agent = &world.agents[self.index];
                // What was acknowledged is forgotten.
                let from = sent.max(agent.acknowledged);
                let bodies = agent.reports.iter().zip(1..);
                let new = bodies.filter(|(_, number)| *number > from);
                new.map(|(body, number)| Report {
                    number,
                    body: body.clone(),
                    head: None,
                })
                .collect()
            };
            if let Some(last) = reports.last() {
                sent = last.number;
            }
            if self.shared.delivery == Delivery::Disorderly {
                for report in reports.iter().rev() {
                    send(up, report).await?;
                }
            }
            for report in &reports {
                send(up, report).await?;
                if self.shared.delivery == Delivery::Disorderly {
                    send(up, report).await?;
                }
            }
            news.changed().await?;
        }
    }
}

async fn send(up: &mpsc::Sender<wire::Up>, report: &Report) -> Result<()> {
    let message = Some(up::Message::Report(report.clone().into()));
    Ok(up.send(wire::Up { message }).await?)
}

async fn fetch(
    mut client: AgentServiceClient<Channel>,
    digest: PlanDigest,
) -> Result<Arc<SealedPlan>> {
    let request = wire::FetchBlobRequest {
        digest: digest.0.to_vec().into(),
    };
    let mut chunks = client.fetch_blob(request).await?.into_inner();
    let mut content = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        content.extend_from_slice(&chunk.data);
    }
    let plan = seal::open(&content)?;
    ensure!(plan.digest() == digest, "another plan was sent");
    Ok(Arc::new(plan))
}
