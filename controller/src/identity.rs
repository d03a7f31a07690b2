//! Who is at the other end of a connection.
//!
//! An identity is two things that must agree: the URI in the certificate says what it claims to
//! be, and the issuer says what it may be. The TLS handshake holds them against each other
//! ([`crate::tls`]), so a [`Peer`] exists only where they do.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockstep_core::trust::Serial;
use lockstep_proto::ids::{HostId, OperatorName};
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use x509_parser::der_parser::oid::Oid;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::pki::roles::{self, Roles};

/// A peer's name, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Whoever has shown no certificate.
    Nobody,
    /// The agent of a host.
    Agent(HostId),
    /// A person, with what the person may do.
    Operator {
        /// The person's name.
        name: OperatorName,
        /// The groups of the certificate's organisational units: what the person may decide for.
        groups: Vec<String>,
        /// The roles of the certificate: what the person may ask for. None if it says nothing of
        /// roles.
        roles: Option<Roles>,
    },
}

impl Identity {
    /// What an operator may ask for; nothing for others. A certificate that says nothing of roles
    /// was made before there were any.
    pub(crate) fn roles(&self) -> Roles {
        match self {
            Self::Agent(_) | Self::Nobody => Roles::default(),
            Self::Operator { roles, .. } => roles.unwrap_or(Roles::BEFORE_ROLES),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("nobody"),
            Self::Agent(host) => write!(f, "agent {host}"),
            Self::Operator { name, .. } => write!(f, "operator {name}"),
        }
    }
}

/// A certificate that names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidIdentity {
    /// Not readable.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// The certificate has no URI, or several.
    #[error("the certificate has {0} URIs, but an identity is exactly one")]
    Uris(usize),
    /// The URI is not one of ours.
    #[error(
        "the certificate's URI `{uri}` is neither `spiffe://{domain}/agent/<host>` nor \
         `spiffe://{domain}/operator/<name>`"
    )]
    Uri {
        /// The URI.
        uri: String,
        /// The trust domain that is expected.
        domain: String,
    },
}

/// A certificate, as far as it says who somebody is.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    /// Who.
    pub(crate) identity: Identity,
    /// Its serial number.
    pub(crate) serial: Serial,
    /// Until when.
    pub(crate) not_after: SystemTime,
}

/// A peer whose certificate was verified; or one who has shown none.
#[derive(Debug, Clone)]
pub(crate) struct Peer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    claim: Claim,
    /// Its certificate and those that came with it, to be verified again when issuers change;
    /// empty for who has shown none.
    chain: Vec<CertificateDer<'static>>,
    address: SocketAddr,
    cut: CancellationToken,
    why: OnceLock<String>,
}

impl Peer {
    /// The peer with a certificate that the handshake has verified: the first of those it showed.
    pub(crate) fn new(
        shown: &[CertificateDer<'_>],
        domain: &str,
        address: SocketAddr,
    ) -> Result<Self, InvalidIdentity> {
        let certificate = shown.first().ok_or(InvalidIdentity::Unreadable)?;
        let claim = read(certificate, domain)?;
        let chain = shown.iter().map(|one| one.clone().into_owned()).collect();
        Ok(Self::with(claim, chain, address))
    }

    /// Somebody without a certificate.
    pub(crate) fn nobody(address: SocketAddr) -> Self {
        let claim = Claim {
            identity: Identity::Nobody,
            serial: Serial::from_bytes(&[]),
            not_after: SystemTime::now() + Duration::from_hours(1),
        };
        Self::with(claim, vec![], address)
    }

    fn with(claim: Claim, chain: Vec<CertificateDer<'static>>, address: SocketAddr) -> Self {
        Self(Arc::new(Inner {
            claim,
            chain,
            address,
            cut: CancellationToken::new(),
            why: OnceLock::new(),
        }))
    }

    /// An agent without a certificate, on a simulated network.
    #[cfg(feature = "faults")]
    pub(crate) fn simulated(host: HostId, not_after: SystemTime) -> Self {
        let claim = Claim {
            identity: Identity::Agent(host),
            serial: Serial::from_bytes(&[1]),
            not_after,
        };
        Self::with(claim, vec![], SocketAddr::from(([127, 0, 0, 1], 1)))
    }

    /// Somebody with a certificate that is valid for a while.
    #[cfg(test)]
    pub(crate) fn of(identity: Identity, serial: Serial) -> Self {
        let claim = Claim {
            identity,
            serial,
            not_after: SystemTime::now() + Duration::from_hours(1),
        };
        Self::with(claim, vec![], SocketAddr::from(([127, 0, 0, 1], 1)))
    }

    /// Tells every stream of this peer to end, and why; the first reason counts.
    pub(crate) fn cut(&self, why: String) {
        let _ = self.0.why.set(why);
        self.0.cut.cancel();
    }

    /// Resolves when the peer's streams are to end.
    pub(crate) fn when_cut(&self) -> &CancellationToken {
        &self.0.cut
    }

    /// Whether they were told to.
    pub(crate) fn is_cut(&self) -> bool {
        self.0.cut.is_cancelled()
    }

    /// What a stream that is cut says.
    pub(crate) fn cut_status(&self) -> Status {
        let why = self
            .0
            .why
            .get()
            .map_or("it may do nothing any more", String::as_str);
        Status::permission_denied(format!("{}: {why}", self.identity()))
    }

    /// The certificates that it has shown, its own first.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    /// Who it is.
    pub(crate) fn identity(&self) -> &Identity {
        &self.0.claim.identity
    }

    /// Where it dials from.
    pub(crate) fn address(&self) -> SocketAddr {
        self.0.address
    }

    /// Its certificate's serial number.
    pub(crate) fn serial(&self) -> &Serial {
        &self.0.claim.serial
    }

    /// When its certificate ends.
    pub(crate) fn not_after(&self) -> SystemTime {
        self.0.claim.not_after
    }

    /// How long its certificate is valid; zero once it has ended. A connection may outlive it,
    /// so each call and each stream asks.
    pub(crate) fn remaining(&self) -> Duration {
        let left = self.0.claim.not_after.duration_since(SystemTime::now());
        left.unwrap_or_default()
    }

    /// The host that this agent acts for.
    pub(crate) fn agent(&self) -> Result<&HostId, Status> {
        match self.identity() {
            Identity::Nobody => Err(Status::unauthenticated("no certificate")),
            Identity::Agent(host) => Ok(host),
            Identity::Operator { name, .. } => Err(Status::permission_denied(format!(
                "this is for agents, and {name} is an operator"
            ))),
        }
    }

    /// The operator, with groups.
    pub(crate) fn operator(&self) -> Result<(&OperatorName, &[String]), Status> {
        match self.identity() {
            Identity::Nobody => Err(Status::unauthenticated("no certificate")),
            Identity::Operator { name, groups, .. } => Ok((name, groups)),
            Identity::Agent(host) => Err(Status::permission_denied(format!(
                "this is for operators, and {host} is an agent"
            ))),
        }
    }
}

/// The URIs of a certificate.
pub(crate) fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>, InvalidIdentity> {
    let parsed = parse(certificate)?;
    let uris = uris_of(&parsed)?;
    Ok(uris.into_iter().map(ToOwned::to_owned).collect())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, InvalidIdentity> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(InvalidIdentity::Unreadable),
    }
}

fn uris_of<'a>(parsed: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, InvalidIdentity> {
    let names = parsed.subject_alternative_name();
    let names = names.map_err(|_| InvalidIdentity::Unreadable)?;
    let names = names.map_or(&[][..], |names| &names.value.general_names[..]);
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    Ok(uris.collect())
}

/// Whom a certificate's URI names.
enum Named {
    Agent(HostId),
    Operator(OperatorName),
}

impl Named {
    fn read(uri: &str, domain: &str) -> Option<Self> {
        let path = uri.strip_prefix("spiffe://")?.strip_prefix(domain)?;
        if let Some(host) = path.strip_prefix("/agent/") {
            return Some(Self::Agent(host.parse().ok()?));
        }
        let name = path.strip_prefix("/operator/")?;
        let ok = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let fits = (1..=63).contains(&name.len()) && name.bytes().all(ok);
        fits.then(|| Self::Operator(name.to_owned()))
    }
}

/// What a certificate claims.
pub(crate) fn read(
    certificate: &CertificateDer<'_>,
    domain: &str,
) -> Result<Claim, InvalidIdentity> {
    let parsed = parse(certificate)?;
    let uris = uris_of(&parsed)?;
    let [uri] = uris[..] else {
        return Err(InvalidIdentity::Uris(uris.len()));
    };
    let invalid = || InvalidIdentity::Uri {
        uri: uri.to_owned(),
        domain: domain.to_owned(),
    };
    let identity = match Named::read(uri, domain).ok_or_else(invalid)? {
        Named::Agent(host) => Identity::Agent(host),
        Named::Operator(name) => {
            let units = parsed.subject().iter_organizational_unit();
            let groups = units
                .filter_map(|unit| unit.as_str().ok())
                .flat_map(|unit| unit.split(','))
                .map(|group| group.trim().to_owned())
                .filter(|group| !group.is_empty())
                .collect();
            Identity::Operator {
                name,
                groups,
                roles: roles_of(&parsed),
            }
        }
    };
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(Claim {
        identity,
        serial: Serial::from_bytes(parsed.raw_serial()),
        not_after: UNIX_EPOCH + Duration::from_secs(seconds),
    })
}

/// The roles of a subject; none if it does not speak of any.
fn roles_of(parsed: &X509Certificate<'_>) -> Option<Roles> {
    let attribute = Oid::from(&roles::ATTRIBUTE).expect("an identifier of four numbers");
    let found = parsed.subject().iter_by_oid(&attribute);
    let found = found.map(|value| Roles::read(value.as_str().unwrap_or_default()));
    found.reduce(Roles::with)
}

/// For fuzzers: what must hold of names in certificates.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    use super::{CertificateDer, Identity, Named, read};

    /// Role and name of a URI of this domain; what was read is what stands there.
    pub fn san(uri: &str, domain: &str) -> Option<(&'static str, String)> {
        let (role, name) = match Named::read(uri, domain)? {
            Named::Agent(host) => ("agent", host.to_string()),
            Named::Operator(name) => ("operator", name),
        };
        assert_eq!(format!("spiffe://{domain}/{role}/{name}"), uri);
        Some((role, name))
    }

    /// Role and name of a certificate of this domain.
    pub fn certificate_name(der: &[u8], domain: &str) -> Option<(&'static str, String)> {
        let claim = read(&CertificateDer::from(der), domain).ok()?;
        let serial = claim.serial.to_string();
        if let Ok(read) = serial.parse::<lockstep_core::trust::Serial>() {
            assert_eq!(read, claim.serial);
        }
        claim.identity.roles();
        match claim.identity {
            Identity::Agent(host) => Some(("agent", host.to_string())),
            Identity::Operator { name, groups, .. } => {
                assert!(
                    groups
                        .iter()
                        .all(|group| !group.is_empty() && group.trim() == group)
                );
                Some(("operator", name))
            }
            Identity::Nobody => unreachable!("a certificate names somebody"),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::pki;

    #[test]
    fn a_certificate_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        pki::init(dir, "example.com").unwrap();
        let agent = pki::issue_agent(dir, "app-1", dir).unwrap();
        let groups = ["dba".to_owned(), "qa_lead".to_owned()];
        let mut person = pki::Person::new("dora", &groups);
        person.roles = Roles::of(&[roles::Role::Viewer, roles::Role::Admin]);
        let operator = pki::issue_operator(dir, &person, dir).unwrap();
        let controller = pki::issue_controller(dir, "c1", &["localhost".into()], dir).unwrap();
        let read_file = |path| {
            let certificate = CertificateDer::from_pem_file(path).unwrap();
            let claim = read(&certificate, "example.com")?;
            Ok::<_, InvalidIdentity>((claim.identity, claim.not_after))
        };

        let (identity, not_after) = read_file(&agent.certificate).unwrap();
        assert_eq!(identity, Identity::Agent("app-1".parse().unwrap()));
        let life = agent.not_after.duration_since(not_after).unwrap();
        assert!(life < Duration::from_secs(1), "{life:?}");
        let (identity, _) = read_file(&operator.certificate).unwrap();
        assert_eq!(
            identity,
            Identity::Operator {
                name: "dora".into(),
                groups: groups.to_vec(),
                roles: Some(person.roles),
            }
        );
        // As a release before roles made it.
        person.roles = Roles::default();
        let before = pki::issue_operator(dir, &person, dir).unwrap();
        let (identity, _) = read_file(&before.certificate).unwrap();
        assert!(matches!(identity, Identity::Operator { roles: None, .. }));
        assert_eq!(identity.roles(), Roles::BEFORE_ROLES);
        // A controller is nobody that may dial a controller.
        assert!(matches!(
            read_file(&controller.certificate),
            Err(InvalidIdentity::Uri { .. })
        ));
        let certificate = CertificateDer::from_pem_file(&agent.certificate).unwrap();
        for domain in ["example.org", "example.co", "example.com/agent", ""] {
            assert!(read(&certificate, domain).is_err(), "{domain}");
        }
    }
}
