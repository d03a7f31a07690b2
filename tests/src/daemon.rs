//! Long-lived processes of a cluster. None outlives the test: the value ends it, and the kernel
//! does where the test itself is killed.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// How to start one.
pub struct Launch<'a> {
    /// The name in messages.
    pub name: &'a str,
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// Its whole environment beside PATH and HOME.
    pub env: Vec<(String, OsString)>,
    /// Where it runs.
    pub dir: &'a Path,
    /// Where its output goes; grows over restarts.
    pub log: &'a Path,
    /// Whom it runs as, if not as the test.
    pub user: Option<&'a str>,
    /// Ends it in good order.
    pub stop: Signal,
}

/// A running process.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    stop: Signal,
}

/// How long a process may take to end in good order before it is killed.
const GRACE: Duration = Duration::from_secs(20);

/// The search path of everything that a cluster runs. Not the caller's: hosts have none of the
/// version managers that developers put in front.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Daemon {
    /// Starts it.
    pub fn spawn(launch: Launch<'_>) -> Result<Self> {
        let Launch {
            name,
            argv,
            env,
            dir,
            log,
            user,
            stop,
        } = launch;
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let mut command = Command::new("setpriv");
        // The kernel sends the signal when the thread that started the process ends, in whatever way.
        command.args(["--pdeathsig", "KILL"]);
        if let Some(user) = user {
            command.args(["--reuid", user, "--regid", user, "--init-groups"]);
        }
        let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
        let child = command
            .arg("--")
            .args(&argv)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", home)
            .envs(env)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("cannot start {name} (setpriv is part of util-linux)"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            stop,
        })
    }

    /// The process id; setpriv becomes the program.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Says that it still runs, or how it ended and what it said last.
    pub fn check(&mut self) -> Result<(), String> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(format!(
                "{} ended with {status}:\n{}",
                self.name,
                self.tail(15)
            )),
        }
    }

    /// Ends it at once, as a crash does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it in good order, and in any case.
    pub fn stop(&mut self) -> Option<ExitStatus> {
        if self.ended().is_none() {
            let _ = kill_process(self.pid(), self.stop);
            let ended = wait::until_true(&self.name.clone(), GRACE, || self.ended().is_some());
            if ended.is_err() {
                self.kill();
            }
        }
        self.ended()
    }

    /// Its last lines.
    pub fn tail(&self, lines: usize) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}
