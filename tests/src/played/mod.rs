//! A controller that a test plays: real TLS, the real contract, and whatever the test wants to say.
//!
//! It keeps nothing and decides nothing: the test sends each message and reads each answer. The
//! agent at the other end is the real one.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use lockstep_proto::ids::{Digest, Epoch, RolloutId, StepKey};
use lockstep_proto::order::{Binding, Order};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1::agent_service_server::{AgentService, AgentServiceServer};
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::wire::{Hello, Welcome};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

mod agent;
mod issuer;
mod plans;

pub use agent::{Agent, Dial, hello};
pub use issuer::{Issuer, Side};
pub use plans::compiled;

/// Generous: machines of all kinds run these tests, and each wait ends as soon as it can.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The controller's clock at each welcome.
pub const CLOCK: u64 = 1_000_000;

/// What makes a controller: all in PEM.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Its certificate, with what follows in its chain.
    pub certificate: String,
    /// The certificate's key.
    pub key: String,
    /// The issuer of agents.
    pub agents: String,
}

/// A connection that tonic can serve.
struct Tls(tokio_rustls::server::TlsStream<tokio::net::TcpStream>);

impl Connected for Tls {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tls {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// The way down to an agent.
pub type Downs = mpsc::Sender<Result<wire::Down, Status>>;
type Blobs = Arc<Mutex<HashMap<Digest, Vec<u8>>>>;

/// What the agent's connections do to the controller.
struct Service {
    sessions: mpsc::Sender<(Hello, Streaming<wire::Up>, Downs)>,
    logs: mpsc::Sender<wire::LogChunk>,
    blobs: Blobs,
}

#[tonic::async_trait]
impl AgentService for Service {
    type SessionStream = ReceiverStream<Result<wire::Down, Status>>;
    type FetchBlobStream = Pin<Box<dyn Stream<Item = Result<wire::BlobChunk, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::Up>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut ups = request.into_inner();
        let (downs, stream) = mpsc::channel(64);
        let Some(wire::Up {
            message: Some(up::Message::Hello(hello)),
        }) = ups.message().await?
        else {
            return Err(Status::invalid_argument("no hello"));
        };
        let hello = hello.try_into().expect("agents say a whole hello");
        let taken = self.sessions.send((hello, ups, downs)).await;
        taken.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn logs(
        &self,
        request: Request<Streaming<wire::LogChunk>>,
    ) -> Result<Response<wire::LogsSummary>, Status> {
        let mut chunks = request.into_inner();
        while let Some(chunk) = chunks.message().await? {
            // Whoever does not read them does not need them.
            let _ = self.logs.try_send(chunk);
        }
        Ok(Response::new(wire::LogsSummary::default()))
    }

    async fn fetch_blob(
        &self,
        request: Request<wire::FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let digest = request.into_inner().digest();
        let digest = digest.map_err(|_| Status::invalid_argument("no digest"))?;
        let blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let content = blobs
            .get(&digest)
            .ok_or_else(|| Status::not_found("no such content"))?;
        let chunk = |data: &[u8]| {
            Ok(wire::BlobChunk {
                data: data.to_vec().into(),
            })
        };
        let chunks: Vec<_> = content.chunks(1000).map(chunk).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }
}

/// The controller.
#[derive(Debug)]
pub struct Controller {
    /// Where it listens.
    pub address: SocketAddr,
    sessions: mpsc::Receiver<(Hello, Streaming<wire::Up>, Downs)>,
    /// Output of steps, up to some bound.
    pub logs: mpsc::Receiver<wire::LogChunk>,
    blobs: Blobs,
}

impl Controller {
    /// Listens on an address with these keys.
    pub async fn start(keys: &Keys, address: SocketAddr) -> Self {
        let config = Arc::new(server_config(keys));
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        let listener = TcpListener::bind(address).await.expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let incoming = TcpListenerStream::new(listener)
            .then(move |tcp| {
                let acceptor = acceptor.clone();
                async move { acceptor.accept(tcp?).await.map(Tls) }
            })
            // An agent that refuses this server fails the handshake; the server goes on.
            .filter(Result::is_ok);
        let (sessions_in, sessions) = mpsc::channel(8);
        let (logs_in, logs) = mpsc::channel(1000);
        let blobs = Blobs::default();
        let service = Service {
            sessions: sessions_in,
            logs: logs_in,
            blobs: blobs.clone(),
        };
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(AgentServiceServer::new(service))
                .serve_with_incoming(incoming),
        );
        Self {
            address,
            sessions,
            logs,
            blobs,
        }
    }

    /// Keeps a plan for agents to fetch.
    pub fn keep(&self, plan: &SealedPlan) {
        self.keep_as(plan.digest(), plan.bytes());
    }

    /// Keeps any bytes under a digest, whether it is theirs or not.
    pub fn keep_as(&self, digest: Digest, bytes: &[u8]) {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.insert(digest, bytes.to_vec());
    }

    /// The next agent to dial, welcomed by a controller that has all its reports.
    pub async fn accept_all(&mut self, epoch: Epoch) -> Session {
        self.welcome(epoch, |hello| hello.last_report, 0).await
    }

    /// The next agent to dial, welcomed.
    pub async fn accept(&mut self, epoch: Epoch, acknowledged: u64) -> Session {
        self.welcome(epoch, |_| acknowledged, 0).await
    }

    /// The same, by a controller that knew an installation before it.
    pub async fn accept_anew(&mut self, epoch: Epoch, earlier: u64) -> Session {
        self.welcome(epoch, |_| 0, earlier).await
    }

    /// Forgets the agents that have dialled and were not met: those that have ended meanwhile.
    pub fn forget_waiting(&mut self) {
        while self.sessions.try_recv().is_ok() {}
    }

    /// The next agent to dial in time, with which nothing has been spoken yet.
    pub async fn met(&mut self) -> Session {
        let dialled = timeout(PATIENCE, self.dialled()).await;
        dialled.expect("an agent dials")
    }

    /// The next agent to dial, whenever that is; its term is that of its hello, to be chosen.
    pub async fn dialled(&mut self) -> Session {
        let next = self.sessions.recv().await;
        let (hello, ups, downs) = next.expect("the server goes on");
        Session {
            epoch: hello.highest_epoch,
            hello,
            ups,
            downs,
        }
    }

    async fn welcome(
        &mut self,
        epoch: Epoch,
        acknowledged: impl Fn(&Hello) -> u64,
        earlier: u64,
    ) -> Session {
        let mut session = self.met().await;
        let acknowledged = acknowledged(&session.hello);
        session.welcome(epoch, acknowledged, earlier).await;
        session
    }
}

fn server_config(keys: &Keys) -> rustls::ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    for issuer in CertificateDer::pem_slice_iter(keys.agents.as_bytes()) {
        let added = roots.add(issuer.expect("an issuer in PEM"));
        added.expect("an issuer can be trusted");
    }
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        provider.clone(),
    );
    let verifier = verifier.build().expect("there is an issuer");
    let chain = CertificateDer::pem_slice_iter(keys.certificate.as_bytes());
    let chain: Vec<_> = chain.map(|one| one.expect("a certificate")).collect();
    let key = PrivateKeyDer::from_pem_slice(keys.key.as_bytes()).expect("a key in PEM");
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3 is there")
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .expect("the key is that of the certificate");
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// A connected agent.
#[derive(Debug)]
pub struct Session {
    /// How it introduced itself.
    pub hello: Hello,
    ups: Streaming<wire::Up>,
    downs: Downs,
    /// The term that orders are given in.
    pub epoch: Epoch,
}

impl Session {
    /// Welcomes the agent in this term.
    pub async fn welcome(&mut self, epoch: Epoch, acknowledged: u64, earlier: u64) {
        self.epoch = epoch;
        let welcome = Welcome {
            version: 1,
            epoch,
            clock: Timestamp(CLOCK),
            acknowledged,
            earlier,
        };
        self.send(down::Message::Welcome(welcome.into())).await;
    }

    /// Its two directions, for whoever speaks and listens at a time.
    pub fn split(self) -> (Streaming<wire::Up>, Downs) {
        (self.ups, self.downs)
    }

    /// Sends a message.
    pub async fn send(&self, message: down::Message) {
        self.send_raw(wire::Down {
            message: Some(message),
            head: None,
        })
        .await;
    }

    /// Sends what may be no message at all. One that has ended takes it to nobody.
    pub async fn send_raw(&self, down: wire::Down) {
        let _ = self.downs.send(Ok(down)).await;
    }

    /// Offers a plan without signatures.
    pub async fn offer(&self, rollout: &RolloutId, plan: &SealedPlan, dry_run: bool) {
        self.offer_signed(rollout, plan.digest(), vec![], dry_run)
            .await;
    }

    /// Offers a plan.
    pub async fn offer_signed(
        &self,
        rollout: &RolloutId,
        plan: Digest,
        signatures: Vec<String>,
        dry_run: bool,
    ) {
        self.send(down::Message::Offer(wire::Offer {
            rollout: rollout.to_string(),
            plan_digest: plan.0.to_vec().into(),
            epoch: Some(self.epoch.into()),
            dry_run,
            signatures: signatures.into_iter().map(Into::into).collect(),
            round: 0,
        }))
        .await;
    }

    /// Orders a step.
    pub async fn order(&self, plan: &SealedPlan, key: &StepKey) {
        self.order_with(plan, key, vec![]).await;
    }

    /// Orders a step, with facts.
    pub async fn order_with(&self, plan: &SealedPlan, key: &StepKey, bindings: Vec<Binding>) {
        let order = self.ordered(plan, key, bindings);
        self.send(down::Message::Order(order.into())).await;
    }

    /// An order as it would be sent.
    pub fn ordered(&self, plan: &SealedPlan, key: &StepKey, bindings: Vec<Binding>) -> Order {
        Order {
            key: key.clone(),
            plan: plan.digest(),
            epoch: self.epoch,
            not_after: Timestamp(CLOCK + 60_000),
            bindings,
        }
    }

    /// Stops what runs of a rollout.
    pub async fn cancel(&self, rollout: &RolloutId) {
        self.send(down::Message::Cancel(wire::Cancel {
            rollout: rollout.to_string(),
            epoch: Some(self.epoch.into()),
        }))
        .await;
    }

    /// Says that a rollout has ended.
    pub async fn release(&self, rollout: &RolloutId) {
        self.send(down::Message::Release(wire::Release {
            rollout: rollout.to_string(),
            epoch: Some(self.epoch.into()),
            comes_back: false,
        }))
        .await;
    }

    /// The next report in time; `None` if the agent has ended the stream.
    pub async fn next(&mut self) -> Option<Report> {
        let report = timeout(PATIENCE, self.coming()).await;
        report.expect("a report comes in time")
    }

    /// The next report, whenever that is; `None` if the agent has ended the stream.
    pub async fn coming(&mut self) -> Option<Report> {
        match self.ups.message().await.ok()??.message? {
            up::Message::Report(report) => {
                Some(report.try_into().expect("agents send whole reports"))
            }
            up::Message::Hello(_) => panic!("a second hello"),
        }
    }

    /// The next report, acknowledged; `None` if the agent has ended the stream.
    pub async fn heard(&mut self) -> Option<Report> {
        let report = self.next().await?;
        self.send(down::Message::Acknowledged(report.number)).await;
        Some(report)
    }

    /// The next report, acknowledged.
    pub async fn report(&mut self) -> ReportBody {
        self.heard().await.expect("the session goes on").body
    }

    /// Waits for the outcome of an attempt, past its `Started`.
    pub async fn outcome(&mut self, key: &StepKey) -> StepOutcome {
        loop {
            match self.report().await {
                ReportBody::Finished {
                    key: of, outcome, ..
                } if of == *key => return outcome,
                ReportBody::Started { key: of } if of == *key => {}
                other => panic!("{other:?} instead of the outcome of {key}"),
            }
        }
    }

    /// Offers a plan, to which the agent consents.
    pub async fn consented(
        &mut self,
        controller: &Controller,
        rollout: &RolloutId,
        plan: &SealedPlan,
    ) {
        controller.keep(plan);
        self.offer(rollout, plan, false).await;
        match self.report().await {
            ReportBody::Consented { rollout: of, .. } if of == *rollout => {}
            other => panic!("{other:?} is no consent"),
        }
    }
}
