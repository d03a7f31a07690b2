//! pg_dump and pg_restore: which ones, and how they log in.

use std::collections::BTreeMap;
use std::io::PipeReader;
use std::path::{Path, PathBuf};

use lockstep_proto::report::{Cause, Failure};

use crate::process::{Ended, Program};
use crate::secrets::Secret;
use crate::sql::{Database, PrivateDir, application_name, conninfo_dbname};
use crate::step::{Context, hinted};

/// Where Debian's packages put each major version.
const VERSIONS: &str = "/usr/lib/postgresql";

/// The server's client programs, ready to log in. What they need to do so is deleted with this
/// value; no password is in their arguments or environment.
pub(super) struct Tools<'a> {
    cx: &'a Context,
    database: &'a Database,
    bin: Option<PathBuf>,
    private: PrivateDir,
    env: BTreeMap<String, Secret>,
    secrets: Vec<Secret>,
}

impl<'a> Tools<'a> {
    /// Tools for a server of this major version.
    pub(super) async fn new(
        cx: &'a Context,
        database: &'a Database,
        major: u32,
    ) -> Result<Self, Failure> {
        let config = &database.config;
        let private = PrivateDir::new(cx, config.os_user.as_deref())?;
        let password = database.password(cx).await?;
        let mut env = BTreeMap::from([
            ("PGHOST", config.host.clone()),
            ("PGPORT", config.port.to_string()),
            ("PGUSER", config.user.clone()),
            ("PGAPPNAME", application_name(&cx.key)),
            ("PGCONNECT_TIMEOUT", "10".to_owned()),
            // Messages are read by us, too.
            ("LC_ALL", "C.UTF-8".to_owned()),
        ]);
        if major >= 14 {
            // A long statement then ends soon after its tool was killed.
            env.insert(
                "PGOPTIONS",
                "-c client_connection_check_interval=1000".to_owned(),
            );
        }
        // Without a password the file is missing, and so nobody's own ~/.pgpass is read.
        let file = match &password {
            Some(password) => private.write_password(password)?,
            None => private.path().join("pgpass"),
        };
        env.insert("PGPASSFILE", file.display().to_string());
        let env = env
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let bin = config
            .bin_dir
            .clone()
            .or_else(|| newest(Path::new(VERSIONS), major));
        let secrets = password.into_iter().collect();
        Ok(Self {
            cx,
            database,
            bin,
            private,
            env,
            secrets,
        })
    }

    /// Who the tools run as, if not as whoever the agent runs as.
    pub(super) fn user(&self) -> Option<&'a str> {
        self.database.config.os_user.as_deref()
    }

    /// An empty file that the tools may write to.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, Failure> {
        self.private.write(name, "")
    }

    /// Runs a tool on a database of the server; fails unless it exits with 0.
    pub(super) async fn run(
        &self,
        tool: &str,
        dbname: Option<&str>,
        args: &[&str],
    ) -> Result<Ended, Failure> {
        let program = self.program(tool, dbname, args)?;
        let ended = program.succeed(self.cx).await;
        ended.map_err(|failure| clarify(failure, tool))
    }

    /// The same, its standard output going to `read` on a thread of its own.
    pub(super) async fn pour<T: Send + 'static>(
        &self,
        tool: &str,
        dbname: Option<&str>,
        args: &[&str],
        read: impl FnOnce(PipeReader) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let program = self.program(tool, dbname, args)?;
        let read = program.pour(self.cx, read).await;
        read.map_err(|failure| clarify(failure, tool))
    }

    /// The version of a tool, as it says itself: `15.18`.
    pub(super) async fn version(&self, tool: &str) -> Result<ToolVersion, Failure> {
        let said = self.run(tool, None, &["--version"]).await?.stdout;
        ToolVersion::read(&said).ok_or_else(|| {
            let what = format!("`{tool} --version` says `{}`", said.trim());
            hinted(
                Cause::Host,
                what,
                "correct `bin_dir`: it is no PostgreSQL's",
            )
        })
    }

    fn program(&self, tool: &str, dbname: Option<&str>, args: &[&str]) -> Result<Program, Failure> {
        let path = self.bin.as_ref().map(|bin| bin.join(tool));
        if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
            return Err(hinted(
                Cause::Host,
                format!("`{tool}` is not there: {} does not exist", path.display()),
                "install postgresql-client in the server's version, or correct `bin_dir`",
            ));
        }
        let mut argv =
            vec![path.map_or_else(|| tool.to_owned(), |path| path.display().to_string())];
        if let Some(dbname) = dbname {
            argv.extend([
                "--no-password".to_owned(),
                "-d".to_owned(),
                conninfo_dbname(dbname),
            ]);
        }
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        Ok(Program {
            argv,
            dir: Some("/".into()),
            env: self.env.clone(),
            user: self.user().map(str::to_owned),
            timeout: None,
            secrets: self.secrets.clone(),
        })
    }
}

/// A client program's version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ToolVersion {
    pub(super) major: u32,
    /// All of it, for people.
    pub(super) text: String,
}

impl ToolVersion {
    /// Reads `pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
    fn read(said: &str) -> Option<Self> {
        let (_, text) = said.trim().split_once("(PostgreSQL) ")?;
        let number = text.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(Self {
            major: number.parse().ok()?,
            text: text.to_owned(),
        })
    }
}

/// A program that comes with the server itself.
pub(super) fn of_server(database: &Database, major: u32, name: &str) -> String {
    let own = Path::new(VERSIONS).join(major.to_string()).join("bin");
    let bin = database.config.bin_dir.clone().unwrap_or(own);
    let path = bin.join(name);
    if path.exists() {
        path.display().to_string()
    } else {
        name.to_owned()
    }
}

/// The newest installed version that is not older than the server.
fn newest(versions: &Path, major: u32) -> Option<PathBuf> {
    let entries = std::fs::read_dir(versions).into_iter().flatten().flatten();
    let installed = entries.filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let bin = entry.path().join("bin");
        (version >= major && bin.join("pg_dump").exists()).then_some((version, bin))
    });
    installed.max().map(|(_, bin)| bin)
}

/// What tools say in passing is the cause.
fn clarify(failure: Failure, tool: &str) -> Failure {
    const KNOWN: &[(&str, Cause, &str)] = &[
        (
            "No space left on device",
            Cause::Host,
            "make room on the volume that it writes to",
        ),
        (
            "Disk quota exceeded",
            Cause::Host,
            "raise the quota of the user that it runs as",
        ),
        (
            "server version mismatch",
            Cause::Host,
            "install client tools that are not older than the server",
        ),
        (
            "unsupported version",
            Cause::Host,
            "the archive was made by a newer pg_dump: install that version's tools",
        ),
        (
            "password authentication failed",
            Cause::Host,
            "check the role's password and its secret",
        ),
        (
            "Peer authentication failed",
            Cause::Host,
            "check `os_user`, or configure a password",
        ),
        (
            "canceling statement due to statement timeout",
            Cause::Step,
            "another session holds a table's lock for longer than `lock_wait`: see \
             pg_blocking_pids()",
        ),
        (
            "canceling statement due to lock timeout",
            Cause::Step,
            "another session holds a table's lock for longer than `lock_wait`: see \
             pg_blocking_pids()",
        ),
        (
            "this build does not support compression",
            Cause::Host,
            "name another `compress` method, or install a pg_dump that was built with this one",
        ),
        (
            "Permission denied",
            Cause::Host,
            "let the user that it runs as get to the directory",
        ),
    ];
    let said = |text: &str| {
        failure
            .last_lines
            .iter()
            .rev()
            .find(|line| line.contains(text))
    };
    for (text, cause, hint) in KNOWN {
        if let Some(line) = said(text) {
            let message = format!("{tool}: {}", line.trim());
            return Failure {
                cause: *cause,
                message,
                hint: Some((*hint).into()),
                ..failure
            };
        }
    }
    let line = said("error:").map(|line| line.trim().to_owned());
    let message = line.map_or_else(|| failure.message.clone(), |line| format!("{tool}: {line}"));
    Failure { message, ..failure }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::failure;

    #[test]
    fn the_newest_version_that_is_not_older_than_the_server_is_taken() {
        let root = tempfile::tempdir().unwrap();
        for version in ["9", "14", "15", "17", "common"] {
            let bin = root.path().join(version).join("bin");
            std::fs::create_dir_all(&bin).unwrap();
            std::fs::write(bin.join("pg_dump"), "").unwrap();
        }
        std::fs::create_dir_all(root.path().join("18/bin")).unwrap();
        let found = |major| newest(root.path(), major);
        assert_eq!(found(15), Some(root.path().join("17/bin")));
        assert_eq!(found(9), Some(root.path().join("17/bin")));
        assert_eq!(found(18), None);
    }

    #[test]
    fn a_tool_says_its_version() {
        let said = "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n";
        let version = ToolVersion::read(said).unwrap();
        assert_eq!(
            (version.major, version.text.as_str()),
            (15, "15.18 (Debian 15.18-0+deb12u1)")
        );
        assert_eq!(
            ToolVersion::read("pg_dump (PostgreSQL) 17beta1")
                .unwrap()
                .major,
            17
        );
        assert_eq!(ToolVersion::read("dump 3"), None);
    }

    #[test]
    fn a_full_disk_is_the_hosts_fault_and_said_so() {
        let lines = ["pg_dump: error: could not write to output file: No space left on device"];
        let last_lines = lines.map(str::to_owned).to_vec();
        let failed = clarify(
            Failure {
                last_lines,
                ..failure(Cause::Step, "`pg_dump` exited with 1")
            },
            "pg_dump",
        );
        assert_eq!(failed.cause, Cause::Host);
        assert!(
            failed.message.contains("No space left"),
            "{}",
            failed.message
        );
        assert!(failed.hint.unwrap().contains("make room"));
    }
}
