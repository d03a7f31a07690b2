//! Files that only one user may read, gone when they are no longer needed.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::StepKey;
use lockstep_proto::report::{Cause, Failure};

use crate::process::User;
use crate::step::{Context, failure};

/// A directory (0700) of the user that a tool runs as, removed when this value is dropped.
#[derive(Debug)]
pub(crate) struct PrivateDir {
    path: PathBuf,
    owner: Option<User>,
}

impl PrivateDir {
    /// Makes one for a user; `None` is whoever the agent runs as. It is in the attempt's own
    /// directory if that user can get there, else in the directory for temporary files.
    pub(crate) fn new(cx: &Context, user: Option<&str>) -> Result<Self, Failure> {
        let owner = user
            .map(User::find)
            .transpose()?
            .filter(|user| !user.is_self());
        let base = match &owner {
            None => cx.dir.clone(),
            Some(user) => {
                user.may_be_taken()?;
                // The attempt's directory holds nothing that its name would give away.
                let opened = fs::set_permissions(&cx.dir, Permissions::from_mode(0o711));
                match opened {
                    Ok(()) if can_enter(user, &cx.dir) => cx.dir.clone(),
                    _ => std::env::temp_dir(),
                }
            }
        };
        let cannot = |error: std::io::Error| {
            let base = base.display();
            failure(
                Cause::Host,
                format!("cannot make a private directory in {base}: {error}"),
            )
        };
        remove_left_over(&base, &cx.key);
        let path = base.join(format!(
            "lockstep-{}-{:016x}",
            cx.key,
            rand::random::<u64>()
        ));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(cannot)?;
        let made = Self { path, owner };
        made.give(&made.path).map_err(cannot)?;
        Ok(made)
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file (0600) into it.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(text.as_bytes())?;
            self.give(&path)
        };
        write().map_err(|error| {
            failure(
                Cause::Host,
                format!("cannot write {}: {error}", path.display()),
            )
        })?;
        Ok(path)
    }

    /// A password file for libpq with one password for every connection of the tool.
    pub(crate) fn write_password(&self, password: &str) -> Result<PathBuf, Failure> {
        if password.contains('\n') {
            return Err(failure(
                Cause::Host,
                "a password with a line break reaches no tool",
            ));
        }
        let escaped = password.replace('\\', "\\\\").replace(':', "\\:");
        self.write("pgpass", &format!("*:*:*:*:{escaped}\n"))
    }

    fn give(&self, path: &Path) -> std::io::Result<()> {
        match &self.owner {
            Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes what killed processes of other attempts at the same step have left.
fn remove_left_over(base: &Path, key: &StepKey) {
    let own = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let other = name
            .strip_prefix("lockstep-")
            .and_then(|name| name.rsplit_once('-'))
            .and_then(|(name, _)| name.parse::<StepKey>().ok());
        let stale = other.is_some_and(|other| {
            other != *key && (&other.rollout, other.at) == (&key.rollout, key.at)
        });
        let removable = entry
            .metadata()
            .is_ok_and(|meta| meta.is_dir() && [0, meta.uid()].contains(&own));
        if stale && removable {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether a user can get into a directory, by its ancestors' permissions for owner and others.
pub(crate) fn can_enter(user: &User, directory: &Path) -> bool {
    directory
        .ancestors()
        .filter(|path| !path.as_os_str().is_empty())
        .all(|path| {
            fs::metadata(path).is_ok_and(|meta| {
                let mode = meta.mode();
                if meta.uid() == user.uid {
                    mode & 0o100 != 0
                } else if meta.gid() == user.gid {
                    mode & 0o010 != 0
                } else {
                    mode & 0o001 != 0
                }
            })
        })
}
