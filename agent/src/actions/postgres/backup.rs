//! `postgres.backup`: pg_dump of one snapshot, with what a restore of it must be equal to.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use lockstep_proto::action::postgres::{Backup, CopyTo, Format};
use lockstep_proto::ids::StepKey;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use tokio::time::Instant;

use self::copies::{copy, find_copy_directory};
use self::dump::dump;
use self::room::check_room;
use super::manifest::{self, Manifest, Store, blocking};
use super::measure::rows_fact;
use super::{fence, human};
use crate::actions::files::{self, parent};
use crate::actions::{Act, Done, Probe};
use crate::faults::reached;
use crate::process::User;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

pub(super) mod copies;
mod dump;
mod room;
mod sent;
mod stored;

pub(super) use room::free;

impl Act for Backup {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        if cx.dry_run {
            if let Err(unmet) = find_copies(self, cx).await {
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
            None => Box::pin(take(self, cx, &database, session, &store, began)).await?,
        };
        for to in &self.copies {
            match to {
                CopyTo::Directory(to) => copy(cx, &store, &made, Path::new(to)).await?,
                CopyTo::Command(to) => sent::send(cx, &store.path(&made.id), &made, to).await?,
                CopyTo::Store(to) => {
                    Box::pin(stored::send(cx, &store.path(&made.id), &made, to)).await?;
                }
            }
        }
        let directories: Vec<&str> = self.copy_directories().collect();
        store.supersede(cx, &made, &directories);
        store.retain(cx, self.keep);
        Ok(done(made, began))
    }

    fn describe(&self) -> String {
        let in_directories = self.copy_directories().map(|to| format!("in {to}"));
        let by_commands = self.copy_commands();
        let by_commands = by_commands.map(|to| format!("by `{}`", to.command.join(" ")));
        let in_stores = self.copy_stores().map(|to| format!("at {}", to.store));
        let copies: Vec<String> = in_directories.chain(by_commands).chain(in_stores).collect();
        let copies = match copies.as_slice() {
            [] => String::new(),
            copies => format!(", with copies {}", copies.join(" and ")),
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
    let what = made.summary();
    let text = format!("{} ({}) in {took:.1} s: {what}", made.id, human(made.size));
    let rows = made
        .contents
        .iter()
        .map(|(name, table)| (name.clone(), table.rows));
    let rows = made.is_counted().then(|| rows_fact(&made.database, rows));
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
        facts: [Some(backup), rows, Some(note)]
            .into_iter()
            .flatten()
            .collect(),
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
    find_copies(act, cx).await?;
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
    check_room(&session, store, &act.copy_directories().collect::<Vec<_>>()).await?;
    let sql = "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYYMMDD\"T\"HH24MISS\"Z\"')";
    let stamp: String = session.one("asking for the time", sql, &[]).await?.get(0);
    let id = manifest::id(&act.database, &stamp, &cx.key);
    let partial = store.path(&format!("{id}{}", manifest::PARTIAL));
    make_directory(&partial, user.as_ref())?;
    let finished = async {
        let made = dump(act, cx, database, session, &partial, id).await?;
        check_size(act, store, &made)?;
        finish(store, &partial, made).await
    };
    let finished = finished.await;
    if finished.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    cx.log.line(&format!(
        "the backup took {:.1} s",
        began.elapsed().as_secs_f64()
    ));
    finished
}

/// Refuses copies that cannot be made: a directory that is not there, a command that cannot be
/// started, a store that cannot be reached.
async fn find_copies(act: &Backup, cx: &Context) -> Result<(), Failure> {
    for directory in act.copy_directories() {
        find_copy_directory(cx, Path::new(directory))?;
    }
    let is_one_file = |to: &CopyTo| !matches!(to, CopyTo::Directory(_));
    if act.format == Format::Directory && act.copies.iter().any(is_one_file) {
        return Err(hinted(
            Cause::Refused,
            "a command or a store takes one file, and an archive of `format: directory` has many",
            "say `format: custom`, or name a directory",
        ));
    }
    for command in act.copy_commands() {
        sent::check_program(cx, command).await?;
    }
    for store in act.copy_stores() {
        Box::pin(stored::find(cx, store)).await?;
    }
    Ok(())
}

/// Refuses an archive that is much smaller than the one before it, as far as the two can be
/// compared: the rows may be gone, or it is another database.
fn check_size(act: &Backup, store: &Store, made: &Manifest) -> Result<(), Failure> {
    let mut before = store.all().into_iter();
    let alike = |it: &Manifest| (it.format, it.compress) == (made.format, made.compress);
    let Some(before) = before.find(alike) else {
        return Ok(());
    };
    let percent = act.min_ratio_prev.0;
    if made.size.saturating_mul(100) >= before.size.saturating_mul(percent) {
        return Ok(());
    }
    Err(hinted(
        Cause::CheckUnmet,
        format!(
            "the archive has {}, which is less than {percent}% of the {} of {}",
            human(made.size),
            human(before.size),
            before.id
        ),
        "see whether the database lost rows, or lower `min_ratio_prev`",
    ))
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

#[cfg(test)]
pub(super) mod tests;
