//! The controller as the command line reaches it: gRPC over TLS 1.3, both sides by certificate.

use std::error::Error as StdError;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lockstep_proto::wire::control_v1::control_service_client::ControlServiceClient;
use lockstep_proto::wire::{MAX_CONTROL_MESSAGE, control_v1 as wire};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{
    CertificateDer, InvalidDnsNameError, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName,
};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::clean;
use super::profile::Profile;
use crate::pki::secret_key;
use crate::tls;

/// How long dialling and the handshake may take, each.
const DIAL: Duration = Duration::from_secs(5);

/// How long a call may take that is not a stream. Submitting waits for the disk, not for hosts.
const CALL: Duration = Duration::from_secs(30);

/// How often an idle connection is asked whether it lives, and how long it may take to answer: as
/// between controller and agents.
const PING: Duration = Duration::from_secs(5);

/// The largest answer, in bytes: the document of a rollout on 10,000 hosts.
const MAX_ANSWER: usize = 64 << 20;

/// The controller's API.
pub(crate) type Api = ControlServiceClient<Channel>;

/// Why a controller did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// A file of the profile cannot be read.
    #[error("{what} {path} cannot be read")]
    File {
        /// Which part of the profile.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate is not an operator's.
    #[error("{path} is no operator's certificate: {why}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Everybody on this machine may act as the operator.
    #[error("the key {0} is readable by everybody")]
    OpenKey(PathBuf),
    /// The key is encrypted, and stays so.
    #[error("the key {path} cannot be decrypted")]
    Passphrase {
        /// The key.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Certificate and key do not make a TLS client.
    #[error("{path} cannot be used for TLS")]
    Tls {
        /// The certificate.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The name of the controller cannot stand in a certificate.
    #[error("`{name}` is no host name")]
    ServerName {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: InvalidDnsNameError,
    },
    /// Nobody answers there, or not one who may be trusted.
    #[error("the controller {address} cannot be reached")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The controller did not answer in time.
    #[error("the controller {address} has not answered within {} s", CALL.as_secs())]
    Silent {
        /// Where.
        address: String,
    },
    /// The controller refuses.
    #[error("{message}")]
    Refused {
        /// The class of the refusal.
        code: Code,
        /// Why, in the controller's words.
        message: String,
    },
    /// The controller cannot.
    #[error("the controller failed: {message}")]
    Failed {
        /// What went wrong there.
        message: String,
    },
}

impl ClientError {
    /// Whether trying again may help.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. })
    }

    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { address, source } => {
                Some(unreachable_hint(address, source.as_ref()))
            }
            Self::Silent { .. } => {
                Some("look at the controller's log for what it waits for".into())
            }
            Self::OpenKey(path) => Some(format!("chmod 0600 {}", path.display())),
            Self::Certificate { .. } | Self::Tls { .. } => {
                Some("make one with `lockstep operator add NAME --role ROLE`".into())
            }
            Self::Refused {
                code: Code::PermissionDenied,
                message,
            } if message.contains("group") || message.contains("role") => Some(
                "roles and groups are part of your certificate: `lockstep operator add NAME --role \
                 ROLE --group GROUP`"
                    .into(),
            ),
            Self::Refused {
                code: Code::NotFound,
                ..
            } => Some("`lockstep history` lists what this controller knows".into()),
            _ => None,
        }
    }
}

fn unreachable_hint(address: &str, source: &(dyn StdError + 'static)) -> String {
    let mut cause = Some(source);
    while let Some(error) = cause {
        if let Some(dial) = error.downcast_ref::<DialError>() {
            return match dial {
                DialError::Tls(_) => format!(
                    "something answers at {address}, but is not trusted: is `ca` the controllers' \
                     issuer, and does the controller's certificate name this address?"
                ),
                DialError::Identity(_) => {
                    format!("{address} is no controller of your trust domain: check `controller`")
                }
                _ => format!(
                    "is `lockstep serve` running there, and may this machine connect to {address}? \
                     the address is `--controller`, LOCKSTEP_CONTROLLER or `controller` in your \
                     profile"
                ),
            };
        }
        cause = match error.downcast_ref::<Broken>() {
            Some(broken) => broken.status.source(),
            None => error.source(),
        };
    }
    "the controller ended the connection: is your certificate an operator's, valid now, and of the \
     issuer that the controller trusts? and are there too many connections under your name, such \
     as commands that watch?"
        .to_owned()
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no connection within {} s", DIAL.as_secs())]
    Slow,
    #[error("the TLS handshake failed: {}", tls::words(.0))]
    Tls(io::Error),
    #[error("its certificate is not a controller's: {0}")]
    Identity(String),
}

/// A connection to the controller; it dials again by itself when it is next used.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    api: Api,
    address: String,
}

impl Client {
    /// Dials the controller of a profile.
    pub(crate) async fn connect(profile: &Profile) -> Result<Self, ClientError> {
        let dialer = Arc::new(Dialer::new(profile)?);
        let address = profile.controller.clone();
        let endpoint = Endpoint::from_static("http://controller.lockstep.internal")
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let connector = tower::service_fn(move |_: http::Uri| {
            let dialer = Arc::clone(&dialer);
            async move { dialer.dial().await.map(TokioIo::new) }
        });
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.map_err(|error| ClientError::Unreachable {
            address: address.clone(),
            source: beneath(error),
        })?;
        let api = ControlServiceClient::new(channel)
            .max_decoding_message_size(MAX_ANSWER)
            .max_encoding_message_size(MAX_CONTROL_MESSAGE);
        let client = Self { api, address };
        // TLS 1.3 tells of a refused certificate only with the first answer. That is no outage,
        // to be waited out.
        let request = wire::ListRolloutsRequest {
            limit: 1,
            open: true,
        };
        client
            .call(|mut api| async move { api.list_rollouts(request).await })
            .await?;
        Ok(client)
    }

    /// Makes one call: `client.call(|mut api| async move { api.pause(request).await })`.
    pub(crate) async fn call<T, F>(&self, call: impl FnOnce(Api) -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        match tokio::time::timeout(CALL, call(self.api.clone())).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.explain(status)),
            Err(_) => Err(ClientError::Silent {
                address: self.address.clone(),
            }),
        }
    }

    /// What a status means. One that came over the wire has no source; one that the connection
    /// itself gave has.
    pub(crate) fn explain(&self, status: Status) -> ClientError {
        let message = clean::line(status.message());
        let address = self.address.clone();
        if status.source().is_some() {
            let message = message.trim_start_matches("h2 protocol error: ").to_owned();
            return ClientError::Unreachable {
                address,
                source: Box::new(Broken { message, status }),
            };
        }
        match status.code() {
            Code::Unavailable => ClientError::Unreachable {
                address,
                source: message.into(),
            },
            Code::DeadlineExceeded => ClientError::Silent { address },
            Code::Internal | Code::Unknown | Code::DataLoss | Code::Unimplemented => {
                ClientError::Failed { message }
            }
            code => ClientError::Refused { code, message },
        }
    }

    /// Where the controller is.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}

/// A call that the connection ended. In a status's own words its causes stand twice.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Broken {
    message: String,
    status: Status,
}

/// The error that tonic wraps; its own words (`transport error`) say nothing.
fn beneath(error: tonic::transport::Error) -> Box<dyn StdError + Send + Sync> {
    let words = error.to_string();
    match error.source() {
        Some(source) if words == "transport error" => {
            Box::new(Beneath(clean::line(&source.to_string()), error))
        }
        _ => Box::new(error),
    }
}

/// Displays an error's source in its place, and keeps the chain below.
#[derive(Debug)]
struct Beneath(String, tonic::transport::Error);

impl std::fmt::Display for Beneath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Beneath {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.1.source()
    }
}

/// Makes connections.
struct Dialer {
    address: String,
    name: ServerName<'static>,
    domain: String,
    tls: TlsConnector,
}

impl Dialer {
    fn new(profile: &Profile) -> Result<Self, ClientError> {
        let roots = read_certificates("the controllers' issuer", &profile.ca)?;
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(roots);
        let chain = read_certificates("the certificate", &profile.cert)?;
        let key = read_key(profile)?;
        let (domain, _) = operator_of(&profile.cert, &chain)?;
        let config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(store)
            .with_client_auth_cert(chain, key);
        let mut config = config.map_err(|source| ClientError::Tls {
            path: profile.cert.clone(),
            source,
        })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would skip what is checked in a full handshake.
        config.resumption = rustls::client::Resumption::disabled();
        let name = ServerName::try_from(profile.host().to_owned()).map_err(|source| {
            ClientError::ServerName {
                name: profile.host().to_owned(),
                source,
            }
        })?;
        Ok(Self {
            address: profile.controller.clone(),
            name,
            domain,
            tls: TlsConnector::from(Arc::new(config)),
        })
    }

    async fn dial(&self) -> Result<TlsStream<TcpStream>, DialError> {
        let tcp = tokio::time::timeout(DIAL, TcpStream::connect(&self.address)).await;
        let tcp = tcp
            .map_err(|_| DialError::Slow)?
            .map_err(DialError::Connect)?;
        tcp.set_nodelay(true).map_err(DialError::Connect)?;
        let tls = tokio::time::timeout(DIAL, self.tls.connect(self.name.clone(), tcp)).await;
        let tls = tls.map_err(|_| DialError::Slow)?.map_err(DialError::Tls)?;
        let (_, session) = tls.get_ref();
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or_else(|| DialError::Identity("it has none".into()))?;
        check_controller(leaf, &self.domain).map_err(DialError::Identity)?;
        Ok(tls)
    }
}

/// Roles are told apart by URI, whatever else a certificate says.
fn check_controller(leaf: &CertificateDer<'_>, domain: &str) -> Result<(), String> {
    let prefix = format!("spiffe://{domain}/controller/");
    let uris = uris_of(leaf)?;
    match uris.as_slice() {
        [uri]
            if uri
                .strip_prefix(&prefix)
                .is_some_and(|name| !name.is_empty()) =>
        {
            Ok(())
        }
        [] => Err("it has no URI".to_owned()),
        uris => Err(format!("`{}` instead of `{prefix}...`", uris.join("`, `"))),
    }
}

/// The name in the operator's own certificate.
pub(crate) fn operator_name(profile: &Profile) -> Result<String, ClientError> {
    let chain = read_certificates("the certificate", &profile.cert)?;
    let (_, name) = operator_of(&profile.cert, &chain)?;
    Ok(name)
}

/// The trust domain and the name in an operator's own certificate; the controller must be of the
/// same domain.
fn operator_of(path: &Path, chain: &[CertificateDer<'_>]) -> Result<(String, String), ClientError> {
    let invalid = |why: String| ClientError::Certificate {
        path: path.to_owned(),
        why,
    };
    let leaf = chain
        .first()
        .ok_or_else(|| invalid("the file holds none".into()))?;
    let uris = uris_of(leaf).map_err(invalid)?;
    let found = match uris.as_slice() {
        [uri] => uri.strip_prefix("spiffe://").and_then(|rest| {
            let (domain, path) = rest.split_once('/')?;
            let name = path.strip_prefix("operator/")?;
            (!name.is_empty()).then(|| (domain.to_owned(), name.to_owned()))
        }),
        _ => None,
    };
    found.ok_or_else(|| invalid(format!("its URI is `{}`", uris.join("`, `"))))
}

fn uris_of(certificate: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|_| "it cannot be parsed".to_owned())?;
    let mut uris = Vec::new();
    for extension in parsed.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            for name in &names.general_names {
                if let GeneralName::URI(uri) = name {
                    uris.push(clean::line(uri));
                }
            }
        }
    }
    Ok(uris)
}

/// The key, once whoever may has said its passphrase, if it has one.
fn read_key(profile: &Profile) -> Result<PrivateKeyDer<'static>, ClientError> {
    let path = &profile.key;
    if tls::is_open(path) {
        return Err(ClientError::OpenKey(path.clone()));
    }
    if let Ok(pem) = fs::read_to_string(path)
        && secret_key::is_encrypted(&pem)
    {
        let failed = |source: io::Error| ClientError::Passphrase {
            path: path.clone(),
            source: source.into(),
        };
        let passphrase = profile.passphrase.ask(&path.display().to_string());
        let passphrase = passphrase.map_err(failed)?;
        let key = secret_key::decrypt(&pem, &passphrase);
        let key = key.map_err(|error| failed(io::Error::other(error)))?;
        return Ok(PrivatePkcs8KeyDer::from(key.to_vec()).into());
    }
    PrivateKeyDer::from_pem_file(path).map_err(|source| ClientError::File {
        what: "the key",
        path: path.clone(),
        source,
    })
}

fn read_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    read().map_err(|source| ClientError::File {
        what,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki;

    fn issued(kind: &str) -> (tempfile::TempDir, CertificateDer<'static>) {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path(), "example.com").unwrap();
        let out = dir.path();
        let issued = match kind {
            "controller" => pki::issue_controller(out, "c1", &["localhost".into()], out),
            "operator" => pki::issue_operator(out, &pki::Person::new("dora", &[]), out),
            _ => pki::issue_agent(out, "app-1", out),
        };
        let leaf = CertificateDer::from_pem_file(issued.unwrap().certificate).unwrap();
        (dir, leaf)
    }

    #[test]
    fn only_a_controller_of_the_same_domain_is_trusted() {
        let (_dir, controller) = issued("controller");
        assert!(check_controller(&controller, "example.com").is_ok());
        assert!(check_controller(&controller, "other.com").is_err());
        let (_dir, agent) = issued("agent");
        let why = check_controller(&agent, "example.com").unwrap_err();
        assert!(why.contains("spiffe://example.com/agent/app-1"), "{why}");
    }

    #[test]
    fn a_certificate_that_is_no_operators_is_refused_before_dialling() {
        let (_dir, operator) = issued("operator");
        let (domain, _) = operator_of(Path::new("x"), &[operator]).unwrap();
        assert_eq!(domain, "example.com");
        let (_dir, agent) = issued("agent");
        assert!(operator_of(Path::new("x"), &[agent]).is_err());
    }
}
