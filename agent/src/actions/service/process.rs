//! Services that the agent starts itself, in sessions of their own.
//!
//! ```text
//! step process --starts--> lockstep-agent supervise      its own session; reads what to run
//!                              |  notes its number        (stdin, so nothing stands in argv)
//!                              v  becomes, by exec
//!                          the service                    outlives step process and daemon
//! ```
//!
//! The step process learns that the service was started when the pipe at `supervise`'s standard
//! error is closed without a word: exec closes it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use super::systemd;
use super::{Phase, State};
use crate::actions::env::parse_env;
use crate::actions::files::{self, OrFailed as _};
use crate::config;
use crate::faults::reached;
use crate::process::{User, base_env};
use crate::secrets::Secret;
use crate::step::{Context, changed, failure};

/// What `supervise` is told on its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    name: String,
    argv: Vec<String>,
    dir: Option<PathBuf>,
    env_file: Option<PathBuf>,
    output: PathBuf,
    user: Option<String>,
    note: PathBuf,
}

/// Which process is the service: its number alone may be given to another one later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Also the number of its session and process group.
    pid: i32,
    /// When it was started, in clock ticks since the boot.
    started: u64,
    /// The boot.
    boot: String,
    /// The length of its output file when it was started.
    output_from: u64,
}

/// Between two looks at a process.
const PAUSE: Duration = Duration::from_millis(50);

/// How long `supervise` may take to become the service.
const TAKE_OFF: Duration = Duration::from_secs(20);

/// How many lines of its output a failure shows, and how far back they are looked for, in bytes.
const LINES: usize = 20;
const TAIL: u64 = 16 << 10;

/// The configuration of a service of the drivers `process` and `command`.
pub(super) fn configured<'a>(cx: &'a Context, name: &str) -> Result<&'a config::Service, Failure> {
    cx.config.services.get(name).ok_or_else(|| Failure {
        hint: Some(format!(
            "add [services.{name}] to agent.toml, or use the driver `systemd`"
        )),
        ..failure(
            Cause::Host,
            format!("service {name} is not in this host's configuration"),
        )
    })
}

/// A service of the driver `process`.
pub(super) struct Process<'a> {
    name: &'a str,
    config: &'a config::Service,
    note: PathBuf,
    output: PathBuf,
}

impl<'a> Process<'a> {
    pub(super) fn open(cx: &'a Context, name: &'a str) -> Result<Self, Failure> {
        let config = configured(cx, name)?;
        if config.argv.is_empty() {
            return Err(Failure {
                hint: Some(format!(
                    "add `argv = [...]` to [services.{name}] in agent.toml"
                )),
                ..failure(
                    Cause::Host,
                    format!("service {name} has no program on this host"),
                )
            });
        }
        let default = || {
            cx.config
                .state_dir
                .join("services")
                .join(format!("{name}.log"))
        };
        Ok(Self {
            name,
            config,
            note: cx
                .config
                .run_dir
                .join("services")
                .join(format!("{name}.json")),
            output: config.output.clone().unwrap_or_else(default),
        })
    }

    pub(super) fn state(&self) -> Result<State, Failure> {
        let note = self.read_note()?;
        let alive = note.as_ref().filter(|note| note.is_alive());
        let (phase, words) = match alive {
            Some(_) => (Phase::Running, "running"),
            None => (Phase::Stopped, "stopped"),
        };
        let run = alive.map(|note| format!("{}.{}", note.pid, note.started));
        Ok(State {
            phase,
            words: words.into(),
            run,
            trouble: None,
        })
    }

    pub(super) async fn start(&self, cx: &Context) -> Result<(), Failure> {
        let Some(left) = self.read_note()?.filter(Note::has_members) else {
            return self.begin(cx).await;
        };
        // Its first process has ended, but not all that it started.
        left.end(Instant::now() + TAKE_OFF).await;
        self.begin(cx).await.map_err(changed)
    }

    async fn begin(&self, cx: &Context) -> Result<(), Failure> {
        for path in [&self.note, &self.output] {
            let dir = files::parent(path);
            fs::create_dir_all(dir)
                .or_failed(|| format!("make the directory {}", dir.display()))?;
        }
        let order = Order {
            name: self.name.to_owned(),
            argv: self.config.argv.clone(),
            dir: self.config.dir.clone(),
            env_file: self.config.env_file.clone(),
            output: self.output.clone(),
            user: self.config.user.clone(),
            note: self.note.clone(),
        };
        cx.log
            .line(&format!("starting {} as {:?}", self.name, order.argv));
        match timeout(TAKE_OFF, self.take_off(&order)).await {
            Ok(result) => result,
            Err(_) => Err(Failure {
                changed: true,
                ..failure(
                    Cause::TimedOut,
                    format!("service {} was not started in time", self.name),
                )
            }),
        }
    }

    async fn take_off(&self, order: &Order) -> Result<(), Failure> {
        reached("supervisor: to be started");
        let mut child = tokio::process::Command::from(supervisor())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .or_failed(|| format!("start the supervisor of service {}", self.name))?;
        reached("supervisor: started");
        // It waits for its order, so it can be moved before it becomes the service.
        if systemd::is_running() && rustix::process::geteuid().is_root() {
            let pid = child.id().expect("it has not been waited for");
            if let Err(failure) = systemd::adopt(self.name, pid).await {
                let _ = child.kill().await;
                return Err(failure);
            }
        }
        let text = serde_json::to_vec(order).expect("an order has a JSON form");
        let mut stdin = child.stdin.take().expect("it was asked for");
        let mut stderr = child.stderr.take().expect("it was asked for");
        let mut said = String::new();
        let handed = stdin.write_all(&text).await;
        drop(stdin);
        reached("supervisor: ordered");
        let read = stderr.read_to_string(&mut said).await;
        reached("supervisor: became the service");
        if said.is_empty() && handed.is_ok() && read.is_ok() {
            return Ok(());
        }
        let _ = child.wait().await;
        Err(Failure {
            changed: true,
            ..failure(
                Cause::Host,
                format!("service {} cannot be started: {}", self.name, said.trim()),
            )
        })
    }

    pub(super) async fn stop(&self, until: Instant) -> Result<(), Failure> {
        if let Some(note) = self.read_note()? {
            reached("service: to be ended");
            if !note.end(until).await {
                return Err(Failure {
                    hint: Some(format!(
                        "process {} does not end even when killed",
                        note.pid
                    )),
                    changed: true,
                    ..failure(
                        Cause::TimedOut,
                        format!("service {} is not stopped", self.name),
                    )
                });
            }
            reached("service: ended");
            files::remove(&self.note)
                .or_failed(|| format!("remove {}", self.note.display()))
                .map_err(changed)?;
        }
        Ok(())
    }

    /// The last lines of this run's output.
    pub(super) fn last_lines(&self) -> Vec<String> {
        let from = self
            .read_note()
            .ok()
            .flatten()
            .map_or(0, |note| note.output_from);
        tail(&self.output, from).unwrap_or_default()
    }

    fn read_note(&self) -> Result<Option<Note>, Failure> {
        match fs::read(&self.note) {
            // A note that cannot be read is refused: it may stand for a running service.
            Ok(text) => json::read(&text).map(Some).map_err(|error| Failure {
                hint: Some("see whether the service runs, end it, and remove the file".into()),
                ..failure(
                    Cause::Host,
                    format!("{} cannot be read: {error}", self.note.display()),
                )
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(files::failed(
                format!("read {}", self.note.display()),
                &error,
            )),
        }
    }
}

impl Note {
    /// Whether the noted process is still there; one that has ended and has not been waited for
    /// is not.
    fn is_alive(&self) -> bool {
        self.boot == boot_id()
            && Stat::of(self.pid).is_some_and(|stat| stat.lives() && stat.started == self.started)
    }

    /// Whether anything of its session is still there.
    fn has_members(&self) -> bool {
        !self.members().is_empty()
    }

    /// The session's living processes. If the number belongs to another process by now, that one
    /// and its session are none of ours.
    fn members(&self) -> Vec<i32> {
        let reused = Stat::of(self.pid).is_some_and(|stat| stat.started != self.started);
        if reused || self.boot != boot_id() {
            return vec![];
        }
        let Ok(entries) = fs::read_dir("/proc") else {
            return vec![];
        };
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            Stat::of(*pid).is_some_and(|stat| stat.lives() && stat.session == self.pid)
        })
        .collect()
    }

    /// Ends the whole session: politely, and at `until` for sure. Says whether all have gone.
    async fn end(&self, until: Instant) -> bool {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            let _ = kill_process_group(pid, Signal::TERM);
        } else {
            self.signal_members(Signal::TERM);
        }
        // What is left a little before the end is killed, so that the end can be seen.
        let kill_at = until.checked_sub(Duration::from_secs(1)).unwrap_or(until);
        while self.has_members() {
            if Instant::now() >= kill_at {
                self.signal_members(Signal::KILL);
            }
            if Instant::now() >= until + Duration::from_secs(1) {
                return false;
            }
            sleep(PAUSE).await;
        }
        true
    }

    fn signal_members(&self, signal: Signal) {
        for pid in self.members().into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    session: i32,
    started: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// `pid (comm) state ppid pgrp session ... starttime(22nd)`; the name may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let session = fields.nth(2)?.parse().ok()?;
        let started = fields.nth(15)?.parse().ok()?;
        Some(Self {
            state,
            session,
            started,
        })
    }

    fn lives(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }
}

fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn tail(path: &Path, from: u64) -> std::io::Result<Vec<String>> {
    let mut file = files::open(path, rustix::fs::OFlags::empty())?;
    let length = file.metadata()?.len();
    // The file was emptied meanwhile: all of it is new.
    let from = if from > length { 0 } else { from };
    file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL))))?;
    let mut bytes = vec![];
    file.take(TAIL).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    Ok(lines[lines.len().saturating_sub(LINES)..].to_vec())
}

/// The program that becomes a service: this one, with the hidden subcommand `supervise`.
#[cfg(not(test))]
fn supervisor() -> std::process::Command {
    // Not `current_exe`: after an upgrade its path may name another file, or none.
    let mut command = std::process::Command::new("/proc/self/exe");
    command
        .arg("supervise")
        .env_clear()
        .envs(base_env(None))
        .current_dir("/");
    command
}

/// Unit tests have no `main` of ours: the test program runs the one test that supervises.
#[cfg(test)]
fn supervisor() -> std::process::Command {
    let mut command = std::process::Command::new("/proc/self/exe");
    let test = "actions::service::process::tests::entry_of_the_supervisor";
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    command
}

/// The hidden subcommand `lockstep-agent supervise`: reads from standard input what to run, and
/// becomes it. It returns only if that fails; the caller writes the error to standard error and
/// exits with another code than 0.
pub(crate) fn supervise() -> Result<std::convert::Infallible, String> {
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|error| format!("cannot read what to run: {error}"))?;
    let order: Order =
        serde_json::from_str(&text).map_err(|error| format!("cannot read what to run: {error}"))?;
    // A process that leads its group already cannot make a session; a fresh child does not.
    rustix::process::setsid().map_err(|error| format!("cannot make a session: {error}"))?;
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(&order.output)
        .map_err(|error| format!("cannot open {}: {error}", order.output.display()))?;
    let length = output.metadata().map_or(0, |metadata| metadata.len());
    let user = order
        .user
        .as_deref()
        .map(User::find)
        .transpose()
        .map_err(|failure| failure.message)?;
    let mut env: BTreeMap<String, Secret> = base_env(user.as_ref())
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect();
    if let Some(path) = &order.env_file {
        let text = fs::read_to_string(path)
            .map(Zeroizing::new)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        env.extend(parse_env(&text));
    }
    note_self(&order, length)?;
    if let Some(user) = user.filter(|user| !user.is_self()) {
        become_user(&user)?;
    }
    let stderr = output
        .try_clone()
        .map_err(|error| format!("cannot share the output: {error}"))?;
    let mut command = std::process::Command::new(&order.argv[0]);
    command.args(&order.argv[1..]).env_clear();
    command.envs(env.iter().map(|(name, value)| (name, value.expose())));
    command.stdin(Stdio::null()).stdout(output).stderr(stderr);
    if let Some(dir) = &order.dir {
        command.current_dir(dir);
    }
    // When exec fails, standard error is the service's output already. This copy of the pipe is
    // closed by exec, as every descriptor of ours is.
    let pipe = std::io::stderr().as_fd().try_clone_to_owned();
    let error = format!("cannot run `{}`: {}", order.argv[0], command.exec());
    let _ = fs::remove_file(&order.note);
    if let Ok(pipe) = pipe {
        let _ = writeln!(fs::File::from(pipe), "{error}");
    }
    Err(error)
}

/// Writes down who the service is, before it is that: a service without a note would be lost.
fn note_self(order: &Order, output_from: u64) -> Result<(), String> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let stat = Stat::of(pid).ok_or("cannot read /proc/self/stat")?;
    let note = Note {
        pid,
        started: stat.started,
        boot: boot_id(),
        output_from,
    };
    let text = serde_json::to_vec(&note).expect("a note has a JSON form");
    files::write(&order.note, &text, 0o600, None)
        .map_err(|error| format!("cannot write {}: {error}", order.note.display()))
}

/// Takes a user's groups and numbers for this thread, which is the one that calls exec.
fn become_user(user: &User) -> Result<(), String> {
    use rustix::process::{Gid, Uid};
    user.may_be_taken().map_err(|failure| failure.message)?;
    let groups = user.groups().map_err(|failure| failure.message)?;
    let groups: Vec<Gid> = groups.into_iter().map(Gid::from_raw).collect();
    let (gid, uid) = (Gid::from_raw(user.gid), Uid::from_raw(user.uid));
    rustix::thread::set_thread_groups(&groups)
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .map_err(|error| format!("cannot become {}: {error}", user.name))
}

#[cfg(test)]
mod tests;
