//! `postgres.verify_backup`: a backup counts only once it has been restored.

use std::path::Path;

use lockstep_proto::action::postgres::{Aspect, VerifyBackup};
use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use tokio::time::Instant;

use super::archive::archive_in;
use super::look::no_backup;
use super::manifest::{Manifest, Store, Verified};
use super::measure::summary;
use super::scratch::Rights;
use super::tools::Tools;
use super::{human, scratch};
use crate::actions::{Act, Done, Probe, bound};
use crate::sql::{Database, Session};
use crate::step::{Context, changed, hinted};

impl Act for VerifyBackup {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let store = Store::of(cx, &database);
        if cx.dry_run {
            database.connect(cx).await?;
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
        let began = Instant::now();
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        drop_left_over(&session, cx).await?;
        let store = Store::of(cx, &database);
        let (made, digest) = newest(cx, &store, &self.database)?;
        if made.size < self.min_size.0 {
            return Err(hinted(
                Cause::CheckUnmet,
                format!(
                    "the backup {} has {}, and must have at least {}",
                    made.id,
                    human(made.size),
                    human(self.min_size.0)
                ),
                "see whether the database lost rows, or lower `min_size`",
            ));
        }
        scratch::check_digest(&store.path(&made.id), &made, digest).await?;
        scratch::check_room(&session, &database).await?;
        let tools = Tools::new(cx, &database, session.major()).await?;
        let archive = archive_in(&store.path(&made.id));
        // All of it is read before anything is made of it.
        let path = archive.display().to_string();
        tools
            .run("pg_restore", None, &["-f", "/dev/null", &path])
            .await?;
        let scratch = scratch_name(cx);
        scratch::create(&session, &scratch).await?;
        let compared = restore_and_compare(
            cx,
            &database,
            &tools,
            &archive,
            &made,
            &scratch,
            &self.compare,
        )
        .await;
        let dropped = scratch::drop(&session, &scratch).await;
        let differences = compared?;
        dropped.map_err(changed)?;
        if !differences.is_empty() {
            let what = format!(
                "the backup {} does not restore to what it was taken of",
                made.id
            );
            return Err(scratch::unequal(&what, &differences));
        }
        let verified = Verified {
            key: cx.key.clone(),
            digest: made.digest,
            compared: self.compare.clone(),
        };
        store.mark_verified(&made.id, &verified)?;
        let summary = format!(
            "{} was restored in {:.1} s and is equal: {} (compared: {})",
            made.id,
            began.elapsed().as_secs_f64(),
            summary(&made.contents),
            words(&self.compare)
        );
        let fact = Fact::BackupVerified {
            database: self.database.clone(),
            id: made.id,
            digest: made.digest,
            fence: made.fence,
        };
        Ok(Done {
            changed: true,
            summary,
            facts: vec![fact],
        })
    }

    fn describe(&self) -> String {
        let compared = words(&self.compare);
        format!(
            "restores the backup of `{}` into a scratch database and compares {compared}",
            self.database
        )
    }
}

/// Restores into the scratch database and says what differs.
async fn restore_and_compare(
    cx: &Context,
    database: &Database,
    tools: &Tools<'_>,
    archive: &Path,
    made: &Manifest,
    scratch: &str,
    aspects: &[Aspect],
) -> Result<Vec<String>, Failure> {
    scratch::restore(
        cx,
        database,
        tools,
        archive,
        made,
        scratch,
        Rights::IfPossible,
    )
    .await?;
    cx.log.progress(0.9, "comparing");
    scratch::differences(cx, database, tools, made, scratch, aspects).await
}

fn words(aspects: &[Aspect]) -> String {
    let words = aspects.iter().map(|aspect| match aspect {
        Aspect::RowCounts => "row counts",
        Aspect::Schema => "schema",
        Aspect::Checksums => "checksums",
    });
    words.collect::<Vec<_>>().join(", ")
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
    let all = store.all();
    let directory = store.directory.display();
    match named {
        Some((id, digest)) => match all.into_iter().find(|made| made.id == *id) {
            Some(made) => Ok((made, digest)),
            None => Err(hinted(
                Cause::Host,
                format!("the backup {id} is not in {directory} on this host"),
                "run this step on the host that made the backup",
            )),
        },
        None => all
            .into_iter()
            .find(|made| made.key.rollout == cx.key.rollout)
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

#[cfg(test)]
mod tests;
