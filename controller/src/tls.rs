//! The accept loop: TLS 1.3 only, both sides with certificates, live reload.
//!
//! ```text
//! TcpListener -> a task each: per-address and overall bound -> handshake -> Connection -> tonic
//!                             ArcSwap<Settings>: one swap replaces certificate and issuers
//! ```
//!
//! Agents and operators have issuers of their own. The certificate's URI says which it claims to
//! be, and only that role's issuers are asked: an agents' certificate with an operator's URI
//! fails in the handshake, as a foreign one does.

mod words;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::config::TlsFiles;
use crate::identity::{self, Identity, Peer};
pub(crate) use words::words;

/// A handshake takes a few milliseconds; a peer that needs longer than this holds it up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Handshakes at a time. Two cores do about 3,000 a second, so these are 0.1 s of work.
const HANDSHAKES: usize = 256;

/// Of those, handshakes with one address at a time: a slow or hostile one leaves room for others,
/// and a fleet behind one address still gets through at full speed.
const HANDSHAKES_PER_ADDRESS: usize = 64;

/// Connections that wait for their handshake; beyond them the kernel's backlog waits.
const WAITING: usize = 2048;

/// Connections that have shaken hands and wait for tonic, which takes them at once.
const ACCEPTED: usize = 64;

/// Without an acknowledgement for so long, the kernel ends a connection.
const USER_TIMEOUT_MS: u32 = 15_000;

/// How often the certificates' files are looked at.
const RELOAD_EVERY: Duration = Duration::from_secs(10);

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file that cannot be read, or holds no certificate or key in PEM.
    #[error("{what} {path} cannot be read")]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A file without any certificate.
    #[error("{what} {path} holds no certificate in PEM")]
    Empty {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A key that everybody on this machine can read.
    #[error("the key {0} is readable by everybody")]
    OpenKey(PathBuf),
    /// The controller's own certificate is not of its domain.
    #[error("the certificate {path} is not a controller's of `{domain}`: its URI is `{uri}`")]
    OtherDomain {
        /// The certificate's file.
        path: PathBuf,
        /// `domain` in the configuration.
        domain: String,
        /// What the certificate says.
        uri: String,
    },
    /// An issuer that agents and operators share: then nothing would tell them apart.
    #[error("{0} is an issuer of both agents and operators; each role needs its own")]
    SharedIssuer(PathBuf),
    /// Certificates that rustls refuses.
    #[error("the certificates cannot be used: {what}")]
    Unusable {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The settings for new connections, replaced as a whole.
#[derive(Debug)]
pub(crate) struct Settings {
    files: TlsFiles,
    domain: Arc<str>,
    current: ArcSwap<rustls::ServerConfig>,
}

impl Settings {
    /// Reads the files for the first time.
    pub(crate) fn load(files: &TlsFiles, domain: &str) -> Result<Arc<Self>, TlsError> {
        let config = server_config(files, domain)?;
        Ok(Arc::new(Self {
            files: files.clone(),
            domain: domain.into(),
            current: ArcSwap::from_pointee(config),
        }))
    }

    /// Reads the files again. If they cannot be used, everything stays as it was. Connections
    /// that are up stay up.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let config = server_config(&self.files, &self.domain)?;
        self.current.store(Arc::new(config));
        Ok(())
    }

    /// Reloads whenever a file changes, and whenever `asked` says so, until cancelled.
    pub(crate) async fn keep_fresh(
        self: Arc<Self>,
        mut asked: mpsc::Receiver<()>,
        stop: CancellationToken,
    ) {
        let mut seen = self.fingerprint();
        loop {
            let forced = tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = asked.recv() => true,
                () = tokio::time::sleep(RELOAD_EVERY) => false,
            };
            let now = self.fingerprint();
            if !forced && now == seen {
                continue;
            }
            match self.reload() {
                Ok(()) => tracing::info!("certificates and issuers were read again"),
                Err(error) => tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "new certificates cannot be used; the old ones stay"
                ),
            }
            seen = now;
        }
    }

    fn fingerprint(&self) -> [Option<(SystemTime, u64)>; 4] {
        let TlsFiles {
            cert,
            key,
            agent_ca,
            operator_ca,
        } = &self.files;
        [cert, key, agent_ca, operator_ca].map(|path| {
            let found = fs::metadata(path).ok()?;
            Some((found.modified().ok()?, found.len()))
        })
    }
}

fn server_config(files: &TlsFiles, domain: &str) -> Result<rustls::ServerConfig, TlsError> {
    let chain = certificates("the certificate", &files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::File {
        what: "the key",
        path: files.key.clone(),
        source,
    })?;
    if is_open(&files.key) {
        return Err(TlsError::OpenKey(files.key.clone()));
    }
    let uris = identity::uris(&chain[0]).unwrap_or_default();
    let prefix = format!("spiffe://{domain}/controller/");
    if !matches!(&uris[..], [uri] if uri.starts_with(&prefix)) {
        return Err(TlsError::OtherDomain {
            path: files.cert.clone(),
            domain: domain.to_owned(),
            uri: uris.join("`, `"),
        });
    }
    let agents = certificates("the agents' issuer", &files.agent_ca)?;
    let operators = certificates("the operators' issuer", &files.operator_ca)?;
    if operators.iter().any(|issuer| agents.contains(issuer)) {
        return Err(TlsError::SharedIssuer(files.operator_ca.clone()));
    }
    let provider = Arc::new(ring::default_provider());
    let verifier = RoleVerifier::new(domain, agents, operators, &provider)?;
    let unusable = |what| {
        move |source: rustls::Error| TlsError::Unusable {
            what,
            source: source.into(),
        }
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable("TLS 1.3"))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .map_err(unusable("the controller's certificate and key"))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session skips the client's certificate: its expiry, and any new issuer.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Whether everybody on this machine can read a file.
pub(crate) fn is_open(path: &Path) -> bool {
    let mode = |found: fs::Metadata| found.permissions().mode();
    fs::metadata(path).is_ok_and(|found| mode(found) & 0o004 != 0)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let found = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() {
        return Err(TlsError::Empty {
            what,
            path: path.to_owned(),
        });
    }
    Ok(found)
}

/// Asks the issuers of the role that a certificate claims.
#[derive(Debug)]
struct RoleVerifier {
    domain: Arc<str>,
    agents: Arc<dyn ClientCertVerifier>,
    operators: Arc<dyn ClientCertVerifier>,
    hints: Vec<DistinguishedName>,
}

impl RoleVerifier {
    fn new(
        domain: &str,
        agents: Vec<CertificateDer<'static>>,
        operators: Vec<CertificateDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let verifier = |what, issuers: Vec<CertificateDer<'static>>| {
            let mut roots = RootCertStore::empty();
            for issuer in issuers {
                roots.add(issuer).map_err(|source| TlsError::Unusable {
                    what,
                    source: source.into(),
                })?;
            }
            WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider))
                .build()
                .map_err(|source| TlsError::Unusable {
                    what,
                    source: source.into(),
                })
        };
        let agents = verifier("the agents' issuers", agents)?;
        let operators = verifier("the operators' issuers", operators)?;
        let hints = [&agents, &operators].map(|verifier| verifier.root_hint_subjects());
        let hints = hints.concat();
        Ok(Self {
            domain: domain.into(),
            agents,
            operators,
            hints,
        })
    }
}

impl ClientCertVerifier for RoleVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let claimed = identity::read(end_entity, &self.domain);
        let (claimed, _) = claimed.map_err(|error| {
            let error = OtherError(Arc::new(error));
            rustls::Error::InvalidCertificate(CertificateError::Other(error))
        })?;
        let verifier = match claimed {
            Identity::Agent(_) => &self.agents,
            Identity::Operator { .. } => &self.operators,
        };
        verifier.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Never asked: no version but 1.3 is offered.
        let refused = rustls::PeerIncompatible::Tls12NotOffered;
        Err(rustls::Error::PeerIncompatible(refused))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Both use the same provider; a signature has nothing to do with the role.
        self.agents.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.agents.supported_verify_schemes()
    }
}

/// Accepts connections until cancelled; those that have shaken hands come out of the receiver.
pub(crate) fn spawn_accepting(
    listener: TcpListener,
    settings: Arc<Settings>,
    stop: CancellationToken,
) -> mpsc::Receiver<Connection> {
    let (accepted, connections) = mpsc::channel(ACCEPTED);
    let gate = Arc::new(Gate::default());
    tokio::spawn(async move {
        while let Some((stream, address, waiting)) = next(&listener, &gate, &stop).await {
            let (settings, gate) = (Arc::clone(&settings), Arc::clone(&gate));
            let (accepted, stop) = (accepted.clone(), stop.clone());
            tokio::spawn(async move {
                let _waiting = waiting;
                let shaking = shake_hands(stream, address, &settings, &gate);
                tokio::select! {
                    () = stop.cancelled() => {}
                    connection = shaking => if let Some(connection) = connection {
                        // The server is gone only when the controller stops.
                        let _ = accepted.send(connection).await;
                    }
                }
            });
        }
    });
    connections
}

async fn next(
    listener: &TcpListener,
    gate: &Gate,
    stop: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    loop {
        tokio::select! {
            () = stop.cancelled() => return None,
            next = async {
                let waiting = Arc::clone(&gate.waiting).acquire_owned().await;
                let waiting = waiting.expect("the semaphore is never closed");
                (waiting, listener.accept().await)
            } => match next {
                (waiting, Ok((stream, address))) => return Some((stream, address, waiting)),
                (_, Err(error)) => {
                    // A connection that was gone before it was accepted, or no descriptor left:
                    // the loop must outlive both.
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

async fn shake_hands(
    stream: TcpStream,
    address: SocketAddr,
    settings: &Settings,
    gate: &Arc<Gate>,
) -> Option<Connection> {
    let _permits = gate.enter(address.ip()).await;
    let prepared = stream.set_nodelay(true).and_then(|()| {
        rustix::net::sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
        Ok(())
    });
    if let Err(error) = prepared {
        tracing::debug!(%address, %error, "the connection was gone before its handshake");
        return None;
    }
    let acceptor = TlsAcceptor::from(settings.current.load_full());
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            // TLS 1.3 tells a refused client little; this line is where the reason stands.
            tracing::warn!(%address, error = words(&error), "a handshake was refused");
            return None;
        }
        Err(_) => {
            tracing::warn!(%address, "a handshake took longer than {HANDSHAKE_TIMEOUT:?}");
            return None;
        }
    };
    let certificate = stream.get_ref().1.peer_certificates()?.first()?;
    match Peer::new(certificate, &settings.domain, address) {
        Ok(peer) => {
            if let Identity::Operator {
                name, roles: None, ..
            } = peer.identity()
            {
                tracing::warn!(
                    operator = name, roles = %peer.identity().roles(),
                    "the certificate says nothing of roles and counts as one of a release before \
                     them; make another with `lockstep operator add NAME --role ROLE`"
                );
            }
            Some(Connection { stream, peer })
        }
        Err(error) => {
            tracing::warn!(%address, %error, "a verified certificate names nobody");
            None
        }
    }
}

/// Bounds handshakes, overall and for each address.
#[derive(Debug)]
struct Gate {
    waiting: Arc<Semaphore>,
    all: Arc<Semaphore>,
    addresses: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            waiting: Arc::new(Semaphore::new(WAITING)),
            all: Arc::new(Semaphore::new(HANDSHAKES)),
            addresses: Mutex::default(),
        }
    }
}

/// The right to shake hands, given back when dropped.
struct Permits {
    gate: Arc<Gate>,
    address: IpAddr,
    own: Option<OwnedSemaphorePermit>,
    _all: OwnedSemaphorePermit,
}

impl Gate {
    async fn enter(self: &Arc<Self>, address: IpAddr) -> Permits {
        let semaphore = {
            let mut addresses = self.addresses();
            let new = || Arc::new(Semaphore::new(HANDSHAKES_PER_ADDRESS));
            Arc::clone(addresses.entry(address).or_insert_with(new))
        };
        let own = semaphore.acquire_owned().await;
        let all = Arc::clone(&self.all).acquire_owned().await;
        Permits {
            gate: Arc::clone(self),
            address,
            own: Some(own.expect("the semaphore is never closed")),
            _all: all.expect("the semaphore is never closed"),
        }
    }

    fn addresses(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Arc<Semaphore>>> {
        // Nothing that holds the lock leaves the map half changed.
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.own = None;
        let mut addresses = self.gate.addresses();
        // Nobody else has it or waits for it: forget the address.
        let last = addresses.get(&self.address);
        if last.is_some_and(|semaphore| Arc::strong_count(semaphore) == 1) {
            addresses.remove(&self.address);
        }
    }
}

/// A connection whose peer is known.
#[derive(Debug)]
pub(crate) struct Connection<S = TlsStream<TcpStream>> {
    /// The bytes.
    pub(crate) stream: S,
    /// Who is at the other end.
    pub(crate) peer: Peer,
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki;

    #[test]
    fn a_certificate_of_another_domain_and_a_key_that_everybody_reads_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        pki::init(dir, "example.com").unwrap();
        let issued = pki::issue_controller(dir, "c1", &["localhost".into()], dir).unwrap();
        let agent = pki::issue_agent(dir, "app-1", dir).unwrap();
        let files = TlsFiles {
            cert: issued.certificate,
            key: issued.key,
            agent_ca: dir.join("ca-agents.crt"),
            operator_ca: dir.join("ca-operators.crt"),
        };
        server_config(&files, "example.com").unwrap();
        for domain in ["other.com", "example.co", "example.com/controller"] {
            let refused = server_config(&files, domain);
            assert!(
                matches!(refused, Err(TlsError::OtherDomain { .. })),
                "{domain}"
            );
        }
        let agents = TlsFiles {
            cert: agent.certificate,
            key: agent.key,
            ..files.clone()
        };
        let refused = server_config(&agents, "example.com");
        assert!(matches!(refused, Err(TlsError::OtherDomain { .. })));
        for (mode, open) in [(0o640, false), (0o644, true)] {
            fs::set_permissions(&files.key, fs::Permissions::from_mode(mode)).unwrap();
            let refused = matches!(
                server_config(&files, "example.com"),
                Err(TlsError::OpenKey(_))
            );
            assert_eq!(refused, open, "{mode:o}");
        }
    }
}
