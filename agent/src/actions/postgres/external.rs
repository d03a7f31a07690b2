//! `postgres.external_backup`: the host's own backup system takes a physical backup of the whole
//! server, and says of itself that it did.

use lockstep_proto::action::postgres::{ExternalBackup, System};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use super::barman::Barman;
use super::human;
use super::pgbackrest::Pgbackrest;
use crate::actions::{Act, Done, Probe};
use crate::sql::Database;
use crate::step::{Context, hinted};

/// A physical backup that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    /// The system's name for it.
    pub(super) label: String,
    /// What it holds, in the system's word.
    pub(super) holds: String,
    /// What it would take on a disk, in bytes.
    pub(super) size: u64,
    /// Where the server's log of changes was when it began.
    pub(super) from: String,
    /// And when it ended.
    pub(super) to: String,
}

impl Act for ExternalBackup {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        let database = Database::find(cx, &self.database)?;
        let taken = match self.system {
            System::Pgbackrest => pgbackrest(cx, &database)?.taken_before().await?,
            System::Barman => {
                // Its backups carry nothing of ours: another one does no harm.
                barman(cx, &database)?.newest().await?;
                None
            }
        };
        Ok(match taken {
            Some(label) if !cx.dry_run => {
                Probe::Present(format!("the physical backup {label} is there"))
            }
            _ => Probe::Absent(self.describe()),
        })
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let database = Database::find(cx, &self.database)?;
        let taken = match self.system {
            System::Pgbackrest => {
                let tool = pgbackrest(cx, &database)?;
                let taken = tool.take(self.kind).await?;
                if self.verify {
                    reading_again(cx);
                    tool.verify().await?;
                }
                taken
            }
            System::Barman => {
                let tool = barman(cx, &database)?;
                let taken = tool.take().await?;
                if self.verify {
                    reading_again(cx);
                    tool.verify(&taken.label).await?;
                }
                taken
            }
        };
        Ok(done(self, taken))
    }

    fn describe(&self) -> String {
        format!(
            "has {} take a physical backup of the server of `{}`",
            name(self.system),
            self.database
        )
    }
}

fn name(system: System) -> &'static str {
    match system {
        System::Pgbackrest => "pgBackRest",
        System::Barman => "Barman",
    }
}

fn reading_again(cx: &Context) {
    cx.log.progress(0.5, "reading what is kept again");
}

fn done(act: &ExternalBackup, taken: Taken) -> Done {
    let again = if act.verify { ", read again" } else { "" };
    let summary = format!(
        "{} took {} ({}, {}){again}",
        name(act.system),
        taken.label,
        taken.holds,
        human(taken.size),
    );
    let fact = Fact::ExternalBackup {
        database: act.database.clone(),
        label: taken.label,
        holds: taken.holds,
        from: taken.from,
        to: taken.to,
    };
    let note = Fact::Note {
        name: "physical backup".into(),
        value: summary.clone(),
    };
    Done {
        changed: true,
        summary,
        facts: vec![fact, note],
    }
}

fn pgbackrest<'a>(cx: &'a Context, database: &Database) -> Result<Pgbackrest<'a>, Failure> {
    Pgbackrest::of(cx, database)
        .ok_or_else(|| missing(database, System::Pgbackrest, "pgbackrest", "stanza"))
}

fn barman<'a>(cx: &'a Context, database: &Database) -> Result<Barman<'a>, Failure> {
    Barman::of(cx, database).ok_or_else(|| missing(database, System::Barman, "barman", "server"))
}

fn missing(database: &Database, system: System, section: &str, key: &str) -> Failure {
    let of = &database.name;
    hinted(
        Cause::Host,
        format!("this host knows no {} of `{of}`", name(system)),
        format!("add a section [postgres.{of}.{section}] with its `{key}` to its agent.toml"),
    )
}

#[cfg(test)]
mod tests;
