//! Secrets that the controller itself uses: addresses of webhooks, the mail server's password.
//!
//! A plan or the configuration names one as `secret://NAME`; its value is the content of the file
//! NAME in the secrets directory, without a last line break. Values are read when they are used,
//! and are wiped from memory afterwards (INV-10).

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Where secrets are found.
#[derive(Debug, Clone)]
pub(crate) struct Secrets {
    dir: Option<PathBuf>,
}

/// A value that may be secret.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Value {
    text: Zeroizing<String>,
    secret: bool,
}

impl Value {
    /// The value itself: for whoever needs it, and for no message.
    pub(crate) fn expose(&self) -> &str {
        &self.text
    }

    /// Whether it came from a secret, so that no message may hold any of it.
    pub(crate) fn is_secret(&self) -> bool {
        self.secret
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.secret {
            "<secret>"
        } else {
            self.expose()
        })
    }
}

/// A secret that cannot be had. Never holds a value.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretError {
    /// The configuration names no directory.
    #[error("secret://{0} is needed, but the configuration has no `secrets_dir`")]
    NoDirectory(String),
    /// Not a file's name.
    #[error("a secret's name has A-Z, a-z, 0-9, `-`, `_` and `.`, and does not begin with `.`")]
    Name,
    /// The file cannot be read.
    #[error("secret://{name} cannot be read from {dir}")]
    Unreadable {
        /// The secret's name.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Everybody may read the file.
    #[error("secret://{name} is readable by everybody: `chmod 0600 {path}`")]
    Open {
        /// The secret's name.
        name: String,
        /// Its file.
        path: PathBuf,
    },
}

impl Secrets {
    /// Secrets in this directory.
    pub(crate) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir }
    }

    /// The value that a text stands for: itself, or the secret that it names.
    pub(crate) fn resolve(&self, text: &str) -> Result<Value, SecretError> {
        let Some(name) = text.strip_prefix("secret://") else {
            return Ok(Value {
                text: Zeroizing::new(text.to_owned()),
                secret: false,
            });
        };
        let ok = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.bytes().all(ok) {
            return Err(SecretError::Name);
        }
        let dir = self.dir.as_deref();
        let dir = dir.ok_or_else(|| SecretError::NoDirectory(name.to_owned()))?;
        let text = read(dir, name)?;
        Ok(Value { text, secret: true })
    }
}

fn read(dir: &Path, name: &str) -> Result<Zeroizing<String>, SecretError> {
    let path = dir.join(name);
    let unreadable = |source| SecretError::Unreadable {
        name: name.to_owned(),
        dir: dir.to_owned(),
        source,
    };
    let mode = fs::metadata(&path)
        .map_err(unreadable)?
        .permissions()
        .mode();
    if mode & 0o004 != 0 {
        return Err(SecretError::Open {
            name: name.to_owned(),
            path,
        });
    }
    let text = fs::read_to_string(&path).map_err(unreadable)?;
    let mut text = Zeroizing::new(text);
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_when_it_is_used_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hook");
        fs::write(&path, "https://example.com/T0/k3y\n").unwrap();
        let secrets = Secrets::new(Some(dir.path().to_owned()));
        let everybody = fs::Permissions::from_mode(0o644);
        fs::set_permissions(&path, everybody).unwrap();
        assert!(matches!(
            secrets.resolve("secret://hook"),
            Err(SecretError::Open { .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let value = secrets.resolve("secret://hook").unwrap();
        assert_eq!(value.expose(), "https://example.com/T0/k3y");
        assert_eq!(format!("{value:?}"), "<secret>");
        assert!(!secrets.resolve("https://example.com").unwrap().is_secret());
    }

    #[test]
    fn a_secret_is_never_looked_for_elsewhere() {
        let secrets = Secrets::new(Some("/etc".into()));
        for name in ["", "..", "../etc/passwd", "a/b", ".x", "a b"] {
            let refused = secrets.resolve(&format!("secret://{name}"));
            assert!(matches!(refused, Err(SecretError::Name)), "{name:?}");
        }
    }
}
