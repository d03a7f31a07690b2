//! Connections to the databases of the host's configuration.
//!
//! Every session carries its attempt in `application_name`
//! (`lockstep:<rollout>:<phase.step>:<direction>:<attempt>`), the agent's own as well as those of
//! the tools that it starts. So what an attempt left behind can be found and ended, which is what
//! makes a later probe count as proof (INV-1).
//!
//! Through a socket PostgreSQL may ask for the operating system's user (`peer`). Tools then run
//! as `os_user`; the agent's own connection cannot change its user, and logs in as the configured
//! role. Recommended is a role of Lockstep's own with a password, or, in `pg_hba.conf`, a line
//! with `peer map=lockstep` and in `pg_ident.conf` one that lets `root` be that role.

use std::path::Path;
use std::time::Duration;

use lockstep_proto::ids::StepKey;
use lockstep_proto::report::{Cause, Failure};
use tokio::time::{Instant, timeout};
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row, SimpleQueryMessage};

use crate::config::Postgres;
use crate::faults::reached;
use crate::secrets::{self, Secret};
use crate::step::{Context, failure};

#[cfg(test)]
pub(crate) mod cluster;
mod error;
mod private;
mod quote;
mod statements;

pub(crate) use error::{Place, explain};
pub(crate) use private::{PrivateDir, can_enter, remove_left_over};
pub(crate) use quote::{conninfo_dbname, ident, literal, url};
pub(crate) use statements::{Kind, Statement, Token, statements};

/// How long the server may take to let us in.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a statement of the agent's own waits for a lock.
const LOCK: Duration = Duration::from_secs(5);

/// A transaction for a statement of the plan's author: it cannot write, and sees all rows or fails,
/// for rows that are hidden from the role would make an assertion hold.
const AUTHORS: &str =
    "BEGIN READ ONLY; SET LOCAL search_path TO DEFAULT; SET LOCAL row_security = off";

/// Sessions that carry the name of any attempt at a step, which begins with `$1`.
const NAMED: &str = "left(application_name, length($1)) = $1";

/// What a session is that somebody has opened.
const CLIENTS: &str = "('client backend', 'walsender')";

/// How long ended sessions may take to be gone: a backend that writes a large file looks up only
/// now and then.
pub(crate) const GONE: Duration = Duration::from_mins(1);

/// The name under which an attempt's sessions stand in `pg_stat_activity`. At most 48 bytes long,
/// so that the server's 63 never cut it.
pub(crate) fn application_name(key: &StepKey) -> String {
    format!("{}{}:{}", step_prefix(key), key.direction, key.attempt)
}

/// What the names of all attempts at a step begin with.
fn step_prefix(key: &StepKey) -> String {
    format!("lockstep:{}:{}:", key.rollout, key.at)
}

/// A database of the host's configuration.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    /// The name that plans use.
    pub(crate) name: String,
    /// How it is reached.
    pub(crate) config: Postgres,
    /// The roles whose sessions are this one's to end: its own, and where that is the section's
    /// `user`, that of migrations.
    roles: Vec<String>,
    /// Whether it is reached as the role of migrations.
    migrates: bool,
}

impl Database {
    /// Looks a database up by the name that plans use.
    pub(crate) fn find(cx: &Context, name: &str) -> Result<Self, Failure> {
        let config = cx
            .config
            .postgres
            .get(name)
            .cloned()
            .ok_or_else(|| Failure {
                hint: Some(format!("add a section [postgres.{name}] to its agent.toml")),
                ..failure(Cause::Host, format!("this host knows no database `{name}`"))
            })?;
        Ok(Self::of(name, config))
    }

    /// That of a section.
    pub(crate) fn of(name: &str, config: Postgres) -> Self {
        let roles = std::iter::once(&config.user).chain(&config.migrate_as);
        Self {
            name: name.to_owned(),
            roles: roles.cloned().collect(),
            config,
            migrates: false,
        }
    }

    /// The same, reached by migrations: as a role of their own where the host's section has one.
    pub(crate) fn migrating(cx: &Context, name: &str) -> Result<Self, Failure> {
        let mut database = Self::find(cx, name)?;
        if let Some(role) = database.config.migrate_as.clone() {
            database.roles = vec![role.clone()];
            database.migrates = true;
            database.config.user = role;
            database.config.password = database.config.migrate_password.clone();
        }
        Ok(database)
    }

    /// Its name on the server.
    pub(crate) fn dbname(&self) -> &str {
        self.config.dbname.as_deref().unwrap_or(&self.name)
    }

    /// The role's password, if the configuration names a secret for it.
    pub(crate) async fn password(&self, cx: &Context) -> Result<Option<Secret>, Failure> {
        let Some(secret) = self.config.password.as_deref() else {
            return Ok(None);
        };
        let name = secrets::named(secret).unwrap_or(secret);
        let text = format!("{}{name}", secrets::SCHEME);
        cx.secret(&text).await.map(Some)
    }

    /// Whether the server is on this host.
    pub(crate) fn is_local(&self) -> bool {
        let host = self.config.host.as_str();
        host.starts_with('/') || matches!(host, "localhost" | "127.0.0.1" | "::1")
    }

    /// Opens a session of the attempt.
    pub(crate) async fn connect(&self, cx: &Context) -> Result<Session, Failure> {
        self.connect_to(cx, self.dbname()).await
    }

    /// Opens a session in another database of the same server.
    pub(crate) async fn connect_to(&self, cx: &Context, dbname: &str) -> Result<Session, Failure> {
        let Postgres {
            host, port, user, ..
        } = &self.config;
        let place = Place {
            database: self.name.clone(),
            dbname: dbname.to_owned(),
            server: format!("{host}:{port}"),
            role: user.clone(),
            secret: self.config.password.clone(),
        };
        let mut config = tokio_postgres::Config::new();
        config
            .port(*port)
            .user(user)
            .dbname(dbname)
            .application_name(application_name(&cx.key))
            .connect_timeout(CONNECT);
        if host.starts_with('/') {
            config.host_path(Path::new(host));
        } else {
            config.host(host);
        }
        if let Some(password) = self.password(cx).await? {
            config.password(password.expose());
        }
        let connected = timeout(CONNECT, config.connect(NoTls)).await;
        let (client, connection) = connected
            .map_err(|_| place.silent(CONNECT))?
            .map_err(|error| explain(&error, "cannot connect", &place))?;
        // It ends when the client is dropped.
        tokio::spawn(connection);
        let mut session = Session {
            client,
            version: 0,
            place,
            roles: self.roles.clone(),
        };
        session.prepare(cx).await?;
        if self.migrates {
            session.is_no_superuser().await?;
        }
        Ok(session)
    }
}

/// A session in a database. Names are looked up in `pg_catalog` only: nobody's functions of the
/// same name come before the server's.
pub(crate) struct Session {
    client: Client,
    /// The server's version: 150018 for 15.18.
    pub(crate) version: u32,
    place: Place,
    /// The roles whose sessions it ends where an attempt has left them.
    roles: Vec<String>,
}

impl Session {
    async fn prepare(&mut self, cx: &Context) -> Result<(), Failure> {
        self.limit_statements(cx, Duration::MAX).await?;
        let lock = LOCK.as_millis();
        self.run(
            "setting up the session",
            &format!(
                "SET lock_timeout = {lock}; SET idle_in_transaction_session_timeout = 0; \
                 SET search_path = pg_catalog, pg_temp"
            ),
        )
        .await?;
        let sql = "SELECT current_setting('server_version_num')::int4";
        let version: i32 = self.one("asking for the version", sql, &[]).await?.get(0);
        self.version = version.unsigned_abs();
        if self.version >= 140_000 {
            // A statement then ends soon after the agent has died.
            self.run(
                "setting up the session",
                "SET client_connection_check_interval = '1s'; SET idle_session_timeout = 0",
            )
            .await?;
        }
        Ok(())
    }

    /// The role of migrations is there to have less power: one with all of it bypasses owners,
    /// rights and fences, and only a superuser could end what it has left.
    async fn is_no_superuser(&self) -> Result<(), Failure> {
        let sql = "SELECT rolsuper FROM pg_roles WHERE rolname = session_user";
        if !self
            .one("asking for the role", sql, &[])
            .await?
            .get::<_, bool>(0)
        {
            return Ok(());
        }
        let Place { role, database, .. } = &self.place;
        Err(Failure {
            hint: Some(format!(
                "name a role that owns the database; if its migrations need a superuser, leave \
                 `migrate_as` out of [postgres.{database}]"
            )),
            ..failure(
                Cause::Refused,
                format!("{role}, as whom `{database}` is migrated, is a superuser"),
            )
        })
    }

    /// The server's major version.
    pub(crate) fn major(&self) -> u32 {
        self.version / 10_000
    }

    /// Where the session is.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Runs one statement; `what` says for people what it was for.
    pub(crate) async fn query(
        &self,
        what: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Failure> {
        let rows = self.client.query(sql, params).await;
        rows.map_err(|error| explain(&error, what, &self.place))
    }

    /// The same for a statement with exactly one row.
    pub(crate) async fn one(
        &self,
        what: &str,
        sql: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Failure> {
        let row = self.client.query_one(sql, params).await;
        row.map_err(|error| explain(&error, what, &self.place))
    }

    /// Runs statements without results.
    pub(crate) async fn run(&self, what: &str, sql: &str) -> Result<(), Failure> {
        reached("statements: to be run");
        let done = self.client.batch_execute(sql).await;
        reached("statements: run");
        done.map_err(|error| explain(&error, what, &self.place))
    }

    /// Runs the statements of a file. A failure names the line, where the server tells the place.
    pub(crate) async fn run_file(&self, file: &str, sql: &str) -> Result<(), Failure> {
        reached("statements: to be run");
        let done = self.client.batch_execute(sql).await;
        reached("statements: run");
        done.map_err(|error| {
            let position = error.as_db_error().and_then(|error| error.position());
            let what = match position {
                Some(ErrorPosition::Original(place)) => {
                    // Characters, counted from 1.
                    let before = sql.chars().take(*place as usize);
                    let line = before.filter(|c| *c == '\n').count() + 1;
                    format!("{file}, line {line}")
                }
                _ => file.to_owned(),
            };
            explain(&error, &what, &self.place)
        })
    }

    /// Runs one statement of the plan's author, which must return one value, in a transaction
    /// that cannot write. The value is as PostgreSQL prints it; `None` if it is NULL.
    pub(crate) async fn value(&self, what: &str, sql: &str) -> Result<Option<String>, Failure> {
        self.run(what, AUTHORS).await?;
        let value = self.value_inside(what, sql).await;
        let ended = self.run(what, "ROLLBACK").await;
        let value = value?;
        ended.map(|()| value)
    }

    async fn value_inside(&self, what: &str, sql: &str) -> Result<Option<String>, Failure> {
        let unmet = |why: String| failure(Cause::CheckUnmet, format!("{what}: {why}"));
        // What is prepared is one statement. One that returns a column is neither COMMIT nor COPY,
        // which could leave the transaction or run programs.
        let statement = self.client.prepare(sql).await;
        let statement = statement.map_err(|error| explain(&error, what, &self.place))?;
        if statement.columns().len() != 1 {
            let columns = statement.columns().len();
            return Err(unmet(format!(
                "it returns {columns} columns, and must return one"
            )));
        }
        let messages = self.client.simple_query(sql).await;
        let messages = messages.map_err(|error| explain(&error, what, &self.place))?;
        let mut rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
            _ => None,
        });
        match (rows.next(), rows.count()) {
            (Some(value), 0) => Ok(value),
            (None, _) => Err(unmet("it returns no row, and must return one".into())),
            (Some(_), more) => Err(unmet(format!(
                "it returns {} rows, and must return one",
                more + 1
            ))),
        }
    }

    /// How many rows one statement of the plan's author returns, in a transaction that cannot
    /// write. More than `most` are not counted.
    pub(crate) async fn rows_up_to(
        &self,
        what: &str,
        sql: &str,
        most: usize,
    ) -> Result<usize, Failure> {
        self.run(what, AUTHORS).await?;
        let rows = self.rows_inside(what, sql, most).await;
        let ended = self.run(what, "ROLLBACK").await;
        let rows = rows?;
        ended.map(|()| rows)
    }

    async fn rows_inside(&self, what: &str, sql: &str, most: usize) -> Result<usize, Failure> {
        // What is prepared is one statement; a cursor has no more in memory than is asked for.
        let cursor = format!("DECLARE lockstep_rows NO SCROLL CURSOR FOR {sql}");
        let statement = self.client.prepare(&cursor).await;
        let statement = statement.map_err(|error| explain(&error, what, &self.place))?;
        let declared = self.client.execute(&statement, &[]).await;
        declared.map_err(|error| explain(&error, what, &self.place))?;
        let moved = format!("MOVE {most} FROM lockstep_rows");
        let moved = self.client.execute(&moved, &[]).await;
        let moved = moved.map_err(|error| explain(&error, what, &self.place))?;
        Ok(usize::try_from(moved).unwrap_or(usize::MAX))
    }

    /// Lets each further statement take no longer than this, and no longer than the step.
    pub(crate) async fn limit_statements(
        &self,
        cx: &Context,
        limit: Duration,
    ) -> Result<(), Failure> {
        let left = cx.deadline.saturating_duration_since(Instant::now());
        // A period of zero would mean none at all.
        let limit = left.min(limit).as_millis();
        let limit = limit.clamp(1, i32::MAX.unsigned_abs().into());
        let sql = format!("SET statement_timeout = {limit}");
        self.run("setting up the session", &sql).await
    }

    /// Ends what sessions attempts at this step have left, on the whole server, and waits until
    /// they are gone. Returns how many there were. An attempt's are those of our roles that carry
    /// its name; a name alone anybody can give himself.
    pub(crate) async fn end_left_over(&self, cx: &Context) -> Result<usize, Failure> {
        let prefix = step_prefix(&cx.key);
        let params: [&(dyn ToSql + Sync); 2] = [&prefix, &self.roles];
        // Of sessions of roles that ours is no member of, the server does not say what they are.
        let ours = format!(
            "{NAMED} AND usename::text = ANY ($2) \
             AND coalesce(backend_type, 'client backend') IN {CLIENTS}"
        );
        let ended = self.end(&ours, &params).await;
        let ended = ended.map_err(|failure| self.may_end(failure))?;
        if ended > 0 {
            cx.log.line(&format!(
                "ended {ended} sessions that an earlier attempt had left"
            ));
        }
        if let Some(others) = self.strangers(cx).await? {
            cx.log.line(&format!(
                "left alone, though they carry the step's name: processes {others}"
            ));
        }
        Ok(ended)
    }

    /// Sessions of other roles that carry the step's name, if there are any. They may be a tool's
    /// that logs in as it likes, or anybody's.
    pub(crate) async fn strangers(&self, cx: &Context) -> Result<Option<String>, Failure> {
        let prefix = step_prefix(&cx.key);
        let params: [&(dyn ToSql + Sync); 2] = [&prefix, &self.roles];
        let sql = format!(
            "SELECT string_agg(format('%s (%s)', pid, usename), ', ') FROM pg_stat_activity \
             WHERE {NAMED} AND usename::text <> ALL ($2)"
        );
        let others = self.one("looking for sessions", &sql, &params).await?;
        Ok(others.get(0))
    }

    fn may_end(&self, failure: Failure) -> Failure {
        let [own, others @ ..] = self.roles.as_slice() else {
            return failure;
        };
        if others.is_empty() || !failure.message.contains("[42501]") {
            return failure;
        }
        let others = others.iter().map(|role| ident(role));
        let others = others.collect::<Vec<_>>().join(", ");
        Failure {
            hint: Some(format!("GRANT {others} TO {}", ident(own))),
            ..failure
        }
    }

    /// Ends the sessions that a condition over `pg_stat_activity` selects, but never this one, and
    /// waits until they are gone. Returns how many there were.
    pub(crate) async fn end_sessions(
        &self,
        condition: &str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<usize, Failure> {
        let condition = format!("{condition} AND backend_type IN {CLIENTS}");
        self.end(&condition, params).await
    }

    async fn end(&self, condition: &str, params: &[&(dyn ToSql + Sync)]) -> Result<usize, Failure> {
        let sql = format!(
            "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE {condition} AND pid <> pg_backend_pid()"
        );
        let what = "ending sessions";
        let mut ended = std::collections::BTreeSet::new();
        let began = Instant::now();
        let mut quiet = 0;
        // A session that was being let in shows only a moment later: it takes two quiet looks.
        while quiet < 2 {
            let rows = self.query(what, &sql, params).await?;
            quiet = if rows.is_empty() { quiet + 1 } else { 0 };
            ended.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
            if began.elapsed() > GONE {
                let left: Vec<String> = rows
                    .iter()
                    .map(|row| row.get::<_, i32>(0).to_string())
                    .collect();
                return Err(Failure {
                    hint: Some("look at these processes on the database's host".into()),
                    ..failure(
                        Cause::Step,
                        format!("sessions do not end: processes {}", left.join(", ")),
                    )
                });
            }
            if quiet < 2 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(ended.len())
    }
}

#[cfg(test)]
mod tests;
