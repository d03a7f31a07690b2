//! The network side: dials the controller, introduces the agent, and carries messages to and from
//! exec. It decides nothing.
//!
//! ```text
//! Dial -> Hello -> TLS 1.3, mutual -> Session: Hello up, Welcome down
//!      -> Connected -> [ read | write | logs ] until one ends -> Disconnected -> back off
//! ```

use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::plan::MAX_PLAN_BYTES;
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::wire::{Hello, InvalidMessage, MAX_AGENT_MESSAGE, Welcome};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::config::Config;
use crate::errors::chain;
use crate::exec::{Inbound, LogPiece, Outbound, Refusal};
use crate::notify::notify;
use crate::tls::TlsError;

mod connect;
mod logs;
mod renew;
mod words;

use renew::Activity;
pub(crate) use words::tls_words;
use words::{is_bad_certificate, words};

/// Messages up that wait for the network. Reports beyond wait in the journal.
const UP: usize = 16;

/// Messages from exec that wait for the writer.
const OUTBOX: usize = 16;

/// From the request to the Welcome: the controller may be restarting, with thousands dialling.
const WELCOME_WITHIN: Duration = Duration::from_secs(20);

/// A plan has at most 1 MiB.
const FETCH_WITHIN: Duration = Duration::from_mins(1);
const FETCH_AGAIN: Duration = Duration::from_secs(1);

/// The first pause between two dials; each is longer than the one before, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const PAUSE_FACTOR: f64 = 1.6;
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A session that lasted so long was a good one: the next dial is a first one.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// The controller asks for a pause before it stops; a wrong number keeps nobody away for long.
const LONGEST_DRAIN: Duration = Duration::from_mins(1);

/// Why a session ended, or did not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The agent's own files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate names another host.
    #[error("the certificate is that of `{certificate}`, agent.toml says `{config}`")]
    OtherHost {
        /// The host in the certificate.
        certificate: String,
        /// The host in the configuration.
        config: String,
    },
    /// The configured address or name cannot be used.
    #[error("`{0}` in agent.toml is not host:port")]
    Address(String),
    /// No connection.
    #[error("cannot connect to the controller at {address}")]
    Connect {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// The controller has ended the stream or refused it.
    #[error("the controller ended the session")]
    Status(#[source] Box<Status>),
    /// The controller says something that breaks the contract.
    #[error("the controller's message cannot be understood")]
    Message(#[from] InvalidMessage),
    /// Silence.
    #[error("the controller did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The stream has ended without a word.
    #[error("the controller closed the session")]
    Closed,
    /// Exec does not obey this controller.
    #[error("this host refuses the controller: {0}")]
    Refused(String),
    /// The other half of the agent is away.
    #[error("exec does not run on this host")]
    NoExec,
    /// The daemon is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl LinkError {
    /// What this side refused, for the journal; what exec has refused it knows.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Connect { source, .. } if is_bad_certificate(source) => {
                Some(Refusal::Certificate)
            }
            Self::Message(_) => Some(Refusal::Contract),
            _ => None,
        }
    }

    /// What people can do about it.
    fn hint(&self) -> Option<&'static str> {
        let text = chain(self);
        let has = |words: &str| text.contains(words);
        Some(match self {
            Self::Tls(_) => "run `lockstep-agent check`",
            Self::OtherHost { .. } => "correct `host`, or get a certificate for this host",
            Self::Address(_) => "write it as name:port",
            Self::NoExec => "systemctl status lockstep-agent-exec",
            Self::Refused(_) => {
                "unless it is this host's disk, find out which controller is the right one before \
                 anything else"
            }
            Self::Status(status) if status.code() == Code::AlreadyExists => {
                "another agent runs under this host's name: end it, and find out who started it"
            }
            _ if has("CertificateExpired") || has("expired") => {
                "a certificate has expired, or a clock is wrong; if it is this host's: an admin \
                 types `lockstep forget HOST` and `lockstep token create HOST`, and this host runs \
                 `lockstep-agent join`"
            }
            Self::Status(status)
                if status.code() == Code::PermissionDenied
                    && status.message().contains("suspended") =>
            {
                "an admin has suspended this host, or its certificate is on two machines"
            }
            _ if has("CertificateRevoked") || has("Revoked") => {
                "this host has been suspended, or forgotten, or another machine has joined in its place"
            }
            // Issuers of two installations may have the same name: then it is the signature that
            // is wrong.
            _ if has("alert: UnknownCA") || has("alert: DecryptError") => {
                "the controller does not know the issuer of this host's certificate: make it with \
                 the issuers of the controller's installation"
            }
            _ if has("UnknownIssuer") || has("BadSignature") => {
                "the certificates are not of the same installation: look at `controller_ca`"
            }
            _ if has("NotAController") => {
                "what answers there is no controller of this agent's domain: look at `controller`, \
                 and whether `cert` and `controller_ca` are of the same installation"
            }
            _ if has("NotValidForName") => {
                "set `controller_name` to the name in the controller's certificate"
            }
            _ if has("Connection refused") => "the controller does not run there",
            _ if has("failed to lookup address") => "the controller's name is not known here",
            _ => return None,
        })
    }
}

/// How a session ended well.
enum Ended {
    /// The controller is about to stop.
    Drained(Duration),
    /// There is a new certificate: connect anew with it.
    Renewed,
}

/// The network side.
#[derive(Debug)]
pub(crate) struct Link {
    config: Arc<Config>,
    exec: mpsc::Sender<Inbound>,
    logs: mpsc::Receiver<LogPiece>,
}

impl Link {
    pub(crate) fn new(
        config: Arc<Config>,
        exec: mpsc::Sender<Inbound>,
        logs: mpsc::Receiver<LogPiece>,
    ) -> Self {
        Self { config, exec, logs }
    }

    /// Keeps a session open until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let result = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                result = self.session() => result,
            };
            let refused = result.as_ref().err().and_then(LinkError::refusal);
            let said = refused.map(Inbound::Refused).into_iter();
            for message in said.chain([Inbound::Disconnected]) {
                if self.exec.send(message).await.is_err() {
                    return;
                }
            }
            if begun.elapsed() > GOOD_SESSION {
                failures = 0;
            }
            let pause = match result {
                Ok(Ended::Renewed) => Duration::ZERO,
                Ok(Ended::Drained(pause)) => pause + jitter(0),
                Err(error) => {
                    let pause = jitter(failures);
                    failures += 1;
                    let hint = error.hint().map(tracing::field::display);
                    let why = words(&error);
                    tracing::warn!(why, hint, again_in = ?pause, "no session");
                    notify(&format!("STATUS=not connected: {why}"));
                    pause
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
            }
        }
    }

    async fn session(&mut self) -> Result<Ended, LinkError> {
        let hello = self.hello().await?;
        let channel = connect::connect(&self.config).await?;
        let activity = Activity::new();
        let mut client = AgentServiceClient::new(channel.clone())
            // Orders with their bindings; no plan travels here.
            .max_decoding_message_size(MAX_AGENT_MESSAGE)
            .max_encoding_message_size(MAX_AGENT_MESSAGE);
        let (up, messages) = mpsc::channel(UP);
        send_up(&up, up::Message::Hello(hello.into())).await?;
        let begin = async {
            let mut down = client
                .session(ReceiverStream::new(messages))
                .await?
                .into_inner();
            let (welcome, head) = welcome(&mut down).await?;
            Ok::<_, LinkError>((down, welcome, head))
        };
        let (down, welcome, head) = timeout(WELCOME_WITHIN, begin)
            .await
            .map_err(|_| LinkError::Silent(WELCOME_WITHIN))??;
        let (outbox, from_exec) = mpsc::channel(OUTBOX);
        self.tell(Inbound::Connected { welcome, outbox }).await?;
        witness(&self.exec, head).await?;
        notify("STATUS=connected to the controller");
        // Reading, writing and logs wait for the network each on its own: a controller that does
        // not read must not keep this side from reading.
        tokio::select! {
            biased;
            ended = read(&self.config, &self.exec, down, &activity) => ended,
            ended = write(&self.exec, client.clone(), &up, from_exec, &activity) => ended,
            ended = renew::keep(&self.config, channel, &activity), if renews() => Ok(ended),
            never = logs::forward(client.clone(), &mut self.logs) => match never {},
        }
    }

    async fn hello(&self) -> Result<Hello, LinkError> {
        let (reply, hello) = oneshot::channel();
        self.tell(Inbound::Dial(reply)).await?;
        hello.await.map_err(|_| LinkError::NoExec)
    }

    async fn tell(&self, message: Inbound) -> Result<(), LinkError> {
        tell(&self.exec, message).await
    }
}

/// Whether there is a certificate to renew. On a simulated network there is none.
fn renews() -> bool {
    #[cfg(feature = "faults")]
    if crate::simulation::world().is_some() {
        return false;
    }
    true
}

async fn tell(exec: &mpsc::Sender<Inbound>, message: Inbound) -> Result<(), LinkError> {
    exec.send(message).await.map_err(|_| LinkError::Stopping)
}

async fn send_up(up: &mpsc::Sender<wire::Up>, message: up::Message) -> Result<(), LinkError> {
    let message = wire::Up {
        message: Some(message),
    };
    up.send(message).await.map_err(|_| LinkError::Closed)
}

async fn welcome(
    down: &mut Streaming<wire::Down>,
) -> Result<(Welcome, Option<wire::Head>), LinkError> {
    let down = down.message().await?.unwrap_or_default();
    match down.message {
        Some(down::Message::Welcome(welcome)) => Ok((welcome.try_into()?, down.head)),
        Some(_) => Err(InvalidMessage::Field("the first message").into()),
        None => Err(LinkError::Closed),
    }
}

/// What the controller says of its journal; an earlier release says nothing.
async fn witness(exec: &mpsc::Sender<Inbound>, head: Option<wire::Head>) -> Result<(), LinkError> {
    match head {
        Some(head) => tell(exec, Inbound::Witness(head.try_into()?)).await,
        None => Ok(()),
    }
}

/// Messages down, to exec.
async fn read(
    config: &Config,
    exec: &mpsc::Sender<Inbound>,
    mut down: Streaming<wire::Down>,
    activity: &Activity,
) -> Result<Ended, LinkError> {
    loop {
        let Some(mut message) = down.message().await? else {
            return Err(LinkError::Closed);
        };
        activity.touch();
        witness(exec, message.head.take()).await?;
        if let Some(down::Message::Drain(drain)) = &message.message {
            let pause = Duration::from_millis(drain.reconnect_after_ms.into());
            tracing::info!(?pause, "the controller is about to stop");
            return Ok(Ended::Drained(pause.min(LONGEST_DRAIN)));
        }
        tell(exec, Inbound::read(message, &config.host)?).await?;
    }
}

/// Messages of exec, up.
async fn write(
    exec: &mpsc::Sender<Inbound>,
    client: AgentServiceClient<Channel>,
    up: &mpsc::Sender<wire::Up>,
    mut outbox: mpsc::Receiver<Outbound>,
    activity: &Activity,
) -> Result<Ended, LinkError> {
    // They end with the session: the offers that they are for are made again in the next one.
    let mut fetches = JoinSet::new();
    while let Some(message) = outbox.recv().await {
        activity.touch();
        while fetches.try_join_next().is_some() {}
        match message {
            Outbound::Report(report) => {
                send_up(up, up::Message::Report((*report).into())).await?;
            }
            Outbound::Fetch(digest) => {
                let (exec, client) = (exec.clone(), client.clone());
                fetches.spawn(async move {
                    let content = timeout(FETCH_WITHIN, fetch(client, digest.0.to_vec()))
                        .await
                        .unwrap_or_else(|_| Err("the controller does not send it".into()));
                    let _ = exec.send(Inbound::Plan(digest, content)).await;
                });
            }
            Outbound::Refuse(why) => return Err(LinkError::Refused(why)),
        }
    }
    Err(LinkError::Stopping)
}

/// A compiled plan, or why it cannot be had. What passes, such as a controller that is being stopped,
/// is no answer: the session ends, or it is asked again.
async fn fetch(client: AgentServiceClient<Channel>, digest: Vec<u8>) -> Result<Vec<u8>, String> {
    use tonic::Code::{
        FailedPrecondition, InvalidArgument, NotFound, OutOfRange, PermissionDenied,
        Unauthenticated,
    };
    loop {
        let status = match fetch_once(client.clone(), digest.clone()).await {
            Ok(content) => return Ok(content),
            Err(status) => status,
        };
        if let NotFound | PermissionDenied | Unauthenticated | InvalidArgument | OutOfRange
        | FailedPrecondition = status.code()
        {
            return Err(format!("{} ({})", status.message(), status.code()));
        }
        tracing::debug!(%status, "a plan cannot be fetched now");
        sleep(FETCH_AGAIN).await;
    }
}

async fn fetch_once(
    mut client: AgentServiceClient<Channel>,
    digest: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let request = wire::FetchBlobRequest {
        digest: digest.into(),
    };
    let mut chunks = client.fetch_blob(request).await?.into_inner();
    let mut content = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        if content.len() + chunk.data.len() > MAX_PLAN_BYTES {
            let why = format!("it is larger than {MAX_PLAN_BYTES} bytes");
            return Err(Status::out_of_range(why));
        }
        content.extend_from_slice(&chunk.data);
    }
    Ok(content)
}

/// Full jitter: anything up to a bound that grows with each failure, so that thousands of agents
/// do not come back together.
fn jitter(failures: i32) -> Duration {
    let bound = FIRST_PAUSE.as_secs_f64() * PAUSE_FACTOR.powi(failures.min(32));
    let bound = bound.min(LONGEST_PAUSE.as_secs_f64());
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        let part = u32::try_from(world.random(1000)).expect("below 1000");
        return Duration::from_secs_f64(bound) * part / 1000;
    }
    Duration::from_secs_f64(rand::random_range(0.0..=bound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound() {
        let longest = |failures| (0..500).map(|_| jitter(failures)).max().unwrap();
        assert!(longest(0) <= FIRST_PAUSE);
        assert!(longest(3) > FIRST_PAUSE);
        assert!(longest(i32::MAX) <= LONGEST_PAUSE);
        assert!(longest(40) > LONGEST_PAUSE / 2);
    }
}
