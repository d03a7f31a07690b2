//! The accept loop: TLS 1.3 only, both sides with certificates, live reload.
//!
//! ```text
//! TcpListener -> room for it -> a task each: first word -> its turn -> handshake -> Connection
//!                                                                               -> tonic
//!                             ArcSwap<Settings>: one swap replaces certificate and issuers
//! ```
//!
//! Where hosts may join, one without a certificate gets through the handshake too, and may make one
//! call.
//!
//! Agents and operators have issuers of their own. The certificate's URI says which it claims to
//! be, and only that role's issuers are asked: an agents' certificate with an operator's URI
//! fails in the handshake, as a foreign one does.

mod connection;
mod gate;
mod verifier;
mod words;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use lockstep_core::refusal::{Caller, Why};
use lockstep_core::trust::Serial;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::config::{Config, TlsFiles};
use crate::identity::{self, Identity, Peer};
use crate::refusals::{HANDSHAKE, Refusals, caller};
use crate::suspensions::{OperatorList, Suspensions};
pub(crate) use connection::Connection;
use gate::{Gate, Place};
use verifier::RoleVerifier;
pub(crate) use words::words;

/// A peer says its first word at once, and a handshake takes a few milliseconds; a peer that needs
/// longer than this for either holds it up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// A key that is none of the agents' issuers'.
    #[error("the key {path} is that of no issuer in {issuers}")]
    OtherKey {
        /// The key's file.
        path: PathBuf,
        /// Where its certificate should be.
        issuers: PathBuf,
    },
    /// A file that holds no revocation list.
    #[error("{0} holds no revocation list in PEM")]
    NoList(PathBuf),
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
    /// The controllers' issuers, shown to hosts that join; none where none may.
    shown: Option<PathBuf>,
    domain: Arc<str>,
    suspensions: Arc<Suspensions>,
    refusals: Refusals,
    current: ArcSwap<Current>,
}

/// What new connections are held against.
#[derive(Debug)]
struct Current {
    config: Arc<rustls::ServerConfig>,
    /// The same that `config` has; none before the files are read.
    verifier: Option<Arc<RoleVerifier>>,
}

impl Settings {
    /// Reads the files for the first time.
    pub(crate) fn load(
        config: &Config,
        suspensions: &Arc<Suspensions>,
        refusals: &Refusals,
    ) -> Result<Arc<Self>, TlsError> {
        let settings = Self {
            files: config.tls.clone(),
            shown: config
                .enroll
                .as_ref()
                .map(|enroll| enroll.controller_ca.clone()),
            domain: config.domain.as_str().into(),
            suspensions: Arc::clone(suspensions),
            refusals: refusals.clone(),
            current: ArcSwap::from_pointee(Current {
                config: Arc::new(unused()?),
                verifier: None,
            }),
        };
        settings.reload()?;
        Ok(Arc::new(settings))
    }

    /// Reads the files again. If they cannot be used, everything stays as it was. Connections
    /// that are up stay up, but for those whose certificate would not be let in now: its issuer is
    /// gone, or it was revoked.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let (lists, operators) = operator_lists(self.files.operator_crl.as_deref())?;
        let current = Arc::new(self.server_config(lists)?);
        self.current.store(Arc::clone(&current));
        self.suspensions.cut_where(|peer| current.why_not(peer));
        if let Some(operators) = operators {
            warn_of_end(&operators);
            self.suspensions.set_operators(operators);
        }
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

    fn fingerprint(&self) -> Vec<Option<(SystemTime, u64)>> {
        let TlsFiles {
            cert,
            key,
            agent_ca,
            operator_ca,
            operator_crl,
        } = &self.files;
        let files = [cert, key, agent_ca, operator_ca].into_iter();
        let files = files.chain(operator_crl).chain(&self.shown);
        let look = |path: &PathBuf| {
            let found = fs::metadata(path).ok()?;
            Some((found.modified().ok()?, found.len()))
        };
        files.map(look).collect()
    }

    fn server_config(
        &self,
        lists: Vec<CertificateRevocationListDer<'static>>,
    ) -> Result<Current, TlsError> {
        let Self { files, domain, .. } = self;
        let mut chain = certificates("the certificate", &files.cert)?;
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
                domain: domain.to_string(),
                uri: uris.join("`, `"),
            });
        }
        if let Some(shown) = &self.shown {
            // A host that joins has their hash only.
            let issuers = certificates("the controllers' issuer", shown)?;
            chain.extend(issuers);
        }
        let agents = certificates("the agents' issuer", &files.agent_ca)?;
        let operators = certificates("the operators' issuer", &files.operator_ca)?;
        if operators.iter().any(|issuer| agents.contains(issuer)) {
            return Err(TlsError::SharedIssuer(files.operator_ca.clone()));
        }
        let suspensions = Arc::clone(&self.suspensions);
        let optional = self.shown.is_some();
        let refusals = self.refusals.clone();
        let verifier = RoleVerifier::new(
            domain,
            agents,
            operators,
            lists,
            optional,
            suspensions,
            refusals,
        )?;
        let verifier = Arc::new(verifier);
        let mut config = builder()?
            .with_client_cert_verifier(Arc::clone(&verifier) as Arc<_>)
            .with_single_cert(chain, key)
            .map_err(unusable("the controller's certificate and key"))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session skips the client's certificate: its expiry, and any new issuer.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Current {
            config: Arc::new(config),
            verifier: Some(verifier),
        })
    }

    /// Cuts a peer whose handshake began before the issuers were replaced that it was held
    /// against. It is among those that are up by now: either this finds it, or `reload` does.
    fn look_again(&self, peer: &Peer, shaken: &Arc<Current>) {
        let current = self.current.load();
        if !Arc::ptr_eq(&current, shaken)
            && let Some(why) = current.why_not(peer)
        {
            peer.cut(why);
        }
    }
}

impl Current {
    fn why_not(&self, peer: &Peer) -> Option<String> {
        self.verifier.as_ref()?.why_not(peer)
    }
}

type Builder = rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier>;

fn builder() -> Result<Builder, TlsError> {
    rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable("TLS 1.3"))
}

/// Settings by which nobody gets in, until others are read.
fn unused() -> Result<rustls::ServerConfig, TlsError> {
    #[derive(Debug)]
    struct Nothing;
    impl rustls::server::ResolvesServerCert for Nothing {
        fn resolve(
            &self,
            _: rustls::server::ClientHello<'_>,
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            None
        }
    }
    let builder = builder()?.with_no_client_auth();
    Ok(builder.with_cert_resolver(Arc::new(Nothing)))
}

fn unusable(what: &'static str) -> impl FnOnce(rustls::Error) -> TlsError {
    move |source| TlsError::Unusable {
        what,
        source: source.into(),
    }
}

type Lists = Vec<CertificateRevocationListDer<'static>>;

/// The operators' revocation lists, for the handshake and for what comes after it.
fn operator_lists(path: Option<&Path>) -> Result<(Lists, Option<OperatorList>), TlsError> {
    let Some(path) = path else {
        return Ok((vec![], None));
    };
    let failed = |source| TlsError::File {
        what: "the operators' revocation list",
        path: path.to_owned(),
        source,
    };
    let lists = CertificateRevocationListDer::pem_file_iter(path).map_err(failed)?;
    let lists: Lists = lists.collect::<Result<_, _>>().map_err(failed)?;
    let mut found = OperatorList::default();
    for list in &lists {
        let no_list = |_| TlsError::NoList(path.to_owned());
        let (_, parsed) = CertificateRevocationList::from_der(list).map_err(no_list)?;
        let serials = parsed.iter_revoked_certificates();
        found
            .serials
            .extend(serials.map(|entry| Serial::from_bytes(entry.raw_serial())));
        let ends = parsed.next_update().map(|at| at.timestamp());
        let ends = ends.and_then(|at| u64::try_from(at).ok()).unwrap_or(0);
        let ends = UNIX_EPOCH + Duration::from_secs(ends);
        // With several issuers, whatever ends first.
        found.ends = Some(found.ends.map_or(ends, |other| other.min(ends)));
    }
    if lists.is_empty() {
        return Err(TlsError::NoList(path.to_owned()));
    }
    Ok((lists, Some(found)))
}

fn warn_of_end(list: &OperatorList) {
    let Some(ends) = list.ends else { return };
    match ends.duration_since(SystemTime::now()) {
        Ok(left) if left < Duration::from_hours(12) => {
            tracing::warn!(ends_in = ?left, "the operators' revocation list ends soon");
        }
        Ok(_) => {}
        Err(_) => tracing::error!(
            "the operators' revocation list has ended: no operator gets in until a newer one is \
             in its place"
        ),
    }
}

/// Whether everybody on this machine can read a file.
pub(crate) fn is_open(path: &Path) -> bool {
    let mode = |found: fs::Metadata| found.permissions().mode();
    fs::metadata(path).is_ok_and(|found| mode(found) & 0o004 != 0)
}

/// The certificates of a file: at least one.
pub(crate) fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
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

/// Accepts connections until cancelled; those that have shaken hands come out of the receiver.
pub(crate) fn spawn_accepting(
    listener: TcpListener,
    settings: Arc<Settings>,
    stop: CancellationToken,
) -> mpsc::Receiver<Connection> {
    let (accepted, connections) = mpsc::channel(ACCEPTED);
    let gate = Arc::new(Gate::default());
    tokio::spawn(async move {
        while let Some((stream, address, place)) = next(&listener, &gate, &stop).await {
            let (settings, gate) = (Arc::clone(&settings), Arc::clone(&gate));
            let (accepted, stop) = (accepted.clone(), stop.clone());
            tokio::spawn(async move {
                let _place = place;
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

/// The next connection that there is room for. What there is none for is closed, so that nobody
/// waits behind it.
async fn next(
    listener: &TcpListener,
    gate: &Gate,
    stop: &CancellationToken,
) -> Option<(TcpStream, SocketAddr, Place)> {
    loop {
        tokio::select! {
            () = stop.cancelled() => return None,
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let closed = match gate.wait(address.ip()) {
                        Ok(place) => return Some((stream, address, place)),
                        Err(closed) => closed,
                    };
                    if closed.is_power_of_two() {
                        tracing::warn!(
                            %address, closed,
                            "too many connections of one address wait for their handshake; what \
                             comes beyond is closed"
                        );
                    }
                }
                Err(error) => {
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
    // One that says nothing takes nobody's turn.
    let mut first = [0];
    let speaks = tokio::time::timeout(HANDSHAKE_TIMEOUT, stream.peek(&mut first)).await;
    if !matches!(speaks, Ok(Ok(1))) {
        tracing::debug!(%address, "a connection said nothing within {HANDSHAKE_TIMEOUT:?}");
        return None;
    }
    let Some(_permits) = gate.enter(address.ip(), gate::TURN_WITHIN).await else {
        tracing::debug!(%address, "no turn to shake hands within {:?}", gate::TURN_WITHIN);
        return None;
    };
    let prepared = stream.set_nodelay(true).and_then(|()| {
        rustix::net::sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
        Ok(())
    });
    if let Err(error) = prepared {
        tracing::debug!(%address, %error, "the connection was gone before its handshake");
        return None;
    }
    let current = settings.current.load_full();
    let acceptor = TlsAcceptor::from(Arc::clone(&current.config));
    // Boxed: those that wait need not have room for it.
    let shaking = Box::pin(acceptor.accept(stream));
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, shaking).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            // TLS 1.3 tells a refused client little; this line is where the reason stands.
            tracing::warn!(%address, error = words(&error), "a handshake was refused");
            if is_unverified(&error) {
                let refusals = &settings.refusals;
                refusals.note(Caller::Unverified, HANDSHAKE, Why::Certificate);
            }
            return None;
        }
        Err(_) => {
            tracing::warn!(%address, "a handshake took longer than {HANDSHAKE_TIMEOUT:?}");
            return None;
        }
    };
    let Some(shown) = stream.get_ref().1.peer_certificates() else {
        let Some(permit) = gate.admit_stranger(address.ip()) else {
            tracing::warn!(%address, "too many without a certificate; this one is closed");
            settings.refusals.note(Caller::Nobody, HANDSHAKE, Why::Rate);
            return None;
        };
        return Some(Connection::stranger(stream, address, permit));
    };
    match Peer::new(shown, &settings.domain, address) {
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
            let Some(permit) = gate.admit_peer(peer.identity()) else {
                let identity = peer.identity();
                tracing::warn!(%address, %identity, "too many connections; this one is closed");
                let who = caller(identity);
                settings.refusals.note(who, HANDSHAKE, Why::Rate);
                return None;
            };
            let connection = Connection::known(stream, peer.clone(), permit, &settings.suspensions);
            settings.look_again(&peer, &current);
            Some(connection)
        }
        Err(error) => {
            tracing::warn!(%address, %error, "a verified certificate names nobody");
            None
        }
    }
}

/// Whether a handshake failed by what the other side has shown, or has not. Whoever is void or
/// suspended is known, and noted already; a connection that broke was refused nothing.
fn is_unverified(error: &std::io::Error) -> bool {
    let inner = error.get_ref();
    let tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
    tls.is_some_and(|error| {
        let revoked = rustls::CertificateError::Revoked;
        *error != rustls::Error::InvalidCertificate(revoked)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki;

    fn load(files: &TlsFiles, domain: &str) -> Result<(), TlsError> {
        let text = "listen = \"127.0.0.1:0\"\nstate_dir = \"s\"\ndomain = \"d\"\n[tls]\n\
                    cert = \"c\"\nkey = \"k\"\nagent_ca = \"a\"\noperator_ca = \"o\"\n";
        let mut config = Config::parse(text, Path::new("x")).unwrap();
        config.tls = files.clone();
        config.domain = domain.to_owned();
        Settings::load(&config, &Arc::default(), &Refusals::default()).map(|_| ())
    }

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
            operator_crl: None,
        };
        load(&files, "example.com").unwrap();
        for domain in ["other.com", "example.co", "example.com/controller"] {
            let refused = load(&files, domain);
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
        let refused = load(&agents, "example.com");
        assert!(matches!(refused, Err(TlsError::OtherDomain { .. })));
        for (mode, open) in [(0o640, false), (0o644, true)] {
            fs::set_permissions(&files.key, fs::Permissions::from_mode(mode)).unwrap();
            let refused = matches!(load(&files, "example.com"), Err(TlsError::OpenKey(_)));
            assert_eq!(refused, open, "{mode:o}");
        }
    }
}
