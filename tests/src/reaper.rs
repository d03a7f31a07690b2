//! What is left to do when a test ends in a way that runs no destructor: killed, timed out, Ctrl-C.
//!
//! A reaper is a process in a session of its own that waits for the end of its standard input,
//! which the kernel closes when its owner ends, in whatever way. Then it cleans up.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::{binaries, processes};

/// The binary's name.
pub const PROGRAM: &str = "lockstep-reaper";

/// Cleans up when dropped, or when this process ends.
#[derive(Debug)]
pub struct Reaper {
    child: Child,
}

impl Reaper {
    /// Sees to a cluster: its processes, then its directory.
    pub fn of_cluster(root: &Path) -> Result<Self> {
        Self::spawn(&["cluster".into(), root.into()])
    }

    /// Sees to a fleet of systemd hosts: its containers, and the daemon where it was started.
    pub fn of_fleet(name: &str) -> Result<Self> {
        Self::spawn(&["fleet".into(), name.into()])
    }

    fn spawn(arguments: &[OsString]) -> Result<Self> {
        let program = binaries::directory()?.join(PROGRAM);
        // `setsid` would start, and find nothing.
        ensure!(
            program.is_file(),
            "{} is missing: run `make build` first",
            program.display()
        );
        let child = Command::new("setsid")
            .arg("--wait")
            .arg(&program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {} with `setsid`", program.display()))?;
        Ok(Self { child })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The reaper's own program.
pub fn main(arguments: &[String]) -> ExitCode {
    // Nothing is ever written: this ends when the owner does.
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let done = match arguments {
        [kind, root] if kind == "cluster" => clean_cluster(Path::new(root)),
        [kind, name] if kind == "fleet" => clean_fleet(name),
        _ => Err(anyhow::anyhow!(
            "usage: {PROGRAM} cluster ROOT | fleet NAME"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn clean_cluster(root: &Path) -> Result<()> {
    if !root.exists() && processes::of(root).is_empty() {
        return Ok(());
    }
    processes::sweep(root)?;
    if root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    Ok(())
}

fn clean_fleet(name: &str) -> Result<()> {
    for command in ["down", "stop-daemon"] {
        Command::new(crate::repository().join("tests/fleet/hosts.sh"))
            .arg(command)
            .env("LOCKSTEP_FLEET", name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
    }
    Ok(())
}
