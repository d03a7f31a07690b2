//! alembic: how it is called, and what its answers mean.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use lockstep_proto::action::migration::{Apply, Current, Downgrade, Plan, Tool, Verify};
use lockstep_proto::order::normal_sql;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Period;

use crate::process::{Ended, Program};
use crate::secrets::Secret;
use crate::sql::{Database, PrivateDir, application_name, url};
use crate::step::{Context, failure, hinted};

/// The most of a program's output that is kept, in bytes: SQL of this size may have been cut.
const MAX_SQL: usize = 1 << 20;

/// Which migrations an action means.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) database: &'a str,
    app: &'a str,
    pub(super) release: &'a str,
    dir: &'a str,
    program: &'a str,
}

macro_rules! sources {
    ($($act:ty)*) => {
        $(impl<'a> From<&'a $act> for Source<'a> {
            fn from(act: &'a $act) -> Self {
                // Another tool will need another module than this one.
                match act.tool {
                    Tool::Alembic => {}
                }
                Self {
                    database: &act.database,
                    app: &act.app,
                    release: &act.release,
                    dir: &act.dir,
                    program: &act.program,
                }
            }
        })*
    };
}

sources!(Current Plan Apply Verify Downgrade);

impl Source<'_> {
    /// The tool's directory in the release.
    fn directory(&self, cx: &Context) -> Result<PathBuf, Failure> {
        let Self {
            app, release, dir, ..
        } = self;
        let config = cx.config.apps.get(*app).ok_or_else(|| {
            hinted(
                Cause::Host,
                format!("this host knows no application `{app}`"),
                format!("add a section [apps.{app}] to its agent.toml"),
            )
        })?;
        let inside = |text: &str| {
            let path = Path::new(text);
            path.components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        };
        let one = Path::new(release).components().count() == 1;
        if !one || ![*release, *dir, self.program].into_iter().all(inside) {
            return Err(failure(
                Cause::Refused,
                format!(
                    "`{release}/{dir}/{}` leaves the release's directory",
                    self.program
                ),
            ));
        }
        Ok(config.root.join("releases").join(release).join(dir))
    }

    /// The release is not on this host, or not built.
    pub(super) fn missing(&self) -> Failure {
        hinted(
            Cause::Refused,
            format!("release {} is not built on this host", self.release),
            "let `release.fetch` and `release.build` bring it first",
        )
    }

    /// Whether the release is on this host and built.
    pub(super) fn is_there(&self, cx: &Context) -> Result<bool, Failure> {
        Ok(self.directory(cx)?.join(self.program).exists())
    }
}

/// How long statements may wait and run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) lock: Period,
    pub(super) statement: Period,
}

/// The tool of a release, able to log in. The password is in a file that goes with this value.
pub(super) struct Alembic<'a> {
    cx: &'a Context,
    /// The database that it works on.
    pub(super) database: Database,
    program: PathBuf,
    directory: PathBuf,
    user: Option<String>,
    env: BTreeMap<String, String>,
    password: Option<Secret>,
    _private: PrivateDir,
}

impl<'a> Alembic<'a> {
    /// The tool of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        let directory = source.directory(cx)?;
        let program = directory.join(source.program);
        if !program.exists() {
            let Source { app, release, .. } = source;
            let (message, hint) = if directory.is_dir() {
                let message = format!("{} is not there", program.display());
                (
                    message,
                    format!("put `release.build` of {release} before this step"),
                )
            } else {
                let message = format!("release {release} of `{app}` is not on this host");
                (
                    message,
                    "put `release.fetch` and `release.build` before this step".to_owned(),
                )
            };
            return Err(hinted(Cause::Host, message, hint));
        }
        let database = Database::find(cx, source.database)?;
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
            // Releases are immutable.
            ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
            ("PYTHONUNBUFFERED", "1".to_owned()),
        ];
        env.extend(own.map(|(name, value)| (name.to_owned(), value)));
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

    /// The same, failing with what the tool said.
    async fn ask(&self, what: &str, args: &[&str]) -> Result<String, Failure> {
        self.cx.log.line(MARK);
        let ended = self.call(args, None).await?;
        if ended.code == 0 {
            return Ok(ended.stdout);
        }
        Err(Self::said(what, ended.code, &self.lines()))
    }

    /// The one newest revision of the release.
    pub(super) async fn head(&self) -> Result<String, Failure> {
        let heads = self.ask("alembic heads", &["heads"]).await?;
        let heads: Vec<&str> = heads
            .lines()
            .filter(|line| line.contains("(head)"))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        match heads.as_slice() {
            [head] => Ok((*head).to_owned()),
            [] => Err(failure(Cause::Step, "the release has no migrations")),
            heads => Err(hinted(
                Cause::Step,
                format!(
                    "the release has {} heads: {}",
                    heads.len(),
                    heads.join(", ")
                ),
                "join them with `alembic merge` in the application, and release that",
            )),
        }
    }

    /// The full name of a revision that a plan names: `head`, `base` (which is none, and so
    /// empty), or a revision, never a relative one.
    pub(super) async fn resolve(&self, to: &str) -> Result<String, Failure> {
        match to {
            "head" => return self.head().await,
            "base" => return Ok(String::new()),
            _ => {}
        }
        let fit = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if to.is_empty() || to.starts_with(['-', '.']) || !to.chars().all(fit) || to == "heads" {
            return Err(hinted(
                Cause::Refused,
                format!("`{to}` names no revision"),
                "name one by its id: relative ones mean something else each time",
            ));
        }
        let shown = self.ask("alembic show", &["show", to]).await?;
        let revision = shown.lines().find_map(|line| line.strip_prefix("Rev: "));
        let revision = revision.and_then(|line| line.split_whitespace().next());
        revision.map(str::to_owned).ok_or_else(|| {
            failure(
                Cause::Step,
                format!("alembic does not say what the revision `{to}` is"),
            )
        })
    }

    /// The SQL that leads from one revision to another; empty if there is none. It is rendered
    /// without limits for locks and statements, so that it is the same whoever asks.
    pub(super) async fn render(&self, way: Way, from: &str, to: &str) -> Result<String, Failure> {
        if from == to {
            return Ok(String::new());
        }
        let range = if from.is_empty() {
            to.to_owned()
        } else {
            format!("{from}:{}", named(to))
        };
        let what = format!("{} --sql", way.command());
        let sql = self.ask(&what, &[way.verb(), &range, "--sql"]).await?;
        if sql.len() + 4 >= MAX_SQL {
            return Err(failure(
                Cause::Step,
                "the migration's SQL is larger than 1 MiB",
            ));
        }
        Ok(normal_sql(&sql))
    }

    /// Goes to a revision. Says how the tool ended.
    pub(super) async fn go(
        &self,
        way: Way,
        to: &str,
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        self.cx.log.line(MARK);
        let ended = self.call(&[way.verb(), to], Some((limits, major))).await?;
        if ended.code == 0 {
            return Ok(Went::Well);
        }
        let lines = self.lines();
        if lines
            .iter()
            .any(|line| LOCKED.iter().any(|word| line.contains(word)))
        {
            return Ok(Went::Locked(Self::said(way.command(), ended.code, &lines)));
        }
        Ok(Went::Badly(Self::said(way.command(), ended.code, &lines)))
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

/// What separates the tool's calls in the log.
const MARK: &str = "--";

/// How a wait for a lock that was too long shows itself.
const LOCKED: &[&str] = &["lock timeout", "LockNotAvailable", "55P03"];

/// Up or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
}

impl Way {
    fn verb(self) -> &'static str {
        match self {
            Self::Up => "upgrade",
            Self::Down => "downgrade",
        }
    }

    fn command(self) -> &'static str {
        match self {
            Self::Up => "alembic upgrade",
            Self::Down => "alembic downgrade",
        }
    }
}

/// How the tool ended.
pub(super) enum Went {
    /// With 0.
    Well,
    /// It waited too long for a lock; trying again may help.
    Locked(Failure),
    /// Otherwise.
    Badly(Failure),
}

/// Alembic's word for a revision; for none it has one, too.
pub(super) fn named(revision: &str) -> &str {
    if revision.is_empty() {
        "base"
    } else {
        revision
    }
}

/// Whether all of the SQL happens in one transaction, or not at all.
pub(super) fn is_transactional(sql: &str) -> bool {
    let begins = sql.lines().filter(|line| line.trim() == "COMMIT;").count();
    begins <= 1 && !sql.to_uppercase().contains("CONCURRENTLY")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sql_is_compared_without_blanks() {
        assert_eq!(
            normal_sql("BEGIN;\n\n\nALTER x;  \nCOMMIT;\n\n"),
            "BEGIN;\nALTER x;\nCOMMIT;\n"
        );
        assert_ne!(normal_sql("ALTER x;"), normal_sql("ALTER  x;"));
    }

    #[test]
    fn work_outside_of_the_transaction_is_seen() {
        assert!(is_transactional(
            "BEGIN;\nALTER TABLE t ADD a int;\nCOMMIT;\n"
        ));
        assert!(!is_transactional(
            "BEGIN;\nCOMMIT;\nCREATE INDEX;\nBEGIN;\nCOMMIT;\n"
        ));
        assert!(!is_transactional("create index concurrently i on t (a);"));
    }
}
