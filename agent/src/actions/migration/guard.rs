//! What must be proven before a schema moves.

use lockstep_proto::action::migration::ProvenBackup;
use lockstep_proto::action::postgres::Level;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::{Period, Timestamp};

use crate::actions::bound;
use crate::actions::postgres::fence;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

/// A revision for people.
pub(super) fn shown(revision: &str) -> &str {
    if revision.is_empty() {
        "no revision"
    } else {
        revision
    }
}

/// What the facts say of a proven backup.
#[derive(Debug, Clone, Copy)]
struct Proof<'a> {
    id: &'a str,
    fence: Option<&'a str>,
    level: Level,
    taken_at: Option<Timestamp>,
}

/// The newest proof, unless it is of another backup than the one that the rollout has made of this
/// database.
fn proof<'a>(cx: &'a Context, database: &str) -> Option<Proof<'a>> {
    let made = bound(&cx.bindings, |fact| match fact {
        Fact::Backup {
            database: of,
            id,
            digest,
            ..
        } if of == database => Some((id, digest)),
        _ => None,
    });
    let is_of_made = |proven| made.is_none_or(|made| made == proven);
    bound(&cx.bindings, |fact| match fact {
        Fact::BackupVerified {
            database: of,
            id,
            digest,
            fence,
            level,
            taken_at,
        } if of == database && is_of_made((id, digest)) => Some(Proof {
            id,
            fence: fence.as_deref(),
            level: *level,
            taken_at: *taken_at,
        }),
        _ => None,
    })
}

/// The backup among the facts that was restored, and its fence.
pub(super) fn verified<'a>(cx: &'a Context, database: &str) -> Option<(&'a str, Option<&'a str>)> {
    let proof = proof(cx, database).filter(|proof| proof.level >= Level::Restored);
    proof.map(|proof| (proof.id, proof.fence))
}

/// Refuses unless a backup of this rollout is proven as far as asked, is not too old and, if it was
/// taken behind a fence, that fence has held since (INV-7).
pub(super) async fn require_backup(
    cx: &Context,
    session: &Session,
    database: &str,
    asked: ProvenBackup,
    otherwise: &str,
) -> Result<(), Failure> {
    let Some(proof) = proof(cx, database) else {
        return Err(hinted(
            Cause::Refused,
            format!("no backup of `{database}` was verified in this rollout"),
            format!(
                "put `postgres.backup` and `postgres.verify_backup` before this step; where several \
                 hosts back up a database of this name, this step runs on each of them{otherwise}"
            ),
        ));
    };
    let id = proof.id;
    if proof.level < asked.level {
        return Err(hinted(
            Cause::Refused,
            format!(
                "the backup {id} of `{database}` is proven to {}, and this needs {}",
                proof.level, asked.level
            ),
            "raise the `level` of `postgres.verify_backup`, and let it compare all",
        ));
    }
    if let Some(longest) = asked.age {
        check_age(session, proof, longest, database).await?;
    }
    let Some(token) = proof.fence else {
        return Ok(());
    };
    let Some(why) = fence::broken(session, token).await? else {
        return Ok(());
    };
    Err(hinted(
        Cause::Refused,
        format!("the backup {id} of `{database}` is older than what may have been written: {why}"),
        "raise the fence, take a new backup and verify it",
    ))
}

/// Refuses a backup that is too old by the clock that has dated it: the server's.
async fn check_age(
    session: &Session,
    proof: Proof<'_>,
    longest: Period,
    database: &str,
) -> Result<(), Failure> {
    let id = proof.id;
    let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
    let now: i64 = session.one("asking for the time", sql, &[]).await?.get(0);
    // One that is dated ahead is of another clock, and its age is not known.
    let age = proof
        .taken_at
        .and_then(|taken| now.unsigned_abs().checked_sub(taken.0));
    let why = match age {
        Some(age) if age <= longest.0 => return Ok(()),
        Some(age) => format!("is {} s old", age / 1000),
        None => "is of an unknown age".to_owned(),
    };
    Err(hinted(
        Cause::Refused,
        format!(
            "the backup {id} of `{database}` {why}, and at most {} s are allowed",
            longest.0 / 1000
        ),
        "take a new backup and verify it shortly before this step",
    ))
}

/// A session that holds the right to migrate its database, for as long as it lives. It stays
/// outside of transactions: building an index concurrently would wait for them.
pub(super) async fn lock(cx: &Context, database: &Database) -> Result<Session, Failure> {
    let session = database.connect(cx).await?;
    session.end_left_over(cx).await?;
    take(&session, &database.name).await.map(|()| session)
}

/// Gives a session the right to migrate its database, or fails with the name of who has it.
pub(super) async fn take(session: &Session, name: &str) -> Result<(), Failure> {
    let what = "reaching for the right to migrate";
    let sql = "SELECT pg_try_advisory_lock(hashtext('lockstep.migrate'), \
               hashtext(current_database()))";
    if session.one(what, sql, &[]).await?.get(0) {
        return Ok(());
    }
    let holder = "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                  WHERE l.locktype = 'advisory' AND l.granted AND l.database = \
                  (SELECT oid FROM pg_database WHERE datname = current_database()) \
                  AND l.classid::int8 = hashtext('lockstep.migrate')::int8 & 4294967295";
    let holder = session.query(what, holder, &[]).await?;
    let holder = holder.first().map_or("another session", |row| row.get(0));
    Err(hinted(
        Cause::Step,
        format!("`{name}` is being migrated by {holder}"),
        "wait until it has ended; nothing was changed",
    ))
}
