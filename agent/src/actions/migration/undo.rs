//! The ways back of `migration.apply` and `migration.downgrade`.

use lockstep_proto::action::migration::{Apply, Downgrade, RequiredBackup, Tool, UndoBy};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::apply::done;
use super::guard::{self, shown};
use super::kept::Kept;
use super::returns::Behind;
use super::tools::{self, Limits, Migrator, Way, revision};
use super::{returns, run};
use crate::actions::Done;
use crate::actions::postgres::{recover, restore};
use crate::sql::{Database, Session};
use crate::step::{Context, changed, failure, hinted};

/// Goes back to what was recorded, or stays, by the plan's rule.
pub(super) async fn apply(act: &Apply, cx: &Context, before: &Value) -> Result<Done, Failure> {
    let to = recorded(before)?;
    match act.undo_by {
        UndoBy::Restore => return Box::pin(bring_back(act, cx, to)).await,
        UndoBy::Recover => return Box::pin(recovered(act, cx, to)).await,
        UndoBy::Downgrade | UndoBy::Keep => {}
    }
    let database = Database::migrating(cx, &act.database)?;
    let session = guard::lock(cx, &database).await?;
    let from = revision(&session, act.tool).await?;
    tools::refuse_begun(&session, act.tool).await?;
    if from == to {
        if act.undo_by == UndoBy::Keep {
            returns::is_as_before(cx, &session, &act.database).await?;
        }
        return Ok(done(&act.database, &from, to, false));
    }
    if act.undo_by == UndoBy::Keep {
        return keep(act, cx, &session, &from).await;
    }
    // Only this release knows the revision that it brought.
    let tool = Migrator::of(cx, act.into()).await?;
    tool.check(&session).await?;
    let mut behind = Behind::default();
    if act.backup != RequiredBackup::None {
        // What cannot be rendered may drop anything.
        let rendered = tool.render(Way::Down, &from, to).await.ok();
        let all = rendered.as_ref().filter(|all| all.opaque.is_empty());
        let sql = all.map(|rendered| rendered.sql.as_str());
        behind = returns::may_go_down(cx, &session, &act.database, sql).await?;
    }
    let limits = Limits {
        lock: act.lock_timeout,
        statement: act.statement_timeout,
    };
    run::go(cx, &tool, &session, Way::Down, (&from, to), limits).await?;
    returns::was_shut(&session, &act.database, &behind).await?;
    let mut done = done(&act.database, &from, to, true);
    done.facts.extend(behind.accepted);
    Ok(done)
}

/// Leaves an additive schema to the release of before.
async fn keep(act: &Apply, cx: &Context, session: &Session, now: &str) -> Result<Done, Failure> {
    let stays = returns::may_stay(cx, session, &act.database).await?;
    let summary = format!(
        "`{}` stays at {}, as the plan says",
        act.database,
        shown(now)
    );
    Ok(Done {
        changed: false,
        summary,
        facts: vec![stays],
    })
}

/// Puts the backup in the database's place. The revision alone does not say that nothing is left of
/// a migration: one that works outside of a transaction writes it at the end. As the role that made
/// the backup, not as the one of migrations: all owners and rights come back with it.
async fn bring_back(act: &Apply, cx: &Context, to: &str) -> Result<Done, Failure> {
    let name = &act.database;
    let old = restore::tidy(cx, name).await?;
    let database = Database::find(cx, name)?;
    let session = guard::lock(cx, &database).await?;
    let from = revision(&session, act.tool).await?;
    let kept = |old: String| Fact::Note {
        name: format!("old database of {name}"),
        value: old,
    };
    // One transaction has left nothing if it did not write the revision.
    let in_parts = run::some_went_in_parts(cx)?;
    if from == to && restore::is_as_backup(cx, name, &session, in_parts).await? {
        let mut done = done(name, &from, to, false);
        done.facts.extend(old.map(kept));
        return Ok(done);
    }
    // The other tools' revisions are not in the manifest.
    let backup = restore::revisions_of_backup(cx, name)?.join(" and ");
    if act.tool == Tool::Alembic && backup != to {
        return Err(hinted(
            Cause::Refused,
            format!(
                "the backup of `{name}` is at {}, and the database was at {} before the step",
                shown(&backup),
                shown(to)
            ),
            "go on with the new release, or downgrade by hand",
        ));
    }
    let since = Kept::of(cx)?.baseline();
    // The swap ends the session that holds the right to migrate.
    let (old, accepted) = restore::return_to_backup(cx, name, since.as_ref()).await?;
    let session = database.connect(cx).await.map_err(changed)?;
    let now = revision(&session, act.tool).await.map_err(changed)?;
    if now != to {
        let message = format!(
            "the backup of `{name}` is at {}, and the database was at {} before the step",
            shown(&now),
            shown(to)
        );
        return Err(changed(failure(Cause::Step, message)));
    }
    let mut done = done(name, &from, to, true);
    done.summary = format!("`{name}` is restored from its backup; the old one is kept as {old}");
    done.facts.push(kept(old));
    done.facts.extend(accepted);
    Ok(done)
}

/// Brings the whole server back to the rollout's restore point, unless nothing was migrated.
async fn recovered(act: &Apply, cx: &Context, to: &str) -> Result<Done, Failure> {
    let name = &act.database;
    // One transaction has left nothing if it did not write the revision.
    let in_parts = run::some_went_in_parts(cx)?;
    let since = Kept::of(cx)?.baseline();
    let from = std::cell::RefCell::new(None);
    let stays = async |session: &Session| {
        guard::take(session, name).await?;
        let now = revision(session, act.tool).await?;
        let stays = now == to && !in_parts;
        from.replace(Some(now));
        Ok(stays)
    };
    let recovered = recover::recover(cx, name, since.as_ref(), stays).await?;
    let from = from.into_inner();
    let Some(recovered) = recovered else {
        return Ok(done(name, to, to, false));
    };
    let now = revision(&recovered.session, act.tool)
        .await
        .map_err(changed)?;
    if now != to {
        let message = format!(
            "the server of `{name}` is back at {}, but `{name}` is at {} there, and was at {} before \
             the step",
            recovered.point,
            shown(&now),
            shown(to)
        );
        return Err(changed(failure(Cause::Step, message)));
    }
    // What it was at, an attempt that was cut off has seen.
    let from = from.unwrap_or_else(|| to.to_owned());
    let mut done = done(name, &from, to, true);
    done.summary = format!(
        "`{name}` and all databases of its server are back at the restore point {}",
        recovered.point
    );
    done.facts.extend(recovered.facts);
    Ok(done)
}

/// Brings the schema back. What the columns and tables that were dropped held is in the backup
/// only; the comparison of the database's state says whether anything of it is missed.
pub(super) async fn downgrade(
    act: &Downgrade,
    cx: &Context,
    before: &Value,
) -> Result<Done, Failure> {
    let to = recorded(before)?;
    let tool = Migrator::of(cx, act.into()).await?;
    let session = guard::lock(cx, tool.database()).await?;
    tool.check(&session).await?;
    let from = tool.revision(&session).await?;
    if from == to {
        return Ok(done(&act.database, &from, to, false));
    }
    let limits = Limits {
        lock: act.lock_timeout,
        statement: act.statement_timeout,
    };
    run::go(cx, &tool, &session, Way::Up, (&from, to), limits).await?;
    let mut done = done(&act.database, &from, to, true);
    if let Some((id, _)) = guard::verified(cx, &act.database) {
        let value = format!("what the downgrade dropped is empty now, and in the backup {id}");
        done.facts.push(Fact::Note {
            name: format!("database {}", act.database),
            value,
        });
    }
    Ok(done)
}

/// The revision that was recorded with the intent.
fn recorded(before: &Value) -> Result<&str, Failure> {
    before["revision"].as_str().ok_or_else(|| {
        failure(
            Cause::Step,
            "the revision before the step was not recorded, so there is no way back",
        )
    })
}
