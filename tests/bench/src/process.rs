//! The processes of a benchmark: parts of this program that are told what to do a line at a time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longer than anything that is waited for.
const PATIENCE: Duration = Duration::from_mins(3);

/// A part that runs. It ends with the value.
#[derive(Debug)]
pub(crate) struct Part<S> {
    child: Child,
    stdin: ChildStdin,
    said: Receiver<S>,
}

impl<S: DeserializeOwned + Send + 'static> Part<S> {
    /// Starts this program anew as a part, with what it is to be.
    pub(crate) fn start(part: &str, what: &impl Serialize) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([part, &serde_json::to_string(what)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {part}"))?;
        let stdin = child.stdin.take().context("it has an input")?;
        let stdout = child.stdout.take().context("it has an output")?;
        let (tell, said) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let read = serde_json::from_str(&line);
                if tell
                    .send(read.unwrap_or_else(|error| panic!("{line}: {error}")))
                    .is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { child, stdin, said })
    }

    /// Tells it something.
    pub(crate) fn tell(&mut self, word: &str) -> Result<()> {
        writeln!(self.stdin, "{word}").context("the part has ended")
    }

    /// What it says next.
    pub(crate) fn next(&mut self) -> Result<S> {
        match self.said.recv_timeout(PATIENCE) {
            Ok(said) => Ok(said),
            Err(RecvTimeoutError::Timeout) => {
                bail!("a part of the benchmark says nothing for {PATIENCE:?}")
            }
            Err(RecvTimeoutError::Disconnected) => bail!("a part of the benchmark has ended"),
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl<S> Drop for Part<S> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    /// Processor time, in seconds.
    pub(crate) cpu: f64,
    /// That of its children that have ended and were waited for.
    pub(crate) children: f64,
    /// Resident memory, in bytes.
    pub(crate) memory: u64,
}

/// Looks what a process has used.
pub(crate) fn used(pid: u32) -> Result<Used> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<u64> = after_name
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    // utime and stime are the 14th and 15th field of proc(5), rss the 24th; the third comes first here.
    // cutime and cstime follow the first two.
    let ticks: &[u64] = fields.get(11..15).context("no such fields")?;
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    let pages = fields.get(21).context("no such field")?;
    Ok(Used {
        cpu: (ticks[0] + ticks[1]) as f64 / per_second,
        children: (ticks[2] + ticks[3]) as f64 / per_second,
        memory: pages * rustix::param::page_size() as u64,
    })
}

/// The most resident memory that a process has had so far, in bytes.
pub(crate) fn peak(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
    let kib: u64 = kib.context("no such line")?.trim().parse()?;
    Ok(kib * 1024)
}

/// The time that the threads of a process have run, in seconds: finer than ticks. Those that have
/// ended are not among them: of the controller, what waits for files, a few milliseconds.
pub(crate) fn running(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let schedule = std::fs::read_to_string(task?.path().join("schedstat"));
        // It may end while it is looked at.
        let Ok(schedule) = schedule else { continue };
        let first = schedule.split_whitespace().next();
        nanoseconds += first.context("no such field")?.parse::<u64>()?;
    }
    Ok(nanoseconds as f64 / 1e9)
}
