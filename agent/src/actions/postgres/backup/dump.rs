//! The dump of one snapshot, and what is measured of the same one.
//!
//! ```text
//! snapshot --> pg_dump -Fc --pipe--> digest, file, fsync     one process, hashed as it comes
//!          \-> pg_dump -Fd --------> files; digest, fsync    several, hashed afterwards
//!          \-> rows, checksums, schema                       as far as the plan wants them
//! ```

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::action::postgres::{Aspect, Backup, Compress, Compression, Format};
use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Timestamp;

use super::super::archive::{self, archive_in};
use super::super::fence;
use super::super::manifest::{Beside, GLOBALS, Manifest, blocking};
use super::super::measure::{Contents, Snapshot, TABLE_NAME, TABLES, fingerprint, revisions};
use super::super::scratch::{jobs, progress};
use super::super::tools::{ToolVersion, Tools};
use super::super::written;
use crate::process::User;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

/// Dumps and measures one snapshot. Everything of it is in `partial` afterwards, but the
/// manifest.
pub(super) async fn dump(
    act: &Backup,
    cx: &Context,
    database: &Database,
    session: Session,
    partial: &Path,
    id: String,
) -> Result<Manifest, Failure> {
    let (server_version, major) = (session.version, session.major());
    let tools = Tools::new(cx, database, major).await?;
    let version = tools.version("pg_dump").await?;
    check_version(&version, major)?;
    let compress = compress_arg(act.compress, &version)?;
    let snapshot = Snapshot::take(session).await?;
    let moment = written::moment(snapshot.session()).await?;
    let lsn = lsn(snapshot.session()).await?;
    let snapshot_arg = format!("--snapshot={}", snapshot.id());
    let wait = format!("--lock-wait-timeout={}ms", act.lock_wait.0.max(1));
    // Syncing is ours, beside the hashing.
    let args = ["--no-sync", &compress, &snapshot_arg, &wait];
    let dump = archived(act, database, &tools, partial, &args);
    let measure = measure(act, database, &tools, &snapshot);
    let both = async { tokio::try_join!(dump, measure) };
    let ((digest, size), (contents, schema)) = tokio::select! {
        both = both => both?,
        never = watch(cx, database) => match never {},
    };
    let fence = fence::raised(snapshot.session())
        .await?
        .map(|raised| raised.token);
    let revisions = revisions(snapshot.session()).await?;
    let sql = "SELECT (extract(epoch FROM now()) * 1000)::int8";
    let taken: i64 = snapshot
        .session()
        .one("asking for the time", sql, &[])
        .await?
        .get(0);
    let globals = if act.globals {
        Some(globals(act, database, &tools, partial).await?)
    } else {
        None
    };
    Ok(Manifest {
        id,
        key: cx.key.clone(),
        database: database.name.clone(),
        dbname: database.dbname().to_owned(),
        format: act.format,
        digest,
        size,
        taken_at: Timestamp(taken.unsigned_abs()),
        contents,
        schema,
        server_version,
        fence,
        revisions,
        moment,
        measured: act.measure.clone(),
        compress: act.compress,
        tool_version: version.text,
        lsn,
        globals,
        copies: act.copies.clone(),
        is_own: true,
    })
}

/// Refuses a pg_dump that is older than the server: it does not know what it would leave out.
fn check_version(tool: &ToolVersion, server: u32) -> Result<(), Failure> {
    if tool.major >= server {
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!(
            "pg_dump is of version {}, and the server of version {server}",
            tool.text
        ),
        "install client tools that are not older than the server, or correct `bin_dir`",
    ))
}

/// The argument of pg_dump that compresses as the plan wants it.
fn compress_arg(compress: Compress, tool: &ToolVersion) -> Result<String, Failure> {
    let level = compress.level.unwrap_or(1);
    let name = match compress.method {
        Compression::None => return Ok("-Z0".to_owned()),
        Compression::Gzip => return Ok(format!("-Z{level}")),
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    };
    if tool.major >= 16 {
        return Ok(format!("--compress={name}:{level}"));
    }
    Err(hinted(
        Cause::Refused,
        format!(
            "pg_dump {} cannot compress with {name}: that came with version 16",
            tool.text
        ),
        "say `compress: {method: gzip}`, or install newer client tools: they dump older servers",
    ))
}

/// Makes the archive; returns its digest and size once it is on the disk.
async fn archived(
    act: &Backup,
    database: &Database,
    tools: &Tools<'_>,
    partial: &Path,
    args: &[&str],
) -> Result<(Digest, u64), Failure> {
    let (archive, dbname) = (archive_in(partial), Some(database.dbname()));
    match act.format {
        Format::Custom => {
            let owner = owner(database)?;
            let file = archive.clone();
            let file = blocking("cannot make the archive", move || {
                archive::create(&file, owner)
            });
            let file = file.await?;
            let args = [args, &["-Fc"]].concat();
            let pour = move |pipe| archive::pour(pipe, file);
            tools.pour("pg_dump", dbname, &args, pour).await
        }
        Format::Directory => {
            let jobs = act.jobs.map_or_else(jobs, usize::from);
            let (jobs, path) = (format!("-j{jobs}"), archive.display().to_string());
            let args = [args, &["-Fd", &jobs, "-f", &path]].concat();
            tools.run("pg_dump", dbname, &args).await?;
            hash_and_sync(archive).await
        }
    }
}

/// Who the files of a backup belong to: whoever restores them reads them.
fn owner(database: &Database) -> Result<Option<(u32, u32)>, Failure> {
    let user = database.config.os_user.as_deref().map(User::find);
    let user = user.transpose()?.filter(|user| !user.is_self());
    Ok(user.map(|user| (user.uid, user.gid)))
}

/// Reads and syncs the archive at the same time: one wants the processor, the other the disk.
async fn hash_and_sync(archive: PathBuf) -> Result<(Digest, u64), Failure> {
    let synced = archive.clone();
    let sync = blocking("cannot write the archive to the disk", move || {
        archive::sync(&synced)
    });
    let hash = blocking("cannot read the archive", move || archive::digest(&archive));
    let ((), hashed) = tokio::try_join!(sync, hash)?;
    Ok(hashed)
}

/// Measures what the plan wants of the snapshot.
async fn measure(
    act: &Backup,
    database: &Database,
    tools: &Tools<'_>,
    snapshot: &Snapshot,
) -> Result<(Contents, Digest), Failure> {
    let wants = |aspect| act.measure.contains(&aspect);
    let contents = match (wants(Aspect::RowCounts), wants(Aspect::Checksums)) {
        (_, true) => snapshot.contents().await?,
        (true, false) => snapshot.counts().await?,
        (false, false) => Contents::new(),
    };
    let schema = if wants(Aspect::Schema) {
        fingerprint(tools, database.dbname(), Some(snapshot.id())).await?
    } else {
        Digest::of(b"")
    };
    Ok((contents, schema))
}

/// Where the server's log of changes is: a point in time recovery to there comes after the snapshot.
async fn lsn(session: &Session) -> Result<Option<String>, Failure> {
    let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
               ELSE pg_current_wal_lsn() END::text";
    let row = session.one("asking for the server's log position", sql, &[]);
    Ok(row.await?.get(0))
}

/// Keeps the server's roles and tablespaces, which no dump of a database holds.
async fn globals(
    act: &Backup,
    database: &Database,
    tools: &Tools<'_>,
    partial: &Path,
) -> Result<Beside, Failure> {
    let (directory, owner) = (partial.to_owned(), owner(database)?);
    let make = blocking("cannot make the file of the globals", move || {
        archive::create_beside(&directory, GLOBALS, owner)
    });
    let file = make.await?;
    let mut args = vec!["--no-password", "--globals-only", "--lock-wait-timeout=5s"];
    if !act.role_passwords {
        args.push("--no-role-passwords");
    }
    let dbname = format!(
        "--database={}",
        crate::sql::conninfo_dbname(database.dbname())
    );
    args.push(&dbname);
    let pour = move |pipe| archive::pour(pipe, file);
    let (digest, size) = tools.pour("pg_dumpall", None, &args, pour).await?;
    Ok(Beside { digest, size })
}

/// Tells how far pg_dump is, as long as it runs.
async fn watch(cx: &Context, database: &Database) -> Infallible {
    let sql =
        "SELECT {name}, greatest(c.reltuples, 1)::int8, pg_relation_size(c.oid) FROM {tables}";
    let sql = sql
        .replace("{name}", TABLE_NAME)
        .replace("{tables}", TABLES);
    // A small dump is over before the first look.
    tokio::time::sleep(Duration::from_secs(1)).await;
    if let Ok(session) = database.connect(cx).await
        && let Ok(rows) = session
            .query("asking for the tables' sizes", &sql, &[])
            .await
    {
        let count = |row: &tokio_postgres::Row, at| row.get::<_, i64>(at).unsigned_abs();
        let tables = rows
            .iter()
            .map(|row| (row.get(0), (count(row, 1), count(row, 2))));
        progress(cx, &session, &tables.collect(), 0.95).await;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pg_dump_cannot_compress_is_refused() {
        let tool = |major| ToolVersion {
            major,
            text: format!("{major}.1"),
        };
        let compress = |method, level| Compress { method, level };
        for (method, level, version, arg) in [
            (Compression::Gzip, None, 15, "-Z1"),
            (Compression::Gzip, Some(6), 15, "-Z6"),
            (Compression::None, None, 15, "-Z0"),
            (Compression::Zstd, Some(3), 16, "--compress=zstd:3"),
            (Compression::Lz4, None, 17, "--compress=lz4:1"),
        ] {
            let made = compress_arg(compress(method, level), &tool(version));
            assert_eq!(made.unwrap(), arg);
        }
        let refused = compress_arg(compress(Compression::Zstd, None), &tool(15)).unwrap_err();
        assert_eq!(refused.cause, Cause::Refused);
        assert_eq!(
            refused.message,
            "pg_dump 15.1 cannot compress with zstd: that came with version 16"
        );
        assert!(check_version(&tool(15), 15).is_ok());
        let old = check_version(&tool(14), 15).unwrap_err();
        assert!(old.message.contains("of version 14.1"), "{}", old.message);
    }
}
