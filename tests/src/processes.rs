//! What /proc tells: the processes that belong to a cluster, whoever their parent is now.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};

use crate::{reaper, wait};

/// A process as /proc shows it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: Pid,
    /// Program and arguments, as everybody on the host can read them.
    pub argv: Vec<String>,
    /// Its first environment, raw; empty if it may not be read.
    pub environ: Vec<u8>,
    /// Where it runs.
    pub dir: Option<PathBuf>,
}

impl Process {
    /// The command line for people.
    pub fn line(&self) -> String {
        format!("{} {}", self.pid.as_raw_nonzero(), self.argv.join(" "))
    }

    fn read(pid: Pid) -> Option<Self> {
        let at = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        // A zombie has no command line left, and is its parent's affair.
        let argv = std::fs::read(at.join("cmdline"))
            .ok()
            .filter(|argv| !argv.is_empty())?;
        let argv = argv
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        Some(Self {
            pid,
            argv: argv
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect(),
            environ: std::fs::read(at.join("environ")).unwrap_or_default(),
            dir: std::fs::read_link(at.join("cwd")).ok(),
        })
    }

    fn mentions(&self, path: &Path) -> bool {
        let text = path.as_os_str().as_bytes();
        let within = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        self.argv.iter().any(|word| within(word.as_bytes()))
            || within(&self.environ)
            || self.dir.as_deref().is_some_and(|dir| dir.starts_with(path))
    }
}

/// All processes of the machine but this one.
pub fn all() -> Vec<Process> {
    let me = rustix::process::getpid();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Pid::from_raw)
        .filter(|pid| *pid != me)
        .filter_map(Process::read)
        .collect()
}

/// The processes that have to do with a directory: in their arguments, environment or as the
/// place where they run. Its reaper is none of them.
pub fn of(directory: &Path) -> Vec<Process> {
    let mut found = all();
    let reaps = |process: &Process| {
        process
            .argv
            .iter()
            .any(|word| word.ends_with(reaper::PROGRAM))
    };
    found.retain(|process| process.mentions(directory) && !reaps(process));
    found
}

/// Kills every process that has to do with a directory, until there is none. Names what was
/// killed.
pub fn sweep(directory: &Path) -> Result<Vec<String>> {
    let mut killed = vec![];
    wait::until("the last process of the cluster to end", wait::SOON, || {
        let left = of(directory);
        for process in &left {
            if !killed.contains(&process.line()) {
                killed.push(process.line());
            }
            let _ = kill_process(process.pid, Signal::KILL);
        }
        match left.first() {
            None => Ok(()),
            Some(process) => Err(process.line()),
        }
    })?;
    Ok(killed)
}
