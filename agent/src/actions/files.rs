//! Files and links that are there as a whole or not at all, also after a power loss.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::StepKey;
use lockstep_proto::report::{Cause, Failure};
use rustix::fs::OFlags;

use crate::faults::reached;
use crate::step::{Context, StepDir, failure};

/// Who owns a file: user and group, by number.
pub(crate) type Owner = (u32, u32);

/// Makes what happened in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Opens a file to be read. What lies in a directory that is not the agent's own may be anything:
/// opening a pipe, or reading one, waits for somebody to write into it.
pub(crate) fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = (flags | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

/// Puts a file in place with its content, permissions and owner, or leaves the old one. The
/// content is never readable by more than `mode` says, not even for a moment.
pub(crate) fn write(
    path: &Path,
    content: &[u8],
    mode: u32,
    owner: Option<Owner>,
) -> io::Result<()> {
    remove_left_over(path)?;
    let temporary = beside(path)?;
    reached("file: to be written");
    let result = write_new(&temporary, content, mode, owner)
        .and_then(|()| fs::rename(&temporary, path))
        .inspect(|()| reached("file: renamed"))
        .and_then(|()| sync_dir(parent(path)));
    reached("file: there");
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write_new(path: &Path, content: &[u8], mode: u32, owner: Option<Owner>) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    if let Some((user, group)) = owner {
        std::os::unix::fs::fchown(&file, Some(user), Some(group))?;
    }
    reached("file: made");
    // After the owner: a change of owner takes set-user bits away.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    reached("file: written");
    file.sync_all()?;
    reached("file: synchronised");
    Ok(())
}

/// Points a symbolic link at a target, in one step.
pub(crate) fn link(target: &Path, link: &Path) -> io::Result<()> {
    remove_left_over(link)?;
    let temporary = beside(link)?;
    reached("link: to be made");
    let result = std::os::unix::fs::symlink(target, &temporary)
        .inspect(|()| reached("link: made"))
        .and_then(|()| fs::rename(&temporary, link))
        .inspect(|()| reached("link: renamed"))
        .and_then(|()| sync_dir(parent(link)));
    reached("link: there");
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Removes a file or link for good; that it is gone already is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    remove_left_over(path)?;
    reached("file: to be removed");
    match fs::remove_file(path) {
        Ok(()) => {
            reached("file: removed");
            sync_dir(parent(path))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a directory that only its owner may enter, with those above it.
pub(crate) fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The private directories of all attempts at a step that this host has made, its own first.
pub(crate) fn attempts(cx: &Context) -> Vec<PathBuf> {
    let own = cx.key.to_string();
    let mut found = vec![cx.dir.clone()];
    let named = |path: &&Path| path.file_name().is_some_and(|name| name == own.as_str());
    let Some(attempt) = cx.dir.ancestors().find(named) else {
        return found;
    };
    let within = cx.dir.strip_prefix(attempt).expect("it is an ancestor");
    let Ok(entries) = fs::read_dir(parent(attempt)) else {
        return found;
    };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name();
        let key = name.to_str().and_then(|name| name.parse::<StepKey>().ok());
        if key.is_some_and(|key| {
            key.rollout == cx.key.rollout && key.at == cx.key.at && key != cx.key
        }) {
            found.push(entry.path().join(within));
        }
    }
    found
}

/// The same without attempts that ended by themselves, and so have an outcome: what is left are
/// its own and those that were killed.
pub(crate) fn attempts_without_outcome(cx: &Context) -> Vec<PathBuf> {
    let has_outcome = |dir: &PathBuf| {
        let attempt = StepDir::at(parent(dir).to_owned());
        *dir != cx.dir && attempt.outcome().exists()
    };
    let mut dirs = attempts(cx);
    dirs.retain(|dir| !has_outcome(dir));
    dirs
}

/// The directory that holds a path.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A free name in the same directory, so that a rename stays within one file system.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = format!("{}{:016x}", beside_prefix(path)?, rand::random::<u64>());
    Ok(path.with_file_name(name))
}

fn beside_prefix(path: &Path) -> io::Result<String> {
    let name = path.file_name().ok_or(ErrorKind::InvalidFilename)?;
    Ok(format!(".{}.lockstep-", name.to_string_lossy()))
}

/// What attempts that were killed left beside a file or link on its way into place. A host takes
/// one step at a time, so that nobody else is writing there.
fn left_over(path: &Path) -> io::Result<Vec<PathBuf>> {
    let prefix = beside_prefix(path)?;
    let is_ours = |name: &str| {
        let tail = name.strip_prefix(&prefix);
        tail.is_some_and(|tail| tail.len() == 16 && tail.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let Ok(entries) = fs::read_dir(parent(path)) else {
        // Whoever writes there says so.
        return Ok(vec![]);
    };
    let ours = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_ours));
    Ok(ours.map(|entry| entry.path()).collect())
}

/// Whether an attempt that was killed left something beside a file or link.
pub(crate) fn has_left_over(path: &Path) -> bool {
    left_over(path).is_ok_and(|left| !left.is_empty())
}

/// Removes what attempts that were killed left beside a file or link: it may hold secrets.
pub(crate) fn remove_left_over(path: &Path) -> io::Result<()> {
    left_over(path)?.iter().try_for_each(fs::remove_file)
}

/// The failure of a file operation: `cannot <what>: <error>`.
pub(crate) fn failed(what: impl std::fmt::Display, error: &io::Error) -> Failure {
    let (cause, hint) = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (
            Cause::Host,
            Some("the file system is full: free space on it, then try again"),
        ),
        ErrorKind::ReadOnlyFilesystem => {
            (Cause::Host, Some("the file system is mounted read-only"))
        }
        ErrorKind::PermissionDenied => (
            Cause::Host,
            Some("the agent's user needs the right to do this"),
        ),
        _ => (Cause::Step, None),
    };
    Failure {
        hint: hint.map(str::to_owned),
        ..failure(cause, format!("cannot {what}: {error}"))
    }
}

/// Puts what was attempted before an error.
pub(crate) trait OrFailed<T> {
    /// The value, or [`failed`].
    fn or_failed<W: std::fmt::Display>(self, what: impl FnOnce() -> W) -> Result<T, Failure>;
}

impl<T> OrFailed<T> for io::Result<T> {
    fn or_failed<W: std::fmt::Display>(self, what: impl FnOnce() -> W) -> Result<T, Failure> {
        self.map_err(|error| failed(what(), &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_with_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        write(&path, b"one", 0o640, None).unwrap();
        write(&path, b"two", 0o600, None).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o600
        );
        assert_eq!(names(dir.path()), ["env"]);
    }

    #[test]
    fn what_a_killed_attempt_left_beside_a_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        let others = [".env.lockstep-mine", ".env2.lockstep-0123456789abcdef"];
        for name in others {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let left = || {
            fs::write(beside(&path).unwrap(), "SECRET=1").unwrap();
            assert!(has_left_over(&path));
        };
        left();
        write(&path, b"one", 0o600, None).unwrap();
        assert!(!has_left_over(&path));
        left();
        link(Path::new("elsewhere"), &path).unwrap();
        assert!(!has_left_over(&path));
        left();
        remove(&path).unwrap();
        let mut names = names(dir.path());
        names.sort();
        assert_eq!(names, others);
    }

    #[test]
    fn nothing_is_left_when_a_file_cannot_be_put_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        fs::create_dir(&path).unwrap();
        assert!(write(&path, b"x", 0o600, None).is_err());
        assert_eq!(names(dir.path()), ["env"]);
    }

    #[test]
    fn a_pipe_where_a_file_is_expected_is_an_error_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let (answer, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || answer.send(open(&path, OFlags::empty()).map(drop)));
        let opened = answers.recv_timeout(std::time::Duration::from_secs(20));
        let error = opened.expect("it is not waited for").unwrap_err();
        assert_eq!(error.to_string(), "not a regular file");
    }

    #[test]
    fn a_link_is_swapped() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("current");
        link(Path::new("releases/v1"), &current).unwrap();
        link(Path::new("releases/v2"), &current).unwrap();
        assert_eq!(fs::read_link(&current).unwrap(), Path::new("releases/v2"));
        assert_eq!(names(dir.path()), ["current"]);
        remove(&current).unwrap();
        remove(&current).unwrap();
        assert_eq!(names(dir.path()), Vec::<String>::new());
    }

    #[test]
    fn a_full_disk_is_the_hosts_fault_and_says_so() {
        let full = io::Error::from_raw_os_error(28);
        let failure = failed("write /x", &full);
        assert_eq!(failure.cause, Cause::Host);
        assert!(
            failure
                .message
                .starts_with("cannot write /x: No space left"),
            "{failure:?}"
        );
        assert!(failure.hint.unwrap().contains("free space"));
    }
}
