//! `postgres.backup`.

use serde::{Deserialize, Serialize};

use super::copy::{CopyCommand, CopyStore, CopyTo};
use crate::values::{Percent, Period};

/// The archive format of pg_dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One compressed file (`-Fc`).
    #[default]
    Custom,
    /// A directory, dumped in parallel (`-Fd`).
    Directory,
}

/// What is compared between a restored backup and its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Aspect {
    /// The exact rows of each table, as in the dump's snapshot.
    #[default]
    RowCounts,
    /// The schema's fingerprint.
    Schema,
    /// An order-free checksum over each table's rows.
    Checksums,
}

/// A method of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// By every version of pg_dump.
    #[default]
    Gzip,
    /// By pg_dump of version 16 or later.
    Lz4,
    /// By pg_dump of version 16 or later.
    Zstd,
    /// Not at all.
    None,
}

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Compress {
    /// Default: gzip.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub method: Compression,
    /// From fast to small: gzip 1 to 9, lz4 1 to 12, zstd 1 to 22. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<u8>,
}

/// Arguments of `postgres.backup`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// The database, as the host's configuration names it with its address and role.
    pub database: String,
    /// The archive format. Default: custom.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub format: Format,
    /// How many processes dump in parallel; only with `format: directory`. Default: half of the processors, at most four.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<u16>,
    /// How the archive is compressed. Default: gzip, level 1.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub compress: Compress,
    /// What is measured of the same snapshot, for a restore to be held against. Default: all three.
    #[serde(default = "all", skip_serializing_if = "is_all")]
    pub measure: Vec<Aspect>,
    /// Also keep the server's roles and tablespaces, with pg_dumpall, beside the archive. Default: false.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub globals: bool,
    /// With the hashes of the roles' passwords, which only a superuser may read. Default: false.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub role_passwords: bool,
    /// Fails if the archive is smaller than this share of the one before it. Default: 0%.
    #[serde(default, skip_serializing_if = "super::super::is_default")]
    pub min_ratio_prev: Percent,
    /// Directories and object stores that get a copy, and commands that take one elsewhere; each is read back and hashed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<CopyTo>,
    /// How long to wait for a table's lock. Default: 5s.
    #[serde(default = "lock_wait")]
    pub lock_wait: Period,
    /// How many backups of this database stay in the backup directory. Default: 7.
    #[serde(default = "keep")]
    pub keep: u32,
}

impl Backup {
    /// The directories that get a copy.
    pub fn copy_directories(&self) -> impl Iterator<Item = &str> {
        self.copies.iter().filter_map(|copy| match copy {
            CopyTo::Directory(directory) => Some(directory.as_str()),
            CopyTo::Command(_) | CopyTo::Store(_) => None,
        })
    }

    /// The commands that take a copy elsewhere.
    pub fn copy_commands(&self) -> impl Iterator<Item = &CopyCommand> {
        self.copies.iter().filter_map(|copy| match copy {
            CopyTo::Command(command) => Some(command),
            CopyTo::Directory(_) | CopyTo::Store(_) => None,
        })
    }

    /// The object stores that get a copy.
    pub fn copy_stores(&self) -> impl Iterator<Item = &CopyStore> {
        self.copies.iter().filter_map(|copy| match copy {
            CopyTo::Store(store) => Some(store),
            CopyTo::Directory(_) | CopyTo::Command(_) => None,
        })
    }
}

fn lock_wait() -> Period {
    Period::seconds(5)
}

fn keep() -> u32 {
    7
}

/// All aspects.
pub(super) fn all() -> Vec<Aspect> {
    vec![Aspect::Schema, Aspect::RowCounts, Aspect::Checksums]
}

fn is_all(aspects: &[Aspect]) -> bool {
    aspects == all()
}
