//! What must be proven before a schema moves, and how it moves.

use std::io::ErrorKind;
use std::time::Duration;

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::alembic::{Alembic, Limits, Way, Went, is_transactional, named};
use crate::actions::bound;
use crate::actions::files::{self, OrFailed as _};
use crate::actions::postgres::{fence, look, measure};
use crate::sql::{Database, Session};
use crate::step::{Context, changed, failure, hinted};

/// What people do after a migration that is no single transaction.
const IN_PART_THERE: &str =
    "it may work outside of a transaction: look whether a part of it is there";

/// How often a migration is tried that waited too long for a lock. Only one that is a single
/// transaction is tried again: of any other, what came before the wait is there already.
const TRIES: u32 = 5;

/// Where an attempt keeps the revision that it goes to by more than one transaction. It is written
/// before the tool starts: from then on the revision alone does not say how far it came.
const IN_PARTS: &str = "goes-in-parts-to";

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

/// Refuses to take a schema back unless nobody could write since the backup; names the tables
/// whose rows have come or gone (INV-6).
pub(super) async fn require_fence(
    cx: &Context,
    session: &Session,
    database: &str,
) -> Result<(), Failure> {
    let why = match verified(cx, database) {
        None => Some("no backup of it was verified in this rollout".to_owned()),
        Some((_, None)) => Some("no fence was up when its backup was taken".to_owned()),
        Some((_, Some(token))) => fence::broken(session, token).await?,
    };
    let Some(why) = why else { return Ok(()) };
    let changes = match look::of_backup(cx, database) {
        None => vec!["its rows at the time of a backup are not known".to_owned()],
        Some(was) => look::changes(&was, &look::count(session, &[]).await?),
    };
    let changes = match changes.as_slice() {
        [] => "no table has another number of rows, but values may have changed".to_owned(),
        changes => changes.join("; "),
    };
    Err(hinted(
        Cause::Refused,
        format!("taking the schema of `{database}` back may lose data: {why}. {changes}"),
        "look at these tables; then either go on with the new schema, or downgrade by hand",
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

/// Where this attempt was going by more than one transaction, if it came as far as to begin.
pub(super) fn went_in_parts(cx: &Context) -> Result<Option<String>, Failure> {
    match std::fs::read_to_string(cx.dir.join(IN_PARTS)) {
        Ok(to) => Ok(Some(to)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).or_failed(|| "read what the attempt has kept"),
    }
}

/// Takes the database to a revision and sees that it is there. After a failure the message says
/// where the database is.
pub(super) async fn go(
    cx: &Context,
    tool: &Alembic<'_>,
    session: &Session,
    way: Way,
    (from, to): (&str, &str),
    limits: Limits,
) -> Result<(), Failure> {
    // What cannot be rendered may do anything.
    let whole = match tool.render(way, from, to).await {
        Ok(sql) => is_transactional(&sql),
        Err(_) => false,
    };
    if !whole {
        files::write(&cx.dir.join(IN_PARTS), to.as_bytes(), 0o600, None)
            .or_failed(|| "keep where the migration goes")?;
    }
    let target = named(to);
    let mut tries = 1;
    let failed = loop {
        let went = tool.go(way, target, limits, session.major()).await;
        let went = went.unwrap_or_else(Went::Badly);
        match went {
            Went::Well => break None,
            Went::Locked(_) if whole && tries < TRIES && revision(session).await? == from => {
                let pause = rand::random_range(200..1000) * u64::from(tries);
                cx.log.line(&format!(
                    "waited too long for a lock; try {tries} of {TRIES}"
                ));
                tokio::time::sleep(Duration::from_millis(pause)).await;
                tries += 1;
            }
            Went::Locked(failure) => {
                let hint = "see pg_blocking_pids(): end what holds the lock, or raise lock_timeout";
                break Some(Failure {
                    hint: Some(hint.into()),
                    ..failure
                });
            }
            Went::Badly(failure) => break Some(failure),
        }
    };
    // A tool that was killed leaves its backend at work for a moment.
    session.end_left_over(cx).await.map_err(changed)?;
    let now = revision(session).await.map_err(changed)?;
    let name = &tool.database.name;
    match failed {
        None if now == to => Ok(()),
        None => Err(changed(failure(
            Cause::Step,
            format!(
                "the tool ended well, but `{name}` is at {} and not at {}",
                shown(&now),
                shown(to)
            ),
        ))),
        Some(failure) => {
            let unchanged = now == from && whole;
            let hint = match (&failure.hint, whole) {
                (hint, true) => hint.clone(),
                (None, false) => Some(IN_PART_THERE.to_owned()),
                (Some(hint), false) => Some(format!("{IN_PART_THERE}; {hint}")),
            };
            let place = if now == from { "still" } else { "now" };
            let message = format!(
                "{}; `{name}` is {place} at {}",
                failure.message,
                shown(&now)
            );
            Err(Failure {
                message,
                hint,
                changed: !unchanged,
                ..failure
            })
        }
    }
}
