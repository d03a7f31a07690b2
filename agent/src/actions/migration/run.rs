//! How a schema moves, and what an attempt leaves that was cut off on its way.

use std::io::ErrorKind;
use std::time::Duration;

use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};

use super::blocked::watch;
use super::guard::shown;
use super::schema;
use super::tools::{Limits, Migrator, Way, Went};
use crate::actions::files::{self, OrFailed as _};
use crate::sql::Session;
use crate::step::{Context, changed, failure};

/// What people do after a migration that is no single transaction.
const IN_PART_THERE: &str =
    "it may work outside of a transaction: look whether a part of it is there";

/// How often a migration is tried that waited too long for a lock. Only one whose revision says how
/// far it came is tried again: of any other, what came before the wait may be there already.
const TRIES: u32 = 5;

/// Where an attempt keeps the revision that it goes to by more than one transaction. It is written
/// before the tool starts: from then on the revision alone does not say how far it came.
const IN_PARTS: &str = "goes-in-parts-to";

/// Where it keeps what the schema was before that.
const SCHEMA: &str = "schema-before.json";

/// Where this attempt was going by more than one transaction, if it came as far as to begin.
pub(super) fn went_in_parts(cx: &Context) -> Result<Option<String>, Failure> {
    match std::fs::read_to_string(cx.dir.join(IN_PARTS)) {
        Ok(to) => Ok(Some(to)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).or_failed(|| "read what the attempt has kept"),
    }
}

/// What the schema has now that it had not before this attempt began, and the other way round.
pub(super) async fn what_is_there(cx: &Context, session: &Session) -> Result<String, Failure> {
    let was = std::fs::read(cx.dir.join(SCHEMA)).ok();
    let was: Option<Vec<String>> = was.and_then(|was| json::read(&was).ok());
    let Some(was) = was else {
        return Ok("what the schema was before was not kept".to_owned());
    };
    let difference = schema::difference(&was, &schema::lines(session).await?);
    for line in &difference {
        cx.log.line(line);
    }
    Ok(schema::told(&difference))
}

/// Whether any attempt at this step began to go by more than one transaction.
pub(super) fn some_went_in_parts(cx: &Context) -> Result<bool, Failure> {
    for dir in files::attempts(cx) {
        let there = dir.join(IN_PARTS).try_exists();
        if there.or_failed(|| "read what the attempts have kept")? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Takes the database to a revision and sees that it is there. After a failure the message says
/// where the database is.
pub(super) async fn go(
    cx: &Context,
    tool: &Migrator<'_>,
    session: &Session,
    way: Way,
    (from, to): (&str, &str),
    limits: Limits,
) -> Result<(), Failure> {
    tool.may_record(session).await?;
    let whole = tool.render(way, from, to).await?.whole;
    if !whole {
        let schema = schema::lines(session).await?;
        let schema = serde_json::to_vec(&schema).expect("texts are JSON");
        for (name, text) in [(SCHEMA, schema.as_slice()), (IN_PARTS, to.as_bytes())] {
            files::write(&cx.dir.join(name), text, 0o600, None)
                .or_failed(|| "keep where the migration goes")?;
        }
    }
    let mut tries = 1;
    let mut at = from.to_owned();
    let failed = loop {
        let went = tokio::select! {
            went = Box::pin(tool.go(way, (&at, to), limits, session.major())) => went,
            never = watch(cx, session) => match never {},
        };
        let went = went.unwrap_or_else(Went::Badly);
        match went {
            Went::Well => break None,
            Went::Locked(_) if whole && tries < TRIES => {
                let pause = rand::random_range(200..1000) * u64::from(tries);
                cx.log.line(&format!(
                    "waited too long for a lock; try {tries} of {TRIES}"
                ));
                tokio::time::sleep(Duration::from_millis(pause)).await;
                at = tool.revision(session).await?;
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
    let now = tool.revision(session).await.map_err(changed)?;
    let name = &tool.database().name;
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
            let mut message = format!(
                "{}; `{name}` is {place} at {}",
                failure.message,
                shown(&now)
            );
            if !whole {
                message += "; ";
                message += &what_is_there(cx, session).await.map_err(changed)?;
            }
            Err(Failure {
                message,
                hint,
                changed: !unchanged,
                ..failure
            })
        }
    }
}
