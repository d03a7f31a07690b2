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

/// How long an issuer's own certificate is valid.
const ISSUER_LIFE: Duration = Duration::from_hours(10 * 365 * 24);

/// How long other certificates are valid.
pub(crate) const LEAF_LIFE: Duration = Duration::from_hours(90 * 24);

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
    leaf.issue(dir, addresses, &[], out)
}

/// Issues an agent's certificate for a host.
pub(crate) fn issue_agent(dir: &Path, host: &str, out: &Path) -> Result<Issued, PkiError> {
    Leaf::new(Kind::Agents, host)?.issue(dir, &[], &[], out)
}

/// Issues an operator's certificate; `groups` are what the operator may decide for.
pub(crate) fn issue_operator(
    dir: &Path,
    name: &str,
    groups: &[String],
    out: &Path,
) -> Result<Issued, PkiError> {
    Leaf::new(Kind::Operators, name)?.issue(dir, &[], groups, out)
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
        groups: &[String],
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
        let not_after = now + LEAF_LIFE;
        params.not_before = date(now - BACKDATED);
        params.not_after = date(not_after);
        params.serial_number = Some(serial());
        params.distinguished_name = subject(name, &domain);
        if !groups.is_empty() {
            let groups = group_list(groups)?;
            let unit = &mut params.distinguished_name;
            unit.push(DnType::OrganizationalUnitName, groups);
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
        write(&issued.key, 0o600, pair.serialize_pem().as_bytes())?;
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
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn issuers_are_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.com").unwrap();
        let before = fs::read(dir.path().join("ca-agents.key")).unwrap();
        assert!(matches!(
            init(dir.path(), "example.com"),
            Err(PkiError::Exists(_))
        ));
        assert_eq!(fs::read(dir.path().join("ca-agents.key")).unwrap(), before);
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.com").unwrap();
        let issued = issue_agent(dir.path(), "app-1", &dir.path().join("out")).unwrap();
        for key in [issued.key, dir.path().join("ca-agents.key")] {
            let mode = fs::metadata(&key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", key.display());
        }
    }

    #[test]
    fn what_is_issued_comes_with_the_issuers_that_its_owner_trusts() {
        let dir = tempfile::tempdir().unwrap();
        let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
        init(&pki, "example.com").unwrap();
        let files = |of: &Path| {
            let files = fs::read_dir(of).unwrap().map(|file| file.unwrap());
            let mut names: Vec<String> = files
                .map(|file| file.file_name().into_string().unwrap())
                .collect();
            names.sort();
            fs::remove_dir_all(of).unwrap();
            names
        };
        let issued = issue_controller(&pki, "main", &["localhost".to_owned()], &out).unwrap();
        let trusted = [out.join("ca-agents.crt"), out.join("ca-operators.crt")];
        assert_eq!(issued.trusts, trusted);
        let issuer = fs::read(pki.join("ca-agents.crt")).unwrap();
        assert_eq!(fs::read(&trusted[0]).unwrap(), issuer);
        let expected = ["ca-agents.crt", "ca-operators.crt", "controller-main.crt"];
        assert_eq!(files(&out)[..3], expected);
        issue_agent(&pki, "app-1", &out).unwrap();
        let expected = ["agent-app-1.crt", "agent-app-1.key", "ca-controllers.crt"];
        assert_eq!(files(&out), expected);
        issue_operator(&pki, "olga", &[], &out).unwrap();
        let expected = ["ca-controllers.crt", "operator-olga.crt"];
        assert_eq!(files(&out)[..2], expected);
    }

    /// Whoever follows the setting-up page ends with the files that its examples name.
    #[test]
    fn the_setting_up_page_names_what_is_issued() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/setup.md");
        let page = fs::read_to_string(page).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
        init(&pki, "example.com").unwrap();
        issue_controller(&pki, "main", &["localhost".to_owned()], &out).unwrap();
        issue_agent(&pki, "app-1", &out).unwrap();
        issue_operator(&pki, "olga", &[], &out).unwrap();
        let words = page.split(['"', '`']).map(Path::new);
        let files = words.filter(|word| {
            let kind = word.extension().and_then(|kind| kind.to_str());
            matches!(kind, Some("crt" | "key"))
        });
        let named = files.filter_map(|file| file.file_name()?.to_str());
        let named: std::collections::BTreeSet<&str> = named.collect();
        let issued = fs::read_dir(&out)
            .unwrap()
            .map(|file| file.unwrap().file_name());
        let issued: Vec<String> = issued.map(|name| name.into_string().unwrap()).collect();
        assert_eq!(named, issued.iter().map(String::as_str).collect());
    }

    #[test]
    fn issuers_of_others_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
        init(&pki, "example.com").unwrap();
        issue_agent(&pki, "app-1", &out).unwrap();
        // While an issuer is replaced, both are trusted.
        let file = out.join("ca-controllers.crt");
        let both = format!("# old\n{}", fs::read_to_string(&file).unwrap());
        fs::write(&file, &both).unwrap();
        issue_agent(&pki, "app-1", &out).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), both);

        let other = dir.path().join("other");
        init(&other, "example.com").unwrap();
        let before = fs::read(out.join("agent-app-1.crt")).unwrap();
        let refused = issue_agent(&other, "app-1", &out);
        assert!(matches!(refused, Err(PkiError::OtherIssuer { .. })));
        assert_eq!(fs::read_to_string(&file).unwrap(), both);
        assert_eq!(fs::read(out.join("agent-app-1.crt")).unwrap(), before);
        // Beside the issuers themselves nothing is copied.
        issue_agent(&pki, "app-1", &pki).unwrap();
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.com").unwrap();
        for name in ["", "../x", "a/b", "..", ".a", "APP-1", "a b"] {
            let refused = issue_agent(dir.path(), name, dir.path());
            assert!(matches!(refused, Err(PkiError::Host(_))), "{name:?}");
            let refused = issue_operator(dir.path(), name, &[], dir.path());
            let fits = name == "APP-1";
            assert_eq!(refused.is_ok(), fits, "{name:?}");
        }
        let refused = issue_agent(dir.path(), "UPPER_host", dir.path()).unwrap_err();
        let refused = refused.to_string();
        assert!(
            refused.contains("a-z, 0-9") && !refused.contains("A-Z"),
            "{refused}"
        );
        assert!(matches!(
            init(&dir.path().join("x"), "not a domain"),
            Err(PkiError::Domain(_))
        ));
        let groups = ["a,b".to_owned()];
        assert!(matches!(
            issue_operator(dir.path(), "dora", &groups, dir.path()),
            Err(PkiError::Group(_))
        ));
    }

    #[test]
    fn a_controller_without_addresses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), "example.com").unwrap();
        let refused = issue_controller(dir.path(), "c1", &[], dir.path());
        assert!(matches!(refused, Err(PkiError::NoAddress)));
        for address in [
            "",
            "foo bar",
            "http://x",
            "127.0.0.1:7443",
            "[::1]",
            "x:1",
            "a/b",
        ] {
            let addresses = ["localhost".to_owned(), address.to_owned()];
            let refused = issue_controller(dir.path(), "c1", &addresses, dir.path());
            assert!(matches!(refused, Err(PkiError::Address(_))), "{address:?}");
        }
        let addresses = ["control.example.com", "127.0.0.1", "::1"].map(ToOwned::to_owned);
        issue_controller(dir.path(), "c1", &addresses, dir.path()).unwrap();
    }
}
