//! The migration tools behind one face: where a database is, what would run, and the going.

use lockstep_proto::action::migration::Tool;
use lockstep_proto::report::Failure;
use lockstep_proto::values::Period;

use super::source::Source;
use crate::sql::Database;
use crate::step::Context;

mod alembic;
mod cli;

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
    /// The SQL; empty if there is nothing to do.
    pub(super) sql: String,
    /// Whether all of it happens in one transaction, or not at all.
    pub(super) whole: bool,
    /// What it does beside the SQL, or may do: a sentence for each.
    pub(super) opaque: Vec<String>,
}

/// A migration tool with the migrations of one release.
pub(super) enum Migrator<'a> {
    Alembic(alembic::Alembic<'a>),
}

impl<'a> Migrator<'a> {
    /// That of a source. Fails if the release is not on this host.
    pub(super) async fn of(cx: &'a Context, source: Source<'_>) -> Result<Self, Failure> {
        match source.tool {
            Tool::Alembic => alembic::Alembic::of(cx, source).await.map(Self::Alembic),
        }
    }

    /// The database that it works on.
    pub(super) fn database(&self) -> &Database {
        match self {
            Self::Alembic(tool) => tool.database(),
        }
    }

    /// The one newest revision of the release.
    pub(super) async fn head(&self) -> Result<String, Failure> {
        match self {
            Self::Alembic(tool) => tool.head().await,
        }
    }

    /// The full name of a revision that a plan names: `head`, `base` (which is none, and so
    /// empty), or a revision, never a relative one.
    pub(super) async fn resolve(&self, to: &str) -> Result<String, Failure> {
        match self {
            Self::Alembic(tool) => tool.resolve(to).await,
        }
    }

    /// What leads from one revision to another. It is rendered without limits for locks and
    /// statements, so that it is the same whoever asks.
    pub(super) async fn render(&self, way: Way, from: &str, to: &str) -> Result<Rendered, Failure> {
        match self {
            Self::Alembic(tool) => tool.render(way, from, to).await,
        }
    }

    /// Goes to a revision. Says how it ended.
    pub(super) async fn go(
        &self,
        way: Way,
        to: &str,
        limits: Limits,
        major: u32,
    ) -> Result<Went, Failure> {
        match self {
            Self::Alembic(tool) => tool.go(way, to, limits, major).await,
        }
    }
}
