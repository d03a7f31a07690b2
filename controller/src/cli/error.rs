//! What commands fail with, and how it is said.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use lockstep_core::plan::Findings;
use serde_json::{Value, json};
use tonic::Code;

use super::client::ClientError;
use super::document::InvalidDocument;
use super::exit::Exit;
use super::profile::ProfileError;
use super::render::{Line, Tone};
use crate::journal::OpenError;
use crate::journal::compact::CompactError;
use crate::journal::offline::{ExportError, ImportError};
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
    /// A passphrase that nobody said.
    #[error("there is no passphrase")]
    Passphrase(#[source] io::Error),
    /// The journal of a state directory cannot be used.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// The journal cannot be exported.
    #[error(transparent)]
    Export(ExportError),
    /// Nothing was imported.
    #[error("nothing was imported")]
    Import(#[from] ImportError),
    /// A journal that cannot be compacted.
    #[error(transparent)]
    Compact(CompactError),
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

impl From<CompactError> for CliError {
    fn from(error: CompactError) -> Self {
        match error {
            CompactError::Open(error) | CompactError::Export(ExportError::Open(error)) => {
                Self::Journal(error)
            }
            error => Self::Compact(error),
        }
    }
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
            | Self::Passphrase(_)
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
                | ClientError::OpenKey(_)
                | ClientError::Passphrase { .. }
                | ClientError::Tls { .. }
                | ClientError::ServerName { .. } => Exit::Usage,
                ClientError::Refused { .. } => Exit::Refused,
                ClientError::Failed { .. } => Exit::Internal,
            },
            Self::Pki(error) => match error {
                PkiError::File { .. } | PkiError::Certificate { .. } => Exit::Internal,
                _ => Exit::Usage,
            },
            Self::Journal(error) | Self::Import(ImportError::Open(error)) => match error {
                OpenError::None { .. } | OpenError::NotOwner { .. } => Exit::Usage,
                OpenError::InUse { .. } => Exit::Superseded,
                OpenError::Quarantined { .. } | OpenError::Format { .. } => Exit::State,
                OpenError::Io { .. } => Exit::Internal,
            },
            Self::Import(error) => match error {
                ImportError::Broken { .. } => Exit::State,
                ImportError::NotAnExport { line, .. } if *line > 1 => Exit::State,
                ImportError::NotEmpty { .. } | ImportError::NotAnExport { .. } => Exit::Usage,
                _ => Exit::Internal,
            },
            Self::Export(_)
            | Self::Compact(
                CompactError::Archive { .. } | CompactError::Recover(_) | CompactError::Export(_),
            ) => Exit::State,
            // Whoever read it has heard enough: `lockstep history | head`.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Done,
            Self::Compact(_) | Self::Document(_) | Self::File { .. } | Self::Output(_) => {
                Exit::Internal
            }
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => Some(hint.clone()),
            Self::Profile(ProfileError::Unreadable { source, .. })
                if source.kind() != io::ErrorKind::NotFound =>
            {
                Some("let yourself read it, or name another with --profile".into())
            }
            Self::Profile(
                ProfileError::Missing { .. }
                | ProfileError::NoProfile { .. }
                | ProfileError::Unreadable { .. },
            ) => Some(
                "write a profile with `controller`, `ca`, `cert` and `key`, or name one with \
                 --profile or LOCKSTEP_PROFILE"
                    .into(),
            ),
            Self::Profile(ProfileError::Address(_)) => Some(
                "it comes from --controller, from LOCKSTEP_CONTROLLER, or from `controller` in \
                 the profile; such as control.example.com:7443"
                    .into(),
            ),
            Self::Profile(ProfileError::Invalid { .. }) => Some(
                "a profile has `controller`, `ca`, `cert` and `key`, and perhaps `server_name`"
                    .into(),
            ),
            Self::Client(ClientError::File { .. }) => Some(
                "`ca`, `cert` and `key` in the profile name PEM files that you can read, relative \
                 to the profile; `lockstep operator add NAME --role ROLE` makes all three"
                    .into(),
            ),
            Self::Client(error) => error.hint(),
            Self::Journal(error) | Self::Import(ImportError::Open(error)) => error.hint(),
            Self::Import(ImportError::NotEmpty { .. }) => Some(
                "import into a new directory; only `blobs`, `logs` and `archive` of the old one \
                 may be in it"
                    .into(),
            ),
            Self::Import(ImportError::NotAnExport { line: ..=1, .. }) => {
                Some("`lockstep journal export` writes what is read here".into())
            }
            Self::Compact(CompactError::Archive { .. }) => Some(
                "the journal is as it was; move that file aside, and see where it came from".into(),
            ),
            Self::Compact(_) => Some("the journal is as it was".into()),
            Self::Import(ImportError::Broken { .. } | ImportError::NotAnExport { .. }) => Some(
                "the file was cut or changed on its way: copy it again, or export again".into(),
            ),
            Self::Pki(PkiError::OtherIssuer { path, dir }) => Some(format!(
                "use another --out; or, if both are to be trusted, append the certificate of {} \
                 to {}",
                dir.join(path.file_name().unwrap_or_default()).display(),
                path.display(),
            )),
            Self::Pki(PkiError::File { .. }) => Some(
                "--dir is where `lockstep pki init` made the issuers, --out where you can write"
                    .into(),
            ),
            Self::Pki(PkiError::Certificate { .. }) => Some(
                "is an address a DNS name or an IP address, and are the issuers' files whole?"
                    .into(),
            ),
            Self::File {
                verb: "read",
                source,
                ..
            } => Some(
                match source.kind() {
                    io::ErrorKind::NotFound => "check the path; it is relative to this directory",
                    io::ErrorKind::PermissionDenied => "let yourself read it, or name another file",
                    _ => "name a file that can be read",
                }
                .into(),
            ),
            Self::File { .. } => Some("name a file in a directory that you can write to".into()),
            Self::Document(InvalidDocument::Format(_)) => {
                Some("use the command line of the controller's own release".into())
            }
            _ => None,
        }
    }

    /// The error's causes, outermost first, without those that repeat what was said.
    fn causes(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut said = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = super::clean::line(&error.to_string());
            // Wrappers often repeat what they wrap.
            if !said.contains(&text) {
                causes.push(text.clone());
            }
            said = text;
            cause = error.source();
        }
        causes
    }

    /// The same for programs.
    pub(crate) fn to_json(&self) -> Value {
        let findings = match self {
            Self::Plan(findings) => findings.to_json(),
            _ => Value::Null,
        };
        json!({
            "format": "lockstep.error/1",
            "error": self.to_string(),
            "causes": self.causes(),
            "hint": self.hint(),
            "findings": findings,
            "exit_code": self.exit() as u8,
        })
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
        let causes = self.causes().into_iter();
        lines.extend(causes.map(|cause| Line::plain(format!("  caused by: {cause}"))));
        if let Some(hint) = self.hint() {
            lines.push(Line::plain(format!("  hint: {hint}")));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::cli::client::Client;
    use crate::cli::plan;
    use crate::cli::profile::{Profile, ProfileArgs};
    use crate::pki;

    fn said(error: impl Into<CliError>) -> String {
        let lines = error.into().lines();
        let lines: Vec<String> = lines.iter().map(|line| line.render(false)).collect();
        lines.join("\n")
    }

    /// Whoever meets a file that is not there hears of which, and what to do next.
    #[tokio::test]
    async fn files_that_cannot_be_read_come_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);

        let text = said(plan::read(&at("nope.yaml")).unwrap_err());
        assert!(text.contains("nope.yaml cannot be read"), "{text}");
        assert!(text.contains("hint: check the path"), "{text}");

        let named = ProfileArgs {
            profile: Some(at("client.toml")),
            ..ProfileArgs::default()
        };
        let text = said(Profile::load(&named).unwrap_err());
        assert!(text.contains("hint: write a profile"), "{text}");

        pki::init(&at("pki"), "example.com").unwrap();
        let olga = pki::Person::new("olga", &[]);
        let issued = pki::issue_operator(&at("pki"), &olga, dir.path()).unwrap();
        let profile = Profile {
            controller: "127.0.0.1:1".to_owned(),
            server_name: None,
            ca: issued.trusts[0].clone(),
            cert: issued.certificate,
            key: issued.key,
            passphrase: super::super::passphrase::Source::Terminal,
        };
        for file in [&profile.ca, &profile.cert, &profile.key] {
            let kept = fs::read(file).unwrap();
            fs::remove_file(file).unwrap();
            let text = said(Client::connect(&profile).await.unwrap_err());
            assert!(text.contains(&*file.to_string_lossy()), "{text}");
            assert!(text.contains("hint: `ca`, `cert` and `key`"), "{text}");
            fs::write(file, kept).unwrap();
        }

        fs::remove_file(at("pki").join("ca-agents.key")).unwrap();
        let text = said(pki::issue_agent(&at("pki"), "app-1", dir.path()).unwrap_err());
        assert!(text.contains("ca-agents.key"), "{text}");
        assert!(text.contains("hint: --dir is where"), "{text}");
        let nowhere = said(pki::issue_agent(Path::new("/nope"), "a", dir.path()).unwrap_err());
        assert!(nowhere.contains("lockstep pki init"), "{nowhere}");
    }
}
