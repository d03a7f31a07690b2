//! Barman, driven through its command line and read through its JSON.

use std::time::Duration;

use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;

use super::external::Taken;
use crate::config;
use crate::process::Program;
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

/// No answer is longer, in bytes.
const LONGEST: usize = 8 << 20;

/// Barman on this host, for one server.
pub(super) struct Barman<'a> {
    cx: &'a Context,
    settings: &'a config::Barman,
    user: Option<String>,
}

/// A backup, as Barman describes one that it has just taken.
#[derive(Debug, Deserialize)]
struct Made {
    backup_id: String,
    status: String,
    error: Option<String>,
    begin_xlog: Option<String>,
    end_xlog: Option<String>,
    size: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    backup_id: String,
    status: String,
}

/// The status of a backup that is complete, with its log.
const DONE: &str = "DONE";

impl<'a> Barman<'a> {
    /// That of a database's server; `None` if the host's configuration names none.
    pub(super) fn of(cx: &'a Context, database: &Database) -> Option<Self> {
        let configured = cx.config.postgres.get(&database.name)?;
        let settings = configured.barman.as_ref()?;
        let os_user = database.config.os_user.clone();
        Some(Self {
            cx,
            settings,
            user: settings.user.clone().or(os_user),
        })
    }

    /// The beginning of every command.
    fn argv(&self) -> Vec<String> {
        let mut argv = vec![self.settings.program.clone()];
        if let Some(config) = &self.settings.config {
            argv.extend(["-c".to_owned(), config.display().to_string()]);
        }
        argv
    }

    /// Runs a command, and reads the JSON that it prints. What it says has no secret.
    async fn ask<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T, Failure> {
        let mut argv = self.argv();
        argv.extend(["-f", "json"].map(str::to_owned));
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        let program = Program {
            argv,
            dir: Some("/".into()),
            user: self.user.clone(),
            timeout: Some(self.left()),
            ..Program::default()
        };
        let captured = program.capture(LONGEST).await?;
        let answer: Result<Value, _> = json::read(&captured.stdout);
        let answer = answer.unwrap_or(Value::Null);
        for line in texts(&answer, "_INFO") {
            self.cx.log.line(line);
        }
        let errors: Vec<&str> = texts(&answer, "_ERROR").collect();
        let what = args.first().copied().unwrap_or_default();
        let failed = |why: &str| {
            hinted(
                Cause::Step,
                format!("Barman, server {}: {why}", self.settings.server),
                format!(
                    "run `{} check {}` as the same user",
                    self.argv().join(" "),
                    self.settings.server
                ),
            )
        };
        match (captured.code, errors.as_slice()) {
            (0, []) => {}
            (code, []) => return Err(failed(&format!("`{what}` exits with {code}"))),
            (_, errors) => return Err(failed(&errors.join("; "))),
        }
        serde_json::from_value(answer)
            .map_err(|_| failed(&format!("`{what}` prints something else than was expected")))
    }

    /// What is left of the step's time.
    fn left(&self) -> Duration {
        self.cx.deadline.saturating_duration_since(Instant::now())
    }

    /// Has a backup taken, and waits for its log.
    pub(super) async fn take(&self) -> Result<Taken, Failure> {
        let made: Made = self
            .ask(&["backup", "--wait", &self.settings.server])
            .await?;
        let id = &made.backup_id;
        if made.status != DONE {
            let why = made.error.unwrap_or(made.status);
            let message = format!("the physical backup {id} is not complete: {why}");
            return Err(failure(Cause::Step, message));
        }
        let (Some(from), Some(to)) = (made.begin_xlog, made.end_xlog) else {
            let message = format!("Barman does not say where the log of {id} begins and ends");
            return Err(failure(Cause::Step, message));
        };
        Ok(Taken {
            label: made.backup_id,
            holds: "full".to_owned(),
            size: made.size.unwrap_or_default(),
            from,
            to,
        })
    }

    /// Reads a backup again, and holds it against its manifest.
    pub(super) async fn verify(&self, label: &str) -> Result<(), Failure> {
        let args = ["verify-backup", &self.settings.server, label];
        self.ask::<Value>(&args).await.map(drop)
    }

    /// The newest complete backup.
    pub(super) async fn newest(&self) -> Result<Option<String>, Failure> {
        let server = &self.settings.server;
        let mut all: Value = self.ask(&["list-backups", server]).await?;
        let listed: Vec<Listed> =
            serde_json::from_value(all[server.as_str()].take()).unwrap_or_default();
        // Its names are times.
        let done = listed.into_iter().filter(|backup| backup.status == DONE);
        Ok(done.map(|backup| backup.backup_id).max())
    }

    /// The commands that bring the server back to a named moment: what the server has handed over
    /// is taken in, and then recovered into a directory.
    pub(super) fn restore_commands(&self, point: &str, base: &str, directory: &str) -> [String; 2] {
        let server = self.settings.server.as_str();
        let to_the_point = [
            "recover",
            "--target-action",
            "promote",
            "--target-name",
            point,
        ];
        let command = |args: &[&str]| {
            let args = args.iter().map(|&arg| arg.to_owned());
            self.argv()
                .into_iter()
                .chain(args)
                .collect::<Vec<_>>()
                .join(" ")
        };
        [
            command(&["archive-wal", server]),
            command(&[to_the_point.as_slice(), &[server, base, directory]].concat()),
        ]
    }
}

/// The texts of a list in what Barman prints.
fn texts<'v>(answer: &'v Value, key: &str) -> impl Iterator<Item = &'v str> {
    let list = answer.get(key).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str)
}
