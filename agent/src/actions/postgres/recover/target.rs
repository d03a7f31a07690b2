//! A server and the point that it is to be brought back to: what is there, and what would be lost.

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};

use super::place::Place;
use super::record::Record;
use super::server::{self, Server};
use super::{configured, open_since_point, switch};
use crate::actions::loss;
use crate::actions::postgres::pgbackrest::Pgbackrest;
use crate::actions::postgres::restore::Baseline;
use crate::actions::postgres::written;
use crate::actions::service::Switch;
use crate::config;
use crate::sql::{Database, Session};
use crate::step::{Context, hinted};

/// How often rows are counted again, or a server is stopped for nothing, because somebody wrote
/// meanwhile.
pub(super) const TRIES: u32 = 3;

/// A server, and the point that it is to be brought back to.
pub(super) struct Target<'a> {
    pub(super) cx: &'a Context,
    pub(super) database: Database,
    pub(super) settings: &'a config::Recover,
    pub(super) tool: Pgbackrest<'a>,
    pub(super) place: Place<'a>,
    pub(super) record: Record,
}

/// What is there.
pub(super) enum There {
    /// The server does not answer: it does not run, or not yet.
    Silent,
    /// It runs, and has not been recovered.
    Before(Session, Server),
    /// It is recovering.
    Recovering(Session),
    /// It goes on from the point.
    Recovered(Session),
    /// It is somewhere else; in words.
    Elsewhere(String),
}

impl<'a> Target<'a> {
    pub(super) fn find(cx: &'a Context, name: &str) -> Result<Self, Failure> {
        let record = Record::required(cx, name)?;
        Self::of(cx, name, record)
    }

    pub(super) fn find_if_any(cx: &'a Context, name: &str) -> Result<Option<Self>, Failure> {
        let record = Record::newest(cx, name)?;
        record.map(|record| Self::of(cx, name, record)).transpose()
    }

    pub(super) fn of(cx: &'a Context, name: &str, record: Record) -> Result<Self, Failure> {
        let database = Database::find(cx, name)?;
        let (settings, tool) = configured(cx, &database)?;
        let place = Place::of(cx, &database, &tool, &record);
        Ok(Self {
            cx,
            database,
            settings,
            tool,
            place,
            record,
        })
    }

    pub(super) async fn switch(&self) -> Result<Switch<'_>, Failure> {
        switch(self.cx, self.settings, &self.database).await
    }

    pub(super) async fn look(&self) -> Result<There, Failure> {
        let Ok(session) = self.database.connect(self.cx).await else {
            return Ok(There::Silent);
        };
        let server = server::ask(&session).await?;
        let (name, data) = (&self.database.name, server.data.display());
        if server.system != self.record.system || server.data != self.record.data {
            let why = format!(
                "the server of `{name}` is another one than at the restore point: its files are in \
                 {data}"
            );
            return Ok(There::Elsewhere(why));
        }
        if !self.works_there(&server) {
            let why = format!(
                "the server of `{name}` says that its files are in {data}, and works elsewhere"
            );
            return Ok(There::Elsewhere(why));
        }
        if server.recovering {
            return Ok(if self.place.is_copy() {
                There::Recovering(session)
            } else {
                There::Elsewhere(format!(
                    "the server of `{name}` is recovering, and not to this rollout's restore point"
                ))
            });
        }
        if server.timeline == self.record.timeline {
            return Ok(There::Before(session, server));
        }
        let began = server::history(&session, server.timeline).await?;
        let is_own = began.as_ref().is_some_and(|(place, why)| {
            *place == self.record.lsn
                && *why == format!("at restore point \"{}\"", self.record.name)
        });
        if is_own {
            return Ok(There::Recovered(session));
        }
        let why = began.map_or_else(|| "of unknown beginning".to_owned(), |(_, why)| why);
        Ok(There::Elsewhere(format!(
            "the server of `{name}` is on timeline {} ({why}), and was on {} at the restore point {}",
            server.timeline, self.record.timeline, self.record.name
        )))
    }

    /// Whether the server that has answered works in the files at its place: its own word names a
    /// path, and another directory may have that name by now.
    fn works_there(&self, server: &Server) -> bool {
        let works = self.place.is_worked_in_by(server.process);
        works.is_ok_and(|works| works)
    }

    /// Refuses a server that is not the one of the restore point any more.
    pub(super) fn check_same(&self, server: &Server) -> Result<(), Failure> {
        let record = &self.record;
        if !self.works_there(server) {
            return Err(hinted(
                Cause::Host,
                format!(
                    "the server of `{}` is not seen to work in {}",
                    self.database.name,
                    server.data.display()
                ),
                "run the agent on the server's own host, as root or as the server's user",
            ));
        }
        let is = (server.system, server.timeline, &server.data);
        if is == (record.system, record.timeline, &record.data) {
            return Ok(());
        }
        Err(hinted(
            Cause::Refused,
            format!(
                "the server of `{}` is not the one of the restore point {} any more: it is on \
                 timeline {}, and was on {}",
                self.database.name, record.name, server.timeline, record.timeline
            ),
            "start the rollout again, so that it makes a new restore point",
        ))
    }

    /// Refuses a point that lies before another change of the schema: the recovery would take that
    /// one back, too.
    pub(super) async fn check_unmigrated(&self, session: &Session) -> Result<(), Failure> {
        let now = written::ledgers(session).await?;
        let since = written::migrated(&self.record.ledgers, &now);
        if since.is_empty() {
            return Ok(());
        }
        Err(hinted(
            Cause::Refused,
            format!(
                "`{}` was migrated since the restore point {}, and a recovery would take that back,                  too: {}",
                self.database.name,
                self.record.name,
                since.join(", ")
            ),
            "put `postgres.restore_point` with `recoverable: true` directly before this step",
        ))
    }

    /// The backup that the copy is restored from.
    pub(super) async fn base(&self) -> Result<String, Failure> {
        let Record {
            system,
            timeline,
            lsn,
            ..
        } = self.record;
        let base = self.tool.base_of(system, timeline, lsn).await?;
        base.ok_or_else(|| {
            hinted(
                Cause::Refused,
                format!(
                    "pgBackRest has no sound backup on timeline {timeline} from which the restore \
                     point {} could be reached",
                    self.record.name
                ),
                "put `postgres.external_backup` before the restore point",
            )
        })
    }

    pub(super) async fn check_room(&self, session: &Session) -> Result<(), Failure> {
        let sql = "SELECT sum(pg_database_size(oid))::int8 FROM pg_database";
        let row = session
            .one("asking for the server's size", sql, &[])
            .await?;
        self.place.check(row.get::<_, i64>(0).unsigned_abs())
    }

    /// Refuses if anything would be lost, unless a person has accepted just that. Returns the next
    /// transaction, and who has accepted it; while that one is not given out, nothing has changed.
    pub(super) async fn nothing_lost(
        &self,
        session: &Session,
        since: Option<&Baseline>,
    ) -> Result<(u64, Option<Fact>), Failure> {
        let (cx, record) = (self.cx, &self.record);
        for _ in 0..TRIES {
            let next = server::quiet(cx, session).await?;
            let mut lost = record
                .held
                .lost_elsewhere(cx, session, &self.database, record.moment)
                .await?;
            let why = open_since_point(cx, session, &self.database.name).await?;
            if why.is_some() {
                let since = since.map(|since| (since.moment, &since.rows));
                let here = record.held.lost_here(session, record.moment, since);
                lost.extend(here.await?);
            } else if let Some(was) = since.and_then(|since| since.ledgers.as_ref()) {
                // A fence lets the database's owner in.
                let now = written::ledgers(session).await?;
                let since = written::migrated(was, &now).into_iter();
                lost.extend(since.map(|table| format!("{table}: migrated since the step")));
            }
            let mut accepted = None;
            if !lost.is_empty() {
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                accepted = Some(loss::accepted(
                    cx,
                    &format!(
                        "all databases of the server of `{}` would go back to {}, and what was \
                         written since would be lost{why}",
                        self.database.name, record.name
                    ),
                    &lost,
                    "then go on with the new schema; the server's files of before would be kept",
                )?);
            }
            let open = server::sessions(cx, session, &self.settings.sessions).await?;
            if !open.is_empty() {
                return Err(hinted(
                    Cause::Refused,
                    format!(
                        "sessions of others would end with the server of `{}`: {}",
                        self.database.name,
                        open.join("; ")
                    ),
                    format!(
                        "end them, or list their roles as `sessions` in [postgres.{}.recover]",
                        self.database.name
                    ),
                ));
            }
            // Late: a slot is made without a transaction, and one that was prepared since the
            // beginning is no session's, and in no count.
            server::check_alone(session).await?;
            if written::next(session).await? == next {
                return Ok((next, accepted));
            }
            cx.log
                .line("somebody wrote while the rows were counted; counting again");
        }
        Err(self.never_quiet())
    }

    /// Refuses a server that somebody writes to whenever it is counted.
    pub(super) fn never_quiet(&self) -> Failure {
        hinted(
            Cause::Refused,
            format!(
                "the server of `{}` is written to all the time",
                self.database.name
            ),
            "find out by whom (its autovacuum counts, too), and try again",
        )
    }
}
