//! What a controller does not start from, or does not go on after.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::blobs::BlobError;
use crate::config::ConfigError;
use crate::driver::{DriverError, StartError};
use crate::journal::OpenError;
use crate::tls::TlsError;

/// Why the controller did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// The state that the journal holds.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The driver ended.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The plans' directory.
    #[error("the plans' directory cannot be used")]
    Blobs(#[from] BlobError),
    /// There is state of a controller, but no journal.
    #[error(
        "{0} holds plans or logs of a controller, but no journal; put the journal back from a \
         backup, or move the directory away to begin anew"
    )]
    JournalMissing(PathBuf),
    /// The address cannot be bound.
    #[error("{address} cannot be bound")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The client for webhooks cannot be made.
    #[error("messages cannot be sent")]
    Notify(#[from] reqwest::Error),
    /// Something of the operating system's.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server's part has failed.
    #[error("the server has failed")]
    Server(#[from] tonic::transport::Error),
    /// A second signal came while draining.
    #[error("left at once, at a second signal; what was acknowledged is durable")]
    Hurried,
}

impl ServeError {
    /// The process's exit code. 2: the configuration or what it names; 4: a fault; 10: the state
    /// directory must be looked at by a person, and a restart does not help; 11: the journal
    /// could not be written, and a restart finds out what was; 12: another controller has the
    /// state directory or took over, and a restart does not help.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Tls(_) | Self::Journal(OpenError::NotOwner { .. }) => 2,
            Self::Journal(OpenError::InUse { .. })
            | Self::Driver(DriverError::Superseded { .. }) => 12,
            Self::Journal(OpenError::Quarantined { .. } | OpenError::Format { .. })
            | Self::JournalMissing(_)
            | Self::Start(_)
            | Self::Driver(
                DriverError::Outdated { .. }
                | DriverError::Compaction(OpenError::Quarantined { .. }),
            ) => 10,
            Self::Driver(DriverError::Append(_)) => 11,
            Self::Journal(error) | Self::Driver(DriverError::Compaction(error))
                if error.is_full_disk() =>
            {
                11
            }
            _ => 4,
        }
    }

    /// What to do about it, where one can tell.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Journal(error @ OpenError::NotOwner { .. }) => return error.hint(),
            Self::Config(ConfigError::Unreadable { .. }) => {
                Some("name the configuration with --config; it must be readable to this user")
            }
            Self::Tls(TlsError::File { .. } | TlsError::Empty { .. }) => Some(
                "`[tls]` names PEM files that this user can read, relative to the configuration; \
                 `lockstep pki controller NAME --address ADDRESS --out DIR` makes all four",
            ),
            Self::Tls(TlsError::OpenKey(_)) => Some(
                "let only its owner, and perhaps its group, read the key: `chmod 0640` and `chgrp` \
                 for the user that the controller runs as",
            ),
            Self::Tls(TlsError::OtherKey { .. }) => Some(
                "`[enroll] agent_ca_key` is the key of one of the certificates in `[tls] agent_ca`",
            ),
            Self::Tls(TlsError::OtherDomain { .. }) => Some(
                "`domain` is what `lockstep pki init --domain` was told; `[tls] cert` is what \
                 `lockstep pki controller` issued",
            ),
            Self::Journal(OpenError::Quarantined { .. }) => Some(
                "`lockstep journal verify --dir STATE_DIR` names the first record that is not \
                 whole; a state directory from a backup is started with `--take-over`: see \
                 docs/recovery.md",
            ),
            Self::Journal(error) if error.is_full_disk() => Some(
                "make room: a start copies the journal, to look at it before anything is changed",
            ),
            Self::Bind { .. } => Some(
                "is something else listening on `listen`, and is it an address of this machine?",
            ),
            _ => None,
        };
        hint.map(str::to_owned)
    }
}
