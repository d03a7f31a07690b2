//! Secrets of this host: where each comes from, and the type that carries its value (INV-10).
//!
//! ```text
//! agent.toml  [secrets.NAME] --> Source      from: a credential, a file, the daemon's environment,
//!                                  |               a command, a vault
//! plan        secret://NAME  --> resolve  --> Secret --> a program's environment, a 0600 file,
//!                                                        a header, a database's login
//! ```
//!
//! A value is fetched in the process that uses it, when it uses it: in the step process, and in the
//! daemon only to see for a dry run whether it can be had. It is in no argument, unit property,
//! journal or log, and is wiped from memory when its [`Secret`] is dropped. What it is handed on to
//! (the kernel, the TLS session, the database's client) keeps copies of its own for as long as it
//! needs them; core dumps are off ([`crate::cores`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use zeroize::Zeroizing;

use crate::config::Config;
use crate::process::Program;
use crate::step::{failure, hinted};

mod handed;
mod source;
#[cfg(test)]
mod tests;
mod value;
mod vault;

#[cfg(feature = "fuzzing")]
pub(crate) use vault::fuzzing as vault_fuzzing;

pub(crate) use handed::hand_over;
pub(crate) use source::Source;
pub(crate) use value::Secret;
pub(crate) use vault::Vault;

/// What a text begins with that stands for a secret.
pub(crate) const SCHEME: &str = "secret://";

/// The longest value, in bytes: certificates with their chains and keys are far shorter.
pub(crate) const MAX_VALUE: usize = 64 << 10;

/// How long a command may take. One that asks another host has had its answer by then.
const COMMAND: Duration = Duration::from_secs(30);

/// Where systemd keeps the credentials of the agent's unit, for those who look from outside it.
const OF_UNIT: &str = "/run/credentials/lockstep-agent.service";

/// The secret that a text names; `None` if the text is its own value.
pub(crate) fn named(text: &str) -> Option<&str> {
    text.strip_prefix(SCHEME)
}

/// Whether a text can be the name of a secret: it may become the name of a file.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// Fetches a secret from where this host has it. The failure says what to do, and holds no value.
pub(crate) async fn resolve(config: &Config, name: &str) -> Result<Secret, Failure> {
    if !is_name(name) {
        return Err(failure(
            Cause::Host,
            format!("`{name}` cannot be the name of a secret"),
        ));
    }
    let value = match config.secrets.get(name) {
        None => return stored(config, name),
        Some(Source::Vault { path, field }) => vault::read(config, name, path, field).await?,
        Some(source) => local(config, name, source).await?,
    };
    if value.expose().is_empty() {
        let source = config.secrets[name].describe();
        return Err(failure(
            Cause::Host,
            format!("the secret `{name}` is empty ({source})"),
        ));
    }
    Ok(value)
}

/// Fetches a secret that needs no vault: a vault's own token is one.
async fn local(config: &Config, name: &str, source: &Source) -> Result<Secret, Failure> {
    match source {
        Source::Credential(credential) => {
            let file = credentials().map(|directory| directory.join(credential));
            let value = file.map_or(Ok(None), |file| read(name, &file));
            value?.ok_or_else(|| {
                hinted(
                    Cause::Host,
                    format!("the secret `{name}`: there is no credential `{credential}`"),
                    format!(
                        "add `LoadCredential={credential}:/path/of/the/file` to the agent's unit, \
                         and restart it"
                    ),
                )
            })
        }
        Source::File(file) => {
            refuse_open(name, file)?;
            read(name, file)?.ok_or_else(|| {
                hinted(
                    Cause::Host,
                    format!("the secret `{name}`: there is no file {}", file.display()),
                    "write it, mode 0600",
                )
            })
        }
        Source::Env(variable) => handed::read(config, name, variable),
        Source::Command(argv) => command(name, argv).await,
        Source::Vault { .. } => Err(hinted(
            Cause::Host,
            format!("the secret `{name}` comes from the vault that it is needed for"),
            "name another source for the vault's token",
        )),
    }
}

/// What holds for a secret without a table: a credential of its name, or a file of its name.
fn stored(config: &Config, name: &str) -> Result<Secret, Failure> {
    let credentials = credentials();
    for directory in credentials.iter().chain(config.secrets_dir.iter()) {
        if let Some(value) = read(name, &directory.join(name))? {
            return Ok(value);
        }
    }
    let directory = config.secrets_dir.as_deref();
    let directory = directory.unwrap_or_else(|| Path::new("/etc/lockstep/secrets"));
    Err(hinted(
        Cause::Host,
        format!("there is no secret `{name}` on this host"),
        format!(
            "put it into {}/{name}, mode 0600, or say in agent.toml where it is: [secrets.{name}]",
            directory.display()
        ),
    ))
}

/// Where the credentials of the agent's unit are.
fn credentials() -> Option<PathBuf> {
    let own = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    own.or_else(|| Some(OF_UNIT.into()).filter(|directory: &PathBuf| directory.is_dir()))
}

/// The content of a file without line breaks at its end; `None` if there is no such file.
fn read(name: &str, path: &Path) -> Result<Option<Secret>, Failure> {
    let cannot = |error: std::io::Error| {
        failure(
            Cause::Host,
            format!(
                "cannot read the secret `{name}` from {}: {error}",
                path.display()
            ),
        )
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(error)),
    };
    // With all its room from the start: a buffer that grows leaves its content behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_VALUE + 2));
    let mut start = file.take(MAX_VALUE as u64 + 1);
    start.read_to_end(&mut bytes).map_err(cannot)?;
    text(name, &bytes).map(Some)
}

/// Refuses a file that everybody on the host can read or change.
fn refuse_open(name: &str, path: &Path) -> Result<(), Failure> {
    match std::fs::metadata(path) {
        Ok(file) if file.mode() & 0o007 != 0 => Err(hinted(
            Cause::Host,
            format!(
                "the secret `{name}`: everybody can get at {}",
                path.display()
            ),
            format!("run: chmod 0600 {}", path.display()),
        )),
        // One that is missing is named where it is read.
        _ => Ok(()),
    }
}

/// A value as it came in bytes, without line breaks at its end.
fn text(name: &str, bytes: &[u8]) -> Result<Secret, Failure> {
    let unfit = |what: &str| failure(Cause::Host, format!("the secret `{name}` {what}"));
    if bytes.len() > MAX_VALUE {
        return Err(unfit("is longer than 64 KiB"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| unfit("is not UTF-8 text"))?;
    Ok(Secret::from(text.trim_end_matches('\n')))
}

/// Runs a command for a secret. Nothing of what it prints is shown anywhere, not even what it says
/// of an error: that may hold the value.
async fn command(name: &str, argv: &[String]) -> Result<Secret, Failure> {
    let program = Program {
        argv: argv.to_vec(),
        dir: Some("/".into()),
        timeout: Some(COMMAND),
        ..Program::default()
    };
    let by_hand = || {
        format!("run it by hand on this host, as the agent's user, and see what it says: {argv:?}")
    };
    let of_secret = |was: Failure| Failure {
        message: format!("the secret `{name}`: {}", was.message),
        hint: was.hint.or_else(|| Some(by_hand())),
        ..was
    };
    let captured = program.capture(MAX_VALUE + 1).await.map_err(of_secret)?;
    if captured.code != 0 {
        let code = captured.code;
        let program = argv.first().map_or("", String::as_str);
        return Err(hinted(
            Cause::Host,
            format!("the secret `{name}`: `{program}` exited with {code}"),
            by_hand(),
        ));
    }
    text(name, &captured.stdout).map_err(|was| Failure {
        hint: Some(by_hand()),
        ..was
    })
}

/// Secrets that a step has fetched: it sees one value of each, however often it asks.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    values: std::sync::Mutex<BTreeMap<String, Secret>>,
}

impl Fetched {
    /// The value of a secret; fetched if it was not before.
    pub(crate) async fn get(&self, config: &Config, name: &str) -> Result<Secret, Failure> {
        let known = self.values().get(name).cloned();
        if let Some(value) = known {
            return Ok(value);
        }
        // On the heap: every action's future has this one in it, and few need it.
        let value = Box::pin(resolve(config, name)).await?;
        self.values().insert(name.to_owned(), value.clone());
        Ok(value)
    }

    fn values(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Secret>> {
        self.values.lock().expect("no holder of the values panics")
    }
}
