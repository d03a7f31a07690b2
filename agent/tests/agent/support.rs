//! A controller played by the test, with real TLS, and a host with the real agent.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Digest, Direction, Epoch, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Order};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::agent_v1::agent_service_server::{AgentService, AgentServiceServer};
use lockstep_proto::wire::agent_v1::{self as wire, down, up};
use lockstep_proto::wire::{Hello, Welcome};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

pub(crate) const HOST: &str = "app-1";
pub(crate) const DOMAIN: &str = "example.org";

/// Generous: machines of all kinds run these tests, and each wait ends as soon as it can.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn issue(&self, spiffe: &str, usage: ExtendedKeyUsagePurpose) -> (String, KeyPair) {
        self.issue_in(DOMAIN, spiffe, usage)
    }

    fn issue_in(
        &self,
        domain: &str,
        spiffe: &str,
        usage: ExtendedKeyUsagePurpose,
    ) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let name = format!("spiffe://{domain}/{spiffe}");
        params
            .subject_alt_names
            .push(SanType::URI(name.try_into().unwrap()));
        params.extended_key_usages = vec![usage];
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key)
    }
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

type Downs = mpsc::Sender<Result<wire::Down, Status>>;

/// What the agent's connections do to the controller.
struct Service {
    sessions: mpsc::Sender<(Hello, Streaming<wire::Up>, Downs)>,
    logs: mpsc::Sender<wire::LogChunk>,
    blobs: Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>,
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
        let hello = hello.try_into().unwrap();
        self.sessions.send((hello, ups, downs)).await.unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn logs(
        &self,
        request: Request<Streaming<wire::LogChunk>>,
    ) -> Result<Response<wire::LogsSummary>, Status> {
        let mut chunks = request.into_inner();
        while let Some(chunk) = chunks.message().await? {
            let _ = self.logs.send(chunk).await;
        }
        Ok(Response::new(wire::LogsSummary::default()))
    }

    async fn fetch_blob(
        &self,
        request: Request<wire::FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let blobs = self.blobs.lock().unwrap();
        let content = blobs
            .get(&request.into_inner().digest.to_vec())
            .ok_or_else(|| Status::not_found("no such content"))?;
        let chunks: Vec<_> = content
            .chunks(1000)
            .map(|data| {
                Ok(wire::BlobChunk {
                    data: data.to_vec().into(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }
}

/// The controller.
pub(crate) struct Controller {
    pub(crate) address: SocketAddr,
    agents: Ca,
    controllers: Ca,
    sessions: mpsc::Receiver<(Hello, Streaming<wire::Up>, Downs)>,
    pub(crate) logs: mpsc::Receiver<wire::LogChunk>,
    blobs: Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>,
}

impl Controller {
    pub(crate) async fn start() -> Self {
        Self::start_as("controller/main").await
    }

    /// One whose certificate says something else.
    pub(crate) async fn start_as(role: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (agents, controllers) = (Ca::new(), Ca::new());
        let (pem, key) = controllers.issue(role, ExtendedKeyUsagePurpose::ServerAuth);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(der(&agents.pem)).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots))
            .build()
            .unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = rustls::ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![der(&pem)], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener)
            .then(move |tcp| {
                let acceptor = acceptor.clone();
                async move { acceptor.accept(tcp?).await.map(Tls) }
            })
            // An agent that refuses this server fails the handshake; the server goes on.
            .filter(Result::is_ok);
        let (sessions_in, sessions) = mpsc::channel(8);
        let (logs_in, logs) = mpsc::channel(1000);
        let blobs = Arc::new(Mutex::new(HashMap::new()));
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
            agents,
            controllers,
            sessions,
            logs,
            blobs,
        }
    }

    /// The issuer of agents' certificates.
    pub(crate) fn agents_issuer(&self) -> &str {
        &self.agents.pem
    }

    /// Keeps a plan for agents to fetch.
    pub(crate) fn keep(&self, plan: &SealedPlan) {
        let digest = plan.digest().0.to_vec();
        self.blobs
            .lock()
            .unwrap()
            .insert(digest, plan.bytes().to_vec());
    }

    /// The next agent to dial, welcomed by a controller that has all its reports.
    pub(crate) async fn accept_all(&mut self, epoch: Epoch) -> Session {
        self.welcome(epoch, |hello| hello.last_report, 0).await
    }

    /// The next agent to dial, welcomed.
    pub(crate) async fn accept(&mut self, epoch: Epoch, acknowledged: u64) -> Session {
        self.welcome(epoch, |_| acknowledged, 0).await
    }

    /// The same, by a controller that knew an installation before it.
    pub(crate) async fn accept_anew(&mut self, epoch: Epoch, earlier: u64) -> Session {
        self.welcome(epoch, |_| 0, earlier).await
    }

    async fn welcome(
        &mut self,
        epoch: Epoch,
        acknowledged: impl Fn(&Hello) -> u64,
        earlier: u64,
    ) -> Session {
        let (hello, ups, downs) = timeout(PATIENCE, self.sessions.recv())
            .await
            .expect("an agent dials")
            .unwrap();
        let acknowledged = acknowledged(&hello);
        let session = Session {
            hello,
            ups,
            downs,
            epoch,
        };
        let welcome = Welcome {
            version: 1,
            epoch,
            clock: Timestamp(CLOCK),
            acknowledged,
            earlier,
        };
        session.send(down::Message::Welcome(welcome.into())).await;
        session
    }
}

/// The controller's clock at each welcome.
pub(crate) const CLOCK: u64 = 1_000_000;

fn der(pem: &str) -> CertificateDer<'static> {
    use rustls::pki_types::pem::PemObject as _;
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

/// A connected agent.
pub(crate) struct Session {
    pub(crate) hello: Hello,
    ups: Streaming<wire::Up>,
    downs: Downs,
    pub(crate) epoch: Epoch,
}

impl Session {
    pub(crate) async fn send(&self, message: down::Message) {
        let down = wire::Down {
            message: Some(message),
            head: None,
        };
        self.downs.send(Ok(down)).await.unwrap();
    }

    pub(crate) async fn offer(&self, rollout: &RolloutId, plan: &SealedPlan, dry_run: bool) {
        self.offer_signed(rollout, plan, vec![], dry_run).await;
    }

    pub(crate) async fn offer_signed(
        &self,
        rollout: &RolloutId,
        plan: &SealedPlan,
        signatures: Vec<String>,
        dry_run: bool,
    ) {
        self.send(down::Message::Offer(wire::Offer {
            rollout: rollout.to_string(),
            plan_digest: plan.digest().0.to_vec().into(),
            epoch: Some(self.epoch.into()),
            dry_run,
            signatures: signatures.into_iter().map(Into::into).collect(),
            round: 0,
        }))
        .await;
    }

    pub(crate) async fn order(&self, plan: &SealedPlan, key: &StepKey) {
        self.order_with(plan, key, vec![]).await;
    }

    pub(crate) async fn order_with(
        &self,
        plan: &SealedPlan,
        key: &StepKey,
        bindings: Vec<Binding>,
    ) {
        let order = Order {
            key: key.clone(),
            plan: plan.digest(),
            epoch: self.epoch,
            not_after: Timestamp(CLOCK + 60_000),
            bindings,
        };
        self.send(down::Message::Order(order.into())).await;
    }

    pub(crate) async fn cancel(&self, rollout: &RolloutId) {
        self.send(down::Message::Cancel(wire::Cancel {
            rollout: rollout.to_string(),
            epoch: Some(self.epoch.into()),
        }))
        .await;
    }

    pub(crate) async fn release(&self, rollout: &RolloutId) {
        self.send(down::Message::Release(wire::Release {
            rollout: rollout.to_string(),
            epoch: Some(self.epoch.into()),
            comes_back: false,
        }))
        .await;
    }

    /// The next report; `None` if the agent has ended the stream.
    pub(crate) async fn next(&mut self) -> Option<Report> {
        let up = timeout(PATIENCE, self.ups.message())
            .await
            .expect("a report comes in time");
        match up.ok()??.message? {
            up::Message::Report(report) => Some(report.try_into().unwrap()),
            up::Message::Hello(_) => panic!("a second hello"),
        }
    }

    /// The next report, acknowledged.
    pub(crate) async fn report(&mut self) -> ReportBody {
        let report = self.next().await.expect("the session goes on");
        self.send(down::Message::Acknowledged(report.number)).await;
        report.body
    }

    /// Waits for the outcome of an attempt, past its `Started`.
    pub(crate) async fn outcome(&mut self, key: &StepKey) -> StepOutcome {
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

    pub(crate) async fn consented(
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

/// A host with the agent's files.
pub(crate) struct Host {
    pub(crate) root: tempfile::TempDir,
    pub(crate) config: PathBuf,
    agent: Option<Child>,
}

impl Host {
    pub(crate) fn new(controller: &Controller, policy: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let (pem, key) = controller.agents.issue(
            &format!("agent/{HOST}"),
            ExtendedKeyUsagePurpose::ClientAuth,
        );
        private_file(&at("agent.pem"), &pem);
        private_file(&at("agent.key"), &key.serialize_pem());
        private_file(&at("ca.pem"), &controller.controllers.pem);
        private_file(&at("policy.toml"), policy);
        let text = format!(
            "host = '{HOST}'\ncontroller = 'localhost:{port}'\nstate_dir = '{root}/state'\n\
             run_dir = '{root}/run'\nsteps = '{steps}'\n\
             [tls]\ncontroller_ca = 'ca.pem'\ncert = 'agent.pem'\nkey = 'agent.key'\n\
             [labels]\nrole = 'app'\n[vars]\nroot = '{root}'\n",
            // On a host of the fleet: systemd.
            steps = std::env::var("LOCKSTEP_TEST_STEPS").unwrap_or_else(|_| "session".to_owned()),
            port = controller.address.port(),
            root = root.path().display(),
        );
        let config = at("agent.toml");
        private_file(&config, &text);
        Self {
            root,
            config,
            agent: None,
        }
    }

    /// Gives the host a certificate of another domain.
    pub(crate) fn move_to(&self, controller: &Controller, domain: &str) {
        let (pem, key) = controller.agents.issue_in(
            domain,
            &format!("agent/{HOST}"),
            ExtendedKeyUsagePurpose::ClientAuth,
        );
        private_file(&self.path("agent.pem"), &pem);
        private_file(&self.path("agent.key"), &key.serialize_pem());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep-agent"));
        command.arg(name).arg("--config").arg(&self.config);
        command
    }

    /// The journal's records, as auditors read them.
    pub(crate) fn journal(&self) -> Vec<Value> {
        let exported = Command::new(env!("CARGO_BIN_EXE_lockstep-agent"))
            .args(["audit", "export", "--config"])
            .arg(&self.config)
            .output()
            .unwrap();
        assert!(exported.status.success(), "{exported:?}");
        let text = String::from_utf8(exported.stdout).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap()
    }

    pub(crate) fn start(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))
            .unwrap();
        let child = self
            .command("run")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    /// Ends the agent without a chance to do anything.
    pub(crate) fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// Ends it with SIGTERM; answers with its exit code.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let mut agent = self.agent.take().unwrap();
        let pid = rustix::process::Pid::from_child(&agent);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        agent.wait().unwrap().code()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// The step process that has claimed an attempt.
    pub(crate) async fn claimed(&self, key: &StepKey) -> rustix::process::Pid {
        let claim = self.path("state/steps").join(key.to_string()).join("claim");
        let pid = wait_for("a claim", || {
            let text = std::fs::read(&claim).ok()?;
            let claim: Value = serde_json::from_slice(&text).ok()?;
            claim["pid"].as_i64()
        })
        .await;
        rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        #[expect(clippy::print_stderr, reason = "for whoever reads why the test failed")]
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}

pub(crate) async fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(value) = ask() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

fn private_file(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

pub(crate) fn rollout(byte: u8) -> RolloutId {
    RolloutId::from_random([byte; 6])
}

pub(crate) fn epoch(counter: u64) -> Epoch {
    Epoch { counter, id: 77 }
}

pub(crate) fn key(rollout: &RolloutId, step: u16, direction: Direction, attempt: u16) -> StepKey {
    StepKey {
        rollout: rollout.clone(),
        host: HOST.parse().unwrap(),
        at: StepRef { phase: 0, step },
        direction,
        attempt,
    }
}

/// A plan with these actions for this host.
pub(crate) fn plan(actions: &[(&str, Value)]) -> SealedPlan {
    let steps = actions.iter().zip(1..).map(|((name, args), line)| Step {
        name: None,
        action: Action::deserialize_args(name, args).unwrap().unwrap(),
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line,
    });
    let labels = [("role".to_owned(), "app".to_owned())].into();
    let plan = CompiledPlan {
        format: FORMAT,
        plan: "test".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::from(u32::MAX) * 1000),
        deadline: Period::seconds(600),
        inputs: [].into(),
        fleet: [("app".to_owned(), Selector { labels })].into(),
        phases: vec![Phase {
            name: "one".into(),
            stages: vec![Stage {
                target: Target::Groups(vec!["app".into()]),
                strategy: Strategy::All,
                steps: steps.collect(),
            }],
            deadline: None,
            planned: None,
        }],
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    };
    let sealed = seal(plan).unwrap();
    assert_eq!(sealed.digest(), Digest::of(sealed.bytes()));
    sealed
}
