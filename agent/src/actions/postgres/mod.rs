//! PostgreSQL: backups that are proven, restores that lose nothing, fences.
//!
//! ```text
//! fence          REVOKE CONNECT, end the applications' sessions; a token is kept in the database
//! backup         one snapshot: pg_dump, rows, checksums, schema -> <id>/archive, manifest.json
//! verify_backup  digest, full read, restore into a scratch database, comparison -> verified.json
//! restore        only behind the same fence: new database, comparison, swap by rename
//! unfence        gives the right to connect back exactly as it was
//! ```
//!
//! A fence's token is the key of the attempt that raised it. It is new whenever the fence goes up
//! again, so "the token is the backup's" means "nobody could write since the backup" (INV-6).

mod analyze;
mod archive;
mod backup;
mod barman;
mod check_sql;
mod compare;
mod external;
pub(crate) mod fence;
pub(crate) mod guarded;
pub(crate) mod integrity;
pub(crate) mod look;
mod manifest;
pub(crate) mod measure;
mod pgbackrest;
mod points;
pub(crate) mod recover;
pub(crate) mod restore;
mod scratch;
mod tools;
pub(crate) mod verify;
pub(crate) mod written;

/// A size for people.
fn human(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let unit = units.into_iter().find(|(_, size)| bytes >= *size);
    unit.map_or_else(
        || format!("{bytes} bytes"),
        |(name, size)| format!("{}.{} {name}", bytes / size, bytes % size * 10 / size),
    )
}
