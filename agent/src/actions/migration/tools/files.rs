//! Directories of SQL files. Lockstep runs them itself, in sessions of the step, each file in one
//! transaction with the row that says so; or it lets the tool's program do the same.

use std::io::Read as _;
use std::path::Path;

use lockstep_proto::action::migration::Tool;
use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};
use rustix::fs::OFlags;

use super::cli::Cli;
use super::own::{Limited, went};
use super::{Limits, Rendered, Way, Went};
use crate::actions::files as disk;
use crate::actions::migration::lint::{Text, lint};
use crate::actions::migration::source::Source;
use crate::sql::{Database, Session, statements, url};
use crate::step::{Context, changed, failure, hinted};

mod diesel;
mod plain;
mod prisma;
mod sqlx;

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// How a tool keeps its migrations, and what it writes down of them.
trait Layout: Sync {
    /// The table of what was applied.
    fn table(&self) -> &'static str;

    /// What is in the tool's directory, in the order in which it is applied.
    fn read(&self, directory: &Path) -> Result<Vec<Migration>, Failure>;

    /// Asks for what was begun, in the order of the files: version, checksum (NULL if the tool
    /// keeps none), and whether it came to its end.
    fn rows(&self, table: &str) -> String;

    /// Makes the table as the tool makes it.
    fn create(&self, table: &str) -> String;

    /// Writes down that a migration was applied.
    fn applied(&self, table: &str, migration: &Migration) -> String;

    /// The same of one outside of a transaction: before it begins, where the table has room for
    /// that, and after its end.
    fn around(&self, table: &str, migration: &Migration) -> (Option<String>, String);

    /// Writes down that a migration was taken back.
    fn reverted(&self, table: &str, migration: &Migration) -> String;

    /// The database's URL, as the tool's own program reads it.
    fn url(&self, database: &Database) -> String {
        url(&database.config, database.dbname())
    }

    /// How the tool's own program goes there, if it has one that can.
    fn command(&self, _walk: &Walk<'_>) -> Result<Vec<String>, Failure> {
        unreachable!("its program is never called")
    }

    /// What is done when the last one was taken back.
    fn emptied(&self, _table: &str) -> Option<String> {
        None
    }
}

/// A migration of a release.
#[derive(Debug, Clone)]
struct Migration {
    /// What the tool's table calls it.
    version: String,
    /// What it is called beside; empty if it is not.
    description: String,
    /// The checksum that the tool's table has of it.
    checksum: String,
    up: Script,
    down: Option<Script>,
}

/// A file of SQL.
#[derive(Debug, Clone)]
struct Script {
    /// Relative to the tool's directory.
    file: String,
    sql: String,
    /// Whether it runs in a transaction.
    whole: bool,
}

/// A way through the migrations of a release.
struct Walk<'a> {
    way: Way,
    /// The version to go to; empty for none.
    to: &'a str,
    /// How many migrations lie on the way.
    steps: usize,
    /// Whether it ends at the release's newest.
    to_head: bool,
}

/// What runs at a time.
struct Part {
    /// What it is for people.
    title: String,
    /// A statement before the script, in a transaction of its own if the script is in none.
    first: Option<String>,
    script: String,
    /// A statement after the script.
    last: Option<String>,
    /// Whether all of it is one transaction.
    whole: bool,
}

/// The migrations of a release, and the table of what was applied.
pub(in crate::actions::migration) struct Files<'a> {
    cx: &'a Context,
    database: Database,
    layout: &'static dyn Layout,
    /// The tool's table, with its schema.
    table: String,
    migrations: Vec<Migration>,
    /// The tool's own program, if it is to run them.
    cli: Option<Box<Cli<'a>>>,
}

fn layout(tool: Tool) -> &'static dyn Layout {
    match tool {
        Tool::Sqlx => &sqlx::Sqlx,
        Tool::Diesel => &diesel::Diesel,
        Tool::Prisma => &prisma::Prisma,
        Tool::Sql => &plain::Plain,
        Tool::Alembic => unreachable!("its migrations are programs"),
    }
}

/// The newest version that a database has; empty if it has none.
pub(super) async fn revision(session: &Session, tool: Tool) -> Result<String, Failure> {
    newest(session, layout(tool)).await
}

async fn newest(session: &Session, layout: &dyn Layout) -> Result<String, Failure> {
    let rows = rows(session, layout).await?;
    let done = rows.into_iter().rev().find(|row| row.done);
    Ok(done.map(|row| row.version).unwrap_or_default())
}

/// Fails if a migration was begun that did not end.
pub(super) async fn refuse_begun(session: &Session, tool: Tool) -> Result<(), Failure> {
    let rows = rows(session, layout(tool)).await?;
    match rows.iter().find(|row| !row.done) {
        Some(row) => Err(begun(&session.place().database, &row.version)),
        None => Ok(()),
    }
}

fn begun(database: &str, version: &str) -> Failure {
    hinted(
        Cause::Refused,
        format!("the migration {version} was begun in `{database}`, and did not end"),
        "look which part of it is there; then finish it or take it back by hand, and correct the \
         tool's table",
    )
}

/// What the tool's table says of a migration.
struct Row {
    version: String,
    checksum: Option<String>,
    done: bool,
}

async fn rows(session: &Session, layout: &dyn Layout) -> Result<Vec<Row>, Failure> {
    let Some(table) = table(session, layout).await? else {
        return Ok(vec![]);
    };
    let rows = session
        .query("asking for what was applied", &layout.rows(&table), &[])
        .await?;
    let row = |row: &tokio_postgres::Row| Row {
        version: row.get(0),
        checksum: row.get(1),
        done: row.get(2),
    };
    Ok(rows.iter().map(row).collect())
}

/// The tool's table with its schema, if it is there. The tool's default is the first schema of the
/// search path, which is `public` nearly always.
async fn table(session: &Session, layout: &dyn Layout) -> Result<Option<String>, Failure> {
    let sql = "SELECT format('%I.%I', n.nspname, c.relname) \
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relname = $1 AND c.relkind = 'r' \
               ORDER BY n.nspname <> 'public', n.nspname LIMIT 1";
    let what = "looking for the table of migrations";
    let found = session.query(what, sql, &[&layout.table()]).await?;
    Ok(found.first().map(|row| row.get(0)))
}

impl<'a> Files<'a> {
    /// Those of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        let database = Database::migrating(cx, source.database)?;
        let layout = layout(source.tool);
        let (directory, program) = source.find(cx)?;
        let migrations = layout.read(&directory)?;
        let mut versions: Vec<&str> = migrations.iter().map(|it| it.version.as_str()).collect();
        versions.sort_unstable();
        if let Some([twice, _]) = versions.windows(2).find(|two| two[0] == two[1]) {
            return Err(failure(
                Cause::Step,
                format!("two migrations of the release are called `{twice}`"),
            ));
        }
        let session = database.connect(cx).await?;
        let table = table(&session, layout).await?;
        let cli = match program {
            Some(_) => {
                let url = layout.url(&database);
                let cli = Cli::of(cx, source, &[("DATABASE_URL", &url)]).await?;
                Some(Box::new(cli))
            }
            None => None,
        };
        Ok(Self {
            cx,
            table: table.unwrap_or_else(|| format!("public.{}", layout.table())),
            database,
            layout,
            migrations,
            cli,
        })
    }

    /// The database that they are for.
    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// The tool's table, if it is there.
    pub(super) async fn table(&self, session: &Session) -> Result<Option<String>, Failure> {
        table(session, self.layout).await
    }

    /// The newest version that the database has; empty if it has none.
    pub(super) async fn revision(&self, session: &Session) -> Result<String, Failure> {
        newest(session, self.layout).await
    }

    /// The newest of the release.
    pub(super) fn head(&self) -> Result<String, Failure> {
        let last = self.migrations.last().ok_or_else(|| {
            hinted(
                Cause::Step,
                "the release has no migrations",
                "check `dir` and `tool` of the step",
            )
        })?;
        Ok(last.version.clone())
    }

    /// The version that a plan names: `head`, `base` (which is none, and so empty), or one of the
    /// release.
    pub(super) fn resolve(&self, to: &str) -> Result<String, Failure> {
        match to {
            "head" => return self.head(),
            "base" => return Ok(String::new()),
            _ => {}
        }
        self.place(to)?;
        Ok(to.to_owned())
    }

    /// How many migrations there are up to a version.
    fn place(&self, version: &str) -> Result<usize, Failure> {
        if version.is_empty() {
            return Ok(0);
        }
        let place = self.migrations.iter().position(|it| it.version == version);
        place.map(|index| index + 1).ok_or_else(|| {
            hinted(
                Cause::Refused,
                format!("`{version}` names no revision: the release has no migration of that name"),
                "name one in full, as the tool's table does; relative ones mean something else \
                 each time",
            )
        })
    }

    /// Fails unless what was applied is what the release begins with, unaltered and whole.
    pub(super) async fn check(&self, session: &Session) -> Result<(), Failure> {
        let name = &self.database.name;
        let refused = |why: String, hint: &str| Err(hinted(Cause::Refused, why, hint));
        let rows = rows(session, self.layout).await?;
        for (index, row) in rows.iter().enumerate() {
            let version = &row.version;
            let known = self.migrations.iter().find(|it| it.version == *version);
            let Some(known) = known else {
                return refused(
                    format!(
                        "`{name}` has the migration {version}, which the release does not have"
                    ),
                    "take the release that brought it, or see who applied it",
                );
            };
            if !row.done {
                return Err(begun(name, version));
            }
            if row
                .checksum
                .as_ref()
                .is_some_and(|it| *it != known.checksum)
            {
                return refused(
                    format!(
                        "{} was changed after it was applied to `{name}`",
                        known.up.file
                    ),
                    "bring the file back as it was, and put the change into a new migration",
                );
            }
            let expected = &self.migrations[index].version;
            if expected != version {
                return refused(
                    format!(
                        "`{name}` has the migration {version}, but not {expected}, which comes \
                         before it"
                    ),
                    "apply it by hand if it belongs there, or give it a name that comes last",
                );
            }
        }
        Ok(())
    }

    /// What leads from one version to another.
    pub(super) fn render(&self, way: Way, from: &str, to: &str) -> Result<Rendered, Failure> {
        let parts = self.parts(way, from, to)?;
        let texts: Vec<Text<'_>> = parts.iter().map(Part::text).collect();
        Ok(Rendered {
            sql: parts.iter().map(Part::shown).collect(),
            whole: parts.iter().all(|part| part.whole),
            files: self.digest(),
            opaque: vec![],
            hazards: lint(&texts),
        })
    }

    /// Digest of all files.
    fn digest(&self) -> Digest {
        let scripts = self.migrations.iter().flat_map(|migration| {
            let Migration { up, down, .. } = migration;
            std::iter::once(up).chain(down)
        });
        let lines = scripts.map(|script| {
            let Script { file, whole, .. } = script;
            format!("{} {whole} {file}\n", script.sha256())
        });
        Digest::of(lines.collect::<String>().as_bytes())
    }

    /// Whether a version lies on the way up from one to another.
    pub(super) fn is_between(&self, from: &str, at: &str, to: &str) -> bool {
        match (self.place(from), self.place(at), self.place(to)) {
            (Ok(from), Ok(at), Ok(to)) => from <= at && at <= to,
            _ => false,
        }
    }

    /// The way from one version to another.
    fn walk<'b>(&self, way: Way, from: &str, to: &'b str) -> Result<Walk<'b>, Failure> {
        let (begin, end) = (self.place(from)?, self.place(to)?);
        Ok(Walk {
            way,
            to,
            steps: begin.abs_diff(end),
            to_head: end == self.migrations.len(),
        })
    }

    /// Goes from one version to another, file by file.
    pub(super) async fn go(
        &self,
        way: Way,
        from: &str,
        to: &str,
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        if let Some(cli) = &self.cli {
            let args = self.layout.command(&self.walk(way, from, to)?)?;
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let what = format!("{} {}", cli.name(), args[..2].join(" "));
            return cli.change(&what, &args, limits, major).await;
        }
        for part in self.parts(way, from, to)? {
            self.cx.log.line(&part.title);
            if let Err(failure) = self.run(&part, limits).await {
                return Ok(went(failure));
            }
        }
        Ok(Went::Well)
    }

    /// Runs a part in a session of its own: what it sets there concerns no other.
    async fn run(&self, part: &Part, limits: Limits) -> Result<(), Failure> {
        let session = Limited::connect(self.cx, &self.database, limits).await?;
        let title = part.title.as_str();
        let begin = part.whole.then_some("BEGIN");
        let commit = part.whole.then_some("COMMIT");
        for before in [begin, part.first.as_deref()].into_iter().flatten() {
            session.0.run(title, before).await?;
        }
        session.0.run_file(title, &part.script).await?;
        for after in [part.last.as_deref(), commit].into_iter().flatten() {
            session.0.run(title, after).await.map_err(changed)?;
        }
        Ok(())
    }

    fn parts(&self, way: Way, from: &str, to: &str) -> Result<Vec<Part>, Failure> {
        let table = self.table.as_str();
        let (begin, end) = (self.place(from)?, self.place(to)?);
        let mut parts = Vec::new();
        match way {
            Way::Up if begin > end => {
                return Err(hinted(
                    Cause::Refused,
                    format!("{from} comes after {to} in the release"),
                    "`migration.downgrade` takes a database back",
                ));
            }
            Way::Down if begin < end => {
                return Err(failure(
                    Cause::Refused,
                    format!("{to} comes after {from} in the release: it is no way back"),
                ));
            }
            Way::Up => {
                let create = (begin == 0).then(|| self.layout.create(table));
                for (index, migration) in self.migrations[begin..end].iter().enumerate() {
                    let create = create.clone().filter(|_| index == 0);
                    let script = &migration.up;
                    if script.whole {
                        let last = self.layout.applied(table, migration);
                        parts.push(Part::of(script, create, last)?);
                        continue;
                    }
                    let (before, after) = self.layout.around(table, migration);
                    let first: Vec<String> = create.into_iter().chain(before).collect();
                    let first = (!first.is_empty()).then(|| first.join(";\n"));
                    parts.push(Part::of(script, first, after)?);
                }
            }
            Way::Down => {
                for (index, migration) in self.migrations[end..begin].iter().enumerate().rev() {
                    let script = migration.down.as_ref().ok_or_else(|| {
                        hinted(
                            Cause::Refused,
                            format!(
                                "{} has no way back: there is no script for it",
                                migration.up.file
                            ),
                            "write one into the release, or restore the backup",
                        )
                    })?;
                    let mut last = self.layout.reverted(table, migration);
                    if let Some(emptied) = self.layout.emptied(table).filter(|_| end + index == 0) {
                        last = format!("{last};\n{emptied}");
                    }
                    parts.push(Part::of(script, None, last)?);
                }
            }
        }
        Ok(parts)
    }
}

impl Part {
    fn of(script: &Script, first: Option<String>, last: String) -> Result<Self, Failure> {
        let Script { file, sql, whole } = script;
        let found = statements(sql);
        if *whole && let Some(own) = found.iter().find(|one| one.is_transaction_control()) {
            return Err(hinted(
                Cause::Refused,
                format!(
                    "{file} line {}: it begins or ends a transaction itself",
                    own.line
                ),
                "leave that out: each file is one transaction, together with its row in the \
                 tool's table",
            ));
        }
        if !whole && found.len() > 1 {
            return Err(hinted(
                Cause::Refused,
                format!(
                    "{file} holds {} statements outside of a transaction",
                    found.len()
                ),
                "put each of them into a file of its own: nothing says how many were run when one \
                 fails",
            ));
        }
        Ok(Self {
            title: file.clone(),
            first,
            script: sql.clone(),
            last: Some(last),
            whole: *whole,
        })
    }

    /// As the linter reads it.
    fn text(&self) -> Text<'_> {
        Text {
            file: &self.title,
            sql: &self.script,
            whole: self.whole,
        }
    }

    /// As people see it.
    fn shown(&self) -> String {
        let Self {
            title,
            first,
            script,
            last,
            whole,
        } = self;
        let (begin, commit) = if *whole {
            ("BEGIN;\n", "COMMIT;\n")
        } else {
            ("", "")
        };
        let line = |sql: &Option<String>| {
            sql.as_ref()
                .map_or(String::new(), |sql| sql.clone() + ";\n")
        };
        let script = script.trim_end();
        let end = if script.ends_with(';') { "" } else { "\n;" };
        format!(
            "-- {title}\n{begin}{}{script}{end}\n{}{commit}",
            line(first),
            line(last)
        )
    }
}

impl Script {
    /// Reads a file of the tool's directory.
    fn read(directory: &Path, file: &str) -> Result<Self, Failure> {
        let path = directory.join(file);
        let unreadable = |why: String| {
            failure(
                Cause::Step,
                format!("cannot read {}: {why}", path.display()),
            )
        };
        let mut sql = String::new();
        disk::open(&path, OFlags::NOFOLLOW)
            .and_then(|opened| opened.take(MAX_FILE + 1).read_to_string(&mut sql))
            .map_err(|error| unreadable(error.to_string()))?;
        if sql.len() as u64 > MAX_FILE {
            return Err(unreadable("it is larger than 1 MiB".to_owned()));
        }
        Ok(Self {
            file: file.to_owned(),
            sql,
            whole: true,
        })
    }

    fn sha256(&self) -> String {
        Digest::of(self.sql.as_bytes()).hex()
    }
}

/// The names of what is in a directory, sorted, without hidden ones: files or directories.
fn names(directory: &Path, directories: bool) -> Result<Vec<String>, Failure> {
    let unreadable = |error: std::io::Error| {
        hinted(
            Cause::Step,
            format!("cannot read {}: {error}", directory.display()),
            "check `dir` and `tool` of the step",
        )
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().into_string();
        let is_directory = entry.file_type().map_err(unreadable)?.is_dir();
        if let Ok(name) = name
            && !name.starts_with('.')
            && is_directory == directories
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod real;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(in crate::actions::migration) use tests::Stage;
