//! Whether a migration's undo may take the schema back, or leave it, without losing a row silently
//! (INV-6).
//!
//! ```text
//! keep        nothing was taken away, and nothing new must be given: the release of before goes on
//! downgrade   the fence has held since the backup; or a fence is up again, and nothing of what
//!             goes was written since the migration was through
//! restore     the fence has held since the backup (`postgres::restore`)
//! ```

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::dropped::{dropped, in_the_way};
use super::guard;
use super::kept::Kept;
use crate::actions::postgres::{fence, look, written};
use crate::sql::Session;
use crate::step::{Context, hinted};

/// Why data may have been written since the rollout's backup of a database; `None` if a fence has
/// held all the time.
pub(super) async fn open_since_backup(
    cx: &Context,
    session: &Session,
    database: &str,
) -> Result<Option<String>, Failure> {
    match guard::verified(cx, database) {
        None => Ok(Some("no backup of it was verified in this rollout".into())),
        Some((_, None)) => Ok(Some("no fence was up when its backup was taken".into())),
        Some((_, Some(token))) => fence::broken(session, token).await,
    }
}

/// Refuses to take a schema down if that may lose what was written; names the rows.
pub(super) async fn may_go_down(
    cx: &Context,
    session: &Session,
    database: &str,
    sql: Option<&str>,
) -> Result<(), Failure> {
    let Some(why) = open_since_backup(cx, session, database).await? else {
        return Ok(());
    };
    let lost = lost(cx, session, database, sql).await?;
    let shut = fence::holds(cx, session).await?;
    if lost.is_empty() && shut {
        cx.log.line(&format!(
            "{why}; but nothing was written since to what the way down drops"
        ));
        return Ok(());
    }
    for line in &lost {
        cx.log.line(line);
    }
    if lost.is_empty() {
        return Err(hinted(
            Cause::Refused,
            format!(
                "taking the schema of `{database}` back may lose data: {why}. Nothing that it \
                 drops was written until now, but no fence keeps it so"
            ),
            "put the migration behind a `fence` whose end the plan names: a rollback raises it \
             again; or go on with the new schema",
        ));
    }
    Err(hinted(
        Cause::Refused,
        format!(
            "taking the schema of `{database}` back would lose data: {why}. {}",
            written::few(&lost)
        ),
        "look at these rows; then either go on with the new schema, or downgrade by hand",
    ))
}

/// The rows that a way down would lose, in words.
async fn lost(
    cx: &Context,
    session: &Session,
    database: &str,
    sql: Option<&str>,
) -> Result<Vec<String>, Failure> {
    let kept = Kept::of(cx);
    if let Some(began) = &kept.began {
        let now = written::columns(session).await?;
        let which = dropped(&began.columns, &now, sql);
        let found = written::since(session, kept.moment(), &which).await?;
        return Ok(found.lines());
    }
    // An older release kept nothing: what is left is to compare with the backup.
    let mut lines = match look::of_backup(cx, database) {
        None => vec![],
        Some(was) => look::changes(&was, &look::count(session, &[]).await?),
    };
    lines.push("what else was written cannot be counted: the moment was not recorded".into());
    Ok(lines)
}

/// Refuses to leave a schema that the release of before cannot live with. Returns what a report
/// says about it.
pub(super) async fn may_stay(
    cx: &Context,
    session: &Session,
    database: &str,
) -> Result<Fact, Failure> {
    let value = match Kept::of(cx).began {
        None => "stays; whether the release of before can live with it was not recorded".into(),
        Some(began) => {
            let now = written::columns(session).await?;
            let found = in_the_way(&began.columns, &now);
            if !found.is_empty() {
                return Err(hinted(
                    Cause::Refused,
                    format!(
                        "the schema of `{database}` cannot stay for the release of before: {}",
                        written::few(&found)
                    ),
                    "go on with the new release, or downgrade by hand; `undo_by: keep` is for \
                     migrations that only add",
                ));
            }
            "stays, as the plan says: it has all that was there before".to_owned()
        }
    };
    Ok(Fact::Note {
        name: format!("schema of {database}"),
        value,
    })
}
