//! Schema migrations with the application's own tool.

use serde::{Deserialize, Serialize};

use crate::values::Period;

mod guards;
mod rehearse;
mod required;

pub use guards::{Guards, OnLongTx};
pub use rehearse::{Rehearse, WayDown};
pub use required::{ProvenBackup, RequiredBackup};

/// A migration tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// alembic, for SQLAlchemy.
    #[default]
    Alembic,
    /// prisma: `migrations/<name>/migration.sql` in `dir`, which Lockstep runs itself.
    Prisma,
    /// diesel: `migrations/<version>_<name>/up.sql` in `dir`.
    Diesel,
    /// sqlx: `migrations/<version>_<description>.sql` in `dir`.
    Sqlx,
    /// Files of SQL, `NNN_name.sql` in `dir`, with `NNN_name.down.sql` for the way back.
    Sql,
}

/// Who runs the migrations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// The tool's own program, from the release.
    #[default]
    Tool,
    /// Lockstep: it runs the SQL that `migration.plan` shows, and nothing else.
    Sql,
}

/// What SQL may do to a database that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Hazard {
    /// Readers or writers wait for long.
    Lock,
    /// A table is written anew, and nobody can use it meanwhile.
    Rewrite,
    /// Data is gone, or overwritten.
    DataLoss,
    /// Code that runs now finds something no longer.
    Breaks,
    /// It fails on a database that is not empty, or always.
    Fails,
}

impl std::fmt::Display for Hazard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Lock => "lock",
            Self::Rewrite => "rewrite",
            Self::DataLoss => "data_loss",
            Self::Breaks => "breaks",
            Self::Fails => "fails",
        })
    }
}

/// How a rollback treats what a migration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum UndoBy {
    /// It goes down with the release that went up: by itself only while the fence has held since
    /// the backup, or if a fence is up again and nothing that goes was written since (INV-6).
    #[default]
    Downgrade,
    /// The schema stays and the code goes back, if the migration only added to it.
    Keep,
    /// The rollout's backup goes into a new database, which takes the old one's name; the old one
    /// is kept. Only while the fence has held since the backup, and only on the host that has it.
    Restore,
    /// The whole server goes back to the rollout's `postgres.restore_point`, through pgBackRest, and
    /// with it all of its databases; the files of before are kept. Only while the fence has held since
    /// the point, only if nothing was written to the other databases, and only on the server's host.
    Recover,
}

/// Arguments of `migration.current`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Current {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic for alembic, bin/sqlx,
    /// bin/diesel.
    #[serde(default = "program")]
    pub program: String,
}

/// Arguments of `migration.plan`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic for alembic, bin/sqlx,
    /// bin/diesel.
    #[serde(default = "program")]
    pub program: String,
    /// The target revision. Default: head.
    #[serde(default = "head")]
    pub to: String,
    /// Hazards that nobody is asked about: with one of them in the SQL the step fails. Others are
    /// shown with the SQL. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fail_on: Vec<Hazard>,
}

/// Arguments of `migration.apply`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic for alembic, bin/sqlx,
    /// bin/diesel.
    #[serde(default = "program")]
    pub program: String,
    /// The target revision. Default: head.
    #[serde(default = "head")]
    pub to: String,
    /// What must be proven before. Default: verified.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub backup: RequiredBackup,
    /// How a rollback treats it. Default: downgrade.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub undo_by: UndoBy,
    /// How long transactions of the database may have been open when it begins, as far as the role
    /// may see them. Default: 1m.
    #[serde(default = "max_tx_age", skip_serializing_if = "is_max_tx_age")]
    pub max_tx_age: Period,
    /// What is done about those that have been open for longer. Default: wait.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub on_long_tx: OnLongTx,
    /// What is watched while it runs. Default: nothing.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub guards: Guards,
    /// Who runs them. With `sql` Lockstep runs what `migration.plan` shows, in sessions of its own;
    /// so it always does for prisma and for files of SQL. Default: tool.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub apply: By,
    /// How long a statement may wait for a lock. Default: 5s.
    #[serde(default = "lock_timeout")]
    pub lock_timeout: Period,
    /// How long a statement may take. Default: 15m.
    #[serde(default = "statement_timeout")]
    pub statement_timeout: Period,
}

/// Arguments of `migration.verify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Verify {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic for alembic, bin/sqlx,
    /// bin/diesel.
    #[serde(default = "program")]
    pub program: String,
    /// The revision expected. Default: head.
    #[serde(default = "head")]
    pub to: String,
}

/// Arguments of `migration.downgrade`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Downgrade {
    /// The tool. Default: alembic.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub tool: Tool,
    /// The database, as the host's configuration names it.
    pub database: String,
    /// The application whose release holds the migrations.
    pub app: String,
    /// The release whose migrations they are.
    pub release: String,
    /// The tool's directory in the release.
    pub dir: String,
    /// The tool's program, relative to `dir`. Default: venv/bin/alembic for alembic, bin/sqlx,
    /// bin/diesel.
    #[serde(default = "program")]
    pub program: String,
    /// The revision to return to, by name: never relative.
    pub to: String,
    /// Who runs them. With `sql` Lockstep runs what `migration.plan` shows, in sessions of its own;
    /// so it always does for prisma and for files of SQL. Default: tool.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub apply: By,
    /// How long a statement may wait for a lock. Default: 5s.
    #[serde(default = "lock_timeout")]
    pub lock_timeout: Period,
    /// How long a statement may take. Default: 15m.
    #[serde(default = "statement_timeout")]
    pub statement_timeout: Period,
}

fn program() -> String {
    ALEMBIC.to_owned()
}

impl Tool {
    /// The tool's program in its directory, where a plan names none; `None` if it is never called.
    pub fn program(self, named: &str) -> Option<&str> {
        let own = match self {
            Self::Alembic => ALEMBIC,
            Self::Diesel => "bin/diesel",
            Self::Sqlx => "bin/sqlx",
            Self::Prisma | Self::Sql => return None,
        };
        // A plan that names none says alembic's: which of the tools it is for, only `tool` says.
        Some(if named == ALEMBIC { own } else { named })
    }
}

const ALEMBIC: &str = "venv/bin/alembic";

fn head() -> String {
    "head".to_owned()
}

fn max_tx_age() -> Period {
    Period::seconds(60)
}

fn is_max_tx_age(age: &Period) -> bool {
    *age == max_tx_age()
}

fn lock_timeout() -> Period {
    Period::seconds(5)
}

fn statement_timeout() -> Period {
    Period::seconds(900)
}
