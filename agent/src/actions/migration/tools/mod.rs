//! The migration tools behind one face: where a database is, what would run, and the going.

use lockstep_proto::action::migration::Tool;
use lockstep_proto::ids::Digest;
use lockstep_proto::order::{normal_sql, sql_digest};
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Period;

use super::lint::Finding;
use super::source::Source;
use crate::actions::postgres::measure;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

mod alembic;
mod cli;
pub(super) mod files;
mod own;

/// How a wait for a lock that was too long shows itself.
const LOCKED: &[&str] = &["lock timeout", "LockNotAvailable", "55P03"];

/// How long statements may wait and run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) lock: Period,
    pub(super) statement: Period,
}

/// Up or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
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

/// What a tool would run.
pub(super) struct Rendered {
    /// The SQL, as it runs; empty if there is nothing to do.
    pub(super) sql: String,
    /// Whether each step that the database's revision tells of happens as a whole or not at all:
    /// then the revision says how far it came.
    pub(super) whole: bool,
    /// Digest of all files of migrations in the release.
    pub(super) files: Digest,
    /// What would run beside the SQL, and cannot be shown: a sentence for each.
    pub(super) opaque: Vec<String>,
    /// What the SQL may do to a database that is in use.
    pub(super) hazards: Vec<Finding>,
}

/// Fails if a migration was begun outside of a transaction, and did not end: its revision is not
/// there, and a part of it may be.
pub(super) async fn refuse_begun(session: &Session, tool: Tool) -> Result<(), Failure> {
    match tool {
        Tool::Alembic => Ok(()),
        _ => files::refuse_begun(session, tool).await,
    }
}

impl Rendered {
    /// The SQL as people see it.
    pub(super) fn shown(&self) -> String {
        normal_sql(&self.sql)
    }

    /// What an approval binds to.
    pub(super) fn digest(&self, tool: Tool, way: (&str, &str)) -> Digest {
        let sql = Digest::of(self.shown().as_bytes());
        sql_digest(tool, way, self.files, &self.opaque, sql)
    }
}

/// A migration tool with the migrations of one release.
pub(super) enum Migrator<'a> {
    Alembic(alembic::Alembic<'a>),
    Files(files::Files<'a>),
}

/// The revision of a database, as the tool has written it down; empty if it has none.
pub(super) async fn revision(session: &Session, tool: Tool) -> Result<String, Failure> {
    if tool != Tool::Alembic {
        return files::revision(session, tool).await;
    }
    let mut revisions = measure::revisions(session).await?;
    match revisions.len() {
        0 | 1 => Ok(revisions.pop().unwrap_or_default()),
        _ => Err(hinted(
            Cause::Step,
            format!(
                "`{}` is at several revisions: {}",
                session.place().database,
                revisions.join(", ")
            ),
            "join them with `alembic merge` in the application first",
        )),
    }
}

impl<'a> Migrator<'a> {
    /// That of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        match source.tool {
            Tool::Alembic => alembic::Alembic::of(cx, source).await.map(Self::Alembic),
            Tool::Prisma | Tool::Diesel | Tool::Sqlx | Tool::Sql => {
                let files = files::Files::of(cx, source).await?;
                Ok(Self::Files(files))
            }
        }
    }

    /// Whether a revision lies on the way from one to another: where a walk may have ended that was
    /// cut off.
    pub(super) fn is_between(&self, from: &str, at: &str, to: &str) -> bool {
        match self {
            Self::Alembic(_) => false,
            Self::Files(files) => files.is_between(from, at, to),
        }
    }

    /// The database that it works on.
    pub(super) fn database(&self) -> &Database {
        match self {
            Self::Alembic(tool) => tool.database(),
            Self::Files(files) => files.database(),
        }
    }

    /// The revision of the database; empty if it has none.
    pub(super) async fn revision(&self, session: &Session) -> Result<String, Failure> {
        match self {
            Self::Alembic(_) => revision(session, Tool::Alembic).await,
            Self::Files(files) => files.revision(session).await,
        }
    }

    /// The one newest revision of the release.
    pub(super) async fn head(&self) -> Result<String, Failure> {
        match self {
            Self::Alembic(tool) => tool.head().await,
            Self::Files(files) => files.head(),
        }
    }

    /// The full name of a revision that a plan names: `head`, `base` (which is none, and so
    /// empty), or a revision, never a relative one.
    pub(super) async fn resolve(&self, to: &str) -> Result<String, Failure> {
        match self {
            Self::Alembic(tool) => tool.resolve(to).await,
            Self::Files(files) => files.resolve(to),
        }
    }

    /// Fails unless what the database has is what the release begins with, unaltered and whole: of
    /// what keeps no record of that, alembic's programs, it is only the revision that counts.
    pub(super) async fn check(&self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Alembic(_) => Ok(()),
            Self::Files(files) => files.check(session).await,
        }
    }

    /// Fails if the role may not write down what it applies: of a migration outside of a
    /// transaction, that would show only when it is done.
    pub(super) async fn may_record(&self, session: &Session) -> Result<(), Failure> {
        let what = "looking for the table of migrations";
        let table = match self {
            Self::Alembic(_) => measure::revisions_table(session).await?,
            Self::Files(files) => files.table(session).await?,
        };
        let Some(table) = table else { return Ok(()) };
        let sql = "SELECT pg_get_userbyid(relowner)::text FROM pg_class \
                   WHERE oid = $1::text::regclass AND NOT \
                   (has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE') \
                   AND has_table_privilege(oid, 'DELETE'))";
        let refused = session.query(what, sql, &[&table]).await?;
        let Some(owner) = refused.first().map(|row| row.get::<_, String>(0)) else {
            return Ok(());
        };
        let role = &session.place().role;
        Err(hinted(
            Cause::Host,
            format!("{role} may not write to {table}, where {owner} has kept what was applied"),
            format!(
                "whoever migrates owns the tables: as a superuser, ALTER TABLE .. OWNER TO {role} \
                 for this one and the application's"
            ),
        ))
    }

    /// What leads from one revision to another. It is rendered without limits for locks and
    /// statements, so that it is the same whoever asks.
    pub(super) async fn render(&self, way: Way, from: &str, to: &str) -> Result<Rendered, Failure> {
        match self {
            Self::Alembic(tool) => tool.render(way, from, to).await,
            Self::Files(files) => files.render(way, from, to),
        }
    }

    /// Goes to a revision. Says how it ended.
    pub(super) async fn go(
        &self,
        way: Way,
        (from, to): (&str, &str),
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        match self {
            Self::Alembic(tool) => tool.go(way, (from, to), limits, major).await,
            Self::Files(files) => files.go(way, from, to, limits, major).await,
        }
    }
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
}
