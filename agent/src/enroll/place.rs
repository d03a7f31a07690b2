//! Where certificate and key are, and as whom `join` works there.
//!
//! The link's directory belongs to the link, and that is who the network talks to: whatever lies
//! there may lead elsewhere. So root makes the directory, and what is done in it is done as the
//! link. Only where nobody but root could have planted anything does root work itself, and hands
//! the files over.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, lchown};
use std::path::{Component, Path, PathBuf};

use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::config::Tls;
use crate::process::User;

/// Files that cannot be made the link's.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    /// The operating system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Only root can act as another user.
    #[error("cannot act as {name}, who the link runs as")]
    Act {
        /// The link's user.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The places of certificate, key and issuer.
pub(super) struct Place<'a> {
    tls: &'a Tls,
    /// Whose they are to be, if not of whoever this is.
    link: Option<&'a User>,
    /// The link's own directory.
    home: &'a Path,
}

impl<'a> Place<'a> {
    pub(super) fn new(tls: &'a Tls, link: Option<&'a User>, home: &'a Path) -> Self {
        let link = link.filter(|user| !user.is_self());
        Self { tls, link, home }
    }

    /// Makes the directories that are missing.
    pub(super) fn prepare(&self) -> Result<(), PlaceError> {
        if let Some(link) = self.link
            && is_roots_alone(self.home)
        {
            give(self.home, link).map_err(io_error("hand over", self.home))?;
        }
        for file in [&self.tls.cert, &self.tls.key, &self.tls.controller_ca] {
            if let Some(directory) = file.parent() {
                self.make(directory)?;
            }
        }
        Ok(())
    }

    fn make(&self, directory: &Path) -> Result<(), PlaceError> {
        let make = || {
            let mut made = DirBuilder::new();
            made.recursive(true).mode(0o700).create(directory)
        };
        let Some(link) = self.link else {
            return make().map_err(io_error("make", directory));
        };
        let mut ancestors: Vec<&Path> = directory.ancestors().collect();
        ancestors.reverse();
        let missing = ancestors.into_iter().find(|at| is_missing(at));
        if let Some(at) = missing
            && at.parent().is_some_and(is_roots_alone)
        {
            let handed_over = DirBuilder::new()
                .mode(0o700)
                .create(at)
                .and_then(|()| lchown(at, Some(link.uid), Some(link.gid)));
            handed_over.map_err(io_error("make", at))?;
        }
        self.work_in(&[directory], make)?
            .map_err(io_error("make", directory))
    }

    /// Works on certificate and key.
    pub(super) fn with_pair<T: Send>(
        &self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, PlaceError> {
        let files = [&self.tls.cert, &self.tls.key];
        let directories: Vec<&Path> = files.iter().filter_map(|file| file.parent()).collect();
        self.work_in(&directories, work)
    }

    /// Works on the controllers' issuer.
    pub(super) fn with_issuer<T: Send>(
        &self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, PlaceError> {
        let directory = self.tls.controller_ca.parent();
        self.work_in(directory.as_slice(), work)
    }

    fn work_in<T: Send>(
        &self,
        directories: &[&Path],
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, PlaceError> {
        match self.link {
            Some(link) if !directories.iter().all(|it| is_roots_alone(it)) => as_user(link, work)
                .map_err(|source| PlaceError::Act {
                    name: link.name.clone(),
                    source,
                }),
            _ => Ok(work()),
        }
    }

    /// What root has written becomes the link's. What the link's uid has written is that already.
    pub(super) fn hand_over(&self) -> Result<(), PlaceError> {
        let Some(link) = self.link else {
            return Ok(());
        };
        for file in [&self.tls.controller_ca, &self.tls.cert, &self.tls.key] {
            if file.parent().is_some_and(is_roots_alone) {
                lchown(file, Some(link.uid), Some(link.gid))
                    .map_err(io_error("hand over", file))?;
            }
        }
        Ok(())
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let path = path.to_owned();
    move |source| PlaceError::Io { what, path, source }
}

fn is_missing(path: &Path) -> bool {
    let found = fs::symlink_metadata(path);
    found.is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Whether nobody but root can put anything into a directory, or another one in its place.
fn is_roots_alone(directory: &Path) -> bool {
    let Ok(directory) = std::path::absolute(directory) else {
        return false;
    };
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    directory.components().all(plain)
        && directory.ancestors().all(|at| {
            fs::symlink_metadata(at)
                .is_ok_and(|meta| meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0)
        })
}

/// Hands over a directory that is root's alone, itself last: until then nobody reaches what is in
/// it.
fn give(directory: &Path, user: &User) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give(&entry.path(), user)?;
        } else {
            lchown(entry.path(), Some(user.uid), Some(user.gid))?;
        }
    }
    lchown(directory, Some(user.uid), Some(user.gid))
}

/// Works with a user's rights on files and no others, on a thread that ends with it.
fn as_user<T: Send>(user: &User, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    use rustix::process::{Gid, Uid};
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let become_user = || {
        set_thread_groups(&[gid])?;
        set_thread_res_gid(None::<Gid>, gid, None::<Gid>)?;
        // Real and saved stay root's, so that no process of the user may touch this one.
        set_thread_res_uid(None::<Uid>, uid, None::<Uid>)
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> io::Result<T> {
            become_user()?;
            Ok(work())
        });
        let ended = thread.join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::enroll::{Pending, settle};
    use crate::identity::{private_dir, replace_file};

    fn owner(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().uid()
    }

    fn tls_in(directory: &Path) -> Tls {
        Tls {
            controller_ca: directory.join("ca-controllers.crt"),
            cert: directory.join("agent.crt"),
            key: directory.join("agent.key"),
        }
    }

    /// What `join` does to files.
    fn join(tls: &Tls, link: &User, home: &Path) -> Result<(), String> {
        let text = |error: PlaceError| crate::errors::chain(&error);
        let place = Place::new(tls, Some(link), home);
        place.prepare().map_err(text)?;
        let pair = || -> Result<(), String> {
            settle(tls).map_err(|error| crate::errors::chain(&error))?;
            Pending::of(tls).map_err(|error| crate::errors::chain(&error))?;
            for (name, bytes) in [(&tls.key, "key"), (&tls.cert, "certificate")] {
                replace_file(name, bytes.as_bytes()).map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        place.with_pair(pair).map_err(text)??;
        let issuer = || replace_file(&tls.controller_ca, b"issuer").map_err(|e| e.to_string());
        place.with_issuer(issuer).map_err(text)??;
        place.hand_over().map_err(text)
    }

    /// A directory of root's alone, in which a link's is; none without root.
    fn root() -> Option<(tempfile::TempDir, User)> {
        rustix::process::geteuid().is_root().then(|| {
            let root = tempfile::tempdir_in("/run").unwrap();
            fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
            (root, User::find("nobody").unwrap())
        })
    }

    #[test]
    fn directories_and_files_become_the_links_also_after_a_join_that_was_killed() {
        let Some((root, link)) = root() else { return };
        let home = root.path().join("link");
        let tls = tls_in(&home.join("tls"));
        join(&tls, &link, &home).unwrap();
        let all = [
            &home,
            &home.join("tls"),
            &tls.key,
            &tls.cert,
            &tls.controller_ca,
        ];
        assert!(all.iter().all(|path| owner(path) == link.uid));
        join(&tls, &link, &home).unwrap();

        fs::remove_dir_all(&home).unwrap();
        private_dir(&home.join("tls")).unwrap();
        fs::write(&tls.controller_ca, "issuer").unwrap();
        join(&tls, &link, &home).unwrap();
        assert!(all.iter().all(|path| owner(path) == link.uid));
    }

    #[test]
    fn files_in_a_directory_of_roots_are_handed_over_and_it_is_not() {
        let Some((root, link)) = root() else { return };
        let directory = root.path().join("etc");
        fs::create_dir(&directory).unwrap();
        let tls = tls_in(&directory);
        join(&tls, &link, &root.path().join("link")).unwrap();
        assert_eq!((owner(&directory), owner(&tls.key)), (0, link.uid));
    }

    /// The link's user has been taken over, and waits for root to join this host again.
    #[test]
    fn nothing_that_the_link_has_planted_is_followed() {
        let Some((root, link)) = root() else { return };
        let home = root.path().join("link");
        let (units, file) = (root.path().join("system"), root.path().join("passwd"));
        let tls = tls_in(&home.join("tls"));
        let next = |name: &str| home.join("tls").join(name);
        let plant = |directory: &Path| {
            let _ = fs::remove_dir_all(&home);
            let _ = fs::remove_dir_all(&units);
            fs::create_dir_all(directory).unwrap();
            fs::create_dir(&units).unwrap();
            fs::write(&file, "root:").unwrap();
            lchown(directory, Some(link.uid), Some(link.gid)).unwrap();
            lchown(&home, Some(link.uid), Some(link.gid)).unwrap();
        };
        let unharmed = || {
            assert_eq!((owner(&units), owner(&file)), (0, 0));
            assert_eq!(fs::read_dir(&units).unwrap().count(), 0);
            assert_eq!(fs::read(&file).unwrap(), b"root:");
        };
        plant(&home);
        symlink(&units, home.join("tls")).unwrap();
        join(&tls, &link, &home).unwrap_err();
        unharmed();
        for name in [
            "agent.key.new",
            "agent.new",
            "ca-controllers.new",
            "agent.key.next",
        ] {
            plant(&home.join("tls"));
            symlink(&file, next(name)).unwrap();
            let _ = join(&tls, &link, &home);
            unharmed();
        }
        // A file of the link's own that was to be replaced may also be a link.
        for name in ["agent.key", "agent.crt", "ca-controllers.crt"] {
            plant(&home.join("tls"));
            symlink(&file, next(name)).unwrap();
            join(&tls, &link, &home).unwrap();
            unharmed();
        }
    }
}
