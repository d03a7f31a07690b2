//! The controller's side of the wire, played by the test: real TLS, one agent.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use anyhow::Result;
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::wire::Hello;
use lockstep_proto::wire::agent_v1::agent_service_server::{AgentService, AgentServiceServer};
use lockstep_proto::wire::agent_v1::{self as wire, up};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

const DOMAIN: &str = "example.org";

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            pem,
        })
    }

    fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> Result<(String, KeyPair)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        let name = format!("spiffe://{DOMAIN}/{name}");
        params
            .subject_alt_names
            .push(SanType::URI(name.try_into()?));
        params.extended_key_usages = vec![usage];
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key))
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

pub(super) type Downs = mpsc::Sender<Result<wire::Down, Status>>;

/// An agent that has dialled.
pub(super) struct Dialled {
    pub(super) hello: Hello,
    pub(super) ups: Streaming<wire::Up>,
    pub(super) downs: Downs,
}

/// What the agent's connections do to the controller.
struct Service {
    sessions: mpsc::UnboundedSender<Dialled>,
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
        let Some(up::Message::Hello(hello)) = ups.message().await?.and_then(|up| up.message) else {
            return Err(Status::invalid_argument("no hello"));
        };
        let hello =
            Hello::try_from(hello).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let dialled = Dialled { hello, ups, downs };
        let _ = self.sessions.send(dialled);
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn logs(
        &self,
        request: Request<Streaming<wire::LogChunk>>,
    ) -> Result<Response<wire::LogsSummary>, Status> {
        let mut chunks = request.into_inner();
        while chunks.message().await?.is_some() {}
        Ok(Response::new(wire::LogsSummary::default()))
    }

    async fn fetch_blob(
        &self,
        request: Request<wire::FetchBlobRequest>,
    ) -> Result<Response<Self::FetchBlobStream>, Status> {
        let blobs = self.blobs.lock().expect("no holder panics");
        let content = blobs
            .get(&request.into_inner().digest.to_vec())
            .ok_or_else(|| Status::not_found("no such content"))?;
        let data = content.clone().into();
        let chunk = Ok(wire::BlobChunk { data });
        Ok(Response::new(Box::pin(tokio_stream::iter([chunk]))))
    }
}

/// The controller's end.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    agents: Ca,
    controllers: Ca,
    /// Agents that have dialled, in order.
    pub(super) sessions: mpsc::UnboundedReceiver<Dialled>,
    blobs: Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>,
}

impl Server {
    /// Listens on a free port of loopback.
    pub(super) async fn start() -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (agents, controllers) = (Ca::new()?, Ca::new()?);
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        let (pem, key) = controllers.issue("controller/main", usage)?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(agents.pem.as_bytes())?)?;
        let verifier = rustls::server::WebPkiClientVerifier::builder(Arc::new(roots)).build()?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let own = CertificateDer::from_pem_slice(pem.as_bytes())?;
        let mut config = rustls::ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![own], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener)
            .then(move |tcp| {
                let acceptor = acceptor.clone();
                async move { acceptor.accept(tcp?).await.map(Tls) }
            })
            // An agent that is killed in the handshake fails it; the server goes on.
            .filter(Result::is_ok);
        let (sender, sessions) = mpsc::unbounded_channel();
        let blobs = Arc::new(Mutex::new(HashMap::new()));
        let service = Service {
            sessions: sender,
            blobs: blobs.clone(),
        };
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(AgentServiceServer::new(service))
                .serve_with_incoming(incoming),
        );
        Ok(Self {
            address,
            agents,
            controllers,
            sessions,
            blobs,
        })
    }

    /// Certificate, key and the controllers' issuer for an agent, in PEM.
    pub(super) fn identity(&self, host: &str) -> Result<[String; 3]> {
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let (pem, key) = self.agents.issue(&format!("agent/{host}"), usage)?;
        Ok([pem, key.serialize_pem(), self.controllers.pem.clone()])
    }

    /// Keeps a plan for agents to fetch.
    pub(super) fn keep(&self, plan: &SealedPlan) {
        let mut blobs = self.blobs.lock().expect("no holder panics");
        blobs.insert(plan.digest().0.to_vec(), plan.bytes().to_vec());
    }
}
