//! The three issuers, and the certificates that they sign.
//!
//! An installation has one issuer for controllers, one for agents and one for operators, so that
//! a certificate of one kind can never stand for another. A directory made by [`init`] holds all
//! three; it belongs on a machine of its own, not on the controller, which needs only the
//! issuers' certificates.
//!
//! ```text
//! DIR/domain                              the trust domain of every certificate
//! DIR/ca-{controllers,agents,operators}.{crt,key}
//! OUT/{controller,agent,operator}-NAME.{crt,key}
//! OUT/ca-*.crt                            the issuers of the peers: what goes to a host is whole
//! ```
//!
//! An operator's certificate holds groups (organisational units) and [`roles`]; its key may be
//! behind a passphrase ([`secret_key`]).

pub(crate) mod roles;
pub(crate) mod secret_key;

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lockstep_proto::ids::{HostId, InvalidId};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use rustls::pki_types::DnsName;

use self::roles::Roles;
use self::secret_key::Passphrase;

/// How long an issuer's own certificate is valid.
const ISSUER_LIFE: Duration = Duration::from_hours(10 * 365 * 24);

/// How long certificates of controllers and agents are valid.
pub(crate) const LEAF_LIFE: Duration = Duration::from_hours(90 * 24);

/// How long an operator's certificate is valid, if nobody says otherwise: a working day.
pub(crate) const OPERATOR_LIFE: Duration = Duration::from_hours(12);

/// The longest that an operator's certificate may be valid.
const LONGEST_OPERATOR_LIFE: Duration = Duration::from_hours(365 * 24);

/// Certificates are valid from so long before they were made: clocks differ.
const BACKDATED: Duration = Duration::from_mins(5);

/// A certificate and its key, written to files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Issued {
    /// The certificate, in PEM.
    pub(crate) certificate: PathBuf,
    /// Its private key, in PEM, readable by its owner only.
    pub(crate) key: PathBuf,
    /// The certificates of the issuers that its owner trusts, in PEM, beside the others.
    pub(crate) trusts: Vec<PathBuf>,
    /// When the certificate ends.
    pub(crate) not_after: SystemTime,
}

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PkiError {
    /// The directory holds issuers already, and they are not overwritten.
    #[error("{0} exists already; issuers are never overwritten")]
    Exists(PathBuf),
    /// The directory holds no issuers.
    #[error("{0} holds no issuers; make them with `lockstep pki init`")]
    NotInitialised(PathBuf),
    /// A trust domain that is none.
    #[error("`{0}` is no trust domain: 1 to 253 of a-z, 0-9, `-` and `.`")]
    Domain(String),
    /// A name that does not fit into a certificate's URI.
    #[error(
        "`{0}` is no name: 1 to 63 of A-Z, a-z, 0-9, `-`, `_` and `.`, not beginning with `.`, \
         and no `..`"
    )]
    Name(String),
    /// A name that no host has.
    #[error(transparent)]
    Host(#[from] InvalidId),
    /// An address that nobody dials.
    #[error(
        "`{0}` is no address: a DNS name such as `control.example.com`, or an IP address; \
         without scheme, port and brackets"
    )]
    Address(String),
    /// A group that does not fit into a subject.
    #[error("`{0}` is no group: 1 to 63 of A-Z, a-z, 0-9, `-` and `_`")]
    Group(String),
    /// A life that is no working life.
    #[error("an operator's certificate is valid for at least a minute and at most 365 days")]
    Life,
    /// A controller that nobody could dial.
    #[error("a controller's certificate needs at least one address that agents dial")]
    NoAddress,
    /// The directory holds the issuers of another installation, and they are not overwritten.
    #[error("{path} does not hold the issuer in {dir}")]
    OtherIssuer {
        /// The file that is there.
        path: PathBuf,
        /// Where this installation's issuers are.
        dir: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate could not be made or read.
    #[error("the certificate for `{name}` cannot be made")]
    Certificate {
        /// Whose.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// Makes the three issuers for a trust domain. A directory that has some is refused.
pub(crate) fn init(dir: &Path, domain: &str) -> Result<(), PkiError> {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if !(1..=253).contains(&domain.len()) || !domain.bytes().all(ok) {
        return Err(PkiError::Domain(domain.to_owned()));
    }
    make_directory(dir)?;
    let marker = dir.join("domain");
    if marker.exists() {
        return Err(PkiError::Exists(marker));
    }
    for kind in Kind::ALL {
        let (certificate, key) = kind.issuer_files(dir);
        for path in [&certificate, &key] {
            if path.exists() {
                return Err(PkiError::Exists(path.clone()));
            }
        }
        make_issuer(kind, domain, &certificate, &key)?;
    }
    // Last: a directory without it is not a finished one.
    write(&marker, 0o644, format!("{domain}\n").as_bytes())
}

/// Issues a controller's certificate; `addresses` are the DNS names and IP addresses by which
/// agents and operators dial it.
pub(crate) fn issue_controller(
    dir: &Path,
    name: &str,
    addresses: &[String],
    out: &Path,
) -> Result<Issued, PkiError> {
    if addresses.is_empty() {
        return Err(PkiError::NoAddress);
    }
    for address in addresses {
        let is_name = DnsName::try_from(address.as_str()).is_ok();
        if address.parse::<IpAddr>().is_err() && !is_name {
            return Err(PkiError::Address(address.clone()));
        }
    }
    let leaf = Leaf::new(Kind::Controllers, name)?;
    leaf.issue(dir, addresses, None, out)
}

/// Issues an agent's certificate for a host.
pub(crate) fn issue_agent(dir: &Path, host: &str, out: &Path) -> Result<Issued, PkiError> {
    Leaf::new(Kind::Agents, host)?.issue(dir, &[], None, out)
}

/// An operator to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Person<'a> {
    /// The operator's name.
    pub(crate) name: &'a str,
    /// What the operator may do. None at all: the certificate says nothing of roles, as those of
    /// releases before them.
    pub(crate) roles: Roles,
    /// What the operator may decide for.
    pub(crate) groups: &'a [String],
    /// How long the certificate is valid.
    pub(crate) life: Duration,
    /// What the key is encrypted with; none: it is not.
    pub(crate) passphrase: Option<&'a Passphrase>,
}

#[cfg(test)]
impl<'a> Person<'a> {
    /// Somebody who may do what everybody may whose certificate says nothing of roles.
    pub(crate) fn new(name: &'a str, groups: &'a [String]) -> Self {
        Self {
            name,
            roles: Roles::BEFORE_ROLES,
            groups,
            life: OPERATOR_LIFE,
            passphrase: None,
        }
    }
}

/// Issues an operator's certificate.
pub(crate) fn issue_operator(
    dir: &Path,
    person: &Person<'_>,
    out: &Path,
) -> Result<Issued, PkiError> {
    if person.life < Duration::from_mins(1) || person.life > LONGEST_OPERATOR_LIFE {
        return Err(PkiError::Life);
    }
    Leaf::new(Kind::Operators, person.name)?.issue(dir, &[], Some(person), out)
}

/// What an issuer signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Controllers,
    Agents,
    Operators,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Controllers, Self::Agents, Self::Operators];

    fn plural(self) -> &'static str {
        match self {
            Self::Controllers => "controllers",
            Self::Agents => "agents",
            Self::Operators => "operators",
        }
    }

    /// The word in the certificate's URI.
    fn singular(self) -> &'static str {
        self.plural().trim_end_matches('s')
    }

    /// Whose certificates a peer of this kind is shown.
    fn peers(self) -> &'static [Self] {
        match self {
            Self::Controllers => &[Self::Agents, Self::Operators],
            Self::Agents | Self::Operators => &[Self::Controllers],
        }
    }

    fn issuer_files(self, dir: &Path) -> (PathBuf, PathBuf) {
        let stem = format!("ca-{}", self.plural());
        (
            dir.join(format!("{stem}.crt")),
            dir.join(format!("{stem}.key")),
        )
    }
}

fn make_issuer(kind: Kind, domain: &str, certificate: &Path, key: &Path) -> Result<(), PkiError> {
    let name = format!("Lockstep issuer of {}", kind.plural());
    let failed = |source| PkiError::Certificate {
        name: name.clone(),
        source,
    };
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    let now = SystemTime::now();
    params.not_before = date(now - BACKDATED);
    params.not_after = date(now + ISSUER_LIFE);
    params.serial_number = Some(serial());
    params.distinguished_name = subject(&name, domain);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let issuer = params.self_signed(&pair).map_err(failed)?;
    write(key, 0o600, pair.serialize_pem().as_bytes())?;
    write(certificate, 0o644, issuer.pem().as_bytes())
}

/// A certificate to be.
struct Leaf<'a> {
    kind: Kind,
    name: &'a str,
}

impl<'a> Leaf<'a> {
    fn new(kind: Kind, name: &'a str) -> Result<Self, PkiError> {
        let ok = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        let fits = (1..=63).contains(&name.len())
            && name.bytes().all(ok)
            && !name.starts_with('.')
            && !name.contains("..");
        // An agent's name is its host's.
        if kind == Kind::Agents {
            name.parse::<HostId>()?;
        }
        if fits {
            Ok(Self { kind, name })
        } else {
            Err(PkiError::Name(name.to_owned()))
        }
    }

    fn issue(
        &self,
        dir: &Path,
        addresses: &[String],
        person: Option<&Person<'_>>,
        out: &Path,
    ) -> Result<Issued, PkiError> {
        let Self { kind, name } = *self;
        let failed = |source| PkiError::Certificate {
            name: name.to_owned(),
            source,
        };
        let (certificate, key) = kind.issuer_files(dir);
        let marker = dir.join("domain");
        if !marker.exists() {
            return Err(PkiError::NotInitialised(dir.to_owned()));
        }
        let domain = read(&marker)?.trim().to_owned();
        let issuer_key = KeyPair::from_pem(&read(&key)?).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(&read(&certificate)?, issuer_key).map_err(failed)?;

        let mut params = CertificateParams::default();
        let now = SystemTime::now();
        let not_after = now + person.map_or(LEAF_LIFE, |person| person.life);
        params.not_before = date(now - BACKDATED);
        params.not_after = date(not_after);
        params.serial_number = Some(serial());
        params.distinguished_name = subject(name, &domain);
        if let Some(person) = person {
            describe(person, &mut params.distinguished_name)?;
        }
        let uri = format!("spiffe://{domain}/{}/{name}", kind.singular());
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        for address in addresses {
            params
                .subject_alt_names
                .push(match address.parse::<IpAddr>() {
                    Ok(ip) => SanType::IpAddress(ip),
                    Err(_) => SanType::DnsName(address.clone().try_into().map_err(failed)?),
                });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match kind {
            Kind::Controllers => ExtendedKeyUsagePurpose::ServerAuth,
            Kind::Agents | Kind::Operators => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;

        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let signed = params.signed_by(&pair, &issuer).map_err(failed)?;
        make_directory(out)?;
        // First: if the directory is another installation's, nothing of it is touched.
        let trusts = kind.peers().iter();
        let trusts = trusts.map(|peer| hand_out(*peer, dir, out));
        let stem = format!("{}-{name}", kind.singular());
        let issued = Issued {
            trusts: trusts.collect::<Result<_, _>>()?,
            certificate: out.join(format!("{stem}.crt")),
            key: out.join(format!("{stem}.key")),
            not_after,
        };
        let pem = match person.and_then(|person| person.passphrase) {
            Some(passphrase) => secret_key::encrypt(&pair.serialize_der(), passphrase),
            None => pair.serialize_pem(),
        };
        write(&issued.key, 0o600, pem.as_bytes())?;
        write(&issued.certificate, 0o644, signed.pem().as_bytes())?;
        Ok(issued)
    }
}

/// Copies an issuer's certificate to those who trust it. A file that holds it already, perhaps
/// among others, stays as it is.
fn hand_out(kind: Kind, dir: &Path, out: &Path) -> Result<PathBuf, PkiError> {
    let (certificate, copy) = (kind.issuer_files(dir).0, kind.issuer_files(out).0);
    let pem = read(&certificate)?;
    if !copy.exists() {
        write(&copy, 0o644, pem.as_bytes())?;
    } else if !read(&copy)?.contains(pem.trim()) {
        return Err(PkiError::OtherIssuer {
            path: copy,
            dir: dir.to_owned(),
        });
    }
    Ok(copy)
}

/// Writes groups and roles into an operator's subject.
fn describe(person: &Person<'_>, subject: &mut DistinguishedName) -> Result<(), PkiError> {
    if !person.groups.is_empty() {
        subject.push(DnType::OrganizationalUnitName, group_list(person.groups)?);
    }
    if person.roles != Roles::default() {
        let attribute = DnType::CustomDnType(roles::ATTRIBUTE.to_vec());
        subject.push(attribute, person.roles.to_string());
    }
    Ok(())
}

/// The groups as the one organisational unit that a subject of ours has. Readers take every unit
/// of a subject, and split each at its commas.
fn group_list(groups: &[String]) -> Result<String, PkiError> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    for group in groups {
        if !(1..=63).contains(&group.len()) || !group.bytes().all(ok) {
            return Err(PkiError::Group(group.clone()));
        }
    }
    Ok(groups.join(","))
}

fn subject(name: &str, domain: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, domain);
    subject.push(DnType::CommonName, name);
    subject
}

/// 127 random bits: a serial number is positive.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}

fn date(at: SystemTime) -> time::OffsetDateTime {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

fn make_directory(dir: &Path) -> Result<(), PkiError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| file_error(dir, source))
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| file_error(path, source))
}

/// Writes a file as a whole or not at all; a key is never readable by others, not even for the
/// moment of its making.
fn write(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), PkiError> {
    let temporary = path.with_extension("tmp");
    let attempt = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(mode);
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    attempt().map_err(|source| file_error(path, source))
}

fn file_error(path: &Path, source: io::Error) -> PkiError {
    PkiError::File {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
