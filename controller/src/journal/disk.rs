//! Every sync of the journal: what stands behind "on the disk". Tests cut the power between any
//! two of them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
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

/// Writes a file once more as it is, for the next sync to write all of it. After a sync that failed
/// the kernel may count as written what is only in its memory, and the next sync skips that
/// (<https://wiki.postgresql.org/wiki/Fsync_Errors>).
pub(super) fn write_again(path: &Path) -> io::Result<()> {
    const CHUNK: usize = 1 << 20;
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = vec![0; CHUNK];
    let mut from = 0;
    while from < length {
        let left = usize::try_from(length - from).unwrap_or(CHUNK);
        let bytes = &mut bytes[..left.min(CHUNK)];
        file.read_exact_at(bytes, from)?;
        file.write_all_at(bytes, from)?;
        from += bytes.len() as u64;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_again_is_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_be_bytes).collect();
        fs::write(&path, &bytes).unwrap();
        let long_ago = std::time::UNIX_EPOCH;
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(long_ago))
            .unwrap();
        write_again(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert_ne!(fs::metadata(&path).unwrap().modified().unwrap(), long_ago);
    }
}
