//! Files that only one user may read, gone when they are no longer needed.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown,
};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::StepKey;
use lockstep_proto::report::{Cause, Failure};
use zeroize::Zeroizing;

use crate::faults::reached;
use crate::identity::make_enterable;
use crate::process::User;
use crate::secrets::Secret;
use crate::step::{Context, failure, hinted};

/// A directory that a tool's user may enter and nobody else, removed when this value is dropped.
/// It stays the agent's own: only the files in it are the user's. So it can be filled and removed
/// without any power over other users' files.
#[derive(Debug)]
pub(crate) struct PrivateDir {
    path: PathBuf,
    owner: Option<User>,
}

impl PrivateDir {
    /// Makes one for a user; `None` is whoever the agent runs as. It is in the run directory, which
    /// a reboot empties.
    pub(crate) fn new(cx: &Context, user: Option<&str>) -> Result<Self, Failure> {
        let owner = user
            .map(User::find)
            .transpose()?
            .filter(|user| !user.is_self());
        let base = parent(&cx.config.run_dir);
        let cannot = |error: std::io::Error| {
            let base = base.display();
            failure(
                Cause::Host,
                format!("cannot make a private directory in {base}: {error}"),
            )
        };
        make_enterable(&base).map_err(cannot)?;
        if let (Some(user), Some(name)) = (&owner, user) {
            user.may_be_taken()?;
            if !can_enter(user, &base) {
                return Err(hinted(
                    Cause::Host,
                    format!("{name} cannot enter {}", base.display()),
                    "let others enter the agent's `run_dir` and the directories above it (0711)",
                ));
            }
        }
        let path = base.join(format!("{}-{:016x}", cx.key, rand::random::<u64>()));
        reached("private directory: to be made");
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(cannot)?;
        reached("private directory: made");
        let made = Self { path, owner };
        made.admit().map_err(cannot)?;
        Ok(made)
    }

    /// Lets the user's group pass, and not look: the files' names are known to whom they concern.
    fn admit(&self) -> std::io::Result<()> {
        let Some(user) = &self.owner else {
            return Ok(());
        };
        chown(&self.path, None, Some(user.gid))?;
        fs::set_permissions(&self.path, Permissions::from_mode(0o710))
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file (0600) into it, which is the user's.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        reached("private file: to be written");
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(text.as_bytes())?;
            match &self.owner {
                Some(user) => chown(&path, Some(user.uid), Some(user.gid)),
                None => Ok(()),
            }
        };
        write().map_err(|error| {
            failure(
                Cause::Host,
                format!("cannot write {}: {error}", path.display()),
            )
        })?;
        reached("private file: written");
        Ok(path)
    }

    /// A password file for libpq with one password for every connection of the tool.
    pub(crate) fn write_password(&self, password: &Secret) -> Result<PathBuf, Failure> {
        let password = password.expose();
        if password.contains('\n') {
            return Err(failure(
                Cause::Host,
                "a password with a line break reaches no tool",
            ));
        }
        // With all its room from the start: a text that grows leaves its content behind.
        let mut line = Zeroizing::new(String::with_capacity(2 * password.len() + 16));
        line.push_str("*:*:*:*:");
        for c in password.chars() {
            if matches!(c, '\\' | ':') {
                line.push('\\');
            }
            line.push(c);
        }
        line.push('\n');
        self.write("pgpass", &line)
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        reached("private directory: to be removed");
        let _ = fs::remove_dir_all(&self.path);
        reached("private directory: removed");
    }
}

/// Removes what attempts have left whose processes have ended, or whose result nobody awaits.
pub(crate) fn remove_left_over(run_dir: &Path, of: impl Fn(&StepKey) -> bool) {
    for entry in fs::read_dir(parent(run_dir))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let key = name.rsplit_once('-').and_then(|(key, _)| key.parse().ok());
        if key.is_some_and(|key| of(&key)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn parent(run_dir: &Path) -> PathBuf {
    run_dir.join("private")
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::testing::Host;

    fn mode(path: &Path) -> (u32, u32, u32) {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o777)
    }

    #[test]
    fn only_the_files_are_the_users_and_what_a_killed_attempt_left_goes() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let host = Host::new();
        let chmod = |mode| fs::set_permissions(host.path(), Permissions::from_mode(mode)).unwrap();
        let cx = host.context();
        chmod(0o700);
        let refused = PrivateDir::new(&cx, Some("nobody")).unwrap_err();
        assert!(
            refused.message.contains("nobody cannot enter"),
            "{refused:?}"
        );

        chmod(0o711);
        let user = User::find("nobody").unwrap();
        let made = PrivateDir::new(&cx, Some("nobody")).unwrap();
        let file = made.write_password(&"a:b".into()).unwrap();
        assert_eq!(mode(made.path()), (0, user.gid, 0o710));
        assert_eq!(mode(&file), (user.uid, user.gid, 0o600));
        assert_eq!(fs::read_to_string(&file).unwrap(), "*:*:*:*:a\\:b\n");

        let path = made.path().to_owned();
        std::mem::forget(made);
        remove_left_over(&host.config.run_dir, |of| *of != cx.key);
        assert!(path.exists());
        remove_left_over(&host.config.run_dir, |of| *of == cx.key);
        assert!(!path.exists());
    }
}
