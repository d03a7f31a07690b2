//! `lockstep-agent join`: a machine becomes a host, by a token that an admin has made.
//!
//! ```text
//! pin: the controller shows that issuer -> token, request -> certificate -> agent.toml
//! ```
//!
//! The token goes to nobody but a controller of the issuer whose hash was given. It can be run
//! again after whatever ended it.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lockstep_proto::ids::{Digest, HostId};
use lockstep_proto::wire::enroll_v1::JoinRequest;
use lockstep_proto::wire::enroll_v1::enroll_service_client::EnrollServiceClient;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};
use tokio::net::TcpStream;
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::place::{Place, PlaceError};
use super::{PairError, Pending, in_pem, is_pair, settle};
use crate::config::{Config, ConfigError, Tls};
use crate::errors::chain;
use crate::identity::{IdentityError, StateLock, private_dir, replace_file};
use crate::process::User;
use crate::tls::{Identity, spiffe_names};
use crate::{exit, runtime, say};

/// For the address to accept, the handshake and the answer, each.
const WITHIN: Duration = Duration::from_secs(10);

/// Who the link runs as where the units are installed as they are shipped, and its directory.
const LINK_USER: &str = "lockstep-link";
const LINK_DIR: &str = "/var/lib/lockstep-link";

/// A token is shorter.
const LONGEST_TOKEN: u64 = 256;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("secret").required(true))]
pub(crate) struct Join {
    /// Where the controller is dialled: `host:port`
    #[arg(long, value_name = "ADDRESS")]
    controller: String,
    /// The token. Others on this machine can read it while this runs: --token-file is better
    #[arg(long, group = "secret")]
    token: Option<String>,
    /// A file whose first line is the token; `-` is standard input
    #[arg(long, value_name = "FILE", group = "secret")]
    token_file: Option<PathBuf>,
    /// The hash of the controllers' issuer's key: `sha256:` and 64 hexadecimal digits
    #[arg(long, value_name = "PIN")]
    ca_pin: Digest,
    /// The name in the controller's certificate, if not the host of --controller
    #[arg(long, value_name = "NAME")]
    controller_name: Option<String>,
    /// The host's configuration; it is written if there is none
    #[arg(long, value_name = "FILE", default_value = "/etc/lockstep/agent.toml")]
    config: PathBuf,
    /// The state directory of a configuration that is written
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lockstep-agent")]
    state_dir: PathBuf,
    /// A label of a configuration that is written: `name=value`; repeat it for more
    #[arg(long = "label", value_name = "LABEL", value_parser = label)]
    labels: Vec<(String, String)>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = parts.ok_or("a label is `name=value`")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Why this machine is no host yet.
#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error("the token cannot be read")]
    TokenFile(#[source] io::Error),
    #[error("this is no token; it is the host's name, a colon and 40 hexadecimal digits")]
    Token,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{path} says `{key} = \"{says}\"`, and this is for `{wanted}`")]
    Other {
        path: PathBuf,
        key: &'static str,
        says: String,
        wanted: String,
    },
    #[error(transparent)]
    State(#[from] IdentityError),
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error("{0} holds other issuers of controllers than the pinned one")]
    OtherIssuer(PathBuf),
    #[error("`{0}` is no address of a controller: write it as host:port")]
    Address(String),
    #[error("the link's certificate cannot be handed over: {0}")]
    LinkUser(String),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("TLS cannot be used")]
    Tls(#[from] rustls::Error),
    #[error("the controller at {address} cannot be reached, or is not the right one: {why}")]
    Connect { address: String, why: String },
    #[error("the controller refuses: {0}")]
    Refused(String),
    #[error("the controller did not do it: {0}")]
    Failed(String),
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl JoinError {
    fn exit(&self) -> u8 {
        match self {
            Self::TokenFile(_)
            | Self::Token
            | Self::Config(_)
            | Self::Other { .. }
            | Self::OtherIssuer(_)
            | Self::LinkUser(_)
            | Self::Address(_) => exit::USAGE,
            Self::State(IdentityError::InUse(_)) => exit::IN_USE,
            Self::Connect { .. } | Self::Refused(_) | Self::Failed(_) => exit::REFUSED,
            Self::State(_) | Self::Place(_) | Self::Pair(_) | Self::Tls(_) | Self::Write { .. } => {
                exit::INTERNAL
            }
        }
    }

    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Token | Self::TokenFile(_) => {
                "an admin makes one with `lockstep token create HOST`"
            }
            Self::Other { .. } => "change the one that is wrong; nothing was asked for yet",
            Self::OtherIssuer(_) => {
                "remove that file, or append the certificate of the issuer with this pin to it"
            }
            Self::State(IdentityError::InUse(_)) => "stop the agent that runs on this host",
            Self::Connect { .. } => {
                "the token was not sent; run it again when that is mended, within the token's ten \
                 minutes"
            }
            Self::Refused(_) => "when that is mended, ask an admin: `lockstep token create HOST`",
            Self::Failed(_) | Self::Pair(_) | Self::Write { .. } => {
                "run it again with the same token: the same key gets the same certificate"
            }
            _ => return None,
        })
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Join) -> u8 {
    let joined = match runtime() {
        Ok(runtime) => runtime.block_on(join(arguments)),
        Err(error) => {
            say(&chain(&error));
            return exit::INTERNAL;
        }
    };
    match joined {
        Ok(said) => {
            say(&said);
            exit::DONE
        }
        Err(error) => {
            say(&chain(&error));
            if let Some(hint) = error.hint() {
                say(&format!("hint: {hint}"));
            }
            error.exit()
        }
    }
}

async fn join(arguments: &Join) -> Result<String, JoinError> {
    let token = read_token(arguments)?;
    let host: HostId = token
        .split_once(':')
        .and_then(|(host, _)| host.parse().ok())
        .ok_or(JoinError::Token)?;
    let known = read_config(arguments, &host)?;
    let link = link_user(known.as_ref())?;
    let (state, tls) = match (&known, &link) {
        (Some(config), _) => (config.state_dir.clone(), config.tls.clone()),
        (None, Some(_)) => (
            arguments.state_dir.clone(),
            default_files(Path::new(LINK_DIR)),
        ),
        (None, None) => (
            arguments.state_dir.clone(),
            default_files(&arguments.state_dir),
        ),
    };
    private_dir(&state)?;
    // An agent that runs has a certificate, and renews it.
    let _lock = StateLock::take(&state)?;
    let place = Place::new(&tls, link.as_ref(), Path::new(LINK_DIR));
    place.prepare()?;
    place.with_pair(|| settle(&tls))??;
    let until = match place.with_pair(|| enrolled(&tls, &host))? {
        Some(until) => until,
        None => redeem(arguments, &token, &host, &tls, &place).await?,
    };
    place.hand_over()?;
    if known.is_none() {
        write_config(arguments, &host, &tls, link.as_ref())?;
    }
    Ok(format!(
        "this machine is {host}, with a certificate for {} h; it is renewed while the agent runs. \
         Next: systemctl enable --now lockstep-agent",
        until / 3600
    ))
}

/// Who the link runs as, if it is a process of its own: as the configuration says, or else as the
/// units that are installed here say.
fn link_user(known: Option<&Config>) -> Result<Option<User>, JoinError> {
    let find = |name: &str| User::find(name).map_err(|why| JoinError::LinkUser(why.message));
    match known {
        Some(config) => config.link_user.as_deref().map(find).transpose(),
        None if rustix::process::geteuid().is_root() => Ok(User::find(LINK_USER).ok()),
        None => Ok(None),
    }
}

fn read_token(arguments: &Join) -> Result<String, JoinError> {
    let mut text = String::new();
    let read = match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => return Ok(token.trim().to_owned()),
        (None, Some(path)) if path.as_os_str() == "-" => {
            io::stdin().take(LONGEST_TOKEN).read_to_string(&mut text)
        }
        (None, Some(path)) => std::fs::File::open(path)
            .and_then(|file| file.take(LONGEST_TOKEN).read_to_string(&mut text)),
        (None, None) => return Err(JoinError::Token),
    };
    read.map_err(JoinError::TokenFile)?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// The configuration that is there, if it is for this host and controller.
fn read_config(arguments: &Join, host: &HostId) -> Result<Option<Config>, JoinError> {
    let path = &arguments.config;
    if !path.exists() {
        return Ok(None);
    }
    let config = Config::load(path)?;
    let other = |key, says: &str, wanted: &str| {
        Err(JoinError::Other {
            path: path.clone(),
            key,
            says: says.to_owned(),
            wanted: wanted.to_owned(),
        })
    };
    if config.host != *host {
        return other("host", config.host.as_str(), host.as_str());
    }
    if config.controller != arguments.controller {
        return other("controller", &config.controller, &arguments.controller);
    }
    Ok(Some(config))
}

/// In the state directory, because the agent replaces them while it runs.
fn default_files(state: &Path) -> Tls {
    let file = |name: &str| state.join("tls").join(name);
    Tls {
        controller_ca: file("ca-controllers.crt"),
        cert: file("agent.crt"),
        key: file("agent.key"),
    }
}

/// For how many seconds the certificate that is there is valid; none if there is none.
fn enrolled(tls: &Tls, host: &HostId) -> Option<i64> {
    let identity = Identity::load(tls).ok()?;
    let left = identity
        .not_after
        .saturating_sub_unsigned(crate::exec::wall_clock().0 / 1000);
    let valid = identity.host == *host && left > 0 && is_pair(tls) && tls.controller_ca.exists();
    valid.then_some(left)
}

async fn redeem(
    arguments: &Join,
    token: &str,
    host: &HostId,
    tls: &Tls,
    place: &Place<'_>,
) -> Result<i64, JoinError> {
    // Durable before anybody is asked: whatever happens from here on, it is this key.
    let pending = place.with_pair(|| Pending::of(tls))??;
    let (channel, shown) = dial(arguments).await?;
    place.with_issuer(|| keep_issuer(&tls.controller_ca, &shown.issuer))??;
    let request = JoinRequest {
        token: token.to_owned(),
        csr: pending.request(&shown.domain, host)?.into(),
    };
    let mut client = EnrollServiceClient::new(channel);
    let answer = tokio::time::timeout(WITHIN, client.join(request)).await;
    let answer = answer.map_err(|_| JoinError::Failed("it does not answer".to_owned()))?;
    let answer = answer.map_err(|status| refused(&status))?.into_inner();
    let uri = format!("spiffe://{}/agent/{host}", shown.domain);
    place.with_pair(|| pending.complete(tls, &uri, &answer.certificates))??;
    let none = || JoinError::Failed("the certificate that it sent is not valid now".to_owned());
    place.with_pair(|| enrolled(tls, host))?.ok_or_else(none)
}

fn refused(status: &Status) -> JoinError {
    let why = status.message().to_owned();
    match status.code() {
        Code::PermissionDenied | Code::InvalidArgument | Code::FailedPrecondition => {
            JoinError::Refused(why)
        }
        Code::Unimplemented | Code::Unauthenticated => {
            JoinError::Refused("it lets nobody join".to_owned())
        }
        _ => JoinError::Failed(why),
    }
}

/// The issuer whose pin was given, for every connection from now on.
fn keep_issuer(path: &Path, issuer: &CertificateDer<'_>) -> Result<(), JoinError> {
    use rustls::pki_types::pem::PemObject as _;
    if path.exists() {
        let known = CertificateDer::pem_file_iter(path);
        let known = known.map(|all| all.filter_map(Result::ok).any(|one| one == *issuer));
        return match known {
            Ok(true) => Ok(()),
            _ => Err(JoinError::OtherIssuer(path.to_owned())),
        };
    }
    let written = replace_file(path, in_pem(issuer).as_bytes());
    written.map_err(|source| JoinError::Write {
        path: path.to_owned(),
        source,
    })
}

fn write_config(
    arguments: &Join,
    host: &HostId,
    tls: &Tls,
    link: Option<&User>,
) -> Result<(), JoinError> {
    let path = &arguments.config;
    let failed = |source| JoinError::Write {
        path: path.clone(),
        source,
    };
    // The link reads it, too, and there is no secret in it.
    let (directory_mode, mode) = match link {
        Some(_) => (0o755, 0o644),
        None => (0o700, 0o600),
    };
    if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        let mut made = std::fs::DirBuilder::new();
        made.recursive(true).mode(directory_mode);
        made.create(directory).map_err(failed)?;
    }
    let text = config_text(arguments, host, tls, link);
    replace_file(path, text.as_bytes()).map_err(failed)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)
}

fn config_text(arguments: &Join, host: &HostId, tls: &Tls, link: Option<&User>) -> String {
    // What is a string in JSON is one in TOML.
    let quote = |text: &str| serde_json::to_string(text).expect("a text has a JSON");
    let path = |path: &Path| quote(&path.to_string_lossy());
    let mut text = format!(
        "# Written by `lockstep-agent join`. Applications, services and databases go here, too;\n\
         # what plans may do goes into policy.toml beside this file.\n\
         host = {}\ncontroller = {}\n",
        quote(host.as_str()),
        quote(&arguments.controller),
    );
    if let Some(name) = &arguments.controller_name {
        let _ = writeln!(text, "controller_name = {}", quote(name));
    }
    if arguments.state_dir != Path::new("/var/lib/lockstep-agent") {
        let _ = writeln!(text, "state_dir = {}", path(&arguments.state_dir));
    }
    if let Some(User { name, .. }) = link {
        let _ = writeln!(text, "link_user = {}", quote(name));
    }
    let _ = writeln!(
        text,
        "\n[tls]\ncontroller_ca = {}\ncert = {}\nkey = {}",
        path(&tls.controller_ca),
        path(&tls.cert),
        path(&tls.key),
    );
    if !arguments.labels.is_empty() {
        text.push_str("\n[labels]\n");
    }
    for (name, value) in &arguments.labels {
        let _ = writeln!(text, "{} = {}", quote(name), quote(value));
    }
    text
}

/// What the controller has shown in the handshake.
#[derive(Debug, Clone)]
struct Shown {
    domain: String,
    issuer: CertificateDer<'static>,
}

async fn dial(arguments: &Join) -> Result<(tonic::transport::Channel, Shown), JoinError> {
    let address = arguments.controller.clone();
    let invalid = || JoinError::Address(address.clone());
    let host = address.rsplit_once(':').ok_or_else(invalid)?.0;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = arguments
        .controller_name
        .as_deref()
        .unwrap_or(host)
        .to_owned();
    let name = ServerName::try_from(name).map_err(|_| invalid())?;
    let shown = Arc::new(Mutex::new(None));
    let verifier = Pinned {
        pin: arguments.ca_pin,
        shown: Arc::clone(&shown),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connect = |why: String| JoinError::Connect {
        address: address.clone(),
        why,
    };
    let dialling = async {
        let tcp = TcpStream::connect(&address).await?;
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
        tls.connect(name, tcp).await
    };
    let dialled = tokio::time::timeout(WITHIN, dialling).await;
    let dialled = dialled.map_err(|_| connect("it does not answer".to_owned()))?;
    let stream = dialled.map_err(|error| connect(crate::link::tls_words(&error)))?;
    let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).take();
    let shown = shown.ok_or_else(|| connect("it has shown no certificate".to_owned()))?;
    let mut stream = Some(stream);
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or(io::ErrorKind::ConnectionRefused);
        async move { stream.map(TokioIo::new).map_err(io::Error::from) }
    });
    let origin = format!("https://{address}")
        .parse()
        .map_err(|_| invalid())?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|_| invalid())?.origin(origin);
    let channel = endpoint.connect_with_connector(connector).await;
    let channel = channel.map_err(|error| connect(chain(&error)))?;
    Ok((channel, shown))
}

/// Trusts a controller whose issuer has this pin, and which shows that issuer.
#[derive(Debug)]
struct Pinned {
    pin: Digest,
    shown: Arc<Mutex<Option<Shown>>>,
}

#[derive(Debug, thiserror::Error)]
enum NotPinned {
    #[error(
        "it shows no issuer with this pin. Is the pin right, and does `[enroll] controller_ca` of \
         the controller name that issuer?"
    )]
    Issuer,
    #[error("its certificate is not a controller's: {0}")]
    Role(String),
}

impl Pinned {
    fn refuse(why: NotPinned) -> rustls::Error {
        let other = OtherError(Arc::new(why));
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
    }

    fn is_pinned(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, parsed)| Digest::of(parsed.public_key().raw) == self.pin)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let issuer = intermediates.iter().find(|one| self.is_pinned(one));
        let issuer = issuer.ok_or_else(|| Self::refuse(NotPinned::Issuer))?;
        let mut anchors = RootCertStore::empty();
        anchors.add(issuer.clone().into_owned())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(anchors.into(), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let verified =
            verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)?;
        let names = spiffe_names(end_entity).map_err(|why| Self::refuse(NotPinned::Role(why)))?;
        let [(domain, role, _)] = &names[..] else {
            let why = format!("it has {} SPIFFE names", names.len());
            return Err(Self::refuse(NotPinned::Role(why)));
        };
        if role != "controller" {
            let why = format!("its role is `{role}`");
            return Err(Self::refuse(NotPinned::Role(why)));
        }
        let shown = Shown {
            domain: domain.clone(),
            issuer: issuer.clone().into_owned(),
        };
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown);
        Ok(verified)
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
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let provider = rustls::crypto::ring::default_provider();
        let algorithms = provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = rustls::crypto::ring::default_provider();
        provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
