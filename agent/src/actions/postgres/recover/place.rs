//! The files of a server, and those of its restored copy beside them.
//!
//! ```text
//! <data>                      the server's files
//! <data>__restoring_<step>    a copy that is being restored: nothing else ever has this name
//! <data>__restored_<step>     the whole copy, marked; after the exchange the files of before
//! <data>__before_<step>_<n>   the files of before, once the server runs on the copy
//! ```
//!
//! The exchange is one operation of the file system, so that a server is always there to be started:
//! the one of before, or the one that recovers. All of it is made as the server's own user.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::record::Record;
use crate::actions::files::{self, OrFailed as _, parent};
use crate::actions::postgres::pgbackrest::Pgbackrest;
use crate::actions::postgres::{backup, human, tools};
use crate::faults::reached;
use crate::process::Program;
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

/// What the name of the mark in a copy that was restored by us begins with. The rest is the step's:
/// a mark that another rollout has left, here or in a backup, says nothing.
const MARK: &str = "lockstep.recovered";

/// The files of a server that tell where it listens and whom it lets in, if they are among its data:
/// they are those of now, not those of the backup.
const SETTINGS: [&str; 3] = ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"];

const AUTO: &str = "postgresql.auto.conf";

/// What tells a server where its recovery ends.
pub(super) const TARGET: [&str; 4] = [
    "restore_command",
    "recovery_target_name",
    "recovery_target_timeline",
    "recovery_target_action",
];

/// The line of `postmaster.pid` that says what the server is doing, counted from 0.
const STATUS: usize = 7;

/// How long the server's files may take to be looked at.
const LOOK: Duration = Duration::from_secs(30);

/// No configuration and no answer is longer, in bytes.
const LONGEST: usize = 1 << 20;

/// Where a server's files are, and what they are called.
pub(super) struct Place<'a> {
    cx: &'a Context,
    data: PathBuf,
    user: Option<String>,
    controldata: String,
    step: String,
    mark: String,
}

/// What the files of a server that does not run say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Control {
    /// In the server's words: `shut down`, `in production`.
    pub(super) state: String,
    pub(super) timeline: u32,
    /// The next transaction at its last checkpoint.
    pub(super) next: u64,
}

impl<'a> Place<'a> {
    pub(super) fn of(
        cx: &'a Context,
        database: &Database,
        tool: &Pgbackrest<'_>,
        record: &Record,
    ) -> Self {
        let rollout = cx.key.rollout.as_str();
        let rollout = rollout.strip_prefix("ro_").unwrap_or(rollout);
        let step = format!("{rollout}_{}_{}", cx.key.at.phase, cx.key.at.step);
        Self {
            cx,
            data: record.data.clone(),
            user: tool.user().map(str::to_owned),
            controldata: tools::of_server(database, record.major, "pg_controldata"),
            mark: format!("{MARK}_{step}"),
            step,
        }
    }

    pub(super) fn data(&self) -> &Path {
        &self.data
    }

    fn beside(&self, what: &str) -> PathBuf {
        let mut path = self.data.clone().into_os_string();
        path.push(format!("__{what}_{}", self.step));
        path.into()
    }

    fn restoring(&self) -> PathBuf {
        self.beside("restoring")
    }

    fn restored(&self) -> PathBuf {
        self.beside("restored")
    }

    fn before(&self) -> PathBuf {
        let mut path = self.beside("before").into_os_string();
        path.push(format!("_{}", self.cx.key.attempt));
        path.into()
    }

    /// Runs a program as the server's own user, who owns all of these files.
    async fn run(&self, argv: &[&str], paths: &[&Path]) -> Result<(), Failure> {
        self.program(argv, paths).succeed(self.cx).await.map(drop)
    }

    fn program(&self, argv: &[&str], paths: &[&Path]) -> Program {
        let words = argv.iter().map(|&word| word.to_owned());
        let paths = paths.iter().map(|path| path.display().to_string());
        Program {
            argv: words.chain(paths).collect(),
            dir: Some("/".into()),
            user: self.user.clone(),
            timeout: None,
            ..Program::default()
        }
    }

    /// Whether the server's first process is alive. What cannot be told counts as alive.
    pub(super) fn is_running(&self) -> bool {
        is_running(&self.data)
    }

    /// Whether the server that runs says that it is on its way down.
    pub(super) fn is_stopping(&self) -> bool {
        let text = fs::read_to_string(self.data.join("postmaster.pid"));
        text.is_ok_and(|text| {
            text.lines()
                .nth(STATUS)
                .is_some_and(|it| it.trim() == "stopping")
        })
    }

    /// Whether a process works in the server's files.
    pub(super) fn is_worked_in_by(&self, pid: u32) -> io::Result<bool> {
        works_in(pid, &self.data)
    }

    /// Whether the files in the server's place are a copy that was restored here.
    pub(super) fn is_copy(&self) -> bool {
        self.data.join(&self.mark).exists()
    }

    /// Whether a server that starts on these files has yet to recover.
    pub(super) fn has_to_recover(&self) -> bool {
        self.data.join("recovery.signal").exists()
    }

    /// What the server's files say, while it does not run.
    pub(super) async fn control(&self) -> Result<Control, Failure> {
        let program = Program {
            timeout: Some(LOOK),
            ..self.program(&[&self.controldata, "-D"], &[&self.data])
        };
        let captured = program.capture(LONGEST).await?;
        let said = String::from_utf8_lossy(&captured.stdout);
        let read = (captured.code == 0).then(|| control(&said)).flatten();
        read.ok_or_else(|| {
            let message = format!(
                "`{}` cannot say what state {} is in",
                self.controldata,
                self.data.display()
            );
            hinted(
                Cause::Host,
                message,
                "run it as the server's user, and look",
            )
        })
    }

    /// Refuses a directory whose place another one cannot take as it is.
    pub(super) fn check(&self, size: u64) -> Result<(), Failure> {
        let what = || format!("look at {}", self.data.display());
        let refused = |why: String| {
            Err(hinted(
                Cause::Refused,
                format!("the server's files in {} {why}", self.data.display()),
                "recover it by hand, as the restore point's step has said, or say `undo_by: \
                 downgrade` or `restore`",
            ))
        };
        let own = fs::symlink_metadata(&self.data).or_failed(what)?;
        if own.is_symlink() {
            return refused("are behind a link, whose place a copy would take".into());
        }
        let above = parent(&self.data);
        if own.dev() != fs::metadata(above).or_failed(what)?.dev() {
            return refused("are a volume of their own: no copy can take their place".into());
        }
        for entry in fs::read_dir(&self.data).or_failed(what)? {
            let entry = entry.or_failed(what)?;
            if entry.file_type().or_failed(what)?.is_symlink() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                return refused(format!("have a link, {name}, that a copy would not have"));
            }
        }
        let free = backup::free(above)?;
        let need = size / 10 * 11;
        if free >= need {
            return Ok(());
        }
        Err(hinted(
            Cause::Host,
            format!(
                "a copy of the server may need {} in {}, and {} are free",
                human(need),
                above.display(),
                human(free)
            ),
            "make room there; then try again",
        ))
    }

    /// Restores a copy of the server from a backup, ready to recover to a point. Nothing of it is in
    /// anybody's way. Only for a server that runs as it was: then what is beside is no file of before.
    pub(super) async fn restore(
        &self,
        tool: &Pgbackrest<'_>,
        base: &str,
        record: &Record,
    ) -> Result<(), Failure> {
        let (restoring, restored) = (self.restoring(), self.restored());
        self.discard().await?;
        self.run(&["mkdir", "-m", "0700", "--"], &[&restoring])
            .await?;
        self.cx
            .log
            .progress(0.1, "restoring a copy of the server beside it");
        tool.restore_into(&restoring, base).await?;
        self.configure(tool, &restoring, record).await?;
        let mark = restoring.join(&self.mark);
        self.run(&["touch", "--"], &[&mark]).await?;
        self.run(&["sync", "--"], &[&mark, &restoring]).await?;
        reached("recovery: restored");
        self.rename(&restoring, &restored)
    }

    /// Gives the whole copy the settings of now.
    pub(super) async fn renew_settings(
        &self,
        tool: &Pgbackrest<'_>,
        record: &Record,
    ) -> Result<(), Failure> {
        self.configure(tool, &self.restored(), record).await
    }

    /// Removes what was restored and is not in the server's place. Only for a server that runs as it
    /// was: then what is beside is no file of before.
    pub(super) async fn discard(&self) -> Result<(), Failure> {
        let (restoring, restored) = (self.restoring(), self.restored());
        self.run(&["rm", "-rf", "--"], &[&restoring]).await?;
        if restored.exists() {
            if self.is_copy() || !restored.join(&self.mark).exists() {
                return Err(hinted(
                    Cause::Refused,
                    format!(
                        "{} is there, and may be all that is left of before",
                        restored.display()
                    ),
                    "look what it is, and give it another name; then try again",
                ));
            }
            self.run(&["rm", "-rf", "--"], &[&restored]).await?;
        }
        Ok(())
    }

    /// Gives a copy the settings of now, and the end of its recovery, durably.
    async fn configure(
        &self,
        tool: &Pgbackrest<'_>,
        copy: &Path,
        record: &Record,
    ) -> Result<(), Failure> {
        let mut written = vec![copy.join(AUTO), copy.to_owned()];
        for name in SETTINGS {
            let now = self.data.join(name);
            if now.exists() {
                self.run(&["cp", "-p", "--"], &[&now, copy]).await?;
                written.push(copy.join(name));
            }
        }
        let mut text = String::new();
        if self.data.join(AUTO).exists() {
            let program = Program {
                timeout: Some(LOOK),
                ..self.program(&["cat", "--"], &[&self.data.join(AUTO)])
            };
            let captured = program.capture(LONGEST).await?;
            if captured.code != 0 {
                let message = format!("cannot read {}", self.data.join(AUTO).display());
                return Err(failure(Cause::Host, message));
            }
            text = settings(&String::from_utf8_lossy(&captured.stdout));
        }
        text.push_str(&target(&tool.fetch_command(), record));
        let from = self.cx.dir.join(AUTO);
        files::write(&from, text.as_bytes(), 0o600, None)
            .or_failed(|| format!("write {}", from.display()))?;
        let file = fs::File::open(&from).or_failed(|| format!("read {}", from.display()))?;
        let to = copy.join(AUTO);
        self.program(&["tee", "--"], &[&to])
            .feed(self.cx, Stdio::from(file))
            .await?;
        let written: Vec<&Path> = written.iter().map(PathBuf::as_path).collect();
        self.run(&["sync", "--"], &written).await
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), Failure> {
        fs::rename(from, to)
            .and_then(|()| files::sync_dir(parent(&self.data)))
            .or_failed(|| format!("rename {} to {}", from.display(), to.display()))
    }

    /// The copy and the server's files take each other's place, in one step; both must not run.
    pub(super) fn exchange(&self) -> Result<(), Failure> {
        let copy = self.restored();
        reached("recovery: to be exchanged");
        let exchanged = renameat_with(CWD, &self.data, CWD, &copy, RenameFlags::EXCHANGE)
            .map_err(io::Error::from)
            .and_then(|()| files::sync_dir(parent(&self.data)));
        reached("recovery: exchanged");
        exchanged.or_failed(|| {
            let (data, copy) = (self.data.display(), copy.display());
            format!("exchange {data} and {copy}")
        })
    }

    /// Once the server runs on the copy: gives the files of before their own name, and takes the
    /// mark away. Returns the names under which there are such files.
    pub(super) async fn tidy(&self) -> Result<Vec<PathBuf>, Failure> {
        let restored = self.restored();
        if restored.exists() && !restored.join(&self.mark).exists() {
            self.rename(&restored, &self.before())?;
        }
        if self.is_copy() {
            self.run(&["rm", "-f", "--"], &[&self.data.join(&self.mark)])
                .await?;
        }
        let prefix = self.beside("before");
        let prefix = prefix.file_name().unwrap_or_default().to_string_lossy();
        let entries = fs::read_dir(parent(&self.data))
            .into_iter()
            .flatten()
            .flatten();
        let mut kept: Vec<PathBuf> = entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&*prefix))
            .map(|entry| entry.path())
            .collect();
        kept.sort();
        Ok(kept)
    }
}

fn is_running(data: &Path) -> bool {
    let unless_gone = |error: io::Error| error.kind() != ErrorKind::NotFound;
    let text = match fs::read_to_string(data.join("postmaster.pid")) {
        Ok(text) => text,
        Err(error) => return unless_gone(error),
    };
    let first = text.lines().next().unwrap_or_default();
    let Ok(pid) = first.trim().parse::<i32>() else {
        return true;
    };
    // After a crash the number may be another process's: a server works in its own files. One that
    // serves a single user writes it with a minus.
    works_in(pid.unsigned_abs(), data).unwrap_or_else(unless_gone)
}

/// Whether a process works in a directory: that itself counts, not its name.
fn works_in(pid: u32, directory: &Path) -> io::Result<bool> {
    let works_in = fs::metadata(format!("/proc/{pid}/cwd"))?;
    let own = fs::metadata(directory)?;
    Ok((works_in.dev(), works_in.ino()) == (own.dev(), own.ino()))
}

/// The settings of a server without those that an earlier recovery has left.
fn settings(text: &str) -> String {
    let is_target = |line: &&str| {
        let name = line.split('=').next().unwrap_or_default().trim();
        name == "restore_command" || name.starts_with("recovery_target")
    };
    let mut kept: String = text
        .lines()
        .filter(|line| !is_target(line))
        .fold(String::new(), |text, line| text + line + "\n");
    kept.push('\n');
    kept
}

/// Where a recovery ends, as the server's configuration says it.
fn target(fetch: &str, record: &Record) -> String {
    let values = [
        fetch.to_owned(),
        record.name.clone(),
        record.timeline.to_string(),
        "promote".to_owned(),
    ];
    let lines = TARGET.iter().zip(values);
    let lines = lines.map(|(name, value)| format!("{name} = '{}'\n", value.replace('\'', "''")));
    lines.collect()
}

/// Reads what pg_controldata prints.
fn control(said: &str) -> Option<Control> {
    let value = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.strip_prefix(':')?.trim())
    };
    let (epoch, next) = value("Latest checkpoint's NextXID")?.split_once(':')?;
    let (epoch, next): (u64, u64) = (epoch.parse().ok()?, next.parse().ok()?);
    Some(Control {
        state: value("Database cluster state")?.to_owned(),
        timeline: value("Latest checkpoint's TimeLineID")?.parse().ok()?,
        next: epoch << 32 | next,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_server_says_its_state() {
        let said = "Database cluster state:               shut down\n\
                    Latest checkpoint's TimeLineID:       3\n\
                    Latest checkpoint's PrevTimeLineID:   2\n\
                    Latest checkpoint's NextXID:          2:726\n";
        let read = Control {
            state: "shut down".into(),
            timeline: 3,
            next: (2 << 32) + 726,
        };
        assert_eq!(control(said), Some(read));
        assert_eq!(control("Database cluster state: shut down\n"), None);
    }

    #[test]
    fn a_server_of_which_nothing_can_be_told_counts_as_running() {
        let data = tempfile::tempdir().unwrap();
        let file = data.path().join("postmaster.pid");
        assert!(!is_running(data.path()));
        for (text, runs) in [
            ("", true),
            ("no number\n", true),
            // No process has it.
            ("2147483647\n", false),
            // One that works elsewhere.
            (&format!("{}\n", std::process::id()), false),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(is_running(data.path()), runs, "{text}");
        }
        let mut inside = std::process::Command::new("sleep");
        let mut inside = inside.arg("60").current_dir(&data).spawn().unwrap();
        fs::write(&file, format!("-{}\n", inside.id())).unwrap();
        assert!(is_running(data.path()));
        inside.kill().unwrap();
        inside.wait().unwrap();
        assert!(!is_running(data.path()));
    }

    #[test]
    fn settings_of_an_earlier_recovery_go() {
        let text =
            "port = '1'\nrestore_command = 'x'\nrecovery_target_name = 'y'\nwork_mem = '1MB'\n";
        assert_eq!(settings(text), "port = '1'\nwork_mem = '1MB'\n\n");
    }
}
