//! Variables of the daemon's environment, for the step processes, which do not have it.
//!
//! The daemon puts the variables that `[secrets.NAME]` names into files (0600) of a directory
//! (0700) below its `run_dir`, which a reboot empties: never into a unit's property or another
//! process's environment. They stay while the daemon is away, for its steps go on; its next start
//! writes them anew.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::report::{Cause, Failure};
use zeroize::Zeroizing;

use super::{Secret, Source};
use crate::config::Config;
use crate::identity::make_enterable;
use crate::step::hinted;

fn directory(run_dir: &Path) -> PathBuf {
    run_dir.join("environment")
}

/// Writes the variables that the configuration names; those that are not there any more, or are not
/// named, are removed.
pub(crate) fn hand_over(config: &Config) -> io::Result<()> {
    let directory = directory(&config.run_dir);
    let mut names: Vec<&str> = config
        .secrets
        .values()
        .filter_map(|source| match source {
            Source::Env(name) => Some(name.as_str()),
            _ => None,
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    make_enterable(&config.run_dir)?;
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(&directory)?.flatten() {
        let file = entry.file_name();
        if !names.iter().any(|name| file == *name) {
            fs::remove_file(entry.path())?;
        }
    }
    for name in names {
        let path = directory.join(name);
        if let Ok(value) = std::env::var(name).map(Zeroizing::new) {
            replace(&path, value.as_bytes())?;
            continue;
        }
        tracing::warn!(
            variable = name,
            "not in the agent's environment, or not UTF-8: the secret cannot be had"
        );
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A whole file, or the old one: a step may be reading it.
fn replace(path: &Path, value: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(value)?;
    fs::rename(&fresh, path)
}

/// A variable of the daemon's environment. Who is not the daemon's step looks at the own one, too.
pub(super) fn read(config: &Config, name: &str, variable: &str) -> Result<Secret, Failure> {
    let file = directory(&config.run_dir).join(variable);
    if let Some(value) = super::read(name, &file)? {
        return Ok(value);
    }
    match std::env::var(variable).map(Zeroizing::new) {
        Ok(value) => super::text(name, value.as_bytes()),
        Err(_) => Err(hinted(
            Cause::Host,
            format!("the secret `{name}`: the agent's environment has no `{variable}`"),
            format!(
                "set {variable} for the agent's service, such as by `EnvironmentFile=` with a file \
                 of mode 0600, and restart it"
            ),
        )),
    }
}
