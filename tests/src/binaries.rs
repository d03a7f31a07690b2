//! Where the real binaries are.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// The binaries under test.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The controller and command line.
    pub lockstep: PathBuf,
    /// The agent.
    pub agent: PathBuf,
}

impl Binaries {
    /// Finds them beside the running executable, where the same build puts them; the variable
    /// `LOCKSTEP_BIN_DIR` names another directory, such as that of an older release.
    pub fn find() -> Result<Self> {
        let directory = match std::env::var_os("LOCKSTEP_BIN_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => directory()?,
        };
        Self::in_directory(&directory)
    }

    /// Those of a directory.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let binary = |name: &str| {
            let path = directory.join(name);
            if !path.is_file() {
                bail!(
                    "{} is missing: run `make build` first (cargo does not build the binaries of \
                     other crates for a test)",
                    path.display()
                );
            }
            Ok(path)
        };
        Ok(Self {
            lockstep: binary("lockstep")?,
            agent: binary("lockstep-agent")?,
        })
    }
}

/// Where this build puts its binaries; tests lie one deeper, in `deps`.
pub fn directory() -> Result<PathBuf> {
    let me = std::env::current_exe().context("this executable has no path")?;
    let directory = me.parent().context("this executable has no directory")?;
    let profile = match directory.file_name() {
        Some(name) if name == "deps" => directory.parent().unwrap_or(directory),
        _ => directory,
    };
    Ok(Path::to_owned(profile))
}
