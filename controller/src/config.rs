//! The controller's configuration file.
//!
//! ```toml
//! listen = "0.0.0.0:7443"            # port 0 takes a free one
//! state_dir = "/var/lib/lockstep"    # journal, plans, logs
//! domain = "example.com"             # the trust domain of every certificate
//! secrets_dir = "/etc/lockstep/secrets"
//!
//! [tls]
//! cert = "controller.crt"            # relative paths: from the file's own directory
//! key = "controller.key"
//! agent_ca = "ca-agents.crt"
//! operator_ca = "ca-operators.crt"
//! operator_crl = "operators.crl"     # perhaps: operators' certificates that are void
//!
//! [enroll]                           # only where hosts may join, and renew their certificates
//! agent_ca_key = "ca-agents.key"     # of the first fitting one in `agent_ca`
//! controller_ca = "ca-controllers.crt"
//! life = "24h"                       # of what is issued
//!
//! [break_glass]                      # only where two people may let a gate be met, for an hour at most
//! group = "incident_lead"            # both are of this group
//!
//! [journal]
//! compact_above = 200000             # records; then ended rollouts go into an archive. 0: never
//!
//! [email]                            # only for `notify.email`
//! host = "smtp.example.com"
//! port = 587
//! security = "starttls"              # or "tls", or "none" (without a password only)
//! from = "Lockstep <lockstep@example.com>"
//! user = "lockstep"
//! password = "secret://smtp"         # a file in `secrets_dir`, never the value itself
//! ```

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::values::Period;
use serde::Deserialize;

/// A configuration that was read and holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    /// Where agents and operators dial.
    pub(crate) listen: SocketAddr,
    /// Where the controller keeps its state.
    pub(crate) state_dir: PathBuf,
    /// The trust domain of every certificate.
    pub(crate) domain: String,
    /// Certificates.
    pub(crate) tls: TlsFiles,
    /// How hosts join; none if they may not.
    pub(crate) enroll: Option<Enroll>,
    /// Where `secret://NAME` is found; none if the controller uses no secrets.
    pub(crate) secrets_dir: Option<PathBuf>,
    /// The group two of whom may break the glass of a gate; none if nobody may.
    pub(crate) break_glass: Option<String>,
    /// The journal is compacted once it has more records than this; none: never.
    pub(crate) compact_above: Option<u64>,
    /// How mail is sent; none if it is not.
    pub(crate) email: Option<Email>,
}

/// The files of the controller's identity, and of whom it trusts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsFiles {
    /// The controller's certificate, then its intermediates, in PEM.
    pub(crate) cert: PathBuf,
    /// Its private key, in PEM.
    pub(crate) key: PathBuf,
    /// The agents' issuers, in PEM.
    pub(crate) agent_ca: PathBuf,
    /// The operators' issuers, in PEM. None of them may be an agents' issuer too.
    pub(crate) operator_ca: PathBuf,
    /// The operators' revocation lists, in PEM; absent: no certificate of theirs is revoked.
    pub(crate) operator_crl: Option<PathBuf>,
}

/// How hosts join and renew their certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Enroll {
    /// The key of one of the agents' issuers, in PEM.
    pub(crate) agent_ca_key: PathBuf,
    /// The controllers' issuers, in PEM: hosts that join know the hash of one.
    pub(crate) controller_ca: PathBuf,
    /// How long a certificate lives.
    pub(crate) life: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEnroll {
    agent_ca_key: PathBuf,
    controller_ca: PathBuf,
    life: Option<Period>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBreakGlass {
    group: String,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawJournal {
    compact_above: Option<u64>,
}

/// What a controller reads at its start in half a second: about 70,000 orders.
const COMPACT_ABOVE: u64 = 200_000;

/// How long an agent's certificate lives, if nobody says otherwise.
const AGENT_LIFE: Duration = Duration::from_hours(24);

/// The bounds of what may be said otherwise: renewing takes a moment, and what lives for long is
/// made by `lockstep pki agent`.
const AGENT_LIVES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(4)..=Duration::from_hours(30 * 24);

/// How mail is sent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Email {
    /// The mail server.
    pub(crate) host: String,
    /// Its port; absent: 587, 465 or 25, as `security` says.
    pub(crate) port: Option<u16>,
    /// How the connection is protected.
    #[serde(default)]
    pub(crate) security: EmailSecurity,
    /// The sender: `name@example.com` or `Name <name@example.com>`.
    pub(crate) from: String,
    /// Who logs in; absent: nobody.
    pub(crate) user: Option<String>,
    /// `secret://NAME`; needed with `user`.
    pub(crate) password: Option<String>,
}

/// How the connection to a mail server is protected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EmailSecurity {
    /// Plain first, then TLS; a server without it is refused.
    #[default]
    Starttls,
    /// TLS from the first byte.
    Tls,
    /// Not at all: for a relay on the same machine.
    None,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration {path} cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML, or has keys that are not known, or lacks some.
    #[error("the configuration {path} is not valid")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where, and what is wrong.
        #[source]
        source: toml::de::Error,
    },
    /// A value that does not fit.
    #[error("`{key}` in the configuration {path}: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    listen: SocketAddr,
    state_dir: PathBuf,
    domain: String,
    secrets_dir: Option<PathBuf>,
    tls: TlsFiles,
    enroll: Option<RawEnroll>,
    break_glass: Option<RawBreakGlass>,
    #[serde(default)]
    journal: RawJournal,
    email: Option<Email>,
}

impl Config {
    /// Reads a configuration file.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads a configuration's text; `path` is where it came from.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|source| ConfigError::Invalid {
            path: path.to_owned(),
            source,
        })?;
        let invalid = |key, why: &str| ConfigError::Value {
            path: path.to_owned(),
            key,
            why: why.to_owned(),
        };
        let base = path.parent().unwrap_or_else(|| Path::new(""));
        let RawConfig {
            listen,
            state_dir,
            domain,
            secrets_dir,
            tls,
            enroll,
            break_glass,
            journal,
            email,
        } = raw;
        let life = enroll.as_ref().and_then(|enroll| enroll.life);
        let life = life.map_or(AGENT_LIFE, Period::to_std);
        if !AGENT_LIVES.contains(&life) {
            return Err(invalid(
                "enroll.life",
                "is at least 4 seconds and at most 30 days",
            ));
        }
        if domain.is_empty() || domain.contains(['/', ':']) {
            let why = "must be the trust domain of the certificates, such as `example.com`";
            return Err(invalid("domain", why));
        }
        let break_glass = break_glass.map(|it| it.group);
        if break_glass.as_ref().is_some_and(|it| it.trim().is_empty()) {
            let why = "must name a group of operators, such as `incident_lead`";
            return Err(invalid("break_glass.group", why));
        }
        if let Some(email) = &email {
            match (&email.user, &email.password) {
                (None, None) => {}
                (Some(_), Some(password)) => {
                    if !password.starts_with("secret://") {
                        let why = "must name a file of `secrets_dir`, such as `secret://smtp`";
                        return Err(invalid("email.password", why));
                    }
                    if email.security == EmailSecurity::None {
                        let why = "a password is sent over TLS only; use `starttls` or `tls`";
                        return Err(invalid("email.security", why));
                    }
                    if secrets_dir.is_none() {
                        let why = "is needed, because `email.password` is a secret";
                        return Err(invalid("secrets_dir", why));
                    }
                }
                _ => {
                    return Err(invalid(
                        "email.user",
                        "needs `email.password`, and vice versa",
                    ));
                }
            }
        }
        Ok(Self {
            listen,
            state_dir: base.join(state_dir),
            domain,
            tls: TlsFiles {
                cert: base.join(tls.cert),
                key: base.join(tls.key),
                agent_ca: base.join(tls.agent_ca),
                operator_ca: base.join(tls.operator_ca),
                operator_crl: tls.operator_crl.map(|path| base.join(path)),
            },
            enroll: enroll.map(|enroll| Enroll {
                agent_ca_key: base.join(enroll.agent_ca_key),
                controller_ca: base.join(enroll.controller_ca),
                life,
            }),
            secrets_dir: secrets_dir.map(|dir| base.join(dir)),
            break_glass,
            compact_above: Some(journal.compact_above.unwrap_or(COMPACT_ABOVE))
                .filter(|above| *above > 0),
            email,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        listen = "127.0.0.1:0"
        state_dir = "state"
        domain = "example.com"
        secrets_dir = "/secrets"
        [tls]
        cert = "c.crt"
        key = "/keys/c.key"
        agent_ca = "a.crt"
        operator_ca = "o.crt"
        [email]
        host = "smtp"
        from = "a@example.com"
        user = "a"
        password = "secret://smtp"
        [enroll]
        agent_ca_key = "a.key"
        controller_ca = "c-ca.crt"
        life = "1h"
        [break_glass]
        group = "incident"
        [journal]
        compact_above = 5000
    "#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/lockstep/controller.toml"))
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.state_dir, Path::new("/etc/lockstep/state"));
        assert_eq!(config.tls.cert, Path::new("/etc/lockstep/c.crt"));
        assert_eq!(config.tls.key, Path::new("/keys/c.key"));
        let enroll = config.enroll.unwrap();
        assert_eq!(enroll.agent_ca_key, Path::new("/etc/lockstep/a.key"));
        assert_eq!(enroll.life, Duration::from_hours(1));
        assert_eq!(config.break_glass.as_deref(), Some("incident"));
        assert_eq!(config.email.unwrap().security, EmailSecurity::Starttls);
        assert_eq!(config.compact_above, Some(5000));
        let above = |text: &str| parse(&GOOD.replace("compact_above = 5000", text));
        assert_eq!(above("").unwrap().compact_above, Some(COMPACT_ABOVE));
        assert_eq!(above("compact_above = 0").unwrap().compact_above, None);
    }

    #[test]
    fn what_is_not_known_or_does_not_fit_is_refused() {
        for (from, to) in [
            ("domain", "domane"),
            ("\"example.com\"", "\"spiffe://example.com\""),
            ("secret://smtp", "hunter2"),
            ("password", "# password"),
            ("\"1h\"", "\"1s\""),
            ("\"1h\"", "\"90d\""),
            ("controller_ca", "# controller_ca"),
            ("secrets_dir", "# secrets_dir"),
            ("\"incident\"", "\" \""),
            ("127.0.0.1:0", "localhost"),
            ("5000", "-1"),
            ("host = \"smtp\"", "host = \"smtp\"\nsecurity = \"none\""),
        ] {
            assert!(parse(&GOOD.replace(from, to)).is_err(), "{from} -> {to}");
        }
    }
}
