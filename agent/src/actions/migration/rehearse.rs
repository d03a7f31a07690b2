//! `postgres.rehearse`: the pending migration on a restored backup, there and back.
//!
//! ```text
//! newest backup -> scratch database, equal to its source (level 4)
//!   -> what it holds -> up, with its locks and times -> what it holds now, by the plan's rule
//!   -> down -> the schema's fingerprint and what it holds are as before -> dropped
//! ```
//!
//! What works on the scratch database sees a host on which that is the database.

use std::sync::Arc;
use std::time::Duration;

use lockstep_proto::action::migration::{Rehearse, WayDown};
use lockstep_proto::action::postgres::{Rows, VerifyBackup};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use tokio::time::Instant;

use super::guard::shown;
use super::run;
use super::tools::{Limits, Migrator, Way};
use super::watched::Watched;
use crate::actions::files;
use crate::actions::files::OrFailed as _;
use crate::actions::postgres::integrity::{Holdings, differences};
use crate::actions::postgres::{verify, written};
use crate::actions::{Act, Done, Probe};
use crate::config::Postgres;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

impl Act for Rehearse {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        if cx.dry_run && !super::source::Source::from(self).is_there(cx)? {
            return Ok(Probe::Unmet(super::source::Source::from(self).missing()));
        }
        proof(&self.database).probe(cx).await
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        // What is missing on this host is found before anything is restored.
        drop(Migrator::of(cx, self.into()).await?);
        let rehearsal = async |scratch: &str| on_scratch(self, cx, scratch).await;
        let (mut done, found) = verify::prove(cx, &proof(&self.database), rehearsal).await?;
        let found = found.expect("level 4 restores");
        done.summary = format!("{}; {}", done.summary, found.summary());
        done.facts.extend(found.notes(&self.database));
        Ok(done)
    }

    fn describe(&self) -> String {
        format!(
            "rehearses the migration of `{}` to {} of {} on its restored backup",
            self.database, self.to, self.release
        )
    }
}

/// The proof that a rehearsal gives of the backup: all but a look into the indexes.
fn proof(database: &str) -> VerifyBackup {
    let args = serde_json::json!({"database": database});
    serde_json::from_value(args).expect("all else has defaults")
}

/// What a rehearsal has found.
#[derive(Debug)]
struct Found {
    from: String,
    to: String,
    up: Duration,
    /// What it held and ran on the way up.
    watched: Watched,
    /// How rows and columns differ after the migration, where that was allowed.
    differs: Vec<String>,
    /// How long the way down took, or why it does not lead back.
    down: Result<Duration, String>,
}

impl Found {
    fn summary(&self) -> String {
        let Self { from, to, up, .. } = self;
        if from == to {
            return format!("there is nothing to migrate: it is at {}", shown(to));
        }
        let down = match &self.down {
            Ok(took) => format!("and back in {:.1} s", took.as_secs_f64()),
            Err(why) => format!("with no way back: {why}"),
        };
        format!(
            "its copy went from {} to {} in {:.1} s, {down}",
            shown(from),
            shown(to),
            up.as_secs_f64()
        )
    }

    fn notes(&self, database: &str) -> Vec<Fact> {
        let note = |what: &str, value: String| Fact::Note {
            name: format!("rehearsal of {database}: {what}"),
            value,
        };
        let mut notes = vec![note("result", self.summary())];
        let lists = [
            ("locks", &self.watched.locks()),
            ("statements", &self.watched.statements()),
            ("differs", &self.differs),
        ];
        for (what, lines) in lists {
            if !lines.is_empty() {
                notes.push(note(what, written::few(lines)));
            }
        }
        notes
    }
}

/// The role of migrations if it may not enter the copy: one that was restored by nobody with power
/// over all roles belongs to whoever restored it.
async fn shut_out<'a>(
    session: &Session,
    database: &'a Database,
) -> Result<Option<&'a str>, Failure> {
    let Some(role) = database.config.migrate_as.as_deref() else {
        return Ok(None);
    };
    let sql = "SELECT has_database_privilege($1, current_database(), 'CONNECT')";
    let enters = session.one("asking for rights", sql, &[&role]).await?;
    Ok((!enters.get::<_, bool>(0)).then_some(role))
}

/// The host's section of a database, to be changed for this context alone.
fn section<'a>(cx: &'a mut Context, name: &str) -> Option<&'a mut Postgres> {
    Arc::make_mut(&mut cx.config).postgres.get_mut(name)
}

/// The same host, on which the scratch database is the database.
fn instead(cx: &Context, name: &str, scratch: &str) -> Result<Context, Failure> {
    let mut cx = cx.clone();
    if let Some(section) = section(&mut cx, name) {
        section.dbname = Some(scratch.to_owned());
    }
    // What an attempt keeps there of its way is not of this step.
    cx.dir = cx.dir.join("rehearsal");
    files::private_dir(&cx.dir).or_failed(|| "make a directory for the rehearsal")?;
    Ok(cx)
}

async fn on_scratch(act: &Rehearse, cx: &Context, scratch: &str) -> Result<Found, Failure> {
    let mut cx = instead(cx, &act.database, scratch)?;
    let database = Database::find(&cx, &act.database)?;
    let session = database.connect(&cx).await?;
    if let Some(role) = shut_out(&session, &database).await? {
        cx.log.line(&format!(
            "{role} may not enter the copy, which belongs to {}: that one rehearses",
            database.config.user
        ));
        if let Some(section) = section(&mut cx, &act.database) {
            section.migrate_as = None;
        }
    }
    let before = Holdings::take(&cx, &database, None, None).await?;
    let tool = Migrator::of(&cx, act.into()).await?;
    let session = tool.database().connect(&cx).await?;
    tool.check(&session).await?;
    let from = tool.revision(&session).await?;
    let to = tool.resolve(&act.to).await?;
    let mut found = Found {
        from: from.clone(),
        to: to.clone(),
        up: Duration::ZERO,
        watched: Watched::default(),
        differs: vec![],
        down: Ok(Duration::ZERO),
    };
    if from == to {
        return Ok(found);
    }
    let limits = Limits {
        lock: act.lock_timeout,
        statement: act.statement_timeout,
    };
    // As the tool's role: the statements of others are not shown to every role.
    let watcher = tool.database().connect(&cx).await?;
    let began = Instant::now();
    let gone = {
        let going = run::go(&cx, &tool, &session, Way::Up, (&from, &to), limits);
        tokio::select! {
            gone = going => gone,
            never = found.watched.watch(&watcher) => match never {},
        }
    };
    found.up = began.elapsed();
    gone.map_err(|failure| in_rehearsal("up", failure))?;
    let after = Holdings::take(&cx, &database, None, Some(&before)).await?;
    let differ = differences(&before, &after, |_| act.rows);
    if !differ.wrong.is_empty() {
        return Err(hinted(
            Cause::CheckUnmet,
            format!(
                "the migration would change what `{}` holds: {}",
                act.database,
                written::few(&differ.wrong)
            ),
            "correct the migration, or say `rows: grown` or `rows: any` if that is what it is for",
        ));
    }
    found.differs = differ.said;
    let session = tool.database().connect(&cx).await?;
    let began = Instant::now();
    let back = run::go(&cx, &tool, &session, Way::Down, (&to, &from), limits).await;
    let took = began.elapsed();
    let back = match back {
        Ok(()) => is_as_before(&cx, &database, &before).await?,
        Err(failure) => Some(failure.message),
    };
    found.down = match (back, act.downgrade) {
        (None, _) => Ok(took),
        (Some(why), WayDown::IfPossible) => Err(why),
        (Some(why), WayDown::Required) => {
            return Err(hinted(
                Cause::CheckUnmet,
                format!("the way down of the migration does not lead back: {why}"),
                "correct it; or say `downgrade: if_possible`, and how a rollback is to undo it by \
                 `undo_by` of `migration.apply`",
            ));
        }
    };
    Ok(found)
}

/// How the scratch database differs from what was restored, in words.
async fn is_as_before(
    cx: &Context,
    database: &Database,
    before: &Holdings,
) -> Result<Option<String>, Failure> {
    let now = Holdings::take(cx, database, None, Some(before)).await?;
    let mut differ = differences(before, &now, |_| Rows::Unchanged).wrong;
    if now.schema != before.schema {
        differ.push(format!(
            "the schema's fingerprint is {}, and was {}",
            now.schema.short(),
            before.schema.short()
        ));
    }
    Ok((!differ.is_empty()).then(|| written::few(&differ)))
}

/// Nothing of the database itself was changed.
fn in_rehearsal(way: &str, failure: Failure) -> Failure {
    Failure {
        message: format!("in the rehearsal, on the way {way}: {}", failure.message),
        changed: false,
        ..failure
    }
}
