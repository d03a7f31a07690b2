//! PostgreSQL: backups that are proven, restores that lose nothing, fences.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::values::{ByteSize, Percent, Period};

mod backup;
mod copy;
mod level;

pub use backup::{Aspect, Backup, Compress, Compression, Format};
pub use copy::{CopyCommand, CopyStore, CopyTo, Presigned};
pub use level::Level;

/// Where a backup is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestoreInto {
    /// A database made for it and dropped afterwards.
    #[default]
    Scratch,
}

/// How the rows of a table may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// They are as many. With a look of `postgres.integrity`, they hold the same values, too, in
    /// the columns that are in both.
    #[default]
    Unchanged,
    /// They are as many, and may hold other values.
    SameCount,
    /// They are as many or more.
    Grown,
    /// They are at most so much more or fewer.
    Within(Percent),
    /// Nothing is asked of them: the table may even be gone.
    Any,
}

/// What a database is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The rollout's newest backup: how many rows each table has.
    #[default]
    Backup,
    /// The rollout's newest `postgres.integrity`: everything that it looks at.
    Integrity,
}

/// The way a fence shuts applications out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum FenceVia {
    /// The roles lose the right to connect, and their sessions end.
    #[default]
    Connect,
}

/// Arguments of `postgres.verify_backup`: it takes the rollout's newest backup of the database.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct VerifyBackup {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// Where it is restored. Default: scratch.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub restore_into: RestoreInto,
    /// A directory of this host with a copy of the backup, which another host has made. Default: the host's own backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// How far it is proven. Default: 4.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub level: Level,
    /// What is compared from level 4 on. Without one of the three the backup reaches level 3, whatever else was equal. Default: all three.
    #[serde(default = "backup::all")]
    pub compare: Vec<Aspect>,
    /// A smaller backup fails.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub min_size: ByteSize,
}

impl VerifyBackup {
    /// The level that a backup has reached when this step has ended well.
    pub fn reaches(&self) -> Level {
        let all = backup::all()
            .iter()
            .all(|aspect| self.compare.contains(aspect));
        if all {
            self.level
        } else {
            self.level.min(Level::Restored)
        }
    }

    /// What the step compares: below level 4 nothing.
    pub fn compared(&self) -> &[Aspect] {
        if self.level >= Level::Equal {
            &self.compare
        } else {
            &[]
        }
    }
}

/// Arguments of `postgres.restore`: it takes the rollout's newest verified backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
}

/// Arguments of `postgres.counts`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Counts {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// Tables, with schema if not `public`. Default: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
}

/// Arguments of `postgres.integrity`: rows, values, sequences, foreign keys, indexes and schema as
/// they are now, for a later `postgres.compare`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Integrity {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// Of larger tables rows are counted, and values not looked at. Default: no table is too large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values_up_to: Option<ByteSize>,
}

/// Arguments of `postgres.compare`: against the rollout's newest backup, or `postgres.integrity`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Compare {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// What it is compared with. Default: backup.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub with: Baseline,
    /// Tables that must exist in both. Default: all that were there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
    /// How the rows of each table may differ. Default: unchanged.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub rows: Rows,
    /// How those of single tables may differ instead, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub except: BTreeMap<String, Rows>,
}

/// One statement and what it must answer: a value, or nothing at all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Assertion {
    /// A statement that returns one value, or, with `empty`, any rows.
    pub sql: String,
    /// The value, as PostgreSQL prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<String>,
    /// The value is a number, and at least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<i64>,
    /// The value is a number, and at most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<i64>,
    /// No row is returned: for statements that look for what must not be there.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub empty: bool,
}

/// Arguments of `postgres.assert`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Assert {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// All are run, and cannot write; each one that fails is named.
    pub checks: Vec<Assertion>,
    /// Tables that must exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
    /// Look for rows whose foreign key has no parent, over all tables.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub foreign_keys: bool,
    /// How long a statement may take. Default: as long as the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statement_timeout: Option<Period>,
}

/// Arguments of `postgres.analyze`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Analyze {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// Tables, with schema if not `public`. Default: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<String>,
}

/// Arguments of `postgres.restore_point`: a name in the server's log of changes, to which its
/// physical backups can be brought back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RestorePoint {
    /// A database of the server, as the host's configuration names it with its address and role.
    pub database: String,
    /// How long the log up to the point may take to be archived. Default: 5m.
    #[serde(default = "archived_within")]
    pub archived_within: Period,
    /// Count the rows of all databases of the server, so that a later `undo_by: recover` can tell
    /// whether anything was written to them since. Default: no.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub recoverable: bool,
}

/// A system of physical backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// pgBackRest.
    #[default]
    Pgbackrest,
    /// Barman.
    Barman,
}

/// What a physical backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything.
    Full,
    /// What has changed since the newest full one.
    Differential,
    /// What has changed since the newest one.
    #[default]
    Incremental,
}

/// Arguments of `postgres.external_backup`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExternalBackup {
    /// A database of the server, as the host's configuration names it with its backup system.
    pub database: String,
    /// The system. Default: pgbackrest.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub system: System,
    /// What it holds. Default: incremental; the first one is always full, and so is Barman's.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub kind: Kind,
    /// Read what is kept again, and fail if anything is damaged: with pgBackRest all backups and the
    /// archive, with Barman the new backup.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub verify: bool,
}

/// Arguments of `postgres.fence`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Fence {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// The way. Default: connect.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub via: FenceVia,
    /// The applications' roles, and all others with a grant to connect. One that is left out makes
    /// the fence refuse; superusers, and the owner with its members, get in all the time.
    pub roles: Vec<String>,
}

/// Arguments of `postgres.unfence`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Unfence {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// The way. Default: connect.
    #[serde(default, skip_serializing_if = "super::is_default")]
    pub via: FenceVia,
    /// The applications' roles.
    pub roles: Vec<String>,
    /// The rollout that has left its fence up, if it was cancelled or closed before lowering it. Default: this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_by: Option<String>,
}

fn archived_within() -> Period {
    Period::seconds(300)
}
