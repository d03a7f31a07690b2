//! The catalogue of actions: what a step of a plan may do.
//!
//! An action is one argument struct (here, by family), one row in `actions!` below, and one
//! implementation in the agent (or, for gates and notices, in the controller). Plan file, JSON
//! Schema, compiled plan and documentation all come from the struct and the row.
//!
//! Strings may hold `${host.NAME}`: a variable from the host's own configuration, put in by the
//! agent before it holds the action against its policy. A value `secret://NAME` is resolved on
//! the host that uses it, never earlier (INV-10).

use serde::{Deserialize, Serialize};

pub mod check;
pub mod env;
pub mod exec;
pub mod gate;
pub mod migration;
pub mod notify;
pub mod postgres;
pub mod release;
pub mod service;

/// What a crash in the middle of an attempt means for an action (INV-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// It changes nothing, and may simply be asked again.
    Observing,
    /// `probe` sees whether the effect is there, so an attempt without proof is settled by it.
    Convergent,
    /// The effect carries the step key, so the attempt that made it can be recognised.
    Receipted,
    /// Nothing can be known afterwards: without an outcome file the outcome is `unknown`.
    Blind,
}

/// Where an action is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// On hosts, by their agents.
    Host,
    /// On the controller: gates and notices.
    Controller,
}

/// A row of the catalogue.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ActionInfo {
    /// The name used in plans: `family.verb`.
    pub name: &'static str,
    /// What a crash in the middle means.
    pub class: Class,
    /// Where it is carried out.
    pub site: Site,
    /// Whether a rollback has anything to return to. Observing actions never have.
    pub undo: bool,
    /// One sentence for the documentation.
    pub summary: &'static str,
}

macro_rules! actions {
    ($($name:literal $variant:ident($args:ty) $class:ident $site:ident $undo:literal $summary:literal;)*) => {
        /// One typed action with its arguments.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[allow(missing_docs, reason = "the rows' summaries say it")]
        pub enum Action {
            $(#[serde(rename = $name)] $variant($args),)*
        }

        /// Every action there is, in the order of the documentation.
        pub const CATALOGUE: &[ActionInfo] = &[
            $(ActionInfo {
                name: $name,
                class: Class::$class,
                site: Site::$site,
                undo: $undo,
                summary: $summary,
            },)*
        ];

        impl Action {
            /// The catalogue's row of this action.
            pub fn info(&self) -> &'static ActionInfo {
                let mut row = 0;
                $(if matches!(self, Self::$variant(_)) { return &CATALOGUE[row]; } row += 1;)*
                unreachable!("row {row}: every variant has a row in the catalogue")
            }

            /// Reads the arguments of the action called `name`; `None` if there is no such action.
            pub fn deserialize_args<'de, D: serde::Deserializer<'de>>(
                name: &str,
                args: D,
            ) -> Option<Result<Self, D::Error>> {
                match name {
                    $($name => Some(<$args>::deserialize(args).map(Self::$variant)),)*
                    _ => None,
                }
            }

            /// The JSON Schema of each action's arguments, by name.
            #[cfg(feature = "schema")]
            pub fn schemas(generator: &mut schemars::SchemaGenerator) -> Vec<(&'static str, schemars::Schema)> {
                vec![$(($name, generator.subschema_for::<$args>()),)*]
            }
        }
    };
}

actions! {
    "service.stop" ServiceStop(service::Stop) Convergent Host true "Stops a service and proves that its port refuses.";
    "service.start" ServiceStart(service::Start) Convergent Host true "Starts a service and proves that it is active and listens.";
    "service.restart" ServiceRestart(service::Restart) Receipted Host true "Restarts a service and proves that it is active and listens; undone last, when what it reads is back.";
    "service.status" ServiceStatus(service::Status) Observing Host false "Says whether a service runs, and fails if it should not be so.";
    "release.fetch" ReleaseFetch(release::Fetch) Convergent Host true "Brings a release's sources from git into a directory of its own.";
    "release.build" ReleaseBuild(release::Build) Convergent Host true "Runs a release's build commands in its directory, once.";
    "release.activate" ReleaseActivate(release::Activate) Convergent Host true "Points the application's `current` link at a release, atomically.";
    "release.previous" ReleasePrevious(release::Previous) Observing Host false "Says which release was active before this rollout.";
    "env.diff" EnvDiff(env::Diff) Observing Host false "Shows by name what a render would change in an environment file; values stay hidden.";
    "env.render" EnvRender(env::Render) Convergent Host true "Writes an environment file atomically, with secrets resolved on the host.";
    "postgres.backup" PostgresBackup(postgres::Backup) Receipted Host false "Takes a backup with pg_dump, with row counts of the same snapshot.";
    "postgres.verify_backup" PostgresVerifyBackup(postgres::VerifyBackup) Receipted Host false "Restores the backup into a scratch database and compares it.";
    "postgres.rehearse" PostgresRehearse(migration::Rehearse) Receipted Host false "Runs the pending migration on the restored backup, there and back.";
    "postgres.restore" PostgresRestore(postgres::Restore) Receipted Host true "Restores the backup into a new database and swaps it in; the old one is kept.";
    "postgres.counts" PostgresCounts(postgres::Counts) Observing Host false "Counts the rows of tables.";
    "postgres.integrity" PostgresIntegrity(postgres::Integrity) Observing Host false "Looks at all that a database holds, for a later comparison.";
    "postgres.compare" PostgresCompare(postgres::Compare) Observing Host false "Compares a database with its backup, or with how it was before.";
    "postgres.assert" PostgresAssert(postgres::Assert) Observing Host false "Runs read-only statements and holds each result against what is expected.";
    "postgres.analyze" PostgresAnalyze(postgres::Analyze) Convergent Host false "Renews the statistics that the planner goes by, table by table.";
    "postgres.restore_point" PostgresRestorePoint(postgres::RestorePoint) Receipted Host false "Names a moment to which the server's physical backups can be brought back, and waits until it is archived.";
    "postgres.external_backup" PostgresExternalBackup(postgres::ExternalBackup) Receipted Host false "Has the host's own backup system take a physical backup, and proves that it did.";
    "postgres.fence" PostgresFence(postgres::Fence) Convergent Host true "Shuts applications out of a database and ends their sessions.";
    "postgres.unfence" PostgresUnfence(postgres::Unfence) Convergent Host true "Lets applications into a database again.";
    "migration.current" MigrationCurrent(migration::Current) Observing Host false "Says which revision a database is at.";
    "migration.plan" MigrationPlan(migration::Plan) Observing Host false "Renders the SQL that a migration would run, from the revision the database is at.";
    "migration.apply" MigrationApply(migration::Apply) Convergent Host true "Migrates a database, once, behind a verified backup.";
    "migration.verify" MigrationVerify(migration::Verify) Observing Host false "Holds the database's revision against the one expected.";
    "migration.downgrade" MigrationDowngrade(migration::Downgrade) Convergent Host true "Takes a database back to a named revision with the code of the release that is undone.";
    "check.http" CheckHttp(check::Http) Receipted Host false "Asks over HTTP, in a chain if need be, and cleans up what it created.";
    "check.tcp" CheckTcp(check::Tcp) Observing Host false "Says whether an address accepts connections.";
    "check.port" CheckPort(check::Port) Observing Host false "Says whether something on this host listens on a port.";
    "check.process" CheckProcess(check::Process) Observing Host false "Says whether processes with a name run on this host.";
    "check.disk" CheckDisk(check::Disk) Observing Host false "Holds the free space at a path against a minimum.";
    "check.tls" CheckTls(check::Tls) Observing Host false "Holds a server's certificate against a minimum of remaining life.";
    "check.sql" CheckSql(check::Sql) Observing Host false "Runs one read-only statement and holds its one value against what is expected.";
    "check.log" CheckLog(check::Log) Observing Host false "Reads what a log gained since the rollout began and fails on forbidden lines.";
    "check.command" CheckCommand(check::Command) Observing Host false "Runs a command that only looks, and holds its exit code and output against what is expected.";
    "gate.approval" GateApproval(gate::Approval) Observing Controller false "Waits for people of named groups to approve what will run.";
    "gate.checklist" GateChecklist(gate::Checklist) Observing Controller false "Waits for people to confirm a list, item by item.";
    "gate.window" GateWindow(gate::Window) Observing Controller false "Waits for a weekly window.";
    "gate.wait" GateWait(gate::Wait) Observing Controller false "Waits for a time.";
    "notify.webhook" NotifyWebhook(notify::Webhook) Blind Controller false "Posts a JSON message, at most once.";
    "notify.slack" NotifySlack(notify::Slack) Blind Controller false "Posts a message to a Slack webhook, at most once.";
    "notify.email" NotifyEmail(notify::Email) Blind Controller false "Sends an e-mail, at most once.";
    "exec.run" ExecRun(exec::Run) Blind Host false "Runs a command that the host's policy lists.";
}

impl Action {
    /// The name used in plans: `family.verb`.
    pub fn name(&self) -> &'static str {
        self.info().name
    }

    /// Whether the action may change anything: what does not is never undone and takes no hold.
    pub fn changes(&self) -> bool {
        self.info().class != Class::Observing
    }

    /// The arguments as canonical JSON, for policies and reports.
    pub fn args(&self) -> serde_json::Value {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::Object(mut map)) => {
                map.remove(self.name()).unwrap_or(serde_json::Value::Null)
            }
            _ => unreachable!("an action is an object with its name as the only key"),
        }
    }
}

/// Whether a field has its default value, and so has no place in the canonical text.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// An address to connect to: `host:port`. A bare port in a plan means `localhost`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Address(pub String);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Address;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a port or `host:port`")
            }
            fn visit_u64<E: serde::de::Error>(self, port: u64) -> Result<Address, E> {
                let port =
                    u16::try_from(port).map_err(|_| E::custom(format!("{port} is no port")))?;
                Ok(Address(format!("localhost:{port}")))
            }
            fn visit_i64<E: serde::de::Error>(self, port: i64) -> Result<Address, E> {
                self.visit_u64(
                    u64::try_from(port).map_err(|_| E::custom(format!("{port} is no port")))?,
                )
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Address, E> {
                if text.parse::<u16>().is_ok() {
                    return Ok(Address(format!("localhost:{text}")));
                }
                match text.rsplit_once(':') {
                    Some((host, port)) if !host.is_empty() && !port.is_empty() => {
                        Ok(Address(text.to_owned()))
                    }
                    _ => Err(E::custom(format!(
                        "`{text}` is neither a port nor `host:port`"
                    ))),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Address {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Address".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A port of this host, or `host:port`.",
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {"type": "string", "pattern": "^([0-9]+|.+:.+)$"},
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_catalogue_names_each_action_once_and_reads_it_back() {
        let names: HashSet<_> = CATALOGUE.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for row in CATALOGUE {
            assert!(
                !(row.class == Class::Observing && row.undo),
                "{}: nothing to undo",
                row.name
            );
            let read = Action::deserialize_args(row.name, serde_json::json!({}));
            assert!(read.is_some(), "{}", row.name);
        }
    }

    #[test]
    fn arguments_are_read_strictly_and_written_canonically() {
        let args = serde_json::json!({"service": "web", "refuses": [8000]});
        let action = Action::deserialize_args("service.stop", args)
            .unwrap()
            .unwrap();
        assert_eq!(
            serde_json::to_string(&action).unwrap(),
            r#"{"service.stop":{"service":"web","refuses":["localhost:8000"],"within":"30s"}}"#
        );
        let unknown = serde_json::json!({"service": "web", "refuse": [8000]});
        assert!(
            Action::deserialize_args("service.stop", unknown)
                .unwrap()
                .is_err()
        );
    }
}
