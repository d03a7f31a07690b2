//! `postgres.restore_point`: a name in the server's log of changes. With a physical backup from
//! before it, and the log that is archived, the whole server can be brought back to that moment.
//!
//! All databases of the server go back, so a rollback does it by itself only where a migration's
//! `undo_by: recover` says so, and [`recover`] finds that nothing would be lost. Otherwise a person
//! does: the step says by which command.

use std::time::Duration;

use lockstep_proto::action::postgres::RestorePoint;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Timestamp;
use serde_json::Value;
use tokio::time::Instant;

use super::barman::Barman;
use super::pgbackrest::Pgbackrest;
use super::recover;
use crate::actions::{Act, Done, Probe};
use crate::sql::{Database, Session};
use crate::step::{Context, changed, hinted};

/// How often is asked how far the archive is.
const LOOK: Duration = Duration::from_millis(200);

impl Act for RestorePoint {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        if cx.dry_run {
            if let Err(unmet) = check_archiving(&session).await {
                return Ok(Probe::Unmet(unmet));
            }
        } else {
            session.end_left_over(cx).await?;
        }
        // The server lists no points. A second one has another name, and does no harm.
        Ok(Probe::Absent(self.describe()))
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let session = database.connect(cx).await?;
        session.end_left_over(cx).await?;
        check_archiving(&session).await?;
        let way_back = WayBack::find(cx, &database).await?;
        let draft = if self.recoverable {
            Some(recover::draft(cx, &session, &database).await?)
        } else {
            None
        };
        let name = name(cx);
        let within = self.archived_within.to_std();
        let point = archived_point(cx, &session, &name, within).await?;
        if let Some(draft) = draft {
            let kept = draft.keep(cx, &self.database, &name, &point.lsn, point.taken_at);
            kept.map_err(changed)?;
        }
        let summary = format!("{name} at {} is archived in {}", point.lsn, point.file);
        let mut facts = vec![Fact::RestorePoint {
            database: self.database.clone(),
            name: name.clone(),
            lsn: point.lsn,
            archived: point.file,
            taken_at: point.taken_at,
        }];
        if let Some(way_back) = way_back {
            let value = way_back.said(&session, &name, point.timeline).await?;
            cx.log.line(&format!("the way back: {value}"));
            facts.push(Fact::Note {
                name: "way back to the restore point".into(),
                value,
            });
        }
        Ok(Done {
            changed: true,
            summary,
            facts,
        })
    }

    fn describe(&self) -> String {
        format!(
            "names a moment to which the server of `{}` can be brought back",
            self.database
        )
    }
}

/// The point's name: that of the attempt, within the 63 bytes that a name may have.
fn name(cx: &Context) -> String {
    let key = &cx.key;
    format!("lockstep_{}_{}_{}", key.rollout, key.at, key.attempt)
}

/// The backup system of the host, and the backup from which the point can be reached.
enum WayBack<'a> {
    Pgbackrest(Pgbackrest<'a>, String),
    Barman(Barman<'a>, String),
}

impl<'a> WayBack<'a> {
    /// `None` if the host's configuration names no system; refuses if that has no backup.
    async fn find(cx: &'a Context, database: &Database) -> Result<Option<Self>, Failure> {
        if let Some(tool) = Pgbackrest::of(cx, database) {
            let base = tool.newest().await?.ok_or_else(no_base)?;
            return Ok(Some(Self::Pgbackrest(tool, base)));
        }
        let Some(tool) = Barman::of(cx, database) else {
            return Ok(None);
        };
        let base = tool.newest().await?.ok_or_else(no_base)?;
        Ok(Some(Self::Barman(tool, base)))
    }

    /// What a person does, in words.
    async fn said(&self, session: &Session, point: &str, timeline: u32) -> Result<String, Failure> {
        let all = "all databases of the server, from the backup";
        Ok(match self {
            Self::Pgbackrest(tool, base) => {
                let command = tool.restore_command(point, base, timeline);
                format!("{all} {base}: stop the server, run `{command}` as its user, start it")
            }
            Self::Barman(tool, base) => {
                let sql = "SELECT current_setting('data_directory')";
                let what = "asking for the data directory";
                let row = session.one(what, sql, &[]).await?;
                let [archive, command] = tool.restore_commands(point, base, row.get(0));
                format!(
                    "{all} {base}: stop the server, put its data directory aside, run `{archive}` \
                     and `{command}` as Barman's user, let the directory be the server's, start it"
                )
            }
        })
    }
}

fn no_base() -> Failure {
    hinted(
        Cause::Refused,
        "there is no physical backup from which a restore point could be reached",
        "put `postgres.external_backup` before this step",
    )
}

/// Refuses where no point could ever be reached.
async fn check_archiving(session: &Session) -> Result<(), Failure> {
    let sql = "SELECT pg_is_in_recovery(), current_setting('archive_mode'), \
               current_setting('archive_command') IN ('', '(disabled)') \
               AND coalesce(current_setting('archive_library', true), '') = ''";
    let row = session
        .one("asking whether the log is archived", sql, &[])
        .await?;
    let (replica, mode, nowhere): (bool, &str, bool) = (row.get(0), row.get(1), row.get(2));
    if replica {
        return Err(hinted(
            Cause::Host,
            "this server is a replica, and makes no restore points",
            "run this step on the primary's host",
        ));
    }
    if mode == "off" || nowhere {
        return Err(hinted(
            Cause::Host,
            "the server archives nothing, so a restore point could not be reached",
            "set `archive_mode = on` and `archive_command` in postgresql.conf, and restart it",
        ));
    }
    Ok(())
}

/// A point that was made.
pub(super) struct Point {
    pub(super) lsn: String,
    /// The file of the log that holds it.
    file: String,
    timeline: u32,
    taken_at: Timestamp,
}

/// Makes a point, and waits until the log up to it is archived.
pub(super) async fn archived_point(
    cx: &Context,
    session: &Session,
    name: &str,
    within: Duration,
) -> Result<Point, Failure> {
    let point = create(session, name).await?;
    wait_for_archive(cx, session, &point, within).await?;
    Ok(point)
}

async fn create(session: &Session, name: &str) -> Result<Point, Failure> {
    let what = "making the restore point";
    let sql = "SELECT lsn::text, pg_walfile_name(lsn), (extract(epoch FROM now()) * 1000)::int8, \
               ('x' || substr(pg_walfile_name(lsn), 1, 8))::bit(32)::int8 \
               FROM pg_create_restore_point($1) lsn";
    let row = session.one(what, sql, &[&name]).await?;
    let point = Point {
        lsn: row.get(0),
        file: row.get(1),
        taken_at: Timestamp(row.get::<_, i64>(2).unsigned_abs()),
        timeline: u32::try_from(row.get::<_, i64>(3)).unwrap_or_default(),
    };
    // Else the file would be archived once it is full.
    session
        .one(what, "SELECT pg_switch_wal()::text", &[])
        .await?;
    Ok(point)
}

/// How far the archive is.
struct Archive {
    newest: Option<String>,
    failed: i64,
    failing: Option<String>,
}

async fn archive(session: &Session) -> Result<Archive, Failure> {
    let sql = "SELECT last_archived_wal, failed_count, last_failed_wal FROM pg_stat_archiver";
    let row = session
        .one("asking how far the archive is", sql, &[])
        .await?;
    Ok(Archive {
        newest: row.get(0),
        failed: row.get(1),
        failing: row.get(2),
    })
}

async fn wait_for_archive(
    cx: &Context,
    session: &Session,
    point: &Point,
    within: Duration,
) -> Result<(), Failure> {
    let before = archive(session).await?.failed;
    let began = Instant::now();
    let mut said = before;
    loop {
        let now = archive(session).await?;
        if now
            .newest
            .as_deref()
            .is_some_and(|it| reaches(it, &point.file))
        {
            return Ok(());
        }
        if now.failed > said {
            said = now.failed;
            let file = now.failing.as_deref().unwrap_or("a file");
            cx.log.line(&format!("archiving {file} has failed"));
        }
        if began.elapsed() >= within {
            let failures = match now.failed - before {
                0 => String::new(),
                some => format!(", and archiving has failed {some} times meanwhile"),
            };
            let newest = now.newest.as_deref().unwrap_or("nothing");
            return Err(Failure {
                changed: true,
                ..hinted(
                    Cause::Step,
                    format!(
                        "{} was not archived within {within:?}: {newest} was last{failures}",
                        point.file
                    ),
                    "see what `archive_command` says in the server's log",
                )
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether an archive whose newest file is this one holds another. Files are archived in their
/// order; a backup's label has the name of its file and more.
fn reaches(newest: &str, file: &str) -> bool {
    let segment = |name: &str| -> Option<String> {
        let name = name.get(..24)?;
        let is_one = name.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_one.then(|| name.to_owned())
    };
    segment(newest) >= segment(file) && segment(newest).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reaches_what_was_archived_before() {
        let file = "00000001000000000000000A";
        for (newest, holds) in [
            ("00000001000000000000000A", true),
            ("00000001000000000000000B", true),
            ("00000001000000000000000A.00000028.backup", true),
            ("000000010000000100000000", true),
            ("000000010000000000000009", false),
            ("000000010000000000000009.00000028.backup", false),
            ("00000002.history", false),
            ("", false),
        ] {
            assert_eq!(reaches(newest, file), holds, "{newest}");
        }
    }
}
