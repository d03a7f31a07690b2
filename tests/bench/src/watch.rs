//! Subscribers: people who watch a rollout, each over a connection of its own.
//!
//! ```text
//! watch ROLLOUT   opens every stream, says so, and tells what came when the rollout has ended
//! ```
//!
//! Those who read take every event apart and look at the clock; the others only count what comes,
//! so that the machine has time left for the controller.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::wire::control_v1::{RolloutEvent, WatchRequest};
use lockstep_tests::cluster::PEOPLE;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::task::JoinSet;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::clock;
use crate::dial::Place;
use crate::load::sent_at;
use crate::report::part;
use crate::side::ms;

/// Things happen evenly between so many of a hundred events: all agents begin in one moment, and
/// they do not end in one moment.
const EVENLY: [usize; 2] = [20, 80];

const WATCH: &str = "/lockstep.control.v1.ControlService/Watch";

/// What the subscribers are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// The controller.
    pub(crate) place: Place,
    /// How many there are.
    pub(crate) subscribers: usize,
    /// Whether they read what comes.
    pub(crate) reads: bool,
}

/// What they say.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// Every connection is up.
    Connected,
    /// Every stream is open.
    Watching,
    /// The rollout has ended: what the subscriber heard that heard least.
    Heard(Heard),
}

/// What one subscriber heard.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Heard {
    /// Events, without heartbeats.
    pub(crate) events: u64,
    /// The number of the last one. Events are numbered without gaps.
    pub(crate) last: u64,
    /// Events in each second while things happened evenly; 0 for one that does not read.
    pub(crate) rate: f64,
    /// Median and 99 of a hundred, in milliseconds: from an event's own time until it came.
    pub(crate) from_event: [f64; 2],
    /// The same from when the agent sent the report.
    pub(crate) from_report: [f64; 2],
    /// 99 of a hundred among all events that happened once everybody watched: from an event's own
    /// time, and from when the agent sent the report, for those that have one.
    pub(crate) of_all: [f64; 2],
}

fn say(said: &Said) {
    println!("{}", serde_json::to_string(said).expect("it is JSON"));
}

/// Subscribes when it is told to, until standard input ends.
pub(crate) fn run(watch: &Watch) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(play(watch))
}

async fn play(watch: &Watch) -> Result<()> {
    let mut channels = vec![];
    // The controller bounds the connections of one person.
    for (name, _) in PEOPLE.iter().cycle().take(watch.subscribers) {
        channels.push(watch.place.operator(name)?.channel().await?);
    }
    say(&Said::Connected);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let rollout = line.strip_prefix("watch ");
        let rollout = rollout.context("watch, and which rollout")?;
        let mut opening = JoinSet::new();
        for channel in &channels {
            opening.spawn(open(channel.clone(), rollout.to_owned(), watch.reads));
        }
        let streams = opening.join_all().await.into_iter();
        let streams = streams.collect::<Result<Vec<_>, _>>()?;
        say(&Said::Watching);
        let opened = wall_ms();
        let mut hearing = JoinSet::new();
        for stream in streams {
            hearing.spawn(hear(stream, opened));
        }
        let heard = hearing.join_all().await.into_iter();
        let heard = heard.collect::<Result<Vec<_>, _>>()?;
        let least = heard.into_iter().min_by_key(|one| one.events);
        say(&Said::Heard(least.context("nobody watches")?));
    }
    Ok(())
}

async fn open(channel: Channel, rollout: String, reads: bool) -> Result<Streaming<Came>, Status> {
    let mut client = Grpc::new(channel);
    let ready = client.ready().await;
    ready.map_err(|error| Status::unavailable(error.to_string()))?;
    let request = WatchRequest { rollout, after: 0 };
    let path = PathAndQuery::from_static(WATCH);
    let answer = client
        .server_streaming(Request::new(request), path, Events { reads })
        .await?;
    Ok(answer.into_inner())
}

/// What became of one event, in milliseconds.
struct Times {
    /// When it happened, by the controller's clock.
    happened: f64,
    /// How long it took from then.
    from_event: f64,
    /// How long it took from when the agent sent the report, if it is a result.
    from_report: Option<f64>,
}

async fn hear(mut stream: Streaming<Came>, opened: f64) -> Result<Heard> {
    let mut heard = Heard::default();
    let mut times = vec![];
    while let Some(event) = stream.message().await? {
        let number = event.number();
        // A heartbeat is no event.
        if number == 0 {
            continue;
        }
        ensure!(number > heard.last, "an event came twice");
        heard.events += 1;
        heard.last = number;
        let Came::Read(event) = event else {
            continue;
        };
        let (now, wall) = (clock::now(), wall_ms());
        let happened = event.at_ms as f64;
        times.push(Times {
            happened,
            from_event: wall - happened,
            from_report: sent_at(&event.message).map(|sent| ms(now.saturating_sub(sent))),
        });
    }
    if !times.is_empty() {
        heard.judge(&times, opened)?;
    }
    Ok(heard)
}

impl Heard {
    /// Times and rate while things happened evenly.
    fn judge(&mut self, times: &[Times], opened: f64) -> Result<()> {
        let [from, until] = EVENLY.map(|percent| times.len() * percent / 100);
        let even = times.get(from..until).unwrap_or_default();
        let (Some(first), Some(last)) = (even.first(), even.last()) else {
            bail!("nobody heard anything");
        };
        ensure!(
            first.happened >= opened,
            "the rollout was half over before everybody watched"
        );
        self.rate = (even.len() - 1) as f64 * 1000.0 / (last.happened - first.happened);
        let [from_event, from_report] = both(even.iter());
        self.from_event = [50, 99].map(|percent| part(&from_event, percent));
        self.from_report = [50, 99].map(|percent| part(&from_report, percent));
        let watched = times.iter().filter(|one| one.happened >= opened);
        self.of_all = both(watched).map(|all| part(&all, 99));
        Ok(())
    }
}

/// From each event's own time, and from each result's report.
fn both<'a>(times: impl Iterator<Item = &'a Times> + Clone) -> [Vec<f64>; 2] {
    [
        times.clone().map(|one| one.from_event).collect(),
        times.filter_map(|one| one.from_report).collect(),
    ]
}

fn wall_ms() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64() * 1000.0
}

/// An event as it came.
#[derive(Debug)]
enum Came {
    Read(Box<RolloutEvent>),
    Counted(Numbered),
}

/// What of an event is read by those who only count.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct Numbered {
    #[prost(uint64, tag = "1")]
    number: u64,
}

impl Came {
    fn number(&self) -> u64 {
        match self {
            Self::Read(event) => event.number,
            Self::Counted(event) => event.number,
        }
    }
}

/// Takes events apart, or only their numbers.
#[derive(Debug, Clone, Copy)]
struct Events {
    reads: bool,
}

impl Codec for Events {
    type Encode = WatchRequest;
    type Decode = Came;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Events {
    type Item = WatchRequest;
    type Error = Status;

    fn encode(&mut self, request: WatchRequest, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let encoded = request.encode(into);
        encoded.map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Events {
    type Item = Came;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Came>, Status> {
        let event = if self.reads {
            RolloutEvent::decode(from).map(|event| Came::Read(Box::new(event)))
        } else {
            Numbered::decode(from).map(Came::Counted)
        };
        let event = event.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(event))
    }
}
