//! A server as a whole: what its databases hold, what was written to them since a moment, who is in
//! them, and what a recovery could not bring back.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::actions::postgres::look::Tally;
use crate::actions::postgres::written::{self, Moment, Which};
use crate::sql::{Database, Session, application_name, ident};
use crate::step::{Context, hinted};

/// How long transactions that are under way may take to end: those of the server itself are short.
const QUIET: Duration = Duration::from_secs(20);

/// How long sessions that are being closed may still be seen.
const LEFT: Duration = Duration::from_secs(5);

/// How many rows there were, with those of the catalogues.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Held {
    /// In the database itself.
    own: Tally,
    /// In the others, by their names on the server.
    others: BTreeMap<String, Tally>,
    /// In the tables that all of them share.
    shared: Tally,
}

impl Held {
    /// Counts all rows of a server.
    pub(super) async fn count(
        cx: &Context,
        session: &Session,
        database: &Database,
        moment: Moment,
    ) -> Result<Self, Failure> {
        let mut held = Self {
            own: written::since(session, Some(moment), &Which::Files)
                .await?
                .tally(),
            shared: written::since_in_shared(session, moment).await?.tally(),
            others: BTreeMap::new(),
        };
        for name in others(session).await? {
            let session = database.connect_to(cx, &name).await?;
            let found = written::since(&session, Some(moment), &Which::Files).await?;
            held.others.insert(name, found.tally());
        }
        Ok(held)
    }

    /// What was written to the other databases since, in words; nothing means nothing.
    pub(super) async fn lost_elsewhere(
        &self,
        cx: &Context,
        session: &Session,
        database: &Database,
        moment: Moment,
    ) -> Result<Vec<String>, Failure> {
        let mut lost = vec![];
        let shared = written::since_in_shared(session, moment).await?;
        lost.extend(shared.lines_and_gone(&self.shared));
        let now = others(session).await?;
        for name in self.others.keys().filter(|name| !now.contains(name)) {
            lost.push(format!("database {name} is gone"));
        }
        for name in now {
            let Some(was) = self.others.get(&name) else {
                lost.push(format!("database {name} is new"));
                continue;
            };
            let session = database.connect_to(cx, &name).await?;
            let found = written::since(&session, Some(moment), &Which::Files).await?;
            let lines = found.lines_and_gone(was).into_iter();
            lost.extend(lines.map(|line| format!("{name}: {line}")));
            lost.extend(unlogged(&session, &name).await?);
        }
        lost.extend(unlogged(session, database.dbname()).await?);
        Ok(lost)
    }

    /// What was written to the database itself since, in words.
    pub(super) async fn lost_here(
        &self,
        session: &Session,
        moment: Moment,
        since: Option<(Option<Moment>, &Tally)>,
    ) -> Result<Vec<String>, Failure> {
        let (moment, was) = since.unwrap_or((Some(moment), &self.own));
        let found = written::since(session, moment, &Which::Files).await?;
        Ok(found.lines_and_gone(was))
    }
}

/// The other databases that somebody can be in.
async fn others(session: &Session) -> Result<Vec<String>, Failure> {
    let sql = "SELECT datname::text FROM pg_database WHERE datallowconn \
               AND datname <> current_database() ORDER BY 1";
    let rows = session.query("asking for the databases", sql, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Rows that stand in no log, and so in no recovered server, whenever they were written.
async fn unlogged(session: &Session, name: &str) -> Result<Vec<String>, Failure> {
    let what = "looking for unlogged tables";
    let sql = "SELECT n.nspname::text, c.relname::text FROM pg_class c \
               JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE c.relkind = 'r' AND c.relpersistence = 'u' ORDER BY 1, 2";
    let mut found = vec![];
    for row in session.query(what, sql, &[]).await? {
        let (schema, table): (&str, &str) = (row.get(0), row.get(1));
        let sql = format!(
            "SELECT count(*) FROM ONLY {}.{}",
            ident(schema),
            ident(table)
        );
        let rows: i64 = session.one(what, &sql, &[]).await?.get(0);
        if rows > 0 {
            found.push(format!(
                "{name}: {schema}.{table}: {rows} rows of an unlogged table, which a recovery empties"
            ));
        }
    }
    Ok(found)
}

/// What a server says of itself.
#[derive(Debug, Clone)]
pub(super) struct Server {
    /// Its own number, the same in all of its copies.
    pub(super) system: u64,
    /// Its files.
    pub(super) data: PathBuf,
    /// The timeline that it writes; of one that recovers, that of its last checkpoint.
    pub(super) timeline: u32,
    /// Whether it is recovering, or is a replica.
    pub(super) recovering: bool,
    /// The process that has answered.
    pub(super) process: u32,
}

/// Asks a server what it is.
pub(super) async fn ask(session: &Session) -> Result<Server, Failure> {
    let what = "asking what server this is";
    if session.version < 130_000 {
        return Err(hinted(
            Cause::Refused,
            "a server older than PostgreSQL 13 is not recovered by itself",
            "say `undo_by: downgrade` or `restore`",
        ));
    }
    let sql = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user";
    if !session.one(what, sql, &[]).await?.get::<_, bool>(0) {
        return Err(hinted(
            Cause::Host,
            "only a superuser sees what all databases of the server hold",
            "name a superuser as `user` in the host's section of this database",
        ));
    }
    let sql = "SELECT (SELECT system_identifier FROM pg_control_system()), \
               current_setting('data_directory'), pg_is_in_recovery(), \
               CASE WHEN pg_is_in_recovery() \
               THEN (SELECT timeline_id FROM pg_control_checkpoint())::int8 \
               ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int8 END, \
               pg_backend_pid()";
    let row = session.one(what, sql, &[]).await?;
    Ok(Server {
        system: row.get::<_, i64>(0).cast_unsigned(),
        data: row.get::<_, &str>(1).into(),
        recovering: row.get(2),
        timeline: u32::try_from(row.get::<_, i64>(3)).unwrap_or_default(),
        process: row.get::<_, i32>(4).unsigned_abs(),
    })
}

/// Refuses a server that others depend on, or that holds what a recovery beside its files could
/// not bring back.
pub(super) async fn check_alone(session: &Session) -> Result<(), Failure> {
    let what = "asking who depends on the server";
    let sql = "SELECT \
        (SELECT string_agg(coalesce(nullif(application_name, ''), usename), ', ') \
         FROM pg_stat_replication), \
        (SELECT string_agg(slot_name, ', ') FROM pg_replication_slots WHERE NOT temporary), \
        (SELECT string_agg(gid, ', ') FROM pg_prepared_xacts), \
        (SELECT string_agg(spcname, ', ') FROM pg_tablespace \
         WHERE spcname NOT IN ('pg_default', 'pg_global'))";
    let row = session.one(what, sql, &[]).await?;
    let obstacles = [
        ("it has replicas, which would have to be built anew", 0),
        (
            "it has replication slots, which a recovery does not bring back",
            1,
        ),
        ("transactions are prepared", 2),
        ("it has tablespaces", 3),
    ];
    let found = obstacles.into_iter().filter_map(|(why, at)| {
        let names: Option<&str> = row.get(at);
        names.map(|names| format!("{why} ({names})"))
    });
    let found: Vec<String> = found.collect();
    if found.is_empty() {
        return Ok(());
    }
    Err(hinted(
        Cause::Refused,
        format!(
            "this server is not recovered by itself: {}",
            found.join("; ")
        ),
        "recover it by hand, as the restore point's step has said, or say `undo_by: downgrade` or \
         `restore`",
    ))
}

/// Whose sessions would end with the server, beside those of the listed roles and our own.
pub(super) async fn sessions(
    cx: &Context,
    session: &Session,
    listed: &[String],
) -> Result<Vec<String>, Failure> {
    let sql = "SELECT format('%s of %s in %s', count(*), usename, datname) FROM pg_stat_activity \
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
               AND application_name <> $1 AND usename::text <> ALL ($2) \
               GROUP BY usename, datname ORDER BY usename, datname";
    let own = application_name(&cx.key);
    let began = Instant::now();
    loop {
        let rows = session
            .query("asking for sessions", sql, &[&own, &listed])
            .await?;
        if rows.is_empty() || began.elapsed() > LEFT {
            return Ok(rows.iter().map(|row| row.get(0)).collect());
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until no transaction that writes is under way on the server. Returns the next one: a
/// server that is shut down before it was given out was written by nobody since.
pub(super) async fn quiet(cx: &Context, session: &Session) -> Result<u64, Failure> {
    let what = "waiting for transactions to end";
    let began = Instant::now();
    let mut said = false;
    loop {
        // First: whoever begins to write after this is given it, or a later one.
        let next = written::next(session).await?;
        let sql = "SELECT string_agg(format('process %s (%s)', pid, \
                   coalesce(usename::text, backend_type)), ', ') \
                   FROM pg_stat_activity WHERE backend_xid IS NOT NULL";
        let row = session.one(what, sql, &[]).await?;
        let Some(busy) = row.get::<_, Option<&str>>(0) else {
            return Ok(next);
        };
        if began.elapsed() > QUIET {
            return Err(hinted(
                Cause::Refused,
                format!("the server is written to: {busy}"),
                "wait for them, or end them; then try again",
            ));
        }
        if !said {
            said = true;
            cx.log
                .line(&format!("{busy} is writing; waiting for its end"));
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// What the server says of the timeline that it is on: the place at which it began, and why.
pub(super) async fn history(
    session: &Session,
    timeline: u32,
) -> Result<Option<(u64, String)>, Failure> {
    let sql = "SELECT pg_read_file($1, 0, 1048576, true)";
    let name = format!("pg_wal/{timeline:08X}.history");
    let row = session
        .one("reading the history of the timeline", sql, &[&name])
        .await?;
    let text: Option<&str> = row.get(0);
    Ok(text.and_then(last_line))
}

/// The last line of a history: the timeline before, where it was left, and why.
fn last_line(text: &str) -> Option<(u64, String)> {
    let mut lines = text.lines().map(str::trim);
    let line = lines.rfind(|line| !line.is_empty())?;
    let mut words = line.splitn(3, '\t');
    let (_, place, why) = (words.next()?, words.next()?, words.next()?);
    Some((super::record::position(place)?, why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_ends_with_where_its_timeline_began() {
        let text =
            "1\t0/3000158\tat restore point \"a\"\n\n2\t0/5000000\tno recovery target specified\n";
        let (place, why) = last_line(text).unwrap();
        assert_eq!(
            (place, why.as_str()),
            (0x500_0000, "no recovery target specified")
        );
        assert_eq!(last_line(""), None);
    }
}
