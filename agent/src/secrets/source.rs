//! Where a secret comes from, as agent.toml says it.

use std::path::PathBuf;

use serde::Deserialize;

/// Where a secret comes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub(crate) enum Source {
    /// A credential of the agent's unit.
    Credential(String),
    /// A file.
    File(PathBuf),
    /// A variable of the daemon's own environment.
    Env(String),
    /// What a command prints: program and arguments.
    Command(Vec<String>),
    /// A field of a secret in the vault.
    Vault {
        /// The path as the vault's API has it, after `/v1/`: `kv/data/app`.
        path: String,
        /// The field's name.
        field: String,
    },
}

/// A table `[secrets.NAME]` as it is written: exactly one of its keys is there.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    credential: Option<String>,
    file: Option<PathBuf>,
    env: Option<String>,
    command: Option<Vec<String>>,
    vault: Option<InVault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InVault {
    path: String,
    field: String,
}

impl TryFrom<Written> for Source {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written {
            credential,
            file,
            env,
            command,
            vault,
        } = written;
        let vault = vault.map(|InVault { path, field }| Self::Vault { path, field });
        let named = [
            credential.map(Self::Credential),
            file.map(Self::File),
            env.map(Self::Env),
            command.map(Self::Command),
            vault,
        ];
        let mut named = named.into_iter().flatten();
        match (named.next(), named.next()) {
            (Some(source), None) => source.check().map(|()| source),
            (None, _) => {
                Err("a secret has one of `credential`, `file`, `env`, `command` and `vault`".into())
            }
            (Some(_), Some(_)) => Err(
                "a secret comes from one place: keep one of `credential`, `file`, `env`, \
                 `command` and `vault`"
                    .into(),
            ),
        }
    }
}

impl Source {
    /// Refuses what can never work.
    fn check(&self) -> Result<(), String> {
        let variable = |name: &str| {
            let mut chars = name.chars();
            let first = chars.next();
            first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
                && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        match self {
            Self::Credential(name) if !super::is_name(name) => {
                Err(format!("`{name}` cannot be the name of a credential"))
            }
            Self::File(path) if path.as_os_str().is_empty() => Err("`file` is empty".into()),
            Self::Env(name) if !variable(name) => {
                Err(format!("`{name}` cannot be the name of a variable"))
            }
            Self::Command(argv) if argv.first().is_none_or(String::is_empty) => {
                Err("`command` names no program".into())
            }
            Self::Vault { path, field } => check_path(path).and_then(|()| match field.as_str() {
                "" => Err("`field` is empty: name the field of the vault's secret".into()),
                _ => Ok(()),
            }),
            _ => Ok(()),
        }
    }

    /// In words, without a value: `file /etc/app/key`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Credential(name) => format!("credential {name}"),
            Self::File(path) => format!("file {}", path.display()),
            Self::Env(name) => format!("variable {name} of the daemon's environment"),
            Self::Command(argv) => format!("command {argv:?}"),
            Self::Vault { path, field } => format!("vault {path}, field {field}"),
        }
    }
}

/// A path that can only mean one secret, and leads to no other part of the vault's API.
fn check_path(path: &str) -> Result<(), String> {
    let fit = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.~@:+=".contains(c);
        !matches!(part, "" | "." | "..") && part.chars().all(plain)
    };
    if path.split('/').all(fit) {
        return Ok(());
    }
    Err(format!(
        "`{path}` cannot be a path in the vault: write it as its API has it after `/v1/`, such as \
         `kv/data/app` (version 2) or `kv/app` (version 1)"
    ))
}
