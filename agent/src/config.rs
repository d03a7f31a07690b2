//! The host's own configuration (`agent.toml`): who the host is, what runs on it, and how its
//! databases are reached. It belongs to root and never comes from the controller.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::HostId;
use rustls::pki_types::ServerName;
use serde::Deserialize;

use crate::secrets::{Source, Vault, is_name};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The host's name; must equal the certificate's.
    pub(crate) host: HostId,
    /// The controller: `host:port`.
    pub(crate) controller: String,
    /// The name in the controller's certificate. Default: the host of `controller`.
    #[serde(default)]
    pub(crate) controller_name: Option<String>,
    /// Journal, claims, outcomes, backups' manifests.
    #[serde(default = "state_dir")]
    pub(crate) state_dir: PathBuf,
    /// Forgotten at a reboot.
    #[serde(default = "run_dir")]
    pub(crate) run_dir: PathBuf,
    /// Who the link runs as, where it and exec are two processes. Default: whoever exec runs as.
    #[serde(default)]
    pub(crate) link_user: Option<String>,
    /// What the host allows. Default: `policy.toml` beside this file.
    #[serde(default)]
    pub(crate) policy: Option<PathBuf>,
    /// One file per secret, named like the secret. Default: `secrets` beside this file. systemd's
    /// `$CREDENTIALS_DIRECTORY` is looked at first.
    #[serde(default)]
    pub(crate) secrets_dir: Option<PathBuf>,
    /// Where secrets come from that are not simply credentials or files of their name.
    #[serde(default)]
    pub(crate) secrets: BTreeMap<String, Source>,
    /// The vault that some of them are in.
    #[serde(default)]
    pub(crate) vault: Option<Vault>,
    /// Certificates.
    pub(crate) tls: Tls,
    /// Labels, by which plans select hosts.
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    /// Variables, put in for `${host.NAME}` in a plan's steps.
    #[serde(default)]
    pub(crate) vars: BTreeMap<String, String>,
    /// How step processes are started.
    #[serde(default)]
    pub(crate) steps: StepRunner,
    /// Applications, by name.
    #[serde(default)]
    pub(crate) apps: BTreeMap<String, App>,
    /// Services of the drivers `process` and `command`, by name.
    #[serde(default)]
    pub(crate) services: BTreeMap<String, Service>,
    /// Databases, by the name that plans use.
    #[serde(default)]
    pub(crate) postgres: BTreeMap<String, Postgres>,
}

/// Certificates in PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tls {
    /// Who may issue controllers' certificates.
    pub(crate) controller_ca: PathBuf,
    /// This agent's certificate chain.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

/// How step processes are started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StepRunner {
    /// As systemd units where systemd runs and the agent is root, else in sessions of their own.
    #[default]
    Auto,
    /// As transient units of systemd.
    Systemd,
    /// In sessions of their own.
    Session,
}

/// An application.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct App {
    /// Holds `releases/`, `shared/` and the link `current`.
    pub(crate) root: PathBuf,
    /// Who owns releases and environment files, and runs builds, migrations, and what plans run
    /// within `root`. Default: whoever the agent runs as.
    #[serde(default)]
    pub(crate) user: Option<String>,
    /// Variables for all of these programs, such as a package cache. A value may be
    /// `secret://NAME`.
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
}

/// A service that systemd does not run.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Service {
    /// Driver `process`: the program and its arguments.
    #[serde(default)]
    pub(crate) argv: Vec<String>,
    /// Driver `process`: the directory it runs in.
    #[serde(default)]
    pub(crate) dir: Option<PathBuf>,
    /// Driver `process`: a file of `NAME=value` lines that becomes its environment.
    #[serde(default)]
    pub(crate) env_file: Option<PathBuf>,
    /// Driver `process`: where its output goes. Default: a file in the state directory.
    #[serde(default)]
    pub(crate) output: Option<PathBuf>,
    /// Driver `process`: who it runs as. Default: whoever the agent runs as.
    #[serde(default)]
    pub(crate) user: Option<String>,
    /// Driver `command`: starts it.
    #[serde(default)]
    pub(crate) start: Vec<String>,
    /// Driver `command`: stops it.
    #[serde(default)]
    pub(crate) stop: Vec<String>,
    /// Driver `command`: exits with 0 if it runs and with 3 if it does not, as systemctl does.
    #[serde(default)]
    pub(crate) status: Vec<String>,
}

/// A database.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Postgres {
    /// A socket directory, or a name or address.
    pub(crate) host: String,
    /// The port.
    #[serde(default = "postgres_port")]
    pub(crate) port: u16,
    /// The database's name on the server. Default: the name that plans use.
    #[serde(default)]
    pub(crate) dbname: Option<String>,
    /// The role. Fences and restores need an owner or a superuser; a migration needs the owner.
    pub(crate) user: String,
    /// The name of the secret with its password. Default: none is sent.
    #[serde(default)]
    pub(crate) password: Option<String>,
    /// The role that migrations log in as. Default: `user`.
    #[serde(default)]
    pub(crate) migrate_as: Option<String>,
    /// The name of the secret with its password. Default: none is sent.
    #[serde(default)]
    pub(crate) migrate_password: Option<String>,
    /// The operating system's user that the tools run as, for peer authentication. Default:
    /// whoever the agent runs as.
    #[serde(default)]
    pub(crate) os_user: Option<String>,
    /// Where `pg_dump` and `pg_restore` are. Default: the newest under `/usr/lib/postgresql` that
    /// is not older than the server, then `PATH`.
    #[serde(default)]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Where backups are kept. Default: `backups` in the state directory.
    #[serde(default)]
    pub(crate) backup_dir: Option<PathBuf>,
    /// pgBackRest, if it keeps the server's physical backups.
    #[serde(default)]
    pub(crate) pgbackrest: Option<Pgbackrest>,
    /// Barman, if it keeps them.
    #[serde(default)]
    pub(crate) barman: Option<Barman>,
    /// How the server is stopped and started, if a rollback may bring it back to a restore point.
    #[serde(default)]
    pub(crate) recover: Option<Recover>,
}

/// What a recovery of the whole server may do.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recover {
    /// The server's unit of systemd.
    #[serde(default)]
    pub(crate) unit: Option<String>,
    /// Or its name among `[services]`, with the commands that start, stop and ask it.
    #[serde(default)]
    pub(crate) service: Option<String>,
    /// Roles whose sessions may end with the server, such as that of the monitoring. Sessions of
    /// others keep it from being stopped.
    #[serde(default)]
    pub(crate) sessions: Vec<String>,
}

/// pgBackRest, as it is set up on the host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pgbackrest {
    /// The server's stanza.
    pub(crate) stanza: String,
    /// Its configuration file. Default: its own default.
    #[serde(default)]
    pub(crate) config: Option<PathBuf>,
    /// The program. Default: the one in `PATH`.
    #[serde(default = "pgbackrest")]
    pub(crate) program: String,
    /// The operating system's user that it runs as. Default: `os_user`.
    #[serde(default)]
    pub(crate) user: Option<String>,
}

/// Barman, as it is set up on the host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Barman {
    /// Its name for the server.
    pub(crate) server: String,
    /// Its configuration file. Default: its own default.
    #[serde(default)]
    pub(crate) config: Option<PathBuf>,
    /// The program. Default: the one in `PATH`.
    #[serde(default = "barman")]
    pub(crate) program: String,
    /// The operating system's user that it runs as. Default: `os_user`.
    #[serde(default)]
    pub(crate) user: Option<String>,
}

fn barman() -> String {
    "barman".to_owned()
}

fn pgbackrest() -> String {
    "pgbackrest".to_owned()
}

fn state_dir() -> PathBuf {
    PathBuf::from("/var/lib/lockstep-agent")
}

fn run_dir() -> PathBuf {
    PathBuf::from("/run/lockstep-agent")
}

fn postgres_port() -> u16 {
    5432
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that can never work.
    #[error("{path} is not valid: {why}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which one, and what to write instead.
        why: String,
    },
    /// Others could change what decides, or read what is secret.
    #[error("{0}")]
    Unsafe(String),
}

impl Config {
    /// Reads the file; paths in it are relative to its directory.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        let mut config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source: Box::new(source),
        })?;
        config
            .check_controller()
            .and_then(|()| config.check_secrets())
            .and_then(|()| config.check_databases())
            .map_err(|why| ConfigError::Value {
                path: path.into(),
                why,
            })?;
        let base = path.parent().unwrap_or_else(|| Path::new(""));
        let Tls {
            controller_ca,
            cert,
            key,
        } = &mut config.tls;
        for file in [controller_ca, cert, key] {
            *file = base.join(&*file);
        }
        for source in config.secrets.values_mut() {
            if let Source::File(file) = source {
                *file = base.join(&*file);
            }
        }
        if let Some(ca) = config.vault.as_mut().and_then(|vault| vault.ca.as_mut()) {
            *ca = base.join(&*ca);
        }
        config.policy = Some(
            base.join(
                config
                    .policy
                    .as_deref()
                    .unwrap_or_else(|| Path::new("policy.toml")),
            ),
        );
        config.secrets_dir = Some(
            base.join(
                config
                    .secrets_dir
                    .as_deref()
                    .unwrap_or_else(|| Path::new("secrets")),
            ),
        );
        Ok(config)
    }

    /// A password of nobody is a mistake that shows only when somebody migrates.
    fn check_databases(&self) -> Result<(), String> {
        let of_nobody = |database: &Postgres| {
            database.migrate_password.is_some() && database.migrate_as.is_none()
        };
        match self.postgres.iter().find(|(_, it)| of_nobody(it)) {
            Some((name, _)) => Err(format!(
                "[postgres.{name}] has a `migrate_password`; say in `migrate_as` whose it is"
            )),
            None => Ok(()),
        }
    }

    /// Names of secrets, and how the vault is reached.
    fn check_secrets(&self) -> Result<(), String> {
        if let Some(name) = self.secrets.keys().find(|name| !is_name(name)) {
            return Err(format!("`{name}` cannot be the name of a secret"));
        }
        if let Some(vault) = &self.vault {
            return vault.check(&self.secrets);
        }
        let in_vault = |source: &Source| matches!(source, Source::Vault { .. });
        match self.secrets.iter().find(|(_, source)| in_vault(source)) {
            Some((name, _)) => Err(format!(
                "[secrets.{name}] is in a vault; say in [vault] which: `address` and `token`"
            )),
            None => Ok(()),
        }
    }

    /// The controller's address, as host and port.
    fn check_controller(&self) -> Result<(), String> {
        let address = &self.controller;
        let parts = address.rsplit_once(':');
        let (host, _) = parts
            .filter(|(_, port)| port.parse::<u16>().is_ok_and(|port| port != 0))
            .ok_or_else(|| {
                format!("`controller` is `{address}`; write it with its port: `name:7443`")
            })?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let unfit = |name: &str| ServerName::try_from(name.to_owned()).is_err();
        // An address of IPv6 has its own colons.
        if unfit(bare) || (bare.contains(':') && bare == host) {
            return Err(format!(
                "`controller` is `{address}`; write it as `name:port`, `address:port` or \
                 `[address]:port`"
            ));
        }
        match &self.controller_name {
            Some(name) if unfit(name) => Err(format!(
                "`controller_name` is `{name}`, which is no name that a certificate can have"
            )),
            _ => Ok(()),
        }
    }

    /// Where link and exec meet, if they are two processes.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("exec.sock")
    }

    /// What the host allows.
    pub(crate) fn policy_path(&self) -> &Path {
        self.policy
            .as_deref()
            .unwrap_or_else(|| Path::new("/etc/lockstep/policy.toml"))
    }
}
