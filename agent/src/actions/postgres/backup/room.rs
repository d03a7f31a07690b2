//! Whether there is room for a backup.

use std::path::Path;

use lockstep_proto::report::{Cause, Failure};

use super::super::human;
use super::super::manifest::Store;
use crate::sql::Session;
use crate::step::{failure, hinted};

/// Free bytes for whoever asks.
pub(in crate::actions::postgres) fn free(path: &Path) -> Result<u64, Failure> {
    let stat = rustix::fs::statvfs(path).map_err(|error| {
        failure(
            Cause::Host,
            format!("cannot ask for the room at {}: {error}", path.display()),
        )
    })?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Refuses to begin what would fill a disk. The archive is at most as large as the tables, and
/// where there was one before, it is not likely to be more than twice as large as that.
pub(super) async fn check_room(
    session: &Session,
    store: &Store,
    copies: &[&str],
) -> Result<(), Failure> {
    let sql = "SELECT coalesce(sum(pg_table_size(oid)), 0)::int8 FROM pg_class \
               WHERE relkind IN ('r', 'm') AND relnamespace <> 'pg_catalog'::regnamespace";
    let tables: i64 = session
        .one("asking for the tables' sizes", sql, &[])
        .await?
        .get(0);
    let previous = store.all().first().map(|made| made.size.saturating_mul(2));
    let need = tables.unsigned_abs().min(previous.unwrap_or(u64::MAX));
    for directory in std::iter::once(store.directory.as_path()).chain(copies.iter().map(Path::new))
    {
        enough(directory, free(directory)?, need)?;
    }
    Ok(())
}

pub(super) fn enough(directory: &Path, free: u64, need: u64) -> Result<(), Failure> {
    if free >= need {
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!(
            "a backup may need {} in {}, and {} are free",
            human(need),
            directory.display(),
            human(free)
        ),
        "make room there; nothing was changed",
    ))
}
