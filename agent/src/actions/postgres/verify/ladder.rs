//! The ladder of proofs: each rung costs more than the one below it, and proves more.
//!
//! ```text
//! 0 digest     the bytes of the archive and its copies are as made  reads them
//! 1 listed     it is an archive of the tables that were counted    reads its table of contents
//! 2 read       all of it can be unpacked                           unpacks it
//! 3 restored   it makes a database with as many rows               restores and counts it
//! 4 equal      that database is what was dumped                    reads each of its rows
//! 5 checked    its indexes hold its rows                           reads its indexes
//! ```
//!
//! What is below the level that is wanted is climbed, too: a lower rung finds in a moment what a
//! higher one would take long to run into.

use std::path::Path;

use lockstep_proto::action::postgres::{Aspect, Level, VerifyBackup};
use lockstep_proto::ids::Digest;
use lockstep_proto::report::{Cause, Failure};

use super::super::archive::archive_in;
use super::super::backup::copies;
use super::super::manifest::Manifest;
use super::super::scratch::{self, Rights};
use super::super::tools::Tools;
use super::scratch_name;
use crate::sql::{Database, Session};
use crate::step::{Context, changed, failure, hinted};

/// A backup, and where it is proven.
pub(super) struct Ladder<'a> {
    pub(super) cx: &'a Context,
    pub(super) database: &'a Database,
    pub(super) session: &'a Session,
    /// The backup's directory.
    pub(super) directory: &'a Path,
    pub(super) made: &'a Manifest,
    /// The digest that the archive must have.
    pub(super) digest: Digest,
}

impl Ladder<'_> {
    /// Climbs as far as the step wants; fails where the backup does not hold. Where it was restored,
    /// `then` works in that database before it is dropped.
    pub(super) async fn climb<T>(
        &self,
        act: &VerifyBackup,
        then: impl AsyncFnOnce(&str) -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        scratch::check_digest(self.directory, self.made, self.digest).await?;
        if act.from.is_none() {
            copies::check(self.cx, self.directory, self.made).await?;
        }
        if act.level < Level::Listed {
            return Ok(None);
        }
        if act.level >= Level::Restored {
            scratch::check_room(self.session, self.database).await?;
        }
        let tools = Tools::new(self.cx, self.database, self.session.major()).await?;
        self.list(&tools).await?;
        if act.level >= Level::Read {
            self.read(&tools).await?;
        }
        if act.level < Level::Restored {
            return Ok(None);
        }
        let found = self.restore(&tools, act, then).await?;
        if act.from.is_some() {
            // Others may write where a copy is: what was restored are still the bytes of before.
            scratch::check_digest(self.directory, self.made, self.digest).await?;
        }
        Ok(Some(found))
    }

    /// The table of contents names the data of each table that was counted.
    async fn list(&self, tools: &Tools<'_>) -> Result<(), Failure> {
        let archive = archive_in(self.directory).display().to_string();
        let file = tools.file("contents.txt")?;
        let output = file.display().to_string();
        tools
            .run("pg_restore", None, &["--list", "-f", &output, &archive])
            .await?;
        let text = std::fs::read_to_string(&file)
            .map_err(|error| failure(Cause::Host, format!("cannot read {output}: {error}")))?;
        let (listed, counted) = (tables_listed(&text), self.made.contents.len());
        if listed >= counted {
            return Ok(());
        }
        Err(hinted(
            Cause::CheckUnmet,
            format!(
                "the archive of {} lists the data of {listed} tables, and {counted} were counted \
                 when it was made",
                self.made.id
            ),
            "take a new backup",
        ))
    }

    /// The whole archive is unpacked, and thrown away.
    async fn read(&self, tools: &Tools<'_>) -> Result<(), Failure> {
        let archive = archive_in(self.directory).display().to_string();
        let args = ["-f", "/dev/null", &archive];
        tools.run("pg_restore", None, &args).await.map(|_| ())
    }

    /// Restores into a database of its own, which is dropped whatever comes of it.
    async fn restore<T>(
        &self,
        tools: &Tools<'_>,
        act: &VerifyBackup,
        then: impl AsyncFnOnce(&str) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let scratch = scratch_name(self.cx);
        scratch::create(self.session, &scratch).await?;
        let held = match self.hold(tools, act, &scratch).await {
            Ok(()) => then(&scratch).await,
            Err(failure) => Err(failure),
        };
        // What works in the restored database ends all other sessions of the step.
        let dropped = match self.database.connect(self.cx).await {
            Ok(session) => scratch::drop(&session, &scratch).await,
            Err(failure) => Err(failure),
        };
        let held = held?;
        dropped.map_err(changed)?;
        Ok(held)
    }

    async fn hold(
        &self,
        tools: &Tools<'_>,
        act: &VerifyBackup,
        scratch: &str,
    ) -> Result<(), Failure> {
        let (cx, database, made) = (self.cx, self.database, self.made);
        let archive = archive_in(self.directory);
        let rights = match act.from {
            None => Rights::IfPossible,
            Some(_) => Rights::None,
        };
        scratch::restore(cx, database, tools, &archive, made, scratch, rights).await?;
        cx.log.progress(0.9, "comparing");
        // An archive without rows restores without an error, too.
        let mut compared = act.compared().to_vec();
        compared.push(Aspect::RowCounts);
        let differences =
            scratch::differences(cx, database, tools, made, scratch, &compared).await?;
        if !differences.is_empty() {
            let what = format!(
                "the backup {} does not restore to what it was taken of",
                made.id
            );
            return Err(scratch::unequal(&what, &differences));
        }
        if act.level >= Level::Checked {
            cx.log.progress(0.95, "checking indexes");
            self.check(tools, scratch).await?;
        }
        Ok(())
    }

    /// Has the server look through the tables and indexes that it has just made of the backup.
    async fn check(&self, tools: &Tools<'_>, scratch: &str) -> Result<(), Failure> {
        let jobs = format!("-j{}", scratch::jobs());
        // Its `-d` is a pattern; the name of a scratch database is none, and no connection string.
        let args = [
            "--no-password",
            "--install-missing",
            "--heapallindexed",
            "--parent-check",
            &jobs,
            scratch,
        ];
        let checked = tools.run("pg_amcheck", None, &args).await;
        checked.map(|_| ()).map_err(|failure| Failure {
            hint: failure.hint.or_else(|| Some(BY_AMCHECK.into())),
            ..failure
        })
    }
}

const BY_AMCHECK: &str = "level 5 needs the extension amcheck on the server, and a superuser in \
     the host's section of this database; level 4 needs neither";

/// How many tables' data a table of contents lists, as pg_restore prints it: a line is
/// `<id>; <oid> <oid> TABLE DATA <schema> <name> <owner>`, comments begin with `;`.
fn tables_listed(contents: &str) -> usize {
    let is_table = |line: &&str| {
        let mut words = line.split(' ');
        words
            .next()
            .is_some_and(|id| id.len() > 1 && id.ends_with(';'))
            && words.nth(2) == Some("TABLE")
            && words.next() == Some("DATA")
    };
    contents.lines().filter(is_table).count()
}

#[cfg(test)]
mod tests;
