//! `postgres.verify_backup`: a backup counts only as far as it was proven.

use std::path::Path;

use lockstep_proto::action::postgres::{Aspect, Level, VerifyBackup};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use tokio::time::Instant;

use self::ladder::Ladder;
use super::backup::copies::find_copy_directory;
use super::look::no_backup;
use super::manifest::{Manifest, Store, Verified};
use super::{human, scratch};
use crate::actions::{Act, Done, Probe, bound};
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

impl Act for VerifyBackup {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let store = Store::of(cx, &database);
        if cx.dry_run {
            database.connect(cx).await?;
            if let Some(from) = &self.from
                && let Err(unmet) = find_copy_directory(cx, Path::new(from))
            {
                return Ok(Probe::Unmet(unmet));
            }
            return Ok(Probe::Unmet(no_backup(&self.database)));
        }
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        drop_left_over(&session, cx).await?;
        let verified = store.all().into_iter().find(|made| {
            store.verified(made).is_some_and(|verified| {
                (&verified.key.rollout, verified.key.at) == (&cx.key.rollout, cx.key.at)
            })
        });
        Ok(match verified {
            Some(made) => Probe::Present(format!("the backup {} is verified", made.id)),
            None => Probe::Absent(self.describe()),
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let (done, _) = prove(cx, self, async |_| Ok(())).await?;
        Ok(done)
    }

    fn describe(&self) -> String {
        let equal = words(self.compared());
        let backup = match &self.from {
            None => format!("the backup of `{}`", self.database),
            Some(from) => format!("the copy in {from} of the backup of `{}`", self.database),
        };
        match self.level {
            Level::Digest => format!("holds {backup} against its digest"),
            Level::Listed => format!("reads what {backup} contains"),
            Level::Read => format!("reads all of {backup}"),
            _ => format!("restores {backup} into a scratch database{equal}"),
        }
    }
}

/// Proves the rollout's newest backup as far as the step says. A restored database is worked on by
/// `then` before it is dropped.
pub(crate) async fn prove<T>(
    cx: &Context,
    act: &VerifyBackup,
    then: impl AsyncFnOnce(&str) -> Result<T, Failure>,
) -> Result<(Done, Option<T>), Failure> {
    let began = Instant::now();
    let database = Database::find(cx, &act.database)?;
    let session = database.connect(cx).await?;
    session.end_left_over(cx).await?;
    drop_left_over(&session, cx).await?;
    let store = Store::of(cx, &database);
    let (made, digest, directory) = if let Some(from) = &act.from {
        let (made, digest, directory) = elsewhere::find(cx, &database, Path::new(from))?;
        elsewhere::check_version(act, &session, &made)?;
        (made, digest, directory)
    } else {
        let (made, digest) = newest(cx, &store, &act.database)?;
        let directory = store.path(&made.id);
        (made, digest, directory)
    };
    if made.size < act.min_size.0 {
        return Err(hinted(
            Cause::CheckUnmet,
            format!(
                "the backup {} has {}, and must have at least {}",
                made.id,
                human(made.size),
                human(act.min_size.0)
            ),
            "see whether the database lost rows, or lower `min_size`",
        ));
    }
    check_measured(act, &made)?;
    let ladder = Ladder {
        cx,
        database: &database,
        session: &session,
        directory: &directory,
        made: &made,
        digest,
    };
    let found = Box::pin(ladder.climb(act, then)).await?;
    let reached = act.reaches();
    // A copy is another host's to mark.
    let before = store.verified(&made).filter(|_| act.from.is_none());
    let (level, compared) = match before {
        // The same bytes were proven further before, and still are.
        Some(before) if before.level > reached => (before.level, before.compared),
        _ => (reached, act.compared().to_vec()),
    };
    let verified = Verified {
        key: cx.key.clone(),
        digest: made.digest,
        level,
        taken_at: Some(made.taken_at),
        compared,
    };
    let place = if let Some(from) = &act.from {
        format!(" by its copy in {from}")
    } else {
        store.mark_verified(&made.id, &verified)?;
        String::new()
    };
    let summary = format!(
        "{} is proven to {} in {:.1} s{place}{}: {}",
        made.id,
        reached,
        began.elapsed().as_secs_f64(),
        words(act.compared()),
        made.summary(),
    );
    let fact = Fact::BackupVerified {
        database: act.database.clone(),
        id: made.id,
        digest: made.digest,
        fence: made.fence,
        level: verified.level,
        taken_at: verified.taken_at,
    };
    let done = Done {
        changed: true,
        summary,
        facts: vec![fact],
    };
    Ok((done, found))
}

/// Refuses to compare what nobody has measured.
fn check_measured(act: &VerifyBackup, made: &Manifest) -> Result<(), Failure> {
    if act.level >= Level::Restored && !made.is_counted() {
        return Err(hinted(
            Cause::Refused,
            format!(
                "the backup {} was made without counting its rows, so a restore proves nothing",
                made.id
            ),
            "let `measure` of `postgres.backup` have row_counts, or ask for level 2",
        ));
    }
    let mut compared = act.compared().iter();
    let Some(missing) = compared.find(|aspect| !made.measured.contains(aspect)) else {
        return Ok(());
    };
    Err(hinted(
        Cause::Refused,
        format!(
            "the backup {} was made without measuring its {}",
            made.id,
            word(*missing)
        ),
        "leave `measure` of `postgres.backup` out, or ask for level 3",
    ))
}

fn word(aspect: Aspect) -> &'static str {
    match aspect {
        Aspect::RowCounts => "row counts",
        Aspect::Schema => "schema",
        Aspect::Checksums => "checksums",
    }
}

fn words(compared: &[Aspect]) -> String {
    if compared.is_empty() {
        return String::new();
    }
    let words = compared.iter().map(|aspect| word(*aspect));
    format!(" (compared: {})", words.collect::<Vec<_>>().join(", "))
}

/// The rollout's newest backup of a database, and the digest that it must have. The fact names it;
/// after a crash of the step that made it only its manifest may.
fn newest(cx: &Context, store: &Store, database: &str) -> Result<(Manifest, Digest), Failure> {
    let named = bound(&cx.bindings, |fact| match fact {
        Fact::Backup {
            database: of,
            id,
            digest,
            ..
        } if of == database => Some((id, *digest)),
        _ => None,
    });
    let all = store.all().into_iter();
    // A controller's word alone makes no other backup the one of this rollout.
    let mut of_this_rollout = all.filter(|made| made.key.rollout == cx.key.rollout);
    let directory = store.directory.display();
    match named {
        Some((id, digest)) => match of_this_rollout.find(|made| made.id == *id) {
            Some(made) => Ok((made, digest)),
            None => Err(hinted(
                Cause::Host,
                format!("the backup {id} of this rollout is not in {directory} on this host"),
                "run this step on the host that made the backup, or say where it has a copy: `from`",
            )),
        },
        None => of_this_rollout
            .next()
            .map(|made| {
                let digest = made.digest;
                (made, digest)
            })
            .ok_or_else(|| {
                hinted(
                    Cause::Refused,
                    format!("this rollout has made no backup of `{database}` in {directory}"),
                    "put `postgres.backup` before this step, on the same host",
                )
            }),
    }
}

/// What the names of this step's scratch databases begin with.
fn scratch_prefix(cx: &Context) -> String {
    let at = cx.key.at;
    format!(
        "lockstep_verify_{}_{}_{}_",
        cx.key.rollout, at.phase, at.step
    )
}

fn scratch_name(cx: &Context) -> String {
    format!("{}{}", scratch_prefix(cx), cx.key.attempt)
}

/// Drops the scratch databases that earlier attempts have left.
async fn drop_left_over(session: &Session, cx: &Context) -> Result<(), Failure> {
    let sql = "SELECT datname::text FROM pg_database WHERE left(datname, length($1)) = $1";
    let left = session
        .query("looking for scratch databases", sql, &[&scratch_prefix(cx)])
        .await?;
    for row in left {
        cx.log.line(&format!(
            "dropping {}, which an earlier attempt had left",
            row.get::<_, &str>(0)
        ));
        scratch::drop(session, row.get(0)).await?;
    }
    Ok(())
}

mod elsewhere;
mod ladder;
#[cfg(test)]
mod tests;
