//! Sessions in which Lockstep itself runs what a migration consists of.

use lockstep_proto::report::Failure;

use super::{LOCKED, Limits, Went};
use crate::sql::{Database, Session, statements};
use crate::step::Context;

/// A session as the tools have them: with the role's own search path, and within limits.
pub(super) struct Limited(pub(super) Session);

impl Limited {
    pub(super) async fn connect(
        cx: &Context,
        database: &Database,
        limits: Limits,
    ) -> Result<Self, Failure> {
        let session = database.connect(cx).await?;
        let setting = format!(
            "SET search_path TO DEFAULT; SET lock_timeout = {}; SET statement_timeout = {}",
            limits.lock.0.max(1),
            limits.statement.0.max(1)
        );
        session.run("setting up the session", &setting).await?;
        Ok(Self(session))
    }

    /// Runs SQL that begins and ends its transactions itself, statement by statement: the server
    /// makes one transaction of what is sent at once.
    pub(super) async fn run(&self, what: &str, sql: &str) -> Result<(), Failure> {
        for one in statements(sql) {
            let place = format!("{what}, line {} of its SQL", one.line);
            self.0.run(&place, one.text).await?;
        }
        Ok(())
    }
}

/// How it went, by what failed.
pub(super) fn went(failure: Failure) -> Went {
    if LOCKED.iter().any(|word| failure.message.contains(word)) {
        Went::Locked(failure)
    } else {
        Went::Badly(failure)
    }
}
