//! The load itself: one state at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use lockstep_proto::wire::agent_v1::{self as wire, up};
use prost::Message as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Channel;
use tower::{Service as _, ServiceExt as _};

use super::flood::Much;
use super::frames;
use crate::played::{Dial, hello};

/// What a connection is at when it gets what it should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It is made, and ends at once, or half of it does.
    Made,
    /// Before TLS.
    BeforeTls,
    /// In TLS, with a certificate, before and within HTTP/2.
    InTls,
    /// Calls of an agent.
    Calls,
    /// An agent's session, before its `Hello`.
    BeforeHello,
    /// An agent's session, after it.
    AfterHello,
    /// Calls of a person.
    Operators,
    /// Calls of a host that would join.
    Enrolment,
    /// The socket between the halves of an agent.
    Bridge,
    /// No frames: connections that are slow.
    Slow,
}

/// All of them, in the order of rounds.
pub(super) const STATES: [State; 10] = [
    State::Made,
    State::BeforeTls,
    State::InTls,
    State::Calls,
    State::BeforeHello,
    State::AfterHello,
    State::Operators,
    State::Enrolment,
    State::Bridge,
    State::Slow,
];

/// Tasks that send.
const SENDERS: u64 = 8;

/// Frames on one connection, where it lives as long.
const FRAMES: u64 = 40;

/// Frames that are sent at once where the first one ends the connection.
const AT_ONCE: u64 = 8;

/// Nothing answers for longer.
const LONGEST: Duration = Duration::from_secs(10);

/// Between two frames of one sender: so many come from many machines at once, and yet the machine
/// that plays them all is not what is measured.
const PACE: Duration = Duration::from_millis(3);

const AGENT: [&str; 4] = ["Session", "Logs", "FetchBlob", "Nothing"];
const CONTROL: [&str; 6] = ["Submit", "GetRollout", "Decide", "Watch", "Logs", "Suspend"];

/// Whom it plays, and where.
pub(super) struct Load {
    pub(super) agents: Vec<(String, Dial)>,
    pub(super) operator: Dial,
    pub(super) stranger: Dial,
    pub(super) socket: PathBuf,
}

impl Load {
    /// Plays a state: so many frames, or slow connections until it is told to stop. How many.
    pub(super) async fn play(
        self: Arc<Self>,
        state: State,
        much: Much,
        stop: &Arc<AtomicBool>,
    ) -> Result<u64> {
        let left = Arc::new(AtomicU64::new(much.frames));
        let sent = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        if state == State::Slow {
            for number in 0..much.slow {
                let (load, stop, sent) = (self.clone(), stop.clone(), sent.clone());
                tasks.spawn(async move { load.slow(number, &stop, &sent).await });
            }
        } else {
            for seed in 0..SENDERS {
                let (load, left, sent) = (self.clone(), left.clone(), sent.clone());
                let random = StdRng::seed_from_u64(seed);
                tasks.spawn(async move { load.send(state, seed, random, &left, &sent).await });
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended?;
        }
        Ok(sent.load(Ordering::Relaxed))
    }

    async fn send(
        &self,
        state: State,
        sender: u64,
        mut random: StdRng,
        left: &AtomicU64,
        sent: &AtomicU64,
    ) {
        // Loopback has many addresses, and each has ports of its own.
        let from = [127, 0, 1, u8::try_from(sender).unwrap_or(0)];
        let index = usize::try_from(sender).unwrap_or(0) % self.agents.len();
        let (host, agent) = &self.agents[index];
        let agent = agent.from(from);
        let (operator, stranger) = (self.operator.from(from), self.stranger.from(from));
        let mut channel: Option<Channel> = None;
        loop {
            let frames = match state {
                State::Made | State::BeforeTls | State::Bridge => 1,
                State::InTls => AT_ONCE,
                _ => FRAMES,
            };
            let granted = take(left, frames);
            if granted == 0 {
                return;
            }
            let done = match state {
                State::Made => made(&stranger, &mut random).await,
                State::BeforeTls => before_tls(&stranger, &mut random).await,
                State::InTls => in_tls(&agent, &mut random, granted).await,
                State::Bridge => self.bridge(&mut random).await,
                State::Calls | State::BeforeHello | State::AfterHello => {
                    calls(state, &agent, host, &mut channel, &mut random, granted).await
                }
                State::Operators => {
                    calls(state, &operator, host, &mut channel, &mut random, granted).await
                }
                State::Enrolment => {
                    calls(state, &stranger, host, &mut channel, &mut random, granted).await
                }
                State::Slow => granted,
            };
            sent.fetch_add(done, Ordering::Relaxed);
            // What a connection did not take is for the next one.
            left.fetch_add(granted - done, Ordering::Relaxed);
            tokio::time::sleep(PACE * u32::try_from(done.max(1)).unwrap_or(1)).await;
        }
    }

    async fn bridge(&self, random: &mut StdRng) -> u64 {
        let Ok(mut socket) = UnixStream::connect(&self.socket).await else {
            return 0;
        };
        let written = socket.write_all(&frames::bridge(random)).await;
        let _ = socket.shutdown().await;
        let _ = timeout(LONGEST, socket.read(&mut [0; 64])).await;
        u64::from(written.is_ok())
    }

    /// One slow connection after the other, of the same kind.
    async fn slow(&self, number: usize, stop: &AtomicBool, sent: &AtomicU64) {
        let (host, agent) = &self.agents[number % self.agents.len()];
        let mut is_first = true;
        while !stop.load(Ordering::Relaxed) {
            if is_first {
                sent.fetch_add(1, Ordering::Relaxed);
            }
            is_first = false;
            let held = match number % 5 {
                0 => silent(&self.stranger, stop).await,
                1 => drip(&self.stranger, &[22, 3, 1, 1, 0, 1, 0, 0, 252, 3, 3], stop).await,
                2 => slow_preface(agent, stop).await,
                3 => endless_headers(&self.stranger, stop).await,
                _ => slow_hello(agent, host, stop).await,
            };
            let _ = held;
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }
}

/// So many of what is left, or fewer.
fn take(left: &AtomicU64, wanted: u64) -> u64 {
    let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        Some(left.saturating_sub(wanted))
    });
    taken.unwrap_or(0).min(wanted)
}

async fn made(dial: &Dial, random: &mut StdRng) -> u64 {
    use rand::Rng as _;
    let Ok(mut tcp) = dial.tcp().await else {
        return 0;
    };
    match random.random_range(0..3) {
        0 => _ = tcp.set_zero_linger(),
        1 => _ = tcp.shutdown().await,
        _ => {}
    }
    1
}

async fn before_tls(dial: &Dial, random: &mut StdRng) -> u64 {
    let Ok(mut tcp) = dial.tcp().await else {
        return 0;
    };
    let written = tcp.write_all(&frames::before_tls(random)).await;
    let _ = tcp.shutdown().await;
    let _ = timeout(LONGEST, tcp.read(&mut [0; 64])).await;
    u64::from(written.is_ok())
}

async fn in_tls(dial: &Dial, random: &mut StdRng, frames: u64) -> u64 {
    use rand::Rng as _;
    let Ok(Ok(mut tls)) = timeout(LONGEST, dial.tls()).await else {
        return 0;
    };
    // The first error ends a connection: what comes with it in one go is still read, or is not.
    let mut bytes = vec![];
    if random.random_bool(0.8) {
        bytes.extend(frames::PREFACE);
    }
    for _ in 0..frames {
        bytes.extend(frames::http2(random));
    }
    let ended = async {
        tls.write_all(&bytes).await?;
        tls.flush().await?;
        while tls.read(&mut [0; 4096]).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    // It may wait for the rest of a frame that said it is longer.
    let _ = timeout(Duration::from_millis(300), ended).await;
    frames
}

/// Calls that are none, on one connection as long as it lasts.
async fn calls(
    state: State,
    dial: &Dial,
    host: &str,
    kept: &mut Option<Channel>,
    random: &mut StdRng,
    count: u64,
) -> u64 {
    use rand::Rng as _;
    if kept.is_none() {
        *kept = timeout(LONGEST, dial.channel())
            .await
            .ok()
            .and_then(Result::ok);
    }
    let Some(channel) = kept.as_mut() else {
        return 0;
    };
    let mut sent = 0;
    for _ in 0..count {
        let (service, methods): (&str, &[&str]) = match state {
            State::Operators => ("lockstep.control.v1.ControlService", &CONTROL),
            State::Enrolment => ("lockstep.enroll.v1.EnrollService", &["Join", "Renew"]),
            State::Calls => ("lockstep.agent.v1.AgentService", &AGENT),
            _ => ("lockstep.agent.v1.AgentService", &AGENT[..1]),
        };
        let method = methods[random.random_range(0..methods.len())];
        let body = match state {
            State::BeforeHello => frames::up(random).into(),
            State::AfterHello => [greeting(host), frames::up(random)].concat().into(),
            _ => frames::grpc(random),
        };
        if !call(channel, &format!("/{service}/{method}"), body).await {
            *kept = None;
            return sent;
        }
        sent += 1;
    }
    sent
}

/// A whole `Hello`, as gRPC frames it.
fn greeting(host: &str) -> Vec<u8> {
    let mut hello: wire::Hello = hello(host, 5).expect("a host's name").into();
    hello.last_report = 1 << 40;
    let message = Some(up::Message::Hello(hello));
    frames::framed(&wire::Up { message }.encode_to_vec())
}

/// Whether the connection is still there afterwards.
async fn call(channel: &mut Channel, path: &str, body: Bytes) -> bool {
    let request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(Full::new(body)));
    let request = request.expect("the path is plain");
    let answered = async {
        let answer = channel.ready().await?.call(request).await?;
        let mut body = answer.into_body();
        while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
            if frame.is_err() {
                break;
            }
        }
        Ok::<_, tonic::transport::Error>(())
    };
    matches!(timeout(LONGEST, answered).await, Ok(Ok(())))
}

async fn silent(dial: &Dial, stop: &AtomicBool) -> std::io::Result<()> {
    let mut tcp = dial.tcp().await?;
    until_closed(&mut tcp, stop).await
}

/// Sends a byte a second, until the other side has enough.
async fn drip(dial: &Dial, bytes: &[u8], stop: &AtomicBool) -> std::io::Result<()> {
    let mut tcp = dial.tcp().await?;
    tcp.write_all(bytes).await?;
    for _ in 0..600 {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        tcp.write_all(&[0]).await?;
    }
    Ok(())
}

async fn slow_preface(dial: &Dial, stop: &AtomicBool) -> std::io::Result<()> {
    let mut tls = dial.tls().await?;
    for byte in frames::PREFACE {
        tls.write_all(&[*byte]).await?;
        tls.flush().await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
    until_closed(&mut tls, stop).await
}

/// Headers that never end, a byte a second.
async fn endless_headers(dial: &Dial, stop: &AtomicBool) -> std::io::Result<()> {
    let mut tls = dial.tls().await?;
    tls.write_all(frames::PREFACE).await?;
    tls.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
    // HEADERS without their end, then CONTINUATIONs of one byte.
    tls.write_all(&[0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82]).await?;
    for _ in 0..600 {
        tls.flush().await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        tls.write_all(&[0, 0, 1, 9, 0, 0, 0, 0, 1, 0x82]).await?;
    }
    Ok(())
}

/// A session whose `Hello` never comes to its end.
async fn slow_hello(dial: &Dial, host: &str, stop: &AtomicBool) -> std::io::Result<()> {
    let channel = dial.channel().await.map_err(std::io::Error::other)?;
    let greeting = greeting(host);
    let (bytes, stream) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let body = tokio_stream::wrappers::ReceiverStream::new(stream);
    let body = tokio_stream::StreamExt::map(body, |bytes| bytes.map(http_body::Frame::data));
    let request = http::Request::post("/lockstep.agent.v1.AgentService/Session")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(http_body_util::StreamBody::new(
            body,
        )))
        .map_err(std::io::Error::other)?;
    let call = tokio::spawn(channel.oneshot(request));
    for byte in &greeting[..greeting.len() - 1] {
        let sent = bytes.send(Ok(Bytes::copy_from_slice(&[*byte]))).await;
        if sent.is_err() || call.is_finished() || stop.load(Ordering::Relaxed) {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    call.abort();
    Ok(())
}

async fn until_closed(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let mut bytes = [0; 256];
    while !stop.load(Ordering::Relaxed) {
        match timeout(Duration::from_secs(1), stream.read(&mut bytes)).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(read) => _ = read?,
            Err(_) => {}
        }
    }
    Ok(())
}
