//! Where a path leads, when the policy has allowed it by its text.
//!
//! Root reads and writes in directories of other users, who can put a symbolic link there at any
//! time. So a path is walked name by name, each from the directory before it, and what was found is
//! held open: nobody can put another thing in its place afterwards. A link is followed
//!
//! - if it is root's or the agent's own, such as `/var/run`, or `current`, which the agent makes;
//! - if it is another user's, only from within an application's directory to within the same one:
//!   so `current/logs -> ../../shared/logs` of a release leads where it should.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use lockstep_proto::report::{Cause, Failure};
use rustix::fs::{FileType, Mode, OFlags, fstat, openat, readlinkat};
use rustix::io::Errno;

use super::files;
use crate::config::Config;
use crate::step::hinted;

/// As many as the kernel follows.
const LINKS: usize = 40;

/// A file or directory that is held, whatever becomes of its name.
#[derive(Debug)]
pub(crate) struct Place(OwnedFd);

/// A place that is not reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// Another user's link leads out of what is that user's.
    #[error("{link} is a symbolic link of user {owner}, who may point it anywhere")]
    Link {
        /// The link.
        link: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The operating system refused, or there is no such file.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl PlaceError {
    /// Whether there is nothing.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// The failure of whoever wanted to do something there.
    pub(crate) fn failed(&self, what: &str) -> Failure {
        match self {
            Self::Io(error) => files::failed(what, error),
            Self::Link { link, .. } => hinted(
                Cause::Refused,
                format!("cannot {what}: {self}"),
                &format!(
                    "name the file that it leads to, and allow that in the host's policy; or let \
                     it be root's: chown -h root {}",
                    link.display()
                ),
            ),
        }
    }
}

impl Place {
    /// Walks an absolute path.
    pub(crate) fn find(config: &Config, path: &Path) -> Result<Self, PlaceError> {
        let mut walk = Walk::begin()?;
        let mut rest: VecDeque<OsString> = names(path);
        let mut links = 0;
        // The application that another user's link stays within.
        let mut within: Option<(PathBuf, PathBuf, u32)> = None;
        while let Some(name) = rest.pop_front() {
            let Some((link, owner)) = walk.step(&name)? else {
                continue;
            };
            links += 1;
            if links > LINKS {
                return Err(io::Error::from(Errno::LOOP).into());
            }
            if owner != 0 && owner != rustix::process::geteuid().as_raw() {
                let root = within.take().map(|(root, ..)| root);
                let root = root.or_else(|| app_root(config, &walk.at));
                let root = root.filter(|root| walk.at.starts_with(root));
                let link = walk.at.join(&name);
                let Some(root) = root else {
                    return Err(PlaceError::Link { link, owner });
                };
                within = Some((root, link, owner));
            }
            let target = readlinkat(&link, "", vec![]).map_err(io::Error::from)?;
            let target = Path::new(OsStr::from_bytes(target.as_bytes()));
            if target.is_absolute() {
                walk = Walk::begin()?;
            }
            let mut all = names(target);
            all.append(&mut rest);
            rest = all;
        }
        match within {
            Some((root, link, owner)) if !walk.at.starts_with(&root) => {
                Err(PlaceError::Link { link, owner })
            }
            _ => Ok(Self(walk.held)),
        }
    }

    /// A path to it that nobody else can change, as long as this value lives.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// The names that a path consists of.
fn names(path: &Path) -> VecDeque<OsString> {
    let names = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    names.collect()
}

/// The directory of an application that a real path lies in.
fn app_root(config: &Config, at: &Path) -> Option<PathBuf> {
    let roots = config.apps.values();
    let mut roots = roots.filter_map(|app| app.root.canonicalize().ok());
    roots.find(|root| at.starts_with(root))
}

/// A place on the way, and its real path.
struct Walk {
    held: OwnedFd,
    at: PathBuf,
}

impl Walk {
    fn begin() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            held: rustix::fs::open("/", flags, Mode::empty())?,
            at: PathBuf::from("/"),
        })
    }

    /// Goes on to a name; stays, and says what it is and whose, if that is a link.
    fn step(&mut self, name: &OsStr) -> io::Result<Option<(OwnedFd, u32)>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let next = openat(&self.held, name, flags, Mode::empty())?;
        let found = fstat(&next)?;
        if FileType::from_raw_mode(found.st_mode).is_symlink() {
            return Ok(Some((next, found.st_uid)));
        }
        self.held = next;
        if name == ".." {
            self.at.pop();
        } else {
            self.at.push(name);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::{lchown, symlink};

    use super::*;
    use crate::config::App;
    use crate::testing::Host;

    /// Somebody who is neither root nor the agent.
    const OTHER: u32 = 65534;

    fn read(host: &Host, path: &Path) -> Result<String, PlaceError> {
        let place = Place::find(&host.config, path)?;
        Ok(fs::read_to_string(place.path())?)
    }

    #[test]
    fn links_of_others_lead_only_about_their_own_application() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut host = Host::new();
        let base = host.path().canonicalize().unwrap();
        let at = |name: &str| base.join(name);
        let link = |target: &str, name: &str, owner: u32| {
            symlink(target, at(name)).unwrap();
            lchown(at(name), Some(owner), Some(owner)).unwrap();
        };
        for directory in ["app/releases/v1", "app/shared/logs", "log", "etc"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        for file in ["app/shared/logs/app.log", "log/real.log", "etc/shadow"] {
            fs::write(at(file), file).unwrap();
        }
        link("releases/v1", "app/current", 0);
        link("../../shared/logs", "app/releases/v1/logs", OTHER);
        link("../log", "app/rotated", 0);
        link("../etc", "app/out", OTHER);
        link("shared/../../etc", "app/about", OTHER);
        link("../app/rotated", "app/both", OTHER);
        link("real.log", "log/own.log", 0);
        link("real.log", "log/app.log", OTHER);
        let shadow = at("etc/shadow");
        link(shadow.to_str().unwrap(), "app/shared/logs/x.log", OTHER);
        let app = App {
            root: at("app"),
            user: None,
            env: BTreeMap::new(),
        };
        host.config.apps = [("app".to_owned(), app)].into();
        for (path, leads_to) in [
            ("app/current/logs/app.log", "app/shared/logs/app.log"),
            ("app/rotated/real.log", "log/real.log"),
            ("log/own.log", "log/real.log"),
        ] {
            assert_eq!(read(&host, &at(path)).unwrap(), leads_to, "{path}");
        }
        for path in [
            "app/out/shadow",
            "app/about/shadow",
            "app/both/real.log",
            "app/current/logs/x.log",
            "log/app.log",
        ] {
            let refused = read(&host, &at(path)).unwrap_err();
            let refused = refused.failed("read it");
            assert_eq!(refused.cause, Cause::Refused, "{path}: {refused:?}");
            assert!(refused.hint.unwrap().contains("chown -h root"), "{path}");
        }
        assert!(read(&host, &at("log/none")).unwrap_err().is_missing());
        // The same application's, after all, but by the way of another's.
        link("../app/shared", "log/shared", OTHER);
        assert!(read(&host, &at("log/shared/logs/app.log")).is_err());
    }
}
