//! What must be proven before a schema moves.

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use crate::actions::bound;
use crate::actions::postgres::{fence, measure};
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

/// The revision of a database; empty if it has none.
pub(super) async fn revision(session: &Session) -> Result<String, Failure> {
    let mut revisions = measure::revisions(session).await?;
    match revisions.len() {
        0 | 1 => Ok(revisions.pop().unwrap_or_default()),
        _ => Err(hinted(
            Cause::Step,
            format!(
                "`{}` is at several revisions: {}",
                session.place().database,
                revisions.join(", ")
            ),
            "join them with `alembic merge` in the application first",
        )),
    }
}

/// A revision for people.
pub(super) fn shown(revision: &str) -> &str {
    if revision.is_empty() {
        "no revision"
    } else {
        revision
    }
}

/// The proof of a backup among the facts, and its fence.
pub(super) fn verified<'a>(cx: &'a Context, database: &str) -> Option<(&'a str, Option<&'a str>)> {
    bound(&cx.bindings, |fact| match fact {
        Fact::BackupVerified {
            database: of,
            id,
            fence,
            ..
        } if of == database => Some((id.as_str(), fence.as_deref())),
        _ => None,
    })
}

/// Refuses unless a backup of this rollout was verified and, if it was taken behind a fence, that
/// fence has held since (INV-7).
pub(super) async fn require_backup(
    cx: &Context,
    session: &Session,
    database: &str,
    otherwise: &str,
) -> Result<(), Failure> {
    let Some((id, fence)) = verified(cx, database) else {
        return Err(hinted(
            Cause::Refused,
            format!("no backup of `{database}` was verified in this rollout"),
            format!(
                "put `postgres.backup` and `postgres.verify_backup` before this step{otherwise}"
            ),
        ));
    };
    let Some(token) = fence else { return Ok(()) };
    let Some(why) = fence::broken(session, token).await? else {
        return Ok(());
    };
    Err(hinted(
        Cause::Refused,
        format!("the backup {id} of `{database}` is older than what may have been written: {why}"),
        "raise the fence, take a new backup and verify it",
    ))
}

/// A session that holds the right to migrate its database, for as long as it lives. It stays
/// outside of transactions: building an index concurrently would wait for them.
pub(super) async fn lock(cx: &Context, database: &Database) -> Result<Session, Failure> {
    let what = "reaching for the right to migrate";
    let session = database.connect(cx).await?;
    session.end_left_over(cx).await?;
    let sql = "SELECT pg_try_advisory_lock(hashtext('lockstep.migrate'), \
               hashtext(current_database()))";
    if session.one(what, sql, &[]).await?.get(0) {
        return Ok(session);
    }
    let holder = "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                  WHERE l.locktype = 'advisory' AND l.granted AND l.database = \
                  (SELECT oid FROM pg_database WHERE datname = current_database()) \
                  AND l.classid::int8 = hashtext('lockstep.migrate')::int8 & 4294967295";
    let holder = session.query(what, holder, &[]).await?;
    let holder = holder.first().map_or("another session", |row| row.get(0));
    Err(hinted(
        Cause::Step,
        format!("`{}` is being migrated by {holder}", database.name),
        "wait until it has ended; nothing was changed",
    ))
}
