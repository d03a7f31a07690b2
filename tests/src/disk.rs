//! A small file system of its own, which can be filled. Only root can mount one.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system; ended with the value.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one with so many MiB on a new directory; none without root's rights.
    pub fn mount(at: PathBuf, mebibytes: u32) -> Option<Self> {
        if !crate::is_root() {
            return None;
        }
        std::fs::create_dir_all(&at).expect("a directory can be made");
        let options = format!("size={mebibytes}m,mode=0700");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(&at)
            .status();
        // Some containers keep that from root, too.
        status
            .is_ok_and(|status| status.success())
            .then(|| Self(at))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Fills it but for so many bytes.
    pub fn fill(&self, leaving: u64) {
        let stat = rustix::fs::statvfs(&self.0).expect("the disk is there");
        let size = (stat.f_bavail * stat.f_frsize).saturating_sub(leaving);
        let ballast = vec![1; usize::try_from(size).expect("the disk is small")];
        match std::fs::write(self.0.join("ballast"), ballast) {
            // Somebody took some of it in between.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
            written => written.expect("the disk can be filled"),
        }
    }

    /// Makes room again.
    pub fn free(&self) {
        std::fs::remove_file(self.0.join("ballast")).expect("it was filled");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
