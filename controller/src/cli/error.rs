//! What commands fail with, and how it is said.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use lockstep_core::plan::Findings;
use tonic::Code;

use super::client::ClientError;
use super::document::InvalidDocument;
use super::exit::Exit;
use super::profile::ProfileError;
use super::render::{Line, Tone};
use crate::pki::PkiError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line asks for something that cannot be.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
        /// What would be right.
        hint: String,
    },
    /// There is no profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The controller did not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The controller's document is not readable.
    #[error(transparent)]
    Document(#[from] InvalidDocument),
    /// The plan cannot run.
    #[error("the plan cannot run")]
    Plan(Box<Findings>),
    /// Nothing was issued.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A file of the caller's cannot be read or written.
    #[error("{path} cannot be {verb}")]
    File {
        /// Which.
        path: PathBuf,
        /// `read` or `written`.
        verb: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The output cannot be written.
    #[error("the output cannot be written")]
    Output(#[from] io::Error),
}

impl CliError {
    /// A wrong command line.
    pub(crate) fn usage(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage {
            what: what.into(),
            hint: hint.into(),
        }
    }

    /// The exit code that it means.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Usage { .. }
            | Self::Profile(_)
            | Self::Plan(_)
            | Self::File { verb: "read", .. } => Exit::Usage,
            Self::Client(error) => match error {
                ClientError::Unreachable { .. } | ClientError::Silent { .. } => Exit::Unreachable,
                ClientError::Refused {
                    code: Code::InvalidArgument,
                    ..
                }
                | ClientError::File { .. }
                | ClientError::Certificate { .. }
                | ClientError::Tls { .. }
                | ClientError::ServerName { .. } => Exit::Usage,
                ClientError::Refused { .. } => Exit::Refused,
                ClientError::Failed { .. } => Exit::Internal,
            },
            Self::Pki(error) => match error {
                PkiError::File { .. } | PkiError::Certificate { .. } => Exit::Internal,
                _ => Exit::Usage,
            },
            // Whoever read it has heard enough: `lockstep history | head`.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Done,
            Self::Document(_) | Self::File { .. } | Self::Output(_) => Exit::Internal,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Profile(ProfileError::Missing { .. } | ProfileError::Unreadable { .. }) => Some(
                "write a profile with `controller`, `ca`, `cert` and `key`, or name one with \
                 --profile or LOCKSTEP_PROFILE"
                    .into(),
            ),
            Self::Client(error) => error.hint(),
            Self::Document(InvalidDocument::Format(_)) => {
                Some("use the command line of the controller's own release".into())
            }
            _ => None,
        }
    }

    /// What is said on stderr: the error, its causes, a hint.
    pub(crate) fn lines(&self) -> Vec<Line> {
        if let Self::Plan(findings) = self {
            let text = findings.to_string();
            return text.lines().map(Line::plain).collect();
        }
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return vec![];
        }
        let mut lines = vec![Line::new(Tone::Bad, format!("error: {self}"))];
        let mut said = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = super::clean::line(&error.to_string());
            // Wrappers often repeat what they wrap.
            if !said.contains(&text) {
                lines.push(Line::plain(format!("  caused by: {text}")));
            }
            said = text;
            cause = error.source();
        }
        if let Some(hint) = self.hint() {
            lines.push(Line::plain(format!("  hint: {hint}")));
        }
        lines
    }
}
