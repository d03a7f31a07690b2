//! The previous release, built from this repository's own history: what half of a fleet still runs
//! while the other half is upgraded.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::binaries::Binaries;
use crate::{repository, target};

/// Where the commit of the previous release stands.
const NAMED_IN: &str = "tests/previous";

/// The previous release.
#[derive(Debug)]
pub struct Previous {
    /// Its commit.
    pub commit: String,
    /// Its binaries, of the same profile as this program.
    pub binaries: Binaries,
}

impl Previous {
    /// Builds it in a target directory of its own, unless that has been done. `Err` inside: it
    /// cannot be had here, and why.
    pub fn build(mut tell: impl FnMut(&str)) -> Result<Result<Self, String>> {
        let file = repository().join(NAMED_IN);
        let commit = fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}", file.display()))?
            .trim()
            .to_owned();
        let whole = commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
        ensure!(whole, "{NAMED_IN} does not name a whole commit: `{commit}`");
        if let Err(why) = is_known(&commit) {
            let why = format!(
                "the previous release, {commit} of {NAMED_IN}, is not in this clone ({why})"
            );
            return Ok(Err(why));
        }
        let root = target().join("previous");
        let source = root.join(&commit);
        if !source.join("Cargo.lock").is_file() {
            extract(&commit, &root, &source)?;
        }
        let (profile, directory) = if cfg!(debug_assertions) {
            ("dev", "debug")
        } else {
            ("release", "release")
        };
        tell(&format!("building the previous release, {commit}"));
        let built = root.join("build");
        let status = Command::new("cargo")
            .args(["build", "--locked", "--quiet", "--bins", "--profile"])
            .args([profile, "-p", "lockstep", "-p", "lockstep-agent"])
            .current_dir(&source)
            .env("CARGO_TARGET_DIR", &built)
            .stdin(Stdio::null())
            .status()
            .context("cannot start cargo")?;
        ensure!(status.success(), "the previous release does not build");
        let binaries = Binaries::in_directory(&built.join(directory))?;
        Ok(Ok(Self { commit, binaries }))
    }
}

fn git(arguments: &[&str]) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(repository()).args(arguments);
    git.stdin(Stdio::null());
    git
}

/// Whether the history reaches back so far: clones in CI often do not, and archives have none.
fn is_known(commit: &str) -> Result<(), String> {
    let asked = git(&["cat-file", "-e", &format!("{commit}^{{commit}}")]).output();
    match asked {
        Err(error) => Err(format!("git cannot be started: {error}")),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().next().unwrap_or("git does not know it").into())
        }
    }
}

/// Its files, whole when the directory is there.
fn extract(commit: &str, root: &Path, source: &PathBuf) -> Result<()> {
    fs::create_dir_all(root)?;
    let fresh = tempfile::Builder::new()
        .prefix("source-")
        .tempdir_in(root)?;
    let archive = fresh.path().join("archive.tar");
    let tree = fresh.path().join("tree");
    fs::create_dir(&tree)?;
    let output = git(&["archive", "--format=tar", "-o"])
        .arg(&archive)
        .arg(commit)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "git archive {commit}: {said}");
    let unpacked = Command::new("tar")
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(&tree)
        .status()?;
    ensure!(unpacked.success(), "the archive of {commit} is not whole");
    let _ = fs::remove_dir_all(source);
    Ok(fs::rename(&tree, source)?)
}
