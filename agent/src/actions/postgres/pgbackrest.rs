//! pgBackRest, driven through its command line and read through its JSON: what it says of its
//! backups counts, not its exit code alone.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use lockstep_proto::action::postgres::Kind;
use lockstep_proto::ids::StepKey;
use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::Deserialize;

use super::external::Taken;
use super::recover::position;
use crate::config;
use crate::process::{Ended, Program};
use crate::sql::Database;
use crate::step::{Context, failure, hinted};

/// The annotation under which a backup carries the key of the attempt that had it taken.
const ANNOTATION: &str = "lockstep";

/// How long pgBackRest may take to say what there is: its repository may be far away.
const LIST: Duration = Duration::from_mins(2);

/// No list of backups is longer, in bytes: ten thousand have less.
const LONGEST: usize = 8 << 20;

/// pgBackRest on this host, for one server.
pub(super) struct Pgbackrest<'a> {
    cx: &'a Context,
    settings: &'a config::Pgbackrest,
    user: Option<String>,
}

/// A backup that it has, as it lists it.
#[derive(Debug, Clone, Deserialize)]
struct Listed {
    label: String,
    /// Whether a page had a wrong checksum.
    #[serde(default)]
    error: bool,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    annotation: BTreeMap<String, String>,
    lsn: Option<Log>,
    archive: Option<Log>,
    info: Info,
}

/// Where the server's log of changes was: places in it, or its files.
#[derive(Debug, Clone, Deserialize)]
struct Log {
    start: String,
    stop: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Info {
    size: u64,
}

#[derive(Debug, Deserialize)]
struct Stanza {
    name: String,
    #[serde(default)]
    backup: Vec<Listed>,
    #[serde(default)]
    db: Vec<Server>,
    status: Status,
}

/// A server whose backups a stanza has.
#[derive(Debug, Deserialize)]
struct Server {
    #[serde(rename = "system-id")]
    system: u64,
}

#[derive(Debug, Deserialize)]
struct Status {
    code: u32,
    message: String,
}

/// Codes of a stanza that can be worked with: all is well; there is no backup yet.
const USABLE: [u32; 2] = [0, 2];

impl Listed {
    /// Whether an attempt at this step had it taken, and it is sound.
    fn is_of_step(&self, key: &StepKey) -> bool {
        let made: Option<StepKey> = self
            .annotation
            .get(ANNOTATION)
            .and_then(|it| it.parse().ok());
        let place = |of: &StepKey| (of.rollout.clone(), of.host.clone(), of.at);
        !self.error && made.is_some_and(|made| place(&made) == place(key))
    }

    fn failed(&self, why: &str) -> Failure {
        let message = format!("the physical backup {}: {why}", self.label);
        failure(Cause::Step, message)
    }
}

impl<'a> Pgbackrest<'a> {
    /// That of a database's server; `None` if the host's configuration names none.
    pub(super) fn of(cx: &'a Context, database: &Database) -> Option<Self> {
        let configured = cx.config.postgres.get(&database.name)?;
        let settings = configured.pgbackrest.as_ref()?;
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
            argv.push(format!("--config={}", config.display()));
        }
        argv.push(format!("--stanza={}", self.settings.stanza));
        argv
    }

    fn program(&self, args: &[&str]) -> Program {
        let mut argv = self.argv();
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        Program {
            argv,
            dir: Some("/".into()),
            user: self.user.clone(),
            ..Program::default()
        }
    }

    async fn run(&self, args: &[&str]) -> Result<Ended, Failure> {
        let mut all = vec!["--log-level-console=info"];
        all.extend(args);
        let ended = self.program(&all).succeed(self.cx).await;
        ended.map_err(|failed| {
            let lines = &failed.last_lines;
            let said = lines
                .iter()
                .rev()
                .find_map(|line| line.split_once("ERROR: "));
            let said = said.map_or(failed.message.as_str(), |(_, said)| said.trim());
            let message = format!("pgBackRest, stanza {}: {said}", self.settings.stanza);
            Failure { message, ..failed }
        })
    }

    /// What it has, oldest first.
    async fn backups(&self) -> Result<Vec<Listed>, Failure> {
        Ok(self.stanza().await?.backup)
    }

    async fn stanza(&self) -> Result<Stanza, Failure> {
        let program = Program {
            timeout: Some(LIST),
            ..self.program(&["--output=json", "info"])
        };
        let captured = program.capture(LONGEST).await?;
        let stanza = &self.settings.stanza;
        let unread = |why: &str| {
            hinted(
                Cause::Host,
                format!("pgBackRest cannot say what it has in stanza {stanza}: {why}"),
                format!("run `{} info` as the same user", self.argv().join(" ")),
            )
        };
        if captured.code != 0 {
            return Err(unread(&format!("it exits with {}", captured.code)));
        }
        let stanzas: Vec<Stanza> = json::read(&captured.stdout)
            .map_err(|_| unread("what it prints is not what was expected"))?;
        let found = stanzas.into_iter().find(|it| it.name == *stanza);
        let found = found.ok_or_else(|| unread("it does not know the stanza"))?;
        if !USABLE.contains(&found.status.code) {
            return Err(unread(&found.status.message));
        }
        Ok(found)
    }

    /// Has a backup taken, under the attempt's key.
    pub(super) async fn take(&self, kind: Kind) -> Result<Taken, Failure> {
        let kind = match kind {
            Kind::Full => "--type=full",
            Kind::Differential => "--type=diff",
            Kind::Incremental => "--type=incr",
        };
        let key = self.cx.key.to_string();
        let annotation = format!("--annotation={ANNOTATION}={key}");
        self.run(&[kind, &annotation, "backup"]).await?;
        let mut backups = self.backups().await?.into_iter();
        let made = backups.find(|backup| backup.annotation.get(ANNOTATION) == Some(&key));
        let Some(made) = made else {
            let message = "pgBackRest has ended well, and lists no backup of this attempt";
            return Err(failure(Cause::Step, message));
        };
        if made.error {
            return Err(made.failed("pages of the server have a wrong checksum"));
        }
        let Some(log) = made.lsn else {
            return Err(made.failed("it does not say where its log begins and ends"));
        };
        Ok(Taken {
            label: made.label,
            holds: made.kind,
            size: made.info.size,
            from: log.start,
            to: log.stop,
        })
    }

    /// The backup that an attempt at this step had taken, if there is one.
    pub(super) async fn taken_before(&self) -> Result<Option<String>, Failure> {
        let backups = self.backups().await?.into_iter();
        let mut made = backups.filter(|backup| backup.is_of_step(&self.cx.key));
        Ok(made.next().map(|made| made.label))
    }

    /// The newest sound backup.
    pub(super) async fn newest(&self) -> Result<Option<String>, Failure> {
        let backups = self.backups().await?.into_iter();
        let newest = backups.rev().find(|backup| !backup.error);
        Ok(newest.map(|backup| backup.label))
    }

    /// Reads everything again. It exits with 0 whatever it finds, so what it says counts.
    pub(super) async fn verify(&self) -> Result<(), Failure> {
        let ended = self.run(&["verify"]).await?;
        let amiss = ["status: error", "invalid", "missing"];
        let mut lines = ended.stdout.lines();
        let found = lines.find(|line| amiss.iter().any(|word| line.contains(word)));
        let Some(line) = found else { return Ok(()) };
        let said = line.split_once("INFO: ").map_or(line, |(_, said)| said);
        let message = format!("pgBackRest finds damage: {}", said.trim());
        let hint = "its log has the whole list; take a full backup once the repository is mended";
        Err(hinted(Cause::Step, message, hint))
    }

    /// The newest sound backup from which a place in the log can be reached, on the timeline that
    /// the place is on; `None` if there is none. Refuses if the stanza is another server's.
    pub(super) async fn base_of(
        &self,
        system: u64,
        timeline: u32,
        place: u64,
    ) -> Result<Option<String>, Failure> {
        let stanza = self.stanza().await?;
        if stanza.db.last().is_some_and(|of| of.system != system) {
            return Err(hinted(
                Cause::Host,
                format!(
                    "pgBackRest's stanza {} is another server's than the one of this database",
                    self.settings.stanza
                ),
                "correct the section's `stanza`",
            ));
        }
        let reaches = |backup: &&Listed| {
            let end = backup.lsn.as_ref().and_then(|log| position(&log.stop));
            let file = backup.archive.as_ref().map(|files| files.stop.as_str());
            let on = file.and_then(|file| u32::from_str_radix(file.get(..8)?, 16).ok());
            !backup.error && end.is_some_and(|end| end <= place) && on == Some(timeline)
        };
        let found = stanza.backup.iter().rev().find(reaches);
        Ok(found.map(|backup| backup.label.clone()))
    }

    /// Who it runs as, if not as whoever the agent runs as.
    pub(super) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Restores a backup into an empty directory, to be recovered from there.
    pub(super) async fn restore_into(&self, directory: &Path, base: &str) -> Result<(), Failure> {
        let to = format!("--pg1-path={}", directory.display());
        let set = format!("--set={base}");
        // Where the recovery ends, the server's configuration says.
        self.run(&[&to, &set, "--type=default", "restore"])
            .await
            .map(drop)
    }

    /// The command with which a server fetches its log, as its configuration has it.
    pub(super) fn fetch_command(&self) -> String {
        let words = self.argv().into_iter().map(|word| shell_word(&word));
        let words: Vec<String> = words.collect();
        format!(
            "{} archive-get %f \"%p\"",
            words.join(" ").replace('%', "%%")
        )
    }

    /// The command that brings the server to a named moment on a timeline, from a backup. Without
    /// the backup and the timeline pgBackRest would take the newest, which may be later ones.
    pub(super) fn restore_command(&self, point: &str, base: &str, timeline: u32) -> String {
        let mut argv = self.argv();
        argv.extend(["--delta", "--type=name", "--target-action=promote"].map(str::to_owned));
        argv.push(format!("--set={base}"));
        argv.push(format!("--target-timeline={timeline}"));
        argv.push(format!("--target={point}"));
        argv.push("restore".to_owned());
        argv.join(" ")
    }
}

/// A word as a shell reads it.
fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=/.,:+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell_where_they_must_be() {
        assert_eq!(shell_word("--stanza=main"), "--stanza=main");
        assert_eq!(shell_word("a b'c"), "'a b'\\''c'");
    }
}
