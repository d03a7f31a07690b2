//! Who the agent is to the controller, and who the controller must be: TLS 1.3, mutual, with roles
//! in the certificates (`spiffe://<domain>/agent/<host>`, `spiffe://<domain>/controller/<name>`).

use std::path::PathBuf;
use std::sync::Arc;

use lockstep_proto::ids::{Digest, HostId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::Tls;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file is missing, or holds no PEM.
    #[error("cannot read {what} {path}")]
    Read {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// It holds no certificate.
    #[error("{0} holds no certificate")]
    Empty(PathBuf),
    /// The agent's certificate names no agent.
    #[error("{path} is not an agent's certificate: {why}")]
    NotAnAgent {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Certificate, key and trust anchors do not go together.
    #[error("the certificate, the key and the controller's CA cannot be used")]
    Unusable(#[from] rustls::Error),
    /// The trust anchors cannot be used.
    #[error("the controller's CA cannot be used")]
    Anchors(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The agent's certificate, with what it says.
#[derive(Debug)]
pub(crate) struct Identity {
    /// The domain that it belongs to.
    pub(crate) domain: String,
    /// The host that it names.
    pub(crate) host: HostId,
    /// When it begins, in seconds since 1970.
    pub(crate) not_before: i64,
    /// When it ends, in seconds since 1970.
    pub(crate) not_after: i64,
    chain: Vec<CertificateDer<'static>>,
}

impl Identity {
    /// Reads the certificate; asked anew for each connection, because it is renewed while the
    /// agent runs.
    pub(crate) fn load(tls: &Tls) -> Result<Self, TlsError> {
        let chain = certificates("the agent's certificate", &tls.cert)?;
        let wrong = |why: String| TlsError::NotAnAgent {
            path: tls.cert.clone(),
            why,
        };
        let leaf = chain
            .first()
            .ok_or_else(|| TlsError::Empty(tls.cert.clone()))?;
        let names = Names::of(leaf).map_err(wrong)?;
        let [(domain, role, name)] = names.spiffe.as_slice() else {
            return Err(wrong(format!(
                "it must have one name spiffe://<domain>/agent/<host>, it has {}",
                names.spiffe.len()
            )));
        };
        if role != "agent" {
            return Err(wrong(format!("its role is `{role}`")));
        }
        Ok(Self {
            domain: domain.clone(),
            host: name.parse().map_err(|error| wrong(format!("{error}")))?,
            not_before: names.not_before,
            not_after: names.not_after,
            chain,
        })
    }

    /// A number that follows from the certificate, and that nobody can tell beforehand.
    pub(crate) fn seed(&self) -> u32 {
        let leaf = self.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
        let digest = Digest::of(leaf);
        u32::from_be_bytes([digest.0[0], digest.0[1], digest.0[2], digest.0[3]])
    }

    /// One that only lives.
    #[cfg(test)]
    pub(crate) fn of_life(not_before: i64, not_after: i64, seed: u8) -> Self {
        Self {
            domain: "example.com".to_owned(),
            host: "app-1".parse().expect("a host's name"),
            not_before,
            not_after,
            chain: vec![CertificateDer::from(vec![seed])],
        }
    }
}

/// Domain, role and name of each `spiffe://` name of a certificate.
pub(crate) fn spiffe_names(
    certificate: &CertificateDer<'_>,
) -> Result<Vec<(String, String, String)>, String> {
    Names::of(certificate).map(|names| names.spiffe)
}

fn certificates(
    what: &'static str,
    path: &PathBuf,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |source| TlsError::Read {
        what,
        path: path.clone(),
        source,
    };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(read)?
        .collect::<Result<_, _>>()
        .map_err(read)?;
    if certificates.is_empty() {
        return Err(TlsError::Empty(path.clone()));
    }
    Ok(certificates)
}

/// What one connection is made with.
pub(crate) fn client_config(tls: &Tls, identity: &Identity) -> Result<Arc<ClientConfig>, TlsError> {
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|source| TlsError::Read {
        what: "the agent's key",
        path: tls.key.clone(),
        source,
    })?;
    let mut anchors = RootCertStore::empty();
    for anchor in certificates("the controller's CA", &tls.controller_ca)? {
        anchors.add(anchor)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(anchors), provider.clone())
        .build()
        .map_err(|error| TlsError::Anchors(Box::new(error)))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ControllerVerifier {
            inner: verifier,
            domain: identity.domain.clone(),
        }))
        .with_client_auth_cert(identity.chain.clone(), key)?;
    // A resumed session would pass by certificates that have expired or been revoked since.
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Why the trust anchors are not those of controllers, as far as that can be seen without one.
pub(crate) fn wrong_anchor(tls: &Tls, identity: &Identity) -> Option<String> {
    let file = tls.controller_ca.display();
    let mut anchors = RootCertStore::empty();
    for anchor in certificates("the controller's CA", &tls.controller_ca).ok()? {
        let issues = X509Certificate::from_der(&anchor).is_ok_and(|(_, parsed)| parsed.is_ca());
        if !issues {
            return Some(format!(
                "`controller_ca` {file} holds a certificate that issues none; it must be that of \
                 the issuer of controllers"
            ));
        }
        anchors.add(anchor).ok()?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(anchors), provider);
    let (leaf, chain) = identity.chain.split_first()?;
    let own = verifier.build().ok()?;
    own.verify_client_cert(leaf, chain, UnixTime::now())
        .is_ok()
        .then(|| {
            format!(
                "`controller_ca` {file} is the issuer of this agent's own certificate; it must be \
                 that of controllers"
            )
        })
}

/// The usual checks, and the role: another agent's certificate of the same domain is no
/// controller's, whoever signed it.
#[derive(Debug)]
struct ControllerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    domain: String,
}

/// A certificate with the right issuer and the wrong role.
#[derive(Debug, thiserror::Error)]
#[error("the certificate is not that of a controller of {domain}: {why}")]
struct NotAController {
    domain: String,
    why: String,
}

impl ControllerVerifier {
    fn check_role(&self, certificate: &CertificateDer<'_>) -> Result<(), String> {
        let names = Names::of(certificate)?;
        let [(domain, role, _)] = names.spiffe.as_slice() else {
            return Err(format!("it has {} SPIFFE names", names.spiffe.len()));
        };
        if role != "controller" {
            return Err(format!("its role is `{role}`"));
        }
        if *domain != self.domain {
            return Err(format!("its domain is `{domain}`"));
        }
        Ok(())
    }
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.inner
                .verify_server_cert(end_entity, intermediates, server_name, ocsp, now)?;
        self.check_role(end_entity).map_err(|why| {
            let error = NotAController {
                domain: self.domain.clone(),
                why,
            };
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
        })?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// The names of a certificate.
struct Names {
    /// Domain, role and name of each URI: all of them are `spiffe://` names.
    spiffe: Vec<(String, String, String)>,
    not_before: i64,
    not_after: i64,
}

impl Names {
    fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (after, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        if !after.is_empty() {
            return Err("something follows the certificate".to_owned());
        }
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| error.to_string())?;
        let spiffe = names
            .into_iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .map(|uri| {
                read_name(uri)
                    .ok_or_else(|| format!("`{uri}` is not spiffe://<domain>/<role>/<name>"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            spiffe,
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
        })
    }
}

/// Domain, role and name of a `spiffe://` name.
fn read_name(uri: &str) -> Option<(String, String, String)> {
    let mut parts = uri.strip_prefix("spiffe://")?.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(domain), Some(role), Some(name), None) if !domain.is_empty() => {
            Some((domain.into(), role.into(), name.into()))
        }
        _ => None,
    }
}

/// For fuzzers: what must hold of names in certificates.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    use super::{CertificateDer, read_name, spiffe_names};

    /// Domain, role and name of a URI; what was read is what stands there.
    pub fn san(uri: &str) -> Option<(String, String, String)> {
        let read = read_name(uri)?;
        let (domain, role, name) = &read;
        assert_eq!(format!("spiffe://{domain}/{role}/{name}"), uri);
        Some(read)
    }

    /// The one name of a certificate, if it has one.
    pub fn certificate_name(der: &[u8]) -> Option<(String, String, String)> {
        let names = spiffe_names(&CertificateDer::from(der)).ok()?;
        <[_; 1]>::try_from(names).ok().map(|[name]| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType};

    #[test]
    fn a_certificate_has_the_names_that_the_controller_reads_in_it() {
        let certificate = |uris: &[&str]| {
            let mut params = CertificateParams::default();
            let names = uris
                .iter()
                .map(|uri| SanType::URI((*uri).try_into().unwrap()));
            params.subject_alt_names = names.collect();
            let key = KeyPair::generate().unwrap();
            params.self_signed(&key).unwrap().der().to_vec()
        };
        let names = |der: Vec<u8>| spiffe_names(&CertificateDer::from(der));
        let own = "spiffe://example.com/agent/app-1";
        let read = ["example.com", "agent", "app-1"].map(str::to_owned);
        assert_eq!(names(certificate(&[own])), Ok(vec![read.into()]));
        let mut longer = certificate(&[own]);
        longer.push(0);
        assert!(names(longer).unwrap_err().contains("follows"));
        let with_another = names(certificate(&[own, "https://example.com/"]));
        assert!(with_another.unwrap_err().contains("https://example.com/"));
        assert!(names(certificate(&["spiffe://example.com/agent/a/b"])).is_err());
    }
}
