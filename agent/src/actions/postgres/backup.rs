//! `postgres.backup`: pg_dump of one snapshot, with what a restore of it must be equal to.

use std::convert::Infallible;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lockstep_proto::action::postgres::{Backup, Format};
use lockstep_proto::ids::StepKey;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Timestamp;
use serde_json::Value;
use tokio::time::Instant;

use super::archive::{self, Dir, archive_in};
use super::manifest::{self, Manifest, Store, blocking};
use super::measure::{Contents, Snapshot, fingerprint, revisions, rows_fact, summary};
use super::scratch::progress;
use super::tools::Tools;
use super::{fence, human, written};
use crate::actions::files::{self, parent};
use crate::actions::places::Place;
use crate::actions::{Act, Done, Probe};
use crate::faults::reached;
use crate::process::User;
use crate::sql::{Database, Session};
use crate::step::{Context, failure, hinted};

impl Act for Backup {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        if cx.dry_run {
            let mut copies = self.copies.iter().map(Path::new);
            let find = |copies| find_copy_directory(cx, copies).err();
            if let Some(unmet) = copies.find_map(find) {
                return Ok(Probe::Unmet(unmet));
            }
        } else {
            session.end_left_over(cx).await?;
        }
        Ok(match of_this_step(&Store::of(cx, &database), cx) {
            Some(made) => Probe::Present(format!("the backup {} is complete", made.id)),
            None => Probe::Absent(self.describe()),
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let began = Instant::now();
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        let store = Store::of(cx, &database);
        let fence = fence::raised(&session).await?.map(|raised| raised.token);
        // Behind the same fence an earlier attempt's backup is as good as a new one; without a
        // fence, that of an attempt that was killed, but for its outcome, is what was asked for.
        let usable =
            |made: &Manifest| made.fence == fence && (fence.is_some() || was_killed(cx, &made.key));
        let made = match of_this_step(&store, cx).filter(usable) {
            Some(made) => made,
            None => take(self, cx, &database, session, &store, began).await?,
        };
        for directory in &self.copies {
            copy(cx, &store, &made, Path::new(directory)).await?;
        }
        store.supersede(cx, &made, &self.copies);
        store.retain(cx, self.keep);
        Ok(done(made, began))
    }

    fn describe(&self) -> String {
        let copies = match self.copies.as_slice() {
            [] => String::new(),
            copies => format!(", with copies in {}", copies.join(" and ")),
        };
        format!("takes a backup of `{}`{copies}", self.database)
    }
}

/// Whether an attempt at this step was cut off: one that failed has an outcome.
fn was_killed(cx: &Context, attempt: &StepKey) -> bool {
    let name = attempt.to_string();
    let is_its = |dir: &PathBuf| parent(dir).ends_with(&name);
    files::attempts_without_outcome(cx).iter().any(is_its)
}

/// What an earlier attempt at the same step has made.
fn of_this_step(store: &Store, cx: &Context) -> Option<Manifest> {
    store.all().into_iter().find(|made| {
        let key = &made.key;
        (&key.rollout, &key.host, key.at) == (&cx.key.rollout, &cx.key.host, cx.key.at)
    })
}

fn done(made: Manifest, began: Instant) -> Done {
    let took = began.elapsed().as_secs_f64();
    let what = summary(&made.contents);
    let text = format!("{} ({}) in {took:.1} s: {what}", made.id, human(made.size));
    let rows = made
        .contents
        .iter()
        .map(|(name, table)| (name.clone(), table.rows));
    let rows = rows_fact(&made.database, rows);
    let backup = Fact::Backup {
        database: made.database,
        id: made.id,
        digest: made.digest,
        size: made.size,
        taken_at: made.taken_at,
        fence: made.fence,
    };
    let note = Fact::Note {
        name: "backup".into(),
        value: text.clone(),
    };
    Done {
        changed: true,
        summary: text,
        facts: vec![backup, rows, note],
    }
}

/// Takes a new backup into the store.
async fn take(
    act: &Backup,
    cx: &Context,
    database: &Database,
    session: Session,
    store: &Store,
    began: Instant,
) -> Result<Manifest, Failure> {
    for directory in &act.copies {
        find_copy_directory(cx, Path::new(directory))?;
    }
    let wait = act.lock_wait.0.max(1);
    session
        .run(
            "setting up the session",
            &format!("SET lock_timeout = {wait}"),
        )
        .await?;
    store.remove_partials(cx);
    let user = database
        .config
        .os_user
        .as_deref()
        .map(User::find)
        .transpose()?;
    make_store(&store.directory, user.as_ref())?;
    check_room(&session, store, &act.copies).await?;
    let sql = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD\"T\"HH24MISS\"Z\"')";
    let stamp: String = session.one("asking for the time", sql, &[]).await?.get(0);
    let id = manifest::id(&act.database, &stamp, &cx.key);
    let partial = store.path(&format!("{id}{}", manifest::PARTIAL));
    make_directory(&partial, user.as_ref())?;
    let dumped = dump(act, cx, database, session, &partial, id).await;
    let finished = match dumped {
        Ok(made) => finish(store, &partial, made).await,
        Err(error) => Err(error),
    };
    if finished.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    cx.log.line(&format!(
        "the backup took {:.1} s",
        began.elapsed().as_secs_f64()
    ));
    finished
}

/// Dumps and measures one snapshot. Everything of it is in `partial` afterwards, but the
/// manifest.
async fn dump(
    act: &Backup,
    cx: &Context,
    database: &Database,
    session: Session,
    partial: &Path,
    id: String,
) -> Result<Manifest, Failure> {
    let server_version = session.version;
    let tools = Tools::new(cx, database, session.major()).await?;
    let snapshot = Snapshot::take(session).await?;
    let moment = written::moment(snapshot.session()).await?;
    let archive = archive_in(partial);
    let path = archive.display().to_string();
    let snapshot_arg = format!("--snapshot={}", snapshot.id());
    let wait = format!("--lock-wait-timeout={}ms", act.lock_wait.0.max(1));
    // Syncing is ours, beside the hashing.
    let mut args = vec!["--no-sync", "-Z1", "-f", &path, &snapshot_arg, &wait];
    let jobs = format!("-j{}", super::scratch::jobs());
    match act.format {
        Format::Custom => args.push("-Fc"),
        Format::Directory => args.extend(["-Fd", jobs.as_str()]),
    }
    let dump = tools.run("pg_dump", Some(database.dbname()), &args);
    let measure = async {
        let contents = snapshot.contents().await?;
        let schema = fingerprint(&tools, database.dbname(), Some(snapshot.id())).await?;
        Ok((contents, schema))
    };
    let both = async { tokio::try_join!(dump, measure) };
    let (_, (contents, schema)): (_, (Contents, _)) = tokio::select! {
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
    cx.log.progress(0.97, "computing the archive's digest");
    let (digest, size) = hash_and_sync(archive).await?;
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
    })
}

/// Writes the manifest and gives the backup its name.
async fn finish(store: &Store, partial: &Path, made: Manifest) -> Result<Manifest, Failure> {
    manifest::write_manifest(partial, &made)?;
    reached("backup: to be named");
    let (from, to, directory) = (
        partial.to_owned(),
        store.path(&made.id),
        store.directory.clone(),
    );
    blocking("cannot keep the backup", move || {
        fs::rename(from, to)?;
        files::sync_dir(&directory)
    })
    .await?;
    reached("backup: named");
    Ok(made)
}

/// Reads and syncs the archive at the same time: one wants the processor, the other the disk.
async fn hash_and_sync(archive: PathBuf) -> Result<(lockstep_proto::ids::Digest, u64), Failure> {
    let synced = archive.clone();
    let sync = blocking("cannot write the archive to the disk", move || {
        archive::sync(&synced)
    });
    let hash = blocking("cannot read the archive", move || archive::digest(&archive));
    let ((), hashed) = tokio::try_join!(sync, hash)?;
    Ok(hashed)
}

/// Tells how far pg_dump is, as long as it runs.
async fn watch(cx: &Context, database: &Database) -> Infallible {
    let sql =
        "SELECT {name}, greatest(c.reltuples, 1)::int8, pg_relation_size(c.oid) FROM {tables}";
    let sql = sql
        .replace("{name}", super::measure::TABLE_NAME)
        .replace("{tables}", super::measure::TABLES);
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

/// The backup directory: the agent's, but passable for the user that the tools run as.
fn make_store(directory: &Path, user: Option<&User>) -> Result<(), Failure> {
    let made = DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory);
    made.map_err(|error| cannot_make(directory, &error))?;
    let Some(user) = user.filter(|user| !user.is_self()) else {
        return Ok(());
    };
    user.may_be_taken()?;
    if crate::sql::can_enter(user, directory) {
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!(
            "{} cannot get to the backup directory {}",
            user.name,
            directory.display()
        ),
        "set `backup_dir` to a directory that `os_user` can enter",
    ))
}

fn make_directory(path: &Path, user: Option<&User>) -> Result<(), Failure> {
    let make = || {
        reached("backup: to be begun");
        DirBuilder::new().mode(0o700).create(path)?;
        reached("backup: begun");
        match user.filter(|user| !user.is_self()) {
            // `backup_dir` may be the user's own, and this name another's by now.
            Some(user) => std::os::unix::fs::lchown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    };
    make().map_err(|error| cannot_make(path, &error))
}

fn cannot_make(path: &Path, error: &std::io::Error) -> Failure {
    hinted(
        Cause::Host,
        format!("cannot make the directory {}: {error}", path.display()),
        "check `backup_dir`, its permissions and its volume",
    )
}

/// Free bytes for whoever asks.
pub(super) fn free(path: &Path) -> Result<u64, Failure> {
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
async fn check_room(session: &Session, store: &Store, copies: &[String]) -> Result<(), Failure> {
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

fn enough(directory: &Path, free: u64, need: u64) -> Result<(), Failure> {
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

/// A directory for copies is made by people: one that is missing may be a volume that is not
/// mounted.
fn find_copy_directory(cx: &Context, directory: &Path) -> Result<Place, Failure> {
    let what = || format!("keep copies in {}", directory.display());
    match Place::find(&cx.config, directory) {
        Ok(place) if place.path().is_dir() => Ok(place),
        Err(error) if !error.is_missing() => Err(error.failed(&what())),
        _ => Err(hinted(
            Cause::Host,
            format!(
                "the directory for copies {} is not there",
                directory.display()
            ),
            "create it, or mount its volume",
        )),
    }
}

/// Copies a backup into a directory, and reads the copy to see that it is equal.
async fn copy(cx: &Context, store: &Store, made: &Manifest, to: &Path) -> Result<(), Failure> {
    let place = find_copy_directory(cx, to)?;
    let to = to.display().to_string();
    let (id, from, expected) = (made.id.clone(), store.path(&made.id), made.digest);
    let what = format!("cannot copy the backup to {to}");
    let copied = blocking(&what, move || {
        // The path itself is a link, of the kernel's.
        let within = Dir::open(&place.path().join("."))?;
        let partial = format!("{id}{}", manifest::PARTIAL);
        let has = |name: &str| Ok(archive::digest(&archive_in(&within.path(name)))?.0 == expected);
        if within.path(&id).is_dir() && has(&id)? {
            return Ok(true);
        }
        for stale in [within.path(&partial), within.path(&id)] {
            if stale.symlink_metadata().is_ok() {
                fs::remove_dir_all(stale)?;
            }
        }
        reached("copy: to be made");
        let equal = archive::copy(&from, &within, &partial, manifest::MANIFEST)
            .inspect(|()| reached("copy: made"))
            .and_then(|()| has(&partial))
            .and_then(|equal| {
                if equal {
                    fs::rename(within.path(&partial), within.path(&id))?;
                    reached("copy: named");
                    within.sync()?;
                }
                Ok(equal)
            });
        if !matches!(equal, Ok(true)) {
            let _ = fs::remove_dir_all(within.path(&partial));
        }
        equal
    });
    if copied.await? {
        cx.log.line(&format!("copied to {to}, digest equal"));
        return Ok(());
    }
    Err(hinted(
        Cause::Host,
        format!("the copy of the backup in {to} is not equal to it"),
        "check that volume: it does not give back what was written",
    ))
}

#[cfg(test)]
pub(super) mod tests;
