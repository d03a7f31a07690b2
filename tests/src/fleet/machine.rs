//! The machine under the fleet: `tests/fleet/hosts.sh`, and files for its hosts.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::NAME;
use crate::repository;

/// Files for a host, put there in one go.
pub(super) struct Stage {
    pub(super) directory: PathBuf,
}

impl Stage {
    pub(super) fn new(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    fn at(&self, path: &str, mode: u32, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.directory.join(path);
        fs::create_dir_all(path.parent().expect("a file has a directory"))?;
        write(&path).with_context(|| format!("cannot stage {}", path.display()))?;
        Ok(fs::set_permissions(&path, Permissions::from_mode(mode))?)
    }

    pub(super) fn copy(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        self.at(to, mode, |path| Ok(fs::copy(from, path).map(drop)?))
    }

    pub(super) fn write(&self, to: &str, text: &str, mode: u32) -> Result<()> {
        self.at(to, mode, |path| Ok(fs::write(path, text)?))
    }

    pub(super) fn put(&self, host: &str) -> Result<()> {
        let directory = self.directory.to_str().context("the path is UTF-8")?;
        hosts(&["put", host, directory, "/"]).map(drop)
    }
}

/// Runs `hosts.sh`; its standard output.
pub(super) fn hosts(arguments: &[&str]) -> Result<String> {
    hosts_with(arguments, "")
}

pub(super) fn hosts_with(arguments: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new(repository().join("tests/fleet/hosts.sh"))
        .args(arguments)
        .env("LOCKSTEP_FLEET", NAME)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("it is piped");
    // A command that reads nothing may have ended already.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "hosts.sh {}: {}\n{said}",
            arguments.join(" "),
            output.status
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
