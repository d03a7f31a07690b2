//! What went wrong with a database, in words that say what to do next.

use std::time::Duration;

use lockstep_proto::report::{Cause, Failure};
use tokio_postgres::error::SqlState;

use crate::step::failure;

/// Where a session is, or was to be.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The name that plans use.
    pub(crate) database: String,
    /// The name on the server.
    pub(crate) dbname: String,
    /// Host or socket directory, and port.
    pub(crate) server: String,
    /// The role.
    pub(crate) role: String,
    /// The name of the password's secret.
    pub(crate) secret: Option<String>,
}

impl Place {
    /// The server did not answer in time.
    pub(crate) fn silent(&self, period: Duration) -> Failure {
        let Self {
            database, server, ..
        } = self;
        Failure {
            hint: Some("check that PostgreSQL runs there and that no firewall is between".into()),
            ..failure(
                Cause::Host,
                format!("the server of `{database}` at {server} did not answer within {period:?}"),
            )
        }
    }
}

/// A failure that says what was tried, why it did not work, and what a person can do.
pub(crate) fn explain(error: &tokio_postgres::Error, what: &str, place: &Place) -> Failure {
    let Place {
        database, server, ..
    } = place;
    if let Some(error) = error.as_db_error() {
        let (cause, hint) = advice(error.code(), place);
        let (message, code) = (error.message(), error.code().code());
        // The server's details may hold values of rows; its message and hint do not.
        let hint = hint.or_else(|| error.hint().map(str::to_owned));
        let message = format!("{what} (`{database}` at {server}): {message} [{code}]");
        return Failure {
            hint,
            ..failure(cause, message)
        };
    }
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    let detail = source.map_or_else(|| error.to_string(), ToString::to_string);
    let hint = match io.map(std::io::Error::kind) {
        Some(std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound) => Some(
            format!("check that PostgreSQL runs, and host and port in [postgres.{database}]"),
        ),
        Some(_) => Some("check the way to the database's host".to_owned()),
        None if detail.contains("password") => Some(format!(
            "the server asks for a password: name its secret as `password` in \
             [postgres.{database}]"
        )),
        None => None,
    };
    let cause = if io.is_some() || hint.is_some() {
        Cause::Host
    } else {
        Cause::Step
    };
    Failure {
        hint,
        ..failure(
            cause,
            format!("{what} (`{database}` at {server}): {detail}"),
        )
    }
}

fn advice(code: &SqlState, place: &Place) -> (Cause, Option<String>) {
    let Place {
        database,
        dbname,
        role,
        secret,
        ..
    } = place;
    let hint = |text: String| Some(text);
    match *code {
        SqlState::INVALID_PASSWORD => {
            let secret = secret.as_deref().unwrap_or("of the role");
            (
                Cause::Host,
                hint(format!(
                    "check the secret `{secret}` and the password of {role}"
                )),
            )
        }
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION => (
            Cause::Host,
            hint(format!(
                "let {role} into {dbname} by a line in the server's pg_hba.conf"
            )),
        ),
        SqlState::INVALID_CATALOG_NAME => (
            Cause::Host,
            hint(format!(
                "create the database {dbname}, or correct [postgres.{database}]"
            )),
        ),
        SqlState::TOO_MANY_CONNECTIONS => (
            Cause::Host,
            hint("end sessions that nobody needs, or raise max_connections".into()),
        ),
        SqlState::DISK_FULL => (
            Cause::Host,
            hint("make room on the database server's data volume".into()),
        ),
        SqlState::CANNOT_CONNECT_NOW => (
            Cause::Host,
            hint("the server is starting or stopping: try again soon".into()),
        ),
        SqlState::INSUFFICIENT_PRIVILEGE => (
            Cause::Host,
            hint(format!(
                "let {role} do it (GRANT), or name another role in [postgres.{database}]"
            )),
        ),
        SqlState::LOCK_NOT_AVAILABLE => (
            Cause::Step,
            hint(
                "another session holds a lock: see pg_blocking_pids() and pg_stat_activity".into(),
            ),
        ),
        SqlState::QUERY_CANCELED => (
            Cause::TimedOut,
            hint("raise the step's timeout if the statement needs longer".into()),
        ),
        SqlState::ADMIN_SHUTDOWN => (Cause::Step, hint("somebody ended the session".into())),
        _ => (Cause::Step, None),
    }
}
