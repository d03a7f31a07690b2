//! The files of a backup. Its directory is `os_user`'s, and one for copies may be anybody's, who
//! can put a link, a pipe or another directory there at any time. So directories are held open,
//! what is in them is reached from there, nothing is followed, and only files are read.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::ids::Digest;
use rustix::fs::OFlags;
use sha2::Digest as _;

use crate::actions::files;

/// The archive's name in a backup's directory: of a file, or of a directory of files.
pub(super) const ARCHIVE: &str = "archive";

/// The archive in a backup's directory.
pub(super) fn archive_in(directory: &Path) -> PathBuf {
    directory.join(ARCHIVE)
}

/// A directory that is held, whatever becomes of its name.
#[derive(Debug)]
pub(super) struct Dir(File);

impl Dir {
    /// Opens a directory, not a link to one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)?;
        Ok(Self(opened))
    }

    /// Makes a directory in this one, which only its owner may enter.
    fn make(&self, name: &str) -> io::Result<Self> {
        let path = self.path(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        Self::open(&path)
    }

    /// A path to a name in it, as long as this value lives.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.0.as_raw_fd()))
    }

    /// Opens a file in it to be read.
    pub(super) fn file(&self, name: &str) -> io::Result<File> {
        files::open(&self.path(name), OFlags::NOFOLLOW)
    }

    /// Makes what happened in it durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    /// The directory of that name, or none if the name is another thing's.
    fn inner(&self, name: &str) -> io::Result<Option<Self>> {
        let path = self.path(name);
        let is_dir = fs::symlink_metadata(&path)?.is_dir();
        is_dir.then(|| Self::open(&path)).transpose()
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.path(""))?;
        let name = |entry: io::Result<fs::DirEntry>| {
            let name = entry?.file_name().into_string();
            name.map_err(|name| io::Error::other(format!("{} is not text", name.display())))
        };
        let mut names = entries.map(name).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }
}

/// Opens one file of an archive after the other, by its name in it; a custom archive is one file
/// without a name.
fn each(
    archive: &Path,
    mut seen: impl FnMut(Option<&str>, File) -> io::Result<()>,
) -> io::Result<()> {
    let directory = Dir::open(files::parent(archive))?;
    let Some(inner) = directory.inner(ARCHIVE)? else {
        return seen(None, directory.file(ARCHIVE)?);
    };
    let names = inner.names()?;
    names
        .iter()
        .try_for_each(|name| seen(Some(name), inner.file(name)?))
}

/// What a pipe may hold, in bytes: as much as the kernel gives without privileges.
const PIPE: usize = 1 << 20;

/// After a read of less than this, the next one waits for [`NAP`]: a tool writes 4 KiB at a time,
/// and whoever takes each of them alone spends more on waking up than on its bytes.
const WORTH_IT: usize = 256 << 10;

/// Long enough for some hundred KiB to gather, short enough that the pipe does not get full.
const NAP: Duration = Duration::from_millis(2);

/// A file for an archive, readable for its owner only.
pub(super) fn create(archive: &Path, owner: Option<(u32, u32)>) -> io::Result<File> {
    create_beside(files::parent(archive), ARCHIVE, owner)
}

/// A file in a backup's directory, readable for its owner only.
pub(super) fn create_beside(
    directory: &Path,
    name: &str,
    owner: Option<(u32, u32)>,
) -> io::Result<File> {
    let directory = Dir::open(directory)?;
    let mut new = OpenOptions::new();
    new.write(true).create_new(true).mode(0o600);
    let file = new.open(directory.path(name))?;
    if let Some((user, group)) = owner {
        std::os::unix::fs::fchown(&file, Some(user), Some(group))?;
    }
    Ok(file)
}

/// Writes what comes through a pipe into a file, to its end, and makes it durable. The digest is
/// that of the bytes as they came, whatever the disk makes of them. It blocks.
pub(super) fn pour(pipe: PipeReader, mut file: File) -> io::Result<(Digest, u64)> {
    let hashed = hash(pipe, |bytes| file.write_all(bytes))?;
    file.sync_all()?;
    Ok(hashed)
}

/// The digest and size of what comes through a pipe, to its end. It blocks.
pub(super) fn drain(pipe: PipeReader) -> io::Result<(Digest, u64)> {
    hash(pipe, |_| Ok(()))
}

fn hash(
    mut pipe: PipeReader,
    mut taken: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<(Digest, u64)> {
    // The kernel may refuse that to a user who has many: then it only takes longer.
    let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE);
    let (mut hash, mut size) = (sha2::Sha256::new(), 0);
    let mut buffer = vec![0; PIPE];
    loop {
        let length = pipe.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        hash.update(&buffer[..length]);
        taken(&buffer[..length])?;
        size += length as u64;
        if length < WORTH_IT {
            std::thread::sleep(NAP);
        }
    }
    Ok((Digest(hash.finalize().into()), size))
}

/// Makes an archive durable. It blocks.
pub(super) fn sync(archive: &Path) -> io::Result<()> {
    each(archive, |_, file| file.sync_all())?;
    let directory = Dir::open(files::parent(archive))?;
    directory.inner(ARCHIVE)?.map_or(Ok(()), |dir| dir.sync())
}

/// The digest and size of an archive. It blocks.
pub(super) fn digest(archive: &Path) -> io::Result<(Digest, u64)> {
    let (mut list, mut total, mut whole) = (sha2::Sha256::new(), 0, None);
    each(archive, |name, file| {
        let (digest, size) = file_digest(file)?;
        total += size;
        match name {
            Some(name) => list.update(format!("{}  {name}\n", digest.hex())),
            None => whole = Some(digest),
        }
        Ok(())
    })?;
    let digest = whole.unwrap_or_else(|| Digest(list.finalize().into()));
    Ok((digest, total))
}

fn file_digest(mut file: File) -> io::Result<(Digest, u64)> {
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok((Digest(hash.finalize().into()), size));
        }
        hash.update(&buffer[..length]);
        size += length as u64;
    }
}

/// The digest and size of a file beside an archive. It blocks.
pub(super) fn digest_beside(directory: &Path, name: &str) -> io::Result<(Digest, u64)> {
    file_digest(Dir::open(directory)?.file(name)?)
}

/// Copies a backup's archive, and the files beside it that say what it is, into a new directory in
/// another one. It blocks.
pub(super) fn copy(from: &Path, to: &Dir, name: &str, beside: &[&str]) -> io::Result<()> {
    let from = Dir::open(from)?;
    let to = to.make(name)?;
    match from.inner(ARCHIVE)? {
        None => copy_file(&from, &to, ARCHIVE)?,
        Some(archive) => {
            let made = to.make(ARCHIVE)?;
            let names = archive.names()?;
            names
                .iter()
                .try_for_each(|name| copy_file(&archive, &made, name))?;
            made.sync()?;
        }
    }
    beside
        .iter()
        .try_for_each(|name| copy_file(&from, &to, name))?;
    to.sync()
}

fn copy_file(from: &Dir, to: &Dir, name: &str) -> io::Result<()> {
    let mut new = OpenOptions::new();
    new.write(true).create_new(true).mode(0o600);
    let mut copied = new.open(to.path(name))?;
    io::copy(&mut from.file(name)?, &mut copied)?;
    copied.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_comes_through_a_pipe_is_written_and_hashed_as_it_came() {
        let directory = tempfile::tempdir().unwrap();
        let archive = archive_in(directory.path());
        let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let (pipe, mut writer) = io::pipe().unwrap();
        let sent = bytes.clone();
        let sender = std::thread::spawn(move || {
            sent.chunks(4096)
                .for_each(|chunk| writer.write_all(chunk).unwrap());
        });
        let file = create(&archive, None).unwrap();
        let poured = pour(pipe, file).unwrap();
        sender.join().unwrap();
        assert_eq!(poured, (Digest::of(&bytes), bytes.len() as u64));
        assert_eq!(fs::read(&archive).unwrap(), bytes);
        // What cannot be written is not taken for the end.
        let (pipe, mut writer) = io::pipe().unwrap();
        writer.write_all(b"rows").unwrap();
        drop(writer);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let failed = pour(pipe, full).unwrap_err();
        assert_eq!(failed.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn what_the_tools_user_plants_is_neither_copied_nor_followed() {
        let host = tempfile::tempdir().unwrap();
        let (backup, secret) = (host.path().join("shop-1"), host.path().join("shadow"));
        let copies = host.path().join("copies");
        fs::write(&secret, "root:").unwrap();
        fs::create_dir(&copies).unwrap();
        let to = Dir::open(&copies).unwrap();
        let fresh = || {
            let _ = fs::remove_dir_all(&backup);
            fs::create_dir(&backup).unwrap();
            fs::write(backup.join("manifest.json"), "{}").unwrap();
        };
        let copy = |name: &str| copy(&backup, &to, name, &["manifest.json"]);

        // Beside the archive, which is a file.
        fresh();
        fs::write(archive_in(&backup), "rows").unwrap();
        symlink(&secret, backup.join("x")).unwrap();
        copy("beside").unwrap();
        assert!(!copies.join("beside/x").exists());
        let found = digest(&archive_in(&copies.join("beside"))).unwrap();
        assert_eq!(found, digest(&archive_in(&backup)).unwrap());
        assert_eq!(found.1, 4);

        // In its place, in the manifest's, and in an archive that is a directory: a link, and a
        // pipe, on which reading would wait for ever.
        for planted in ["archive", "manifest.json", "archive/1.dat"] {
            for pipe in [false, true] {
                fresh();
                match planted {
                    "archive" => {}
                    "manifest.json" => {
                        fs::remove_file(backup.join(planted)).unwrap();
                        fs::write(archive_in(&backup), "rows").unwrap();
                    }
                    _ => fs::create_dir(archive_in(&backup)).unwrap(),
                }
                let at = backup.join(planted);
                if pipe {
                    let mode = rustix::fs::Mode::RUSR;
                    let kind = rustix::fs::FileType::Fifo;
                    rustix::fs::mknodat(rustix::fs::CWD, &at, kind, mode, 0).unwrap();
                } else {
                    symlink(&secret, &at).unwrap();
                }
                let name = format!("{}-{pipe}", planted.replace('/', "-"));
                copy(&name).expect_err(&name);
                if planted != "manifest.json" {
                    digest(&archive_in(&backup)).expect_err(&name);
                }
            }
        }

        // The whole backup, and where the copy is to be.
        fresh();
        fs::write(archive_in(&backup), "rows").unwrap();
        symlink(host.path(), copies.join("taken")).unwrap();
        copy("taken").unwrap_err();
        assert!(!archive_in(host.path()).exists());
        let moved = host.path().join("moved");
        fs::rename(&backup, &moved).unwrap();
        symlink(&moved, &backup).unwrap();
        copy("moved").unwrap_err();
    }
}
