//! The one way in which Lockstep starts other programs: argv, never a shell.

use std::collections::BTreeMap;
use std::io::{ErrorKind, PipeReader};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

use crate::faults::reached;
use crate::secrets::{Secret, named};
use crate::step::Context;

mod capture;
mod output;
mod user;

pub(crate) use output::{Redactor, head};
pub(crate) use user::User;

/// A program to run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    /// Program and arguments. No secret may stand here: everybody on the host can read it.
    pub(crate) argv: Vec<String>,
    /// The directory it runs in. A program name with a `/` in it is relative to it.
    pub(crate) dir: Option<PathBuf>,
    /// Its environment, which is otherwise only PATH, HOME, LANG=C.UTF-8, LC_ALL=C.UTF-8 and the
    /// user's name.
    pub(crate) env: BTreeMap<String, Secret>,
    /// Who it runs as. Default: whoever the agent runs as.
    pub(crate) user: Option<String>,
    /// At most this long, and never longer than the step's deadline; then its process group is
    /// ended, first politely.
    pub(crate) timeout: Option<Duration>,
    /// Values that are taken out of its output before it is logged or returned.
    pub(crate) secrets: Vec<Secret>,
}

/// How a program ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub(crate) code: i32,
    /// The first MiB of its standard output. Standard error goes to the step's log only.
    pub(crate) stdout: String,
}

/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// How long output is awaited after the program itself has ended: a child that it left behind may
/// hold the pipe open for ever.
const STRAGGLERS: Duration = Duration::from_secs(2);

/// The search path of programs where the agent itself has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Program {
    /// Adds variables; a value `secret://NAME` is resolved, and hidden in the output.
    pub(crate) async fn with_env(
        mut self,
        cx: &Context,
        env: &BTreeMap<String, String>,
    ) -> Result<Self, Failure> {
        for (name, text) in env {
            let value = cx.secret(text).await?;
            if named(text).is_some() {
                self.secrets.push(value.clone());
            }
            self.env.insert(name.clone(), value);
        }
        Ok(self)
    }

    /// Runs it, its output going to the step's log line by line. Fails if it cannot be started
    /// (with a hint about a missing tool) or takes too long; an exit code other than 0 is no
    /// failure here.
    pub(crate) async fn run(&self, cx: &Context) -> Result<Ended, Failure> {
        self.attend(cx, Stdio::null(), Stdio::piped()).await
    }

    /// The same with something on its standard input; fails unless it exits with 0.
    pub(crate) async fn feed(&self, cx: &Context, stdin: Stdio) -> Result<Ended, Failure> {
        let ended = self.attend(cx, stdin, Stdio::piped()).await?;
        self.well(cx, ended)
    }

    /// Runs it, its standard output going to `read` on a thread of its own, and fails unless it
    /// exits with 0. Once `read` has failed nobody takes its output, which ends it.
    pub(crate) async fn pour<T: Send + 'static>(
        &self,
        cx: &Context,
        read: impl FnOnce(PipeReader) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let no_pipe = |error| self.failure(Cause::Host, format!("gets no pipe: {error}"));
        let (reader, writer) = std::io::pipe().map_err(no_pipe)?;
        let reading = tokio::task::spawn_blocking(move || read(reader));
        let ended = self.attend(cx, Stdio::null(), writer.into()).await;
        let read = reading
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        match (read, ended) {
            // What the program says of its broken pipe is not the cause.
            (Err(error), _) => {
                let what = format!("has output that cannot be kept: {error}");
                let hint = (error.kind() == ErrorKind::StorageFull)
                    .then(|| "make room on the volume that it goes to".to_owned());
                Err(Failure {
                    hint,
                    ..self.failure(Cause::Host, what)
                })
            }
            (Ok(read), ended) => self.well(cx, ended?).map(|_| read),
        }
    }

    async fn attend(&self, cx: &Context, stdin: Stdio, stdout: Stdio) -> Result<Ended, Failure> {
        reached("program: to be started");
        let mut child = self.spawn(stdin, stdout)?;
        reached("program: started");
        let group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let redactor = Redactor::new(&self.secrets);
        let mut kept = output::Kept::default();
        let copy = async {
            tokio::join!(
                output::copy(stdout, &redactor, &cx.log, Some(&mut kept)),
                output::copy(stderr, &redactor, &cx.log, None),
            );
        };
        let ended = {
            let mut copy = std::pin::pin!(copy);
            // The pipes are read while waiting: a program that fills one would wait for us.
            let wait = async {
                let mut copied = false;
                loop {
                    tokio::select! {
                        () = &mut copy, if !copied => copied = true,
                        status = child.wait() => {
                            if !copied {
                                let _ = timeout(STRAGGLERS, &mut copy).await;
                            }
                            return status;
                        }
                    }
                }
            };
            timeout_at(self.end(cx), wait).await
        };
        let status = match ended {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => {
                return Err(self.failure(Cause::Step, format!("cannot be waited for: {error}")));
            }
            Err(_) => {
                stop(&mut child, &group).await;
                group.forget();
                return Err(self.took_too_long(cx));
            }
        };
        group.forget();
        reached("program: ended");
        Ok(Ended {
            code: exit_code(status),
            stdout: kept.into_string(),
        })
    }

    /// Runs it, and fails unless it exits with 0; the failure carries the last lines.
    pub(crate) async fn succeed(&self, cx: &Context) -> Result<Ended, Failure> {
        let ended = self.run(cx).await?;
        self.well(cx, ended)
    }

    fn well(&self, cx: &Context, ended: Ended) -> Result<Ended, Failure> {
        if ended.code == 0 {
            return Ok(ended);
        }
        let message = match ended.code {
            code if code > 128 => format!("was ended by signal {}", code - 128),
            code => format!("exited with {code}"),
        };
        let last_lines = cx.log.last_lines();
        Err(Failure {
            last_lines,
            changed: true,
            ..self.failure(Cause::Step, message)
        })
    }

    /// The program as people know it, without its arguments: they may be long.
    fn name(&self) -> &str {
        self.argv.first().map_or("", String::as_str)
    }

    fn failure(&self, cause: Cause, what: impl std::fmt::Display) -> Failure {
        crate::step::failure(cause, format!("`{}` {what}", self.name()))
    }

    fn end(&self, cx: &Context) -> Instant {
        let own = self.timeout.and_then(|own| Instant::now().checked_add(own));
        own.map_or(cx.deadline, |own| own.min(cx.deadline))
    }

    fn took_too_long(&self, cx: &Context) -> Failure {
        let by_step = Instant::now() >= cx.deadline;
        let what = match (by_step, self.timeout) {
            (false, Some(own)) => format!("took longer than {own:?} and was ended"),
            _ => "was still running at the step's timeout and was ended".to_owned(),
        };
        Failure {
            hint: by_step.then(|| "raise the step's `timeout` if it needs longer".to_owned()),
            last_lines: cx.log.last_lines(),
            changed: true,
            ..self.failure(Cause::TimedOut, what)
        }
    }

    /// Whether it could be started, without starting it.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let program = self.program()?;
        self.check_dir()?;
        if let Some(user) = &self.user {
            User::find(user)?.may_be_taken()?;
        }
        let there = if program.components().count() == 1 {
            let mut own = base_env(None).into_iter();
            let path = self.env.get("PATH").map(|path| path.expose().to_owned());
            let path =
                path.or_else(|| own.find_map(|(name, value)| (name == "PATH").then_some(value)));
            path.iter()
                .flat_map(|path| path.split(':'))
                .any(|dir| Path::new(dir).join(&program).is_file())
        } else {
            program.is_file()
        };
        if !there {
            return Err(self.cannot_start(&program, &ErrorKind::NotFound.into()));
        }
        Ok(())
    }

    fn check_dir(&self) -> Result<(), Failure> {
        match &self.dir {
            Some(dir) if !dir.is_dir() => {
                let what = format!(
                    "cannot run in {}: there is no such directory",
                    dir.display()
                );
                Err(self.failure(Cause::Host, what))
            }
            _ => Ok(()),
        }
    }

    fn spawn(&self, stdin: Stdio, stdout: Stdio) -> Result<Child, Failure> {
        let program = self.program()?;
        self.check_dir()?;
        let mut command = Command::new(&program);
        command
            .args(&self.argv[1..])
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .env_clear();
        let user = self.user.as_deref().map(User::find).transpose()?;
        command.envs(base_env(user.as_ref()));
        let own = self.env.iter();
        command.envs(own.map(|(name, value)| (name, value.expose())));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        if let Some(user) = user.filter(|user| !user.is_self()) {
            user.may_be_taken()?;
            // The standard library drops the agent's supplementary groups when it changes the
            // user, so the program has the user's main group only.
            command.uid(user.uid).gid(user.gid);
        }
        command
            .spawn()
            .map_err(|error| self.cannot_start(&program, &error))
    }

    fn program(&self) -> Result<PathBuf, Failure> {
        let Some(name) = self.argv.first().filter(|name| !name.is_empty()) else {
            return Err(crate::step::failure(
                Cause::Refused,
                "the command names no program",
            ));
        };
        if self.argv.iter().any(|argument| argument.contains('\0')) {
            return Err(self.failure(Cause::Refused, "has an argument with a NUL in it"));
        }
        let path = Path::new(name);
        match &self.dir {
            Some(dir) if name.contains('/') && path.is_relative() => Ok(dir.join(path)),
            _ => Ok(path.to_owned()),
        }
    }

    fn cannot_start(&self, program: &Path, error: &std::io::Error) -> Failure {
        let bare = program.components().count() == 1;
        match error.kind() {
            ErrorKind::NotFound if program.exists() => Failure {
                hint: Some("its first line names an interpreter that is not there".into()),
                ..self.failure(Cause::Host, "cannot be started")
            },
            ErrorKind::NotFound if bare => Failure {
                hint: Some(how_to_get(self.name())),
                ..self.failure(Cause::Host, "is not installed on this host")
            },
            ErrorKind::NotFound => {
                let what = format!("is not there: {} does not exist", program.display());
                self.failure(Cause::Host, what)
            }
            ErrorKind::PermissionDenied => Failure {
                hint: Some(match &self.user {
                    Some(user) => {
                        format!("check that {user} may execute it and enter its directory")
                    }
                    None => "check that it is executable".to_owned(),
                }),
                ..self.failure(Cause::Host, "may not be executed")
            },
            _ => self.failure(Cause::Host, format!("cannot be started: {error}")),
        }
    }
}

/// The environment that every program gets.
pub(crate) fn base_env(user: Option<&User>) -> Vec<(&'static str, String)> {
    let own = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let mut env = vec![
        (
            "PATH",
            own("PATH").unwrap_or_else(|| DEFAULT_PATH.to_owned()),
        ),
        ("LANG", "C.UTF-8".to_owned()),
        ("LC_ALL", "C.UTF-8".to_owned()),
    ];
    if let Some(User { name, home, .. }) = user.cloned().or_else(User::current) {
        env.push(("HOME", home.to_string_lossy().into_owned()));
        env.push(("USER", name.clone()));
        env.push(("LOGNAME", name));
    }
    env
}

/// Which package usually brings a tool.
fn how_to_get(tool: &str) -> String {
    let package = match tool {
        "git" | "npm" | "nodejs" | "systemd" | "curl" | "make" => tool,
        "node" => "nodejs",
        "npx" => "npm",
        "python3" | "python" => "python3 and python3-venv",
        "pip" | "pip3" => "python3-pip",
        "psql" | "pg_dump" | "pg_restore" | "createdb" | "dropdb" => "postgresql-client",
        "journalctl" | "systemctl" => "systemd",
        "gcc" | "cc" => "build-essential",
        _ => return format!("install what brings `{tool}`, or put it on the agent's PATH"),
    };
    format!(
        "install {package} (Debian: `apt-get install {}`)",
        package.replace(" and", "")
    )
}

/// Ends a process group: politely, then for sure.
async fn stop(child: &mut Child, group: &Group) {
    group.signal(Signal::TERM);
    let _ = timeout(GRACE, child.wait()).await;
    // Also when the leader has gone: what it started may ignore SIGTERM.
    group.signal(Signal::KILL);
    let _ = child.wait().await;
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The process group of a running program. It is killed if the one who waits for it goes away.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, signal);
        }
    }

    /// The program has ended; its number may soon be another's.
    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Host;

    fn program(argv: &[&str]) -> Program {
        let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
        Program {
            argv,
            ..Program::default()
        }
    }

    /// A program of several lines, run by an interpreter that every host of the tests has.
    fn script(lines: &str) -> Program {
        program(&["python3", "-u", "-c", lines])
    }

    async fn gone(pid: &str) -> bool {
        for _ in 0..100 {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    #[tokio::test]
    async fn output_goes_to_the_log_and_the_exit_code_comes_back() {
        let host = Host::new();
        let cx = host.context();
        let ended = script("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
            .run(&cx)
            .await
            .unwrap();
        assert_eq!((ended.code, ended.stdout.as_str()), (7, "out\n"));
        let mut lines = cx.log.last_lines();
        lines.sort();
        assert_eq!(lines, ["err", "out"]);
        let failed = script("import sys; print('why'); sys.exit(3)")
            .succeed(&cx)
            .await
            .unwrap_err();
        assert_eq!(failed.cause, Cause::Step);
        assert!(
            failed.message.contains("exited with 3"),
            "{}",
            failed.message
        );
        assert!(failed.last_lines.contains(&"why".to_owned()));
    }

    #[tokio::test]
    async fn the_environment_is_clean_and_secrets_stay_hidden() {
        let host = Host::new();
        host.secret("db", "pa55word-canary");
        let cx = host.context();
        let env = BTreeMap::from([
            ("PASSWORD".to_owned(), "secret://db".to_owned()),
            ("PLAIN".to_owned(), "seen".to_owned()),
        ]);
        let program = script("import os; [print(k, v) for k, v in sorted(os.environ.items())]");
        let ended = program
            .with_env(&cx, &env)
            .await
            .unwrap()
            .succeed(&cx)
            .await
            .unwrap();
        assert!(ended.stdout.contains("PASSWORD ***"), "{}", ended.stdout);
        assert!(ended.stdout.contains("PLAIN seen"));
        assert!(ended.stdout.contains("LC_ALL C.UTF-8"));
        assert!(
            !ended.stdout.contains("CARGO"),
            "nothing of the agent's own environment"
        );
        assert!(!cx.log.last_lines().join("\n").contains("canary"));
    }

    #[tokio::test]
    async fn a_program_that_takes_too_long_is_ended_with_all_it_started() {
        let host = Host::new();
        let cx = host.context();
        // The parent ends at SIGTERM, its child ignores it.
        let program = Program {
            timeout: Some(Duration::from_millis(1500)),
            ..script(
                "import signal, subprocess, sys, time\n\
                 child = 'import signal, time\\n'\n\
                 child += 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(60)'\n\
                 print(subprocess.Popen([sys.executable, '-c', child]).pid)\n\
                 time.sleep(60)",
            )
        };
        let began = std::time::Instant::now();
        let failed = program.run(&cx).await.unwrap_err();
        assert_eq!(failed.cause, Cause::TimedOut);
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "{:?}",
            began.elapsed()
        );
        let pid = cx.log.last_lines().pop().unwrap();
        assert!(gone(&pid).await, "the child {pid} is left");
    }

    #[tokio::test]
    async fn a_dropped_run_ends_the_program() {
        let host = Host::new();
        let cx = host.context();
        let program = script("import os, time; print(os.getpid()); time.sleep(60)");
        let _ = timeout(Duration::from_secs(2), program.run(&cx))
            .await
            .unwrap_err();
        let pid = cx.log.last_lines().pop().unwrap();
        assert!(gone(&pid).await, "{pid} is left");
    }

    #[tokio::test]
    async fn the_steps_deadline_ends_a_program_too() {
        let host = Host::new();
        let mut cx = host.context();
        cx.deadline = Instant::now() + Duration::from_millis(300);
        let failed = program(&["sleep", "60"]).run(&cx).await.unwrap_err();
        assert_eq!(failed.cause, Cause::TimedOut);
        assert!(
            failed.message.contains("step's timeout"),
            "{}",
            failed.message
        );
    }

    #[tokio::test]
    async fn a_background_child_that_holds_the_pipe_does_not_hold_the_step() {
        let host = Host::new();
        let cx = host.context();
        let program = script(
            "import subprocess\n\
             print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)",
        );
        let began = std::time::Instant::now();
        let ended = program.succeed(&cx).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(10));
        let pid = ended.stdout.trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn a_missing_tool_is_named_with_its_package() {
        let host = Host::new();
        let cx = host.context();
        let env = BTreeMap::from([("PATH".to_owned(), "/nowhere".into())]);
        let failed = Program {
            env,
            ..program(&["git", "status"])
        }
        .run(&cx)
        .await
        .unwrap_err();
        assert_eq!(failed.cause, Cause::Host);
        assert_eq!(failed.message, "`git` is not installed on this host");
        assert!(failed.hint.unwrap().contains("apt-get install git"));
        let dir = Some(PathBuf::from("/no/such/dir"));
        let failed = Program {
            dir,
            ..program(&["git"])
        }
        .run(&cx)
        .await
        .unwrap_err();
        assert!(
            failed.message.contains("no such directory"),
            "{}",
            failed.message
        );
        let failed = program(&[]).run(&cx).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused);
    }

    #[tokio::test]
    async fn a_program_runs_as_its_user() {
        let Ok(nobody) = User::find("nobody") else {
            return;
        };
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let host = Host::new();
        let cx = host.context();
        let user = Some("nobody".to_owned());
        let program = Program {
            user,
            dir: Some("/".into()),
            ..program(&["id"])
        };
        let ended = program.succeed(&cx).await.unwrap();
        assert!(
            ended
                .stdout
                .starts_with(&format!("uid={}(nobody)", nobody.uid))
        );
        assert!(!ended.stdout.contains("root"), "{}", ended.stdout);
    }
}
