//! Who this agent is: its installation, its boot, and the lock that makes it the only one.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use lockstep_proto::ids::{BootId, Digest};
use rustix::fs::{FlockOperation, OFlags};

use crate::faults::reached;
use crate::journal::{sync_all, sync_dir};

/// An identity that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// Another agent has the state directory.
    #[error("another agent runs with the state directory {0}")]
    InUse(PathBuf),
    /// The operating system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    let path = path.to_owned();
    move |source| IdentityError::Io { what, path, source }
}

/// Makes a directory for the agent alone, with its parents.
pub(crate) fn private_dir(path: &Path) -> Result<(), IdentityError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("make", path))
}

/// Makes a directory that everybody may enter and only the agent may list, with its parents.
pub(crate) fn make_enterable(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    // The process's mask may have taken what others need.
    std::fs::set_permissions(path, Permissions::from_mode(0o711))
}

/// Held as long as the daemon runs; step processes do not inherit it.
#[derive(Debug)]
pub(crate) struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the state directory for this process.
    pub(crate) fn take(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(IdentityError::InUse(state_dir.to_owned())),
            Err(error) => Err(io_error("lock", &path)(error.into())),
        }
    }
}

/// The identity of this boot. The kernel's id alone would not do: containers share it, so that a
/// random file in the run directory, which a boot empties, is part of it.
pub(crate) fn boot_id(run_dir: &Path) -> Result<BootId, IdentityError> {
    let kernel_path = Path::new("/proc/sys/kernel/random/boot_id");
    let kernel = std::fs::read(kernel_path).map_err(io_error("read", kernel_path))?;
    make_enterable(run_dir).map_err(io_error("make", run_dir))?;
    let path = run_dir.join("boot");
    let own = match std::fs::read(&path) {
        Ok(own) if own.len() == 32 => own,
        _ => make_boot_file(run_dir, &path)?,
    };
    let digest = Digest::of(&[kernel, own].concat());
    Ok(BootId::from_bytes(
        digest.0[..8].try_into().expect("a digest has 32 bytes"),
    ))
}

fn make_boot_file(run_dir: &Path, path: &Path) -> Result<Vec<u8>, IdentityError> {
    let bytes: [u8; 32] = rand::random();
    let fresh = run_dir.join(format!("boot.{}", std::process::id()));
    write_durably(&fresh, &bytes).map_err(io_error("write", &fresh))?;
    // Whoever links first has made it: two that start together agree.
    match std::fs::hard_link(&fresh, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io_error("write", path)(error));
        }
        _ => {}
    }
    reached("boot: linked");
    std::fs::remove_file(&fresh).map_err(io_error("remove", &fresh))?;
    reached("boot: there");
    std::fs::read(path).map_err(io_error("read", path))
}

/// Removes what was left of boot files by a process that was killed while it made one.
pub(crate) fn remove_left_over(run_dir: &Path) {
    for entry in std::fs::read_dir(run_dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("boot.") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Writes a whole new file and makes its content durable, but not its name. A symbolic link of that
/// name is not followed.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = write_whole(path, bytes)?;
    sync_all(&file, path)?;
    reached("file: synchronised");
    Ok(())
}

/// The same for this boot only: after a power loss it may be torn, or not there.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, bytes).map(drop)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<File> {
    reached("file: to be written");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    reached("file: opened");
    file.write_all(bytes)?;
    reached("file: written");
    Ok(file)
}

/// Replaces a file as a whole: afterwards the new content is durable, or the old one is there.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    write_durably(&fresh, bytes)?;
    std::fs::rename(&fresh, path)?;
    reached("file: renamed");
    sync_dir(path.parent().unwrap_or_else(|| Path::new(".")))?;
    reached("file: there");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_on_the_same_state_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::take(dir.path()).unwrap();
        assert!(matches!(
            StateLock::take(dir.path()),
            Err(IdentityError::InUse(_))
        ));
        drop(first);
        StateLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_boot_ends_when_the_run_directory_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let first = boot_id(&run).unwrap();
        assert_eq!(boot_id(&run).unwrap(), first);
        std::fs::remove_dir_all(&run).unwrap();
        assert_ne!(boot_id(&run).unwrap(), first);
    }
}
