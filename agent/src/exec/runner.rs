//! Starts step processes where they outlive the daemon, and ends what an attempt left behind.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lockstep_proto::ids::{BootId, HostId, StepKey};
use rustix::process::{Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::look::LookDir;
use super::unit::{Sandbox, Start, Unit};
use crate::config::StepRunner;
use crate::faults::{planted, reached};
use crate::process::base_env;
use crate::step::{Claim, StepDir};

/// How long processes have to end after SIGTERM, before SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// How long the end of an attempt's processes is waited for in all. A process in uninterruptible
/// sleep can hold out longer; then nothing can be proven.
const GONE_WITHIN: Duration = Duration::from_mins(1);

/// How step processes are started on this host.
#[derive(Debug)]
pub(crate) struct Runner {
    program: PathBuf,
    config: PathBuf,
    systemd: bool,
}

impl Runner {
    /// Decides how; `config` is the file that step processes read too.
    pub(crate) fn new(kind: StepRunner, config: &Path) -> io::Result<Self> {
        let root = rustix::process::geteuid().is_root();
        // What sd_booted(3) looks at.
        let booted = Path::new("/run/systemd/system").is_dir();
        Ok(Self {
            program: std::env::current_exe()?,
            config: std::path::absolute(config)?,
            systemd: match kind {
                StepRunner::Auto => root && booted,
                StepRunner::Systemd => true,
                StepRunner::Session => false,
            },
        })
    }

    /// In words, for `check` and the log.
    pub(crate) fn describe(&self) -> &'static str {
        if self.systemd {
            "transient units of systemd"
        } else {
            "sessions of their own"
        }
    }

    /// Whether every step process that is alive can be found, whoever started it, even before it
    /// has claimed its attempt.
    pub(crate) fn finds_all(&self) -> bool {
        self.systemd
    }

    /// Starts the step process of an attempt. The child, if it is one, only says sooner that the
    /// process has ended.
    pub(crate) async fn start(&self, key: &StepKey, dir: &StepDir) -> io::Result<Option<Child>> {
        #[cfg(feature = "faults")]
        if let Some(world) = crate::simulation::world() {
            return world.spawn(key).map(|()| None);
        }
        if self.systemd {
            self.start_unit(key, dir).await?;
            return Ok(None);
        }
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(dir.output())?;
        reached("step process: to be started");
        let child = Command::new(&self.program)
            .args(self.arguments(key))
            .env_clear()
            .envs(environment())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(false)
            .spawn()?;
        reached("step process: started");
        Ok(Some(child))
    }

    /// The planted fault: an attempt begins before anything of it is recorded.
    #[cfg(feature = "faults")]
    pub(crate) fn start_early(&self, key: &StepKey) {
        if let Some(world) = crate::simulation::world() {
            let _ = world.spawn(key);
            return;
        }
        let mut command = std::process::Command::new(&self.program);
        command.args(self.arguments(key)).env_clear();
        command.envs(environment()).current_dir("/");
        // To its end, so that what is lost with the agent is the same each time.
        let ended = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        tracing::warn!(?ended, "done before the intent: a fault is planted");
    }

    fn arguments(&self, key: &StepKey) -> [String; 4] {
        let config = self.config.to_string_lossy().into_owned();
        ["step".into(), "--config".into(), config, key.to_string()]
    }

    async fn start_unit(&self, key: &StepKey, dir: &StepDir) -> io::Result<()> {
        let action = dir.read_job().map(|job| job.action)?;
        Unit::of_step(key)
            .start(Start {
                description: format!("Lockstep step {key}"),
                argv: self.argv(&self.arguments(key)),
                environment: environment(),
                output: dir.output(),
                longest: None,
                sandbox: Sandbox::of(&action),
            })
            .await
    }

    /// Whether what runs on this host does so in units of systemd, and so has rights of its own.
    pub(crate) fn has_units(&self) -> bool {
        self.systemd
    }

    /// Starts the process of a look, which writes to these directories and nowhere else; it is
    /// ended after `longest`, whoever waits for it.
    pub(super) async fn start_look(
        &self,
        unit: &Unit,
        dir: &LookDir,
        writable: Vec<PathBuf>,
        longest: Duration,
    ) -> io::Result<()> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let arguments = [
            "look".into(),
            "--config".into(),
            path(&self.config),
            path(dir.path()),
        ];
        unit.start(Start {
            description: "Lockstep looks at the host".into(),
            argv: self.argv(&arguments),
            environment: environment(),
            output: dir.output(),
            longest: Some(longest),
            sandbox: Sandbox::Look { writable },
        })
        .await
    }

    /// Ends the looks of an earlier daemon: nobody awaits them, and what they write for an attempt
    /// is not what the attempt's next look writes. A daemon that looks by itself has none.
    pub(super) async fn end_looks(&self, host: &HostId) -> io::Result<()> {
        if !self.systemd {
            return Ok(());
        }
        let start = Instant::now();
        loop {
            let left = Unit::all_looks(host).await?;
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > GRACE {
                return Err(io::Error::other(format!("{} of them go on", left.len())));
            }
            for unit in left {
                unit.kill().await;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn argv(&self, arguments: &[String]) -> Vec<String> {
        let program = self.program.to_string_lossy().into_owned();
        std::iter::once(program)
            .chain(arguments.iter().cloned())
            .collect()
    }

    /// Ends whatever an attempt left behind; false if something of it is still there afterwards.
    pub(crate) async fn end_all(&self, key: &StepKey, dir: &StepDir, boot: &BootId) -> bool {
        if planted!(SettleTooEarly) {
            return true;
        }
        let unit = self.systemd.then(|| Unit::of_step(key));
        if let Some(unit) = &unit {
            unit.stop().await;
        }
        let start = Instant::now();
        loop {
            let alive = Claim::read(dir).map_or_else(Vec::new, |claim| claim.alive(boot));
            let in_unit = match &unit {
                Some(unit) => unit.exists().await,
                None => false,
            };
            if alive.is_empty() && !in_unit {
                return true;
            }
            let signal = if start.elapsed() < GRACE {
                Signal::TERM
            } else {
                Signal::KILL
            };
            for pid in alive {
                // It may have ended meanwhile.
                let _ = send(pid, signal);
            }
            // Programs of other users, which are not exec's to end.
            if let Some(unit) = unit.as_ref().filter(|_| signal == Signal::KILL) {
                unit.kill().await;
            }
            if start.elapsed() > GONE_WITHIN {
                return false;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Asks the step process to stop: it ends its programs, and says so in its outcome.
    pub(crate) fn cancel(dir: &StepDir, boot: &BootId) {
        reached("cancel file: to be written");
        if let Err(error) = std::fs::write(dir.cancel(), b"") {
            tracing::warn!(%error, "the cancel file cannot be written; a signal must do");
        }
        reached("cancel file: written");
        if let Some(claim) = Claim::read(dir).filter(|claim| claim.is_alive(boot))
            && let Some(pid) = rustix::process::Pid::from_raw(claim.pid)
        {
            let _ = send(pid, Signal::TERM);
        }
    }
}

fn send(pid: rustix::process::Pid, signal: Signal) -> rustix::io::Result<()> {
    #[cfg(feature = "faults")]
    if let Some(world) = crate::simulation::world() {
        world.kill(pid.as_raw_nonzero().get(), signal == Signal::KILL);
        return Ok(());
    }
    kill_process(pid, signal)
}

/// The environment of step processes: the plain one, and where systemd keeps the daemon's
/// credentials. The directory's name is no secret.
fn environment() -> BTreeMap<String, String> {
    let mut environment: BTreeMap<String, String> = base_env(None)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    if let Ok(directory) = std::env::var("CREDENTIALS_DIRECTORY") {
        environment.insert("CREDENTIALS_DIRECTORY".into(), directory);
    }
    #[cfg(feature = "faults")]
    environment.extend(crate::faults::handed_on());
    environment
}
