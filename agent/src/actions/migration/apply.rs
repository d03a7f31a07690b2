//! `migration.apply` and `migration.downgrade`.

use lockstep_proto::action::migration::{Apply, Downgrade, ProvenBackup, Tool, UndoBy};
use lockstep_proto::ids::{Digest, Direction};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::{Value, json};

use super::guard::{self, shown};
use super::source::Source;
use super::tools::{Limits, Migrator, Way, revision};
use super::{kept, returns, run, undo};
use crate::actions::postgres::written::Which;
use crate::actions::postgres::{guarded, recover, restore};
use crate::actions::{Act, Done, Probe, bound};
use crate::sql::{Database, Session};
use crate::step::{Context, changed, hinted};

/// Where the database is, once the old attempt's sessions are gone; and where it is to be.
async fn where_it_is(
    cx: &Context,
    source: Source<'_>,
    to: &str,
    what: String,
) -> Result<Probe, Failure> {
    let session = Database::migrating(cx, source.database)?
        .connect(cx)
        .await?;
    if !cx.dry_run {
        session.end_left_over(cx).await?;
        if let Some(others) = session.strangers(cx).await? {
            return Ok(Probe::NoProof(format!(
                "sessions of other roles carry this step's name and may be its own, still at work: \
                 processes {others}; wait until they are gone, or end them"
            )));
        }
    } else if !source.is_there(cx)? {
        return Ok(Probe::Unmet(source.missing()));
    }
    let now = revision(&session, source.tool).await?;
    let name = source.database;
    if let Some(goal) = run::went_in_parts(cx)?
        && goal != now
    {
        // The revision is written at the end: what is there of the rest, only people can see.
        return Ok(Probe::NoProof(format!(
            "`{name}` is at {}, on its way to {} by a migration that may work outside of a \
             transaction: look whether a part of it is there; {}",
            shown(&now),
            shown(&goal),
            run::what_is_there(cx, &session).await?
        )));
    }
    let to = Migrator::of(cx, source).await?.resolve(to).await?;
    Ok(if now == to {
        Probe::Present(format!("`{name}` is at {to}"))
    } else {
        Probe::Absent(format!("`{name}` is at {}; {what}", shown(&now)))
    })
}

async fn before(cx: &Context, source: Source<'_>) -> Result<Value, Failure> {
    let session = Database::migrating(cx, source.database)?
        .connect(cx)
        .await?;
    Ok(json!({"revision": revision(&session, source.tool).await?}))
}

fn moved(database: &str, before: &str, after: &str) -> Fact {
    Fact::Revision {
        database: database.to_owned(),
        before: before.to_owned(),
        after: after.to_owned(),
    }
}

pub(super) fn done(database: &str, from: &str, to: &str, changed: bool) -> Done {
    let summary = if changed {
        format!("`{database}` went from {} to {}", shown(from), shown(to))
    } else {
        format!("`{database}` is at {} already", shown(to))
    };
    Done {
        changed,
        summary,
        facts: vec![moved(database, from, to)],
    }
}

impl Act for Apply {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        if cx.key.direction == Direction::Undo && self.undo_by == UndoBy::Recover {
            // The server may be down.
            return recover::probe(cx, &self.database).await;
        }
        where_it_is(cx, self.into(), &self.to, self.describe()).await
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        before(cx, self.into()).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let tool = Migrator::of(cx, self.into()).await?;
        let session = guard::lock(cx, tool.database()).await?;
        tool.check(&session).await?;
        let from = tool.revision(&session).await?;
        let to = tool.resolve(&self.to).await?;
        if from == to {
            return Ok(done(&self.database, &from, &to, false));
        }
        guarded::can_watch(&session, &self.guards).await?;
        guarded::may_start(cx, &session, self.max_tx_age, self.on_long_tx).await?;
        // Only now: while others were waited for, a backup has aged and a fence may have fallen.
        if let Some(asked) = self.backup.asks() {
            let otherwise = ", or say `backup: none` if its data can be lost";
            guard::require_backup(cx, &session, &self.database, asked, otherwise).await?;
        }
        as_approved(cx, &tool, (self.tool, &self.database), &from, &to).await?;
        let limits = Limits {
            lock: self.lock_timeout,
            statement: self.statement_timeout,
        };
        match self.undo_by {
            UndoBy::Restore => restore::is_at_hand(cx, &self.database)?,
            UndoBy::Recover => {
                let begun = kept::Kept::of(cx)?.began.is_some();
                recover::is_at_hand(cx, &self.database, begun).await?;
            }
            UndoBy::Downgrade | UndoBy::Keep => {}
        }
        let keeps = self.undo_by == UndoBy::Keep;
        kept::begin(cx, &session, keeps).await?;
        let beyond = {
            let going = run::go(cx, &tool, &session, Way::Up, (&from, &to), limits);
            tokio::select! {
                gone = going => gone.map(|()| None)?,
                beyond = guarded::watch(cx, &session, &self.guards) => Some(beyond),
            }
        };
        if let Some(beyond) = beyond {
            return Err(ended(cx, &session, (self.tool, &from), beyond).await);
        }
        keep_end(self, cx, &session).await.map_err(changed)?;
        Ok(done(&self.database, &from, &to, true))
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        undo::apply(self, cx, before).await
    }

    fn describe(&self) -> String {
        format!(
            "migrates `{}` to {} of {}",
            self.database, self.to, self.release
        )
    }
}

/// Keeps what an undo has to know of a migration that is through.
async fn keep_end(act: &Apply, cx: &Context, session: &Session) -> Result<(), Failure> {
    let name = &act.database;
    match act.undo_by {
        UndoBy::Downgrade => kept::end(cx, session, None).await,
        UndoBy::Keep => kept::end(cx, session, Some(Which::All)).await,
        UndoBy::Restore => {
            let open = returns::open_since_backup(cx, session, name).await?;
            kept::end(cx, session, open.is_none().then_some(Which::All)).await
        }
        UndoBy::Recover => {
            // A role of migrations may not read the whole catalogue.
            let session = Database::find(cx, name)?.connect(cx).await?;
            let open = recover::open_since_point(cx, &session, name).await?;
            kept::end(cx, &session, open.is_none().then_some(Which::Files)).await
        }
    }
}

/// The failure of a migration whose tool was ended: says where the database is, once the tool's
/// sessions are gone.
async fn ended(
    cx: &Context,
    session: &Session,
    (tool, from): (Tool, &str),
    beyond: Failure,
) -> Failure {
    let now = match session.end_left_over(cx).await {
        Ok(_) => revision(session, tool).await,
        Err(failure) => Err(failure),
    };
    let whole = matches!(run::went_in_parts(cx), Ok(None));
    let name = &session.place().database;
    match now {
        Ok(now) => Failure {
            message: format!("{}; `{name}` is at {}", beyond.message, shown(&now)),
            changed: !(whole && now == from),
            ..beyond
        },
        Err(failure) => Failure {
            message: format!(
                "{}; where `{name}` is cannot be seen: {}",
                beyond.message, failure.message
            ),
            ..changed(beyond)
        },
    }
}

/// Refuses unless what people saw is what would run (INV-12).
async fn as_approved(
    cx: &Context,
    tool: &Migrator<'_>,
    (kind, database): (Tool, &str),
    from: &str,
    to: &str,
) -> Result<(), Failure> {
    let seen = bound(&cx.bindings, |fact| match fact {
        Fact::SqlPlan {
            database: of,
            from,
            to,
            digest,
            tool,
            ..
        } if of == database => Some((from, to, digest, tool)),
        _ => None,
    });
    let Some((seen_from, seen_to, seen_digest, seen_tool)) = seen else {
        return Ok(());
    };
    let refused = |why: String| {
        Err(hinted(
            Cause::Refused,
            format!("the SQL for `{database}` is not what was shown: {why}"),
            "start the rollout again, so that people see what would run now",
        ))
    };
    // An attempt that was cut off between two files has brought a part of what was shown.
    let again = cx.key.attempt > 1 && tool.is_between(seen_from, from, to);
    if seen_to != to || (seen_from != from && !again) {
        return refused(format!(
            "it went from {} to {seen_to}, and would go from {} to {to}",
            shown(seen_from),
            shown(from)
        ));
    }
    let rendered = tool.render(Way::Up, seen_from, to).await?;
    let digest = rendered.digest(kind, (seen_from, to));
    // As an agent of an earlier release has shown it. A controller of one forgets the tool's name.
    let is_of_sql_alone =
        seen_tool.is_none() && Digest::of(rendered.shown().as_bytes()) == *seen_digest;
    if digest != *seen_digest && !is_of_sql_alone {
        return refused(format!(
            "its digest is {}, and was {}",
            digest.short(),
            seen_digest.short()
        ));
    }
    Ok(())
}

impl Act for Downgrade {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        where_it_is(cx, self.into(), &self.to, self.describe()).await
    }

    async fn before(&self, cx: &Context) -> Result<Value, Failure> {
        before(cx, self.into()).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let tool = Migrator::of(cx, self.into()).await?;
        let session = guard::lock(cx, tool.database()).await?;
        guard::require_backup(cx, &session, &self.database, ProvenBackup::RESTORED, "").await?;
        tool.check(&session).await?;
        let from = tool.revision(&session).await?;
        if self.to == "head" {
            return Err(hinted(
                Cause::Refused,
                "`head` is no revision to go down to",
                "name the revision by its id",
            ));
        }
        let to = tool.resolve(&self.to).await?;
        if from == to {
            return Ok(done(&self.database, &from, &to, false));
        }
        let limits = Limits {
            lock: self.lock_timeout,
            statement: self.statement_timeout,
        };
        run::go(cx, &tool, &session, Way::Down, (&from, &to), limits).await?;
        Ok(done(&self.database, &from, &to, true))
    }

    async fn undo(&self, cx: &Context, before: &Value) -> Result<Done, Failure> {
        undo::downgrade(self, cx, before).await
    }

    fn describe(&self) -> String {
        format!(
            "takes `{}` back to {} with {}",
            self.database, self.to, self.release
        )
    }
}

#[cfg(test)]
mod cut_off;
#[cfg(test)]
mod recoveries;
#[cfg(test)]
mod rehearsals;
#[cfg(test)]
mod required;
#[cfg(test)]
mod roles;
#[cfg(test)]
mod rollbacks;
#[cfg(test)]
mod sabotages;
#[cfg(test)]
mod shown;
#[cfg(test)]
pub(super) mod stage;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod ways_back;
