//! What a migration may do to those who use the database: looked at before it starts, and watched
//! while it runs.

use std::time::Duration;

use lockstep_proto::action::migration::{Guards, OnLongTx};
use lockstep_proto::report::{Cause, Failure};
use lockstep_proto::values::Period;
use tokio::time::Instant;

use super::written;
use crate::sql::{Session, application_name};
use crate::step::{Context, failure, hinted};

/// How long old transactions are waited for: less than the time that a migration's step has beyond
/// that of its statements.
const PATIENCE: Duration = Duration::from_mins(4);

/// How often it is looked.
const EVERY: Duration = Duration::from_secs(1);

/// Sessions of this database, without this one, whose transaction is older than `$1` milliseconds.
/// Those of other roles are seen by who may read all statistics.
const OLD: &str = "datid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
     AND backend_type = 'client backend' \
     AND xact_start < clock_timestamp() - $1::int8 * interval '1 millisecond'";

/// Whether the role may see what others do.
const SEES_ALL: &str = "SELECT pg_has_role('pg_read_all_stats', 'USAGE')";

/// Refuses a replica, and a database with transactions that have been open for too long: what the
/// migration locks would wait for them, and everybody for the migration.
pub(crate) async fn may_start(
    cx: &Context,
    session: &Session,
    oldest: Period,
    then: OnLongTx,
) -> Result<(), Failure> {
    let name = &session.place().database;
    let what = "looking at what runs";
    let replica = "SELECT pg_is_in_recovery()";
    if session.one(what, replica, &[]).await?.get(0) {
        return Err(hinted(
            Cause::Refused,
            format!("the server of `{name}` is a replica, which cannot be written"),
            format!("name the primary in [postgres.{name}]"),
        ));
    }
    if !session.one(what, SEES_ALL, &[]).await?.get::<_, bool>(0) {
        cx.log.line(
            "the role cannot see how long the transactions of other roles have been open: GRANT \
             pg_read_all_stats",
        );
    }
    let began = Instant::now();
    loop {
        let open = open_for_long(session, what, oldest).await?;
        if open.is_empty() {
            return Ok(());
        }
        let shown = written::few(&open);
        match then {
            OnLongTx::Wait if began.elapsed() < PATIENCE => {
                cx.log.line(&format!("waiting for {shown}"));
                tokio::time::sleep(EVERY).await;
            }
            OnLongTx::End if began.elapsed() < PATIENCE => {
                cx.log.line(&format!("ending {shown}"));
                let age = oldest.0.cast_signed();
                session.end_sessions(OLD, &[&age]).await?;
                // A prepared transaction has no session.
                tokio::time::sleep(EVERY).await;
            }
            OnLongTx::Wait | OnLongTx::Fail | OnLongTx::End => {
                return Err(hinted(
                    Cause::Step,
                    format!("transactions of `{name}` have been open for too long: {shown}"),
                    "end them, raise `max_tx_age`, or say `on_long_tx: end`; nothing was changed",
                ));
            }
        }
    }
}

/// The transactions that have been open for too long, in words.
async fn open_for_long(
    session: &Session,
    what: &str,
    oldest: Period,
) -> Result<Vec<String>, Failure> {
    let age = oldest.0.cast_signed();
    let sql = format!(
        "SELECT format('process %s (%s %s) for %s s', pid, usename, application_name, \
         extract(epoch FROM clock_timestamp() - xact_start)::int8) FROM pg_stat_activity \
         WHERE {OLD} AND pid <> pg_backend_pid() UNION ALL \
         SELECT format('the prepared transaction %s for %s s', gid, \
         extract(epoch FROM clock_timestamp() - prepared)::int8) FROM pg_prepared_xacts \
         WHERE database = current_database() \
         AND prepared < clock_timestamp() - $1::int8 * interval '1 millisecond' ORDER BY 1"
    );
    let rows = session.query(what, &sql, &[&age]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Refuses guards that could not see what they watch.
pub(crate) async fn can_watch(session: &Session, guards: &Guards) -> Result<(), Failure> {
    let what = "looking at the guards";
    if guards.longest_wait.is_some() && session.major() < 14 {
        return Err(hinted(
            Cause::Refused,
            "the server does not say how long sessions have waited for a lock",
            "leave the guard `longest_wait` out, or use PostgreSQL 14 or later",
        ));
    }
    if guards.replication_lag.is_some()
        && !session.one(what, SEES_ALL, &[]).await?.get::<_, bool>(0)
    {
        let role = &session.place().role;
        return Err(hinted(
            Cause::Refused,
            format!("{role} cannot see how far standbys are behind"),
            format!("GRANT pg_monitor TO {role}, or leave the guard `replication_lag` out"),
        ));
    }
    Ok(())
}

/// Looks again and again, until something goes beyond a guard or nothing can be seen any more.
pub(crate) async fn watch(cx: &Context, session: &Session, guards: &Guards) -> Failure {
    if *guards == Guards::default() {
        return std::future::pending().await;
    }
    loop {
        match look(cx, session, guards).await {
            Ok(None) => tokio::time::sleep(EVERY).await,
            Ok(Some(beyond)) => {
                let message = format!("the migration was ended: {beyond}");
                let hint = "see what waits and what holds it up, and try again at a calmer time";
                return hinted(Cause::Step, message, hint);
            }
            Err(blind) => {
                return failure(
                    Cause::Step,
                    format!(
                        "the migration was ended, for its guards saw nothing: {}",
                        blind.message
                    ),
                );
            }
        }
    }
}

/// What has gone beyond a guard, in words.
async fn look(cx: &Context, session: &Session, guards: &Guards) -> Result<Option<String>, Failure> {
    let what = "watching the guards";
    if let Some(most) = guards.connections {
        let sql = "SELECT count(*), current_setting('max_connections')::int8 \
                   FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let row = session.one(what, sql, &[]).await?;
        let (used, there): (i64, i64) = (row.get(0), row.get(1));
        let share = used.unsigned_abs() * 100 / there.unsigned_abs().max(1);
        if share > most.0 {
            return Ok(Some(format!(
                "{used} of {there} connections are in use ({share}%), and {most} were allowed"
            )));
        }
    }
    if let Some(longest) = guards.replication_lag {
        let sql = "SELECT application_name, (extract(epoch FROM replay_lag) * 1000)::int8 \
                   FROM pg_stat_replication WHERE replay_lag IS NOT NULL \
                   ORDER BY replay_lag DESC LIMIT 1";
        if let Some(row) = session.query(what, sql, &[]).await?.first() {
            let (standby, lag): (&str, i64) = (row.get(0), row.get(1));
            if lag.unsigned_abs() > longest.0 {
                return Ok(Some(format!(
                    "the standby {standby} is {lag} ms behind, and {longest} were allowed"
                )));
            }
        }
    }
    if guards.blocked.is_none() && guards.longest_wait.is_none() {
        return Ok(None);
    }
    let since = if session.major() < 14 {
        "NULL::timestamptz"
    } else {
        "l.waitstart"
    };
    let sql = format!(
        "SELECT count(DISTINCT l.pid), \
         coalesce(max(extract(epoch FROM clock_timestamp() - {since}) * 1000), 0)::int8 \
         FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted \
         AND a.datid = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND (a.application_name, a.usename) <> ($1, session_user) \
         AND EXISTS (SELECT 1 FROM pg_stat_activity own \
         WHERE (own.application_name, own.usename) = ($1, session_user) AND own.pid <> pg_backend_pid() \
         AND own.pid = ANY (pg_blocking_pids(l.pid)))"
    );
    let own = application_name(&cx.key);
    let row = session.one(what, &sql, &[&own]).await?;
    let (waiting, longest): (i64, i64) = (row.get(0), row.get(1));
    if let Some(most) = guards.blocked
        && waiting > i64::from(most)
    {
        return Ok(Some(format!(
            "{waiting} sessions wait for a lock of the migration, and {most} were allowed"
        )));
    }
    if let Some(allowed) = guards.longest_wait
        && longest.unsigned_abs() > allowed.0
    {
        return Ok(Some(format!(
            "a session has waited {longest} ms for a lock of the migration, and {allowed} were allowed"
        )));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use lockstep_proto::values::Percent;

    use super::*;
    use crate::sql::cluster::Bench;

    const NONE: Period = Period(0);

    async fn start(bench: &Bench, then: OnLongTx) -> Result<(), Failure> {
        let cx = bench.cx(0, vec![]);
        let session = bench.session("staff").await;
        may_start(&cx, &session, NONE, then).await
    }

    #[tokio::test]
    async fn old_transactions_are_named_waited_for_or_ended() {
        let bench = Bench::with_rows().await;
        start(&bench, OnLongTx::Fail).await.unwrap();
        let open = bench.session("as_app").await;
        open.run("", "BEGIN; SELECT 1").await.unwrap();
        let failed = start(&bench, OnLongTx::Fail).await.unwrap_err();
        let who = format!("({} test) for 0 s", bench.app());
        assert!(failed.message.contains(&who), "{}", failed.message);
        assert!(!failed.changed);
        let patient = async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            open.run("", "ROLLBACK").await.unwrap();
        };
        let (waited, ()) = tokio::join!(start(&bench, OnLongTx::Wait), patient);
        waited.unwrap();
        open.run("", "BEGIN; SELECT 1").await.unwrap();
        start(&bench, OnLongTx::End).await.unwrap();
        assert!(open.run("", "SELECT 1").await.is_err());
    }

    #[tokio::test]
    async fn what_goes_beyond_a_guard_is_said_with_its_figure() {
        let bench = Bench::with_rows().await;
        let session = bench.session("staff").await;
        let cx = bench.cx(0, vec![]);
        let seen = async |guards: &Guards| look(&cx, &session, guards).await.unwrap();
        let guards = Guards {
            connections: Some(Percent(99)),
            replication_lag: Some(Period(1)),
            blocked: Some(0),
            longest_wait: Some(Period(50)),
        };
        can_watch(&session, &guards).await.unwrap();
        assert_eq!(seen(&guards).await, None);
        let crowded = Guards {
            connections: Some(Percent(0)),
            ..Guards::default()
        };
        let crowd = seen(&crowded).await.unwrap();
        assert!(crowd.contains("of 60 connections are in use"), "{crowd}");
        // One holds a lock, another waits for it.
        let (holder, waiter) = (bench.session("staff").await, bench.session("as_app").await);
        holder
            .run("", "BEGIN; LOCK public.users IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        let named = format!("SET application_name = '{}'", application_name(&cx.key));
        let waiting = async || {
            let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
            while bench.ask(waits).await == "0" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let beyond = async {
            waiting().await;
            assert_eq!(seen(&guards).await, None, "the holder is somebody else");
            holder.run("", &named).await.unwrap();
            let blocked = watch(&cx, &session, &guards).await;
            assert!(
                blocked
                    .message
                    .ends_with("1 sessions wait for a lock of the migration, and 0 were allowed"),
                "{}",
                blocked.message
            );
            let long = Guards {
                blocked: None,
                ..guards.clone()
            };
            let long = watch(&cx, &session, &long).await;
            assert!(
                long.message
                    .contains("ms for a lock of the migration, and 50ms"),
                "{}",
                long.message
            );
            holder.run("", "ROLLBACK").await.unwrap();
        };
        let (waited, ()) = tokio::join!(waiter.run("", "SELECT 1 FROM public.users"), beyond);
        waited.unwrap();
        // Another role under the migration's name is not the migration.
        let faker = bench.session("as_owner").await;
        let hold = format!("{named}; BEGIN; LOCK public.users IN ACCESS EXCLUSIVE MODE");
        faker.run("", &hold).await.unwrap();
        let faked = async {
            waiting().await;
            assert_eq!(seen(&guards).await, None);
            faker.run("", "ROLLBACK").await.unwrap();
        };
        let (waited, ()) = tokio::join!(waiter.run("", "SELECT 1 FROM public.users"), faked);
        waited.unwrap();
        // The owner sees no standby.
        let owner = bench.session("as_owner").await;
        let refused = can_watch(&owner, &guards).await.unwrap_err();
        assert!(refused.hint.unwrap().contains("GRANT pg_monitor"));
    }
}
