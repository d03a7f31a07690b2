//! Every sync of the journal: what stands behind "on the disk". Tests cut the power between any
//! two of them.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::OpenError;

/// Makes a file's content durable.
pub(super) fn sync(file: &File, path: &Path) -> io::Result<()> {
    #[cfg(test)]
    lockstep_tests::power::before_sync(path);
    #[cfg(not(test))]
    let _ = path;
    file.sync_data()
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(dir: &Path) -> Result<(), OpenError> {
    let synced = File::open(dir).and_then(|opened| {
        #[cfg(test)]
        lockstep_tests::power::before_sync(dir);
        opened.sync_all()
    });
    synced.map_err(io_error("sync", dir))
}

/// Makes a directory's files and their names durable.
pub(super) fn sync_files(dir: &Path) -> Result<(), OpenError> {
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        if path.is_dir() {
            sync_directory(&path)?;
        } else {
            let synced = File::open(&path).and_then(|file| sync(&file, &path));
            synced.map_err(io_error("sync", &path))?;
        }
    }
    sync_directory(dir)
}

pub(super) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { what, path, source }
}
