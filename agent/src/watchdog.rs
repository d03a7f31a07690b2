//! Tells systemd's watchdog that the process is well, from what it is there for and not from a timer
//! beside it: a daemon that hangs is started again, and what it started goes on.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::notify::notify;

/// What systemd is told.
pub(crate) const WELL: &str = "WATCHDOG=1";

/// When the next proof is due; never if nobody asks for one.
#[derive(Debug)]
pub(crate) struct Due(Option<Interval>);

impl Due {
    /// As systemd asks in this process's environment.
    pub(crate) fn new() -> Self {
        let micros = std::env::var("WATCHDOG_USEC").ok();
        let micros = micros.and_then(|micros| micros.parse().ok());
        let for_us = std::env::var("WATCHDOG_PID").ok();
        let for_us = for_us.is_none_or(|pid| pid == std::process::id().to_string());
        let limit = micros.filter(|micros| for_us && *micros > 0);
        Self(limit.map(|micros| {
            // Thrice, so that one that comes late costs nothing.
            let mut due = interval(Duration::from_micros(micros) / 3);
            due.set_missed_tick_behavior(MissedTickBehavior::Delay);
            due
        }))
    }

    pub(crate) async fn come(&mut self) {
        match &mut self.0 {
            Some(due) => _ = due.tick().await,
            None => std::future::pending().await,
        }
    }
}

/// Writes a file beside the journal, waits for the disk, and says that the process is well. A disk
/// that hangs keeps this from returning, and the process from saying so; one that is full answers.
pub(crate) fn beat(state_dir: &Path) {
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(state_dir.join("pulse"))?;
        file.write_all_at(b"\n", 0)?;
        file.sync_data()
    };
    match write() {
        Err(error) if error.kind() != io::ErrorKind::StorageFull => {
            tracing::error!(%error, "the journal's disk does not take a write");
        }
        _ => notify(WELL),
    }
}
