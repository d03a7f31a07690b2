//! Watches the memory of processes that is theirs alone, while something goes on.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Pid;

/// Between two looks.
const PACE: Duration = Duration::from_millis(100);

/// Looks at processes until it is told to end.
#[derive(Debug)]
pub struct Memory {
    stop: Arc<AtomicBool>,
    watched: Vec<Watched>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Watched {
    pid: Pid,
    first: u64,
    most: Arc<AtomicU64>,
}

impl Memory {
    /// Begins with what they have now.
    pub fn begin(pids: &[Pid]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let begun = |pid: &Pid| {
            let first = anonymous_kib(*pid);
            Watched {
                pid: *pid,
                first,
                most: Arc::new(AtomicU64::new(first)),
            }
        };
        let watched: Vec<Watched> = pids.iter().map(begun).collect();
        let (told, seen) = (stop.clone(), watched.clone());
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                for one in &seen {
                    one.most
                        .fetch_max(anonymous_kib(one.pid), Ordering::Relaxed);
                }
                thread::sleep(PACE);
            }
        });
        Self {
            stop,
            watched,
            thread,
        }
    }

    /// By how much each has grown at most, in MiB.
    pub fn end(self) -> Vec<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        let grown = |one: &Watched| {
            let most = one.most.load(Ordering::Relaxed);
            let kib = u32::try_from(most.saturating_sub(one.first)).unwrap_or(u32::MAX);
            f64::from(kib) / 1024.0
        };
        self.watched.iter().map(grown).collect()
    }
}

fn anonymous_kib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()));
    let status = status.unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.unwrap_or(0)
}
