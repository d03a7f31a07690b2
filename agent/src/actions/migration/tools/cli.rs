//! A migration tool's own program: how it logs in, and how it ended. The password is in a file that
//! goes with the value.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lockstep_proto::report::{Cause, Failure};

use super::{LOCKED, Limits, Went};
use crate::actions::migration::source::Source;
use crate::process::{Ended, Program};
use crate::secrets::Secret;
use crate::sql::{Database, PrivateDir, application_name, url};
use crate::step::{Context, failure};

/// The most of a program's output that is kept, in bytes.
pub(super) const MAX_OUTPUT: usize = 1 << 20;

/// What separates the tool's calls in the log.
const MARK: &str = "--";

/// The program of a release, able to log in.
pub(super) struct Cli<'a> {
    cx: &'a Context,
    database: Database,
    program: PathBuf,
    directory: PathBuf,
    user: Option<String>,
    env: BTreeMap<String, String>,
    password: Option<Secret>,
    _private: PrivateDir,
}

impl<'a> Cli<'a> {
    /// That of a source, with these variables beside. Fails if the release is not on this host.
    pub(super) async fn of(
        cx: &'a Context,
        source: Source<'_>,
        more: &[(&str, &str)],
    ) -> Result<Self, Failure> {
        let (directory, program) = source.find(cx)?;
        let program = program.expect("only a tool with a program is called");
        let database = Database::migrating(cx, source.database)?;
        let config = &cx.config.apps[source.app];
        let private = PrivateDir::new(cx, config.user.as_deref())?;
        let password = database.password(cx).await?;
        // Without a password the file is missing, and so nobody's own ~/.pgpass is read.
        let file = match &password {
            Some(password) => private.write_password(password)?,
            None => private.path().join("pgpass"),
        };
        let mut env = config.env.clone();
        let own = [
            ("DATABASE_URL", url(&database.config, database.dbname())),
            ("PGPASSFILE", file.display().to_string()),
            ("PGAPPNAME", application_name(&cx.key)),
            ("PGCONNECT_TIMEOUT", "10".to_owned()),
        ];
        env.extend(own.map(|(name, value)| (name.to_owned(), value)));
        env.extend(
            more.iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned())),
        );
        let user = config.user.clone();
        Ok(Self {
            cx,
            database,
            program,
            directory,
            user,
            env,
            password,
            _private: private,
        })
    }

    /// The tool's directory.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The program's name.
    pub(super) fn name(&self) -> String {
        let name = self.program.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The database that it works on.
    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    async fn call(&self, args: &[&str], limits: Option<(Limits, u32)>) -> Result<Ended, Failure> {
        let mut env = self.env.clone();
        if let Some((Limits { lock, statement }, major)) = limits {
            let (lock, statement) = (lock.0.max(1), statement.0.max(1));
            let mut options = format!("-c lock_timeout={lock} -c statement_timeout={statement}");
            if major >= 14 {
                // A statement then ends soon after the tool was killed.
                options += " -c client_connection_check_interval=1000";
            }
            let more = [
                ("PGOPTIONS", options),
                // Where options do not reach the server, the tool's own script may read these.
                ("LOCK_TIMEOUT_MS", lock.to_string()),
                ("STATEMENT_TIMEOUT_MS", statement.to_string()),
            ];
            env.extend(more.map(|(name, value)| (name.to_owned(), value)));
        }
        let mut argv = vec![self.program.display().to_string()];
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        let program = Program {
            argv,
            dir: Some(self.directory.clone()),
            user: self.user.clone(),
            secrets: self.password.iter().cloned().collect(),
            ..Program::default()
        };
        program.with_env(self.cx, &env).await?.run(self.cx).await
    }

    /// What it prints. Fails with what it said if it exits with another code than 0.
    pub(super) async fn ask(&self, what: &str, args: &[&str]) -> Result<String, Failure> {
        let ended = self.answer(args).await?;
        if ended.code == 0 {
            return Ok(ended.stdout);
        }
        Err(self.unanswered(what, &ended))
    }

    /// The same, whatever its exit code.
    pub(super) async fn answer(&self, args: &[&str]) -> Result<Ended, Failure> {
        self.cx.log.line(MARK);
        self.call(args, None).await
    }

    /// The failure of a call that exited with another code than 0.
    pub(super) fn unanswered(&self, what: &str, ended: &Ended) -> Failure {
        Self::said(what, ended.code, &self.lines())
    }

    /// Lets it change the database, within limits. Says how it ended.
    pub(super) async fn change(
        &self,
        what: &str,
        args: &[&str],
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        self.cx.log.line(MARK);
        let ended = self.call(args, Some((limits, major))).await?;
        if ended.code == 0 {
            return Ok(Went::Well);
        }
        let lines = self.lines();
        let locked = lines
            .iter()
            .any(|line| LOCKED.iter().any(|word| line.contains(word)));
        let failure = Self::said(what, ended.code, &lines);
        Ok(if locked {
            Went::Locked(failure)
        } else {
            Went::Badly(failure)
        })
    }

    /// What the log got since the last mark.
    fn lines(&self) -> Vec<String> {
        let lines = self.cx.log.last_lines();
        let since = lines
            .iter()
            .rposition(|line| line == MARK)
            .map_or(0, |mark| mark + 1);
        lines[since..].to_vec()
    }

    fn said(what: &str, code: i32, lines: &[String]) -> Failure {
        let telling = ["FAILED:", "psycopg.errors.", "Error:", "Error)", "error:"];
        let line = lines
            .iter()
            .rev()
            .find(|line| telling.iter().any(|word| line.contains(word)));
        let why = line
            .or_else(|| lines.last())
            .map_or_else(String::new, |line| format!(": {}", line.trim()));
        Failure {
            last_lines: lines.to_vec(),
            ..failure(Cause::Step, format!("`{what}` exited with {code}{why}"))
        }
    }
}
