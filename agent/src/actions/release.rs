//! Releases: immutable directories, and a link to the one that is active.
//!
//! ```text
//! <root>/releases/v1.0.0/                  a release, with `.lockstep-release.json`
//! <root>/releases/.partial-<attempt>/      one that is being fetched
//! <root>/current -> releases/v1.0.0        the active one, swapped by one rename
//! <root>/shared/                           what outlives releases
//! <root>/.mirror/                          a bare repository, so that little is fetched
//! ```

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::{Digest, StepKey};
use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{self, OrFailed as _};
use crate::config;
use crate::faults::reached;
use crate::process::{Program, User};
use crate::step::{Context, failure};

mod activate;
mod build;
mod fetch;

/// The file in a release that says where it comes from.
const NOTE: &str = ".lockstep-release.json";

/// The largest note that is read, in bytes. The application's user could put anything there.
const MAX_NOTE: u64 = 64 << 10;

/// An application on this host.
struct App<'a> {
    name: &'a str,
    config: &'a config::App,
    user: Option<User>,
}

/// Where a release comes from, and whether it is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    app: String,
    release: String,
    url: String,
    tag: String,
    commit: String,
    /// The attempt that fetched it.
    fetched_by: StepKey,
    /// `None` until a build begins: a release may need none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    build: Option<Build>,
}

/// A build that was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Build {
    /// Of the commands.
    digest: Digest,
    /// The attempt that began it.
    by: StepKey,
    /// Whether it came to its end.
    done: bool,
}

/// A name that is one component of a path, and no option of any program.
fn checked<'a>(what: &str, name: &'a str) -> Result<&'a str, Failure> {
    let unfit = name.is_empty()
        || name.len() > 128
        || name.starts_with(['-', '.'])
        || name.contains("..")
        || name.contains(|c: char| c == '/' || c == '\\' || c.is_control() || c.is_whitespace());
    if unfit {
        return Err(failure(
            Cause::Refused,
            format!("`{name}` cannot be the name of {what}"),
        ));
    }
    Ok(name)
}

impl<'a> App<'a> {
    fn open(cx: &'a Context, name: &'a str) -> Result<Self, Failure> {
        let name = checked("an application", name)?;
        let config = cx.config.apps.get(name).ok_or_else(|| Failure {
            hint: Some(format!("add [apps.{name}] with its `root` to agent.toml")),
            ..failure(
                Cause::Host,
                format!("application {name} is not in this host's configuration"),
            )
        })?;
        let user = config.user.as_deref().map(User::find).transpose()?;
        Ok(Self { name, config, user })
    }

    fn releases(&self) -> PathBuf {
        self.config.root.join("releases")
    }

    fn release(&self, name: &str) -> Result<PathBuf, Failure> {
        Ok(self.releases().join(checked("a release", name)?))
    }

    /// The application's own copy of its repository.
    fn mirror(&self) -> PathBuf {
        self.config.root.join(".mirror")
    }

    fn current(&self) -> PathBuf {
        self.config.root.join("current")
    }

    /// What `current` points at, as it is written there; `None` if there is no link.
    fn target(&self) -> Result<Option<PathBuf>, Failure> {
        let link = self.current();
        match fs::read_link(&link) {
            Ok(target) => Ok(Some(target)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidInput => Err(Failure {
                hint: Some(format!(
                    "move it to {}/<release> and link to it",
                    self.releases().display()
                )),
                ..failure(
                    Cause::Host,
                    format!("{} is no symbolic link", link.display()),
                )
            }),
            Err(error) => Err(files::failed(format!("read {}", link.display()), &error)),
        }
    }

    /// The name of the active release; empty if none is.
    fn active(&self) -> Result<String, Failure> {
        Ok(self
            .target()?
            .map(|target| release_of(&target))
            .unwrap_or_default())
    }

    fn note(&self, release: &str) -> Result<Option<Note>, Failure> {
        let path = self.release(release)?.join(NOTE);
        match read_note(&path) {
            Ok(text) => json::read(&text).map(Some).map_err(|error| {
                failure(
                    Cause::Host,
                    format!("{} cannot be read: {error}", path.display()),
                )
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(files::failed(format!("read {}", path.display()), &error)),
        }
    }

    /// The note of a release that was fetched.
    fn fetched(&self, release: &str) -> Result<Note, Failure> {
        self.note(release)?.ok_or_else(|| self.not_fetched(release))
    }

    fn not_fetched(&self, release: &str) -> Failure {
        Failure {
            hint: Some("let a `release.fetch` step bring it first".into()),
            ..failure(
                Cause::Refused,
                format!("release {release} of {} was not fetched", self.name),
            )
        }
    }

    fn write_note(&self, dir: &Path, note: &Note) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(note).expect("a note has a JSON form");
        files::write(&dir.join(NOTE), &text, 0o644, self.owner())
            .or_failed(|| format!("note where release {} comes from", note.release))
    }

    /// Who owns what is made here, if it is not the agent's own user.
    fn owner(&self) -> Option<files::Owner> {
        self.user
            .as_ref()
            .filter(|user| !user.is_self())
            .map(|user| (user.uid, user.gid))
    }

    /// Makes a directory that belongs to the application, unless it is there.
    fn make_dir(&self, dir: &Path) -> Result<(), Failure> {
        let owner = self.owner();
        reached("directory: to be made");
        let make = || match fs::create_dir(dir) {
            Ok(()) => match owner {
                Some((user, group)) => std::os::unix::fs::lchown(dir, Some(user), Some(group)),
                None => Ok(()),
            },
            Err(error) if error.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            Err(error) => Err(error),
        };
        let made = make();
        reached("directory: made");
        made.or_failed(|| format!("make the directory {}", dir.display()))
    }

    /// A program that runs as the application's user.
    fn program(&self, argv: &[&str]) -> Program {
        Program {
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            user: self.config.user.clone(),
            ..Program::default()
        }
    }

    /// Removes what interrupted attempts left: never a release.
    fn sweep(&self) -> Result<(), Failure> {
        let places = [
            (self.releases(), &[PARTIAL, REMOVED][..]),
            (self.mirror(), &[INDEX][..]),
        ];
        for (place, beginnings) in places {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                if beginnings.iter().any(|begins| name.starts_with(begins)) {
                    remove_all(&entry.path())
                        .or_failed(|| format!("remove {}", entry.path().display()))?;
                }
            }
        }
        Ok(())
    }
}

fn read_note(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = vec![];
    let file = files::open(path, rustix::fs::OFlags::empty())?;
    file.take(MAX_NOTE).read_to_end(&mut text)?;
    Ok(text)
}

/// Directories on their way in and out begin with these; no release can.
const PARTIAL: &str = ".partial-";
const REMOVED: &str = ".removed-";

/// The index of a release on its way, in the mirror, begins with this.
const INDEX: &str = "index-";

fn remove_all(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// The release that a link's target names.
fn release_of(target: &Path) -> String {
    target
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// A failed program's failure, with the cause that its last lines name, if they name a known one.
fn explained(failed: Failure) -> Failure {
    let said = |words: &str| failed.last_lines.iter().any(|line| line.contains(words));
    let known = if said("No space left on device") || said("ENOSPC") || said("Disk quota exceeded")
    {
        Some("the file system is full: free space on it, then try again")
    } else if said("dubious ownership") {
        Some("the repository belongs to another user: have it listed in git's `safe.directory`")
    } else if said("could not read Username") || said("Permission denied (publickey") {
        Some("give the application's user a key or a credential helper for the repository")
    } else {
        None
    };
    match known {
        Some(hint) => Failure {
            cause: Cause::Host,
            hint: Some(hint.into()),
            ..failed
        },
        None => failed,
    }
}

fn before<T: serde::de::DeserializeOwned>(before: &Value) -> Result<T, Failure> {
    serde_json::from_value(before.clone()).map_err(|error| {
        failure(
            Cause::Step,
            format!("the before-state cannot be read: {error}"),
        )
    })
}

#[cfg(test)]
mod tests;
