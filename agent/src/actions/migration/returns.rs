//! Whether a migration's undo may take the schema back, or leave it, without losing a row silently
//! (INV-6).
//!
//! ```text
//! keep        no column was taken away, no table has fewer rows, and nothing new must be given: the
//!             release of before goes on
//! downgrade   the fence has held since the backup; or a fence is up again, and nothing of what
//!             goes was written since the migration was through; and it holds until all is down
//! restore     the fence has held since the backup (`postgres::restore`)
//! recover     the same since the restore point, and nothing was written elsewhere on the server
//!             (`postgres::recover`)
//! otherwise   a person has accepted what is lost, as it was shown (`actions::loss`)
//! ```

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::dropped::{differs, dropped, fewer, in_the_way};
use super::kept::Kept;
use super::{guard, run};
use crate::actions::loss;
use crate::actions::postgres::written::Which;
use crate::actions::postgres::{fence, look, written};
use crate::sql::Session;
use crate::step::{Context, changed, hinted};

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

/// Behind what a schema goes down.
#[derive(Debug, Default)]
pub(super) struct Behind {
    /// The fence that is up. Without one a person has accepted that.
    fence: Option<String>,
    /// What a person has accepted to lose.
    pub(super) accepted: Option<Fact>,
}

/// Refuses to take a schema down if that may lose what was written, and nobody has accepted that;
/// names the rows.
pub(super) async fn may_go_down(
    cx: &Context,
    session: &Session,
    database: &str,
    sql: Option<&str>,
) -> Result<Behind, Failure> {
    let behind = fence::holding(cx, session).await?;
    let Some(why) = open_since_backup(cx, session, database).await? else {
        let fence = guard::verified(cx, database).and_then(|(_, fence)| fence);
        return Ok(Behind {
            fence: Some(fence.expect("it has held").to_owned()),
            accepted: None,
        });
    };
    let mut lost = lost(cx, session, database, sql).await?;
    // One that fell while the rows were counted has let more in.
    let still = fence::holding(cx, session).await?;
    let fence = still.filter(|still| behind.as_ref() == Some(still));
    if lost.is_empty() && fence.is_some() {
        cx.log.line(&format!(
            "{why}; but nothing was written since to what the way down drops"
        ));
        return Ok(Behind {
            fence,
            accepted: None,
        });
    }
    if fence.is_none() {
        lost.push("what is still written until it is back: no fence is up".to_owned());
    }
    let accepted = loss::accepted(
        cx,
        &format!("taking the schema of `{database}` back would lose data: {why}"),
        &lost,
        "then go on with the new schema, or put the migration behind a `fence` whose end the plan \
         names: a rollback raises it again",
    )?;
    Ok(Behind {
        fence,
        accepted: Some(accepted),
    })
}

/// Fails if the fence behind which a schema went down has fallen meanwhile.
pub(super) async fn was_shut(
    session: &Session,
    database: &str,
    behind: &Behind,
) -> Result<(), Failure> {
    let Some(token) = &behind.fence else {
        return Ok(());
    };
    let Some(why) = fence::broken(session, token).await.map_err(changed)? else {
        return Ok(());
    };
    Err(changed(hinted(
        Cause::Step,
        format!(
            "the schema of `{database}` is back, but its fence did not hold until then: {why}. What \
             was written meanwhile to what it dropped is lost"
        ),
        "see in the server's log who wrote in these moments; what the backup holds is not lost",
    )))
}

/// The rows that a way down would lose, in words.
async fn lost(
    cx: &Context,
    session: &Session,
    database: &str,
    sql: Option<&str>,
) -> Result<Vec<String>, Failure> {
    let kept = Kept::of(cx)?;
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
    let kept = Kept::of(cx)?;
    let Some(began) = &kept.began else {
        return Err(hinted(
            Cause::Refused,
            format!(
                "the schema of `{database}` cannot stay for the release of before: what there was \
                 before the migration was not recorded"
            ),
            "look whether that release can live with it; then go on with the new one, or downgrade \
             by hand",
        ));
    };
    let mut found = in_the_way(&began.columns, &written::columns(session).await?);
    let mut rows = "its rows were not counted";
    if let Some(was) = &began.rows {
        // What was deleted since is not the migration's doing.
        let is = match kept
            .through
            .as_ref()
            .and_then(|through| through.rows.clone())
        {
            Some(is) => is,
            None => written::since(session, began.moment, &Which::All)
                .await?
                .tally(),
        };
        found.extend(fewer(was, &is));
        rows = "the migration left no table with fewer rows";
    }
    if !found.is_empty() {
        return Err(hinted(
            Cause::Refused,
            format!(
                "the schema of `{database}` cannot stay for the release of before: {}",
                written::few(&found)
            ),
            "go on with the new release, or downgrade by hand; `undo_by: keep` is for migrations \
             that only add",
        ));
    }
    let value = format!("stays, as the plan says: no column of before is gone, and {rows}");
    Ok(Fact::schema_stays(database, value))
}

/// Refuses to call a schema the old one, by its revision, that is not as it was: a migration that
/// works outside of a transaction writes the revision at the end.
pub(super) async fn is_as_before(
    cx: &Context,
    session: &Session,
    database: &str,
) -> Result<(), Failure> {
    let Some(began) = Kept::of(cx)?.began else {
        return Ok(());
    };
    let in_parts = run::some_went_in_parts(cx)?;
    let mut found = differs(&began.columns, &written::columns(session).await?);
    if let Some(was) = began.rows.filter(|_| in_parts) {
        let is = written::since(session, began.moment, &Which::All).await?;
        found.extend(fewer(&was, &is.tally()));
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(hinted(
        Cause::Refused,
        format!(
            "`{database}` is at the revision of before, but a part of the migration is there: {}",
            written::few(&found)
        ),
        "it works outside of a transaction: take this part away by hand, or bring the rest",
    ))
}
